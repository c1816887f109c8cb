//go:build e2e

// The end-to-end tests run against the cluster that `make kind-up deploy` makes: `make e2e`. They break what can break
// on a node, and count the processes and files of each node from outside, through the engine that runs it.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"
)

const settle = 90 * time.Second // the longest that anything may take to be right again

// cluster is the kind cluster under test, seen from outside.
type cluster struct {
	t      *testing.T
	name   string
	image  string
	space  string // the test's own namespace
	worker string
	table  [][3]string // fault, what happens, time to be right again
}

func newCluster(t *testing.T) *cluster {
	c := &cluster{t: t, name: os.Getenv("CLUSTER"), image: os.Getenv("IMAGE")}
	if c.name == "" || c.image == "" {
		t.Fatal("CLUSTER and IMAGE must name the cluster and the image: use make e2e")
	}
	c.worker = c.name + "-worker"
	c.space = "e2e-" + strconv.Itoa(os.Getpid())
	c.kubectl("create", "namespace", c.space)
	t.Cleanup(func() { c.try("delete", "namespace", c.space, "--wait=true", "--timeout=120s") })
	return c
}

// try runs kubectl against the cluster under test and no other.
func (c *cluster) try(args ...string) (string, error) { return c.pipe("", args...) }

func (c *cluster) pipe(input string, args ...string) (string, error) {
	cmd := exec.Command("kubectl", append([]string{"--context", "kind-" + c.name}, args...)...)
	cmd.Stdin = strings.NewReader(input)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out)), err
}

func (c *cluster) kubectl(args ...string) string {
	c.t.Helper()
	out, err := c.try(args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// onNode runs a shell script in a node's container.
func (c *cluster) onNode(node, script string) (string, error) {
	out, err := exec.Command("docker", "exec", node, "bash", "-c", script).Output()
	return strings.TrimSpace(string(out)), err
}

// podOptions make the Pods of the tests.
type podOptions struct {
	annotations map[string]string
	command     string // of bash; default: sleeps
	host        bool
	init        string // command of an init container
	second      string // command of a second container
	restart     string // restartPolicy; default Always
	node        string // default: the worker
	labels      map[string]string
}

func (c *cluster) manifest(name string, o podOptions) string {
	container := func(name, command string) map[string]any {
		return map[string]any{"name": name, "image": c.image, "imagePullPolicy": "IfNotPresent",
			"command": []string{"bash", "-c", command}}
	}
	containers := []any{container("main", cmpOr(o.command, "trap exit TERM; sleep infinity & wait"))}
	if o.second != "" {
		containers = append(containers, container("second", o.second))
	}
	spec := map[string]any{"nodeName": cmpOr(o.node, c.worker), "restartPolicy": cmpOr(o.restart, "Always"),
		"terminationGracePeriodSeconds": 1, "automountServiceAccountToken": false, "hostNetwork": o.host,
		"containers": containers, "tolerations": []any{map[string]any{"operator": "Exists"}}}
	if o.init != "" {
		spec["initContainers"] = []any{container("init", o.init)}
	}
	body, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "Pod", "spec": spec,
		"metadata": map[string]any{"name": name, "annotations": o.annotations, "labels": o.labels}})
	if err != nil {
		c.t.Fatal(err)
	}
	return string(body)
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// create makes Pods, without waiting for them, in one call.
func (c *cluster) create(manifests ...string) {
	c.t.Helper()
	list := `{"apiVersion":"v1","kind":"List","items":[` + strings.Join(manifests, ",") + `]}`
	if _, err := c.pipe(list, "-n", c.space, "create", "-f", "-"); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) waitReady(names ...string) {
	c.t.Helper()
	args := []string{"-n", c.space, "wait", "--for=condition=Ready", "--timeout=180s"}
	for _, name := range names {
		args = append(args, "pod/"+name)
	}
	c.kubectl(args...)
}

// annotate sets N, or removes it when n is "-".
func (c *cluster) annotate(name, n string) {
	c.t.Helper()
	what := annotation + "=" + n
	if n == "-" {
		what = annotation + "-"
	}
	c.kubectl("-n", c.space, "annotate", "--overwrite", "pod", name, what)
}

// delete removes Pods and waits until they are gone from the API.
func (c *cluster) delete(names ...string) {
	c.t.Helper()
	c.kubectl(append([]string{"-n", c.space, "delete", "pod", "--wait=true"}, names...)...)
}

// census is what runs and lies on a node, counted from outside of the program.
type census struct {
	tcpdumps map[string]string // "-W N -w /capture-x.pcap" → PID
	doubles  int               // tcpdumps beyond the first of a file
	files    []string          // the names of all capture files
}

var commandLine = regexp.MustCompile(`^(\d+) .*?tcpdump -C 1 -W (\d+) -w (\S+\.pcap) `)

// look counts on a node. The program's root is reached through /proc, since it is no file system of the node.
func (c *cluster) look(name string) (census, error) {
	n := census{tcpdumps: map[string]string{}}
	out, err := c.onNode(name, `
		for p in /proc/[0-9]*; do
			read -r comm <$p/comm || continue
			case $comm in
			tcpdump|nsenter) echo "${p#/proc/} $(tr '\0' ' ' <$p/cmdline)" ;;
			packetcapture) ls -1 $p/root/ | sed -n 's/^capture-/file capture-/p' ;;
			esac
		done 2>/dev/null; true`)
	if err != nil {
		return n, err
	}
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if file, ok := strings.CutPrefix(line, "file "); ok {
			n.files = append(n.files, file)
		} else if m := commandLine.FindStringSubmatch(line + " "); m != nil {
			key := m[2] + " " + m[3]
			if n.tcpdumps[key] != "" {
				n.doubles++
			}
			n.tcpdumps[key] = m[1]
		}
	}
	slices.Sort(n.files)
	return n, nil
}

// wrong says what differs from what is wanted: captures are "N stem" that run, kept are stems whose files stay
// without a tcpdump. Every capture must have its first file, and no file may belong to anything else.
func (n census) wrong(captures, kept []string) string {
	if n.doubles > 0 {
		return fmt.Sprintf("%d tcpdumps write where another does", n.doubles)
	}
	stems := map[string]bool{}
	for _, stem := range kept {
		stems[stem] = false
	}
	for _, key := range captures {
		if n.tcpdumps[key] == "" {
			return "no tcpdump for " + key
		}
		_, stem, _ := strings.Cut(key, " ")
		stems[stem] = false
	}
	if len(n.tcpdumps) != len(captures) {
		return fmt.Sprintf("%d tcpdumps run, %d are asked for: %v", len(n.tcpdumps), len(captures), n.tcpdumps)
	}
	for _, file := range n.files {
		stem := "/" + strings.TrimRight(file, digits)
		if _, ok := stems[stem]; !ok {
			return "a file that nobody asked for: " + file
		}
		stems[stem] = true
	}
	for stem, seen := range stems {
		if !seen {
			return "no file for " + stem
		}
	}
	return ""
}

// exact waits until the worker has exactly what is wanted and returns how long that took.
func (c *cluster) exact(captures []string, kept ...string) time.Duration {
	c.t.Helper()
	began := time.Now()
	wrong := ""
	for time.Since(began) < settle {
		n, err := c.look(c.worker)
		if err != nil {
			wrong = err.Error()
		} else if wrong = n.wrong(captures, kept); wrong == "" {
			return time.Since(began)
		}
		time.Sleep(50 * time.Millisecond) // a poll with a deadline: nothing outside tells
	}
	c.t.Fatalf("not right after %s: %s", settle, wrong)
	return 0
}

func (c *cluster) pid(key string) string {
	c.t.Helper()
	n, err := c.look(c.worker)
	if err != nil || n.tcpdumps[key] == "" {
		c.t.Fatalf("no tcpdump for %q: %v, %v", key, n, err)
	}
	return n.tcpdumps[key]
}

// capturePod is the packetcapture Pod that is ready on the worker.
func (c *cluster) capturePod() string {
	c.t.Helper()
	deadline := time.Now().Add(settle)
	for {
		out, _ := c.try("-n", "kube-system", "get", "pods", "-l", "app=packetcapture",
			"--field-selector", "status.phase=Running,spec.nodeName="+c.worker, "-o",
			`jsonpath={range .items[?(@.status.containerStatuses[0].ready==true)]}{.metadata.name} {.metadata.deletionTimestamp}{"\n"}{end}`)
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) == 1 {
				return f[0]
			}
		}
		if time.Now().After(deadline) {
			c.t.Fatal("no packetcapture Pod is ready on " + c.worker)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// read returns what tcpdump says of a capture's first files.
func (c *cluster) read(file string, filter ...string) string {
	c.t.Helper()
	args := append([]string{"-n", "kube-system", "exec", c.capturePod(), "--", "tcpdump", "-Z", "root", "-nn", "-A", "-r", file}, filter...)
	return c.kubectl(args...)
}

// events waits for an Event of a Pod and returns its message.
func (c *cluster) event(pod, reason string) string {
	c.t.Helper()
	deadline := time.Now().Add(settle)
	for {
		out := c.kubectl("-n", c.space, "get", "events", "--field-selector", "involvedObject.name="+pod+",reason="+reason,
			"-o", `jsonpath={range .items[*]}{.message}{"\n"}{end}`)
		if out != "" {
			return out
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("no Event %s of %s", reason, pod)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// eventWith waits for an Event whose message holds a text.
func (c *cluster) eventWith(pod, reason, text string) {
	c.t.Helper()
	for deadline := time.Now().Add(settle); !strings.Contains(c.event(pod, reason), text); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			c.t.Fatalf("no Event %s of %s holds %s: %s", reason, pod, text, c.event(pod, reason))
		}
	}
}

func (c *cluster) row(fault, happens string, took time.Duration) {
	c.table = append(c.table, [3]string{fault, happens, fmt.Sprintf("%.1f s", took.Seconds())})
}

// TestE2E is one story, since its faults hit the one cluster there is. (C2, C3, C4, C5, C6, C7, C8, C9)
func TestE2E(t *testing.T) {
	c := newCluster(t)
	stem := func(name string) string { return "/capture-" + name + ".pcap" }
	c.create(c.manifest("web", podOptions{}), c.manifest("web-2", podOptions{}))
	c.waitReady("web", "web-2")
	c.exact(nil)

	step := func(name string, f func(t *testing.T)) {
		if t.Failed() {
			return // one story: what follows would only repeat it
		}
		t.Run(name, func(t *testing.T) {
			outer := c.t
			c.t = t
			defer func() { c.t = outer }()
			f(t)
		})
	}

	step("annotate, change, remove", func(t *testing.T) { // C2
		c.annotate("web", "3")
		c.row("annotated", "captured", c.exact([]string{"3 " + stem("web")}))
		c.annotate("web", "12")
		c.row("N changed", "captured anew, old files gone", c.exact([]string{"12 " + stem("web")}))
		pid := c.pid("12 " + stem("web"))
		c.annotate("web", "012")
		if got := c.event("web", "CaptureInvalid"); !strings.Contains(got, `"012"`) {
			t.Errorf("CaptureInvalid does not name the value: %s", got)
		}
		c.kubectl("-n", c.space, "label", "pod", "web", "seen=yes")
		c.annotate("web-2", "1")
		c.exact([]string{"12 " + stem("web"), "1 " + stem("web-2")})
		if got := c.pid("12 " + stem("web")); got != pid {
			t.Errorf("tcpdump was restarted by what did not concern it: PID %s, then %s", pid, got)
		}
		c.annotate("web", "-")
		c.row("annotation removed", "stopped, files gone; web-2 goes on", c.exact([]string{"1 " + stem("web-2")}))
		c.annotate("web-2", "-")
		c.exact(nil)
		c.eventWith("web-2", "CaptureStopped", "packets captured, 0 dropped by the kernel; its files (")
	})

	step("kill -9 tcpdump", func(t *testing.T) { // C5
		c.annotate("web", "3")
		c.exact([]string{"3 " + stem("web")})
		pid := c.pid("3 " + stem("web"))
		if _, err := c.onNode(c.worker, "kill -9 "+pid); err != nil {
			t.Fatal(err)
		}
		c.row("`kill -9` of tcpdump", "started again, Event", c.another(pid, "3 "+stem("web")))
		if got := c.event("web", "CaptureFailed"); !strings.Contains(got, "signal: killed") {
			t.Errorf("CaptureFailed does not say why: %s", got)
		}
	})

	step("kill -9 the program", func(t *testing.T) { // C5
		pid := c.pid("3 " + stem("web"))
		if _, err := c.onNode(c.worker, "pkill -9 -x packetcapture"); err != nil {
			t.Fatal(err)
		}
		c.row("`kill -9` of the program", "no tcpdump outlives it; captured anew", c.another(pid, "3 "+stem("web")))
	})

	step("rollout restart", func(t *testing.T) {
		pid := c.pid("3 " + stem("web"))
		began := time.Now()
		c.kubectl("-n", "kube-system", "rollout", "restart", "daemonset/packetcapture")
		c.kubectl("-n", "kube-system", "rollout", "status", "daemonset/packetcapture", "--timeout=120s")
		c.another(pid, "3 "+stem("web"))
		c.row("`kubectl rollout restart`", "captured anew by the new Pod", time.Since(began))
	})

	step("pod deleted and recreated", func(t *testing.T) { // C5
		c.delete("web")
		c.row("Pod deleted", "stopped, files gone", c.exact(nil))
		c.create(c.manifest("web", podOptions{annotations: map[string]string{annotation: "2"}}))
		c.waitReady("web")
		c.row("Pod recreated with the annotation", "captured", c.exact([]string{"2 " + stem("web")}))
	})

	step("pod finished", func(t *testing.T) { // C5
		c.create(c.manifest("job", podOptions{restart: "Never", command: `echo last words >/dev/udp/192.0.2.1/4444`,
			annotations: map[string]string{annotation: "2"}}))
		c.kubectl("-n", c.space, "wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/job", "--timeout=60s")
		c.row("Pod finished", "tcpdump ends, files stay", c.exact([]string{"2 " + stem("web")}, stem("job")))
		if got := c.read("/capture-job.pcap0", "udp port 4444"); !strings.Contains(got, "last words") {
			t.Errorf("its files lack its packet: %s", got)
		}
		c.delete("job")
		c.exact([]string{"2 " + stem("web")})
	})

	step("alternations", func(t *testing.T) { // C2, C5
		for i := range 100 {
			c.annotate("web-2", []string{"3", "4", "-"}[i%3])
		}
		c.row("100 alternations of 3, 4 and no annotation", "exactly the last one", c.exact([]string{"2 " + stem("web"), "3 " + stem("web-2")}))
		c.annotate("web-2", "-")
		c.exact([]string{"2 " + stem("web")})
	})

	step("API server away", func(t *testing.T) { // C5, C6
		pid := c.pid("2 " + stem("web"))
		stop := make(chan struct{})
		var changing sync.WaitGroup
		changing.Add(1)
		go func() { // annotations change as often as the API server takes it
			defer changing.Done()
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					c.try("-n", c.space, "annotate", "--overwrite", "--request-timeout=2s", "pod", "web-2", annotation+"="+strconv.Itoa(3+i%2))
				}
			}
		}()
		control := c.name + "-control-plane"
		manifest := "/etc/kubernetes/manifests/kube-apiserver.yaml"
		if _, err := c.onNode(control, "mv "+manifest+" /etc/kubernetes/ && while pgrep -x kube-apiserver >/dev/null; do sleep 0.2; done"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second) // it stays away: what is shown is that nothing happens meanwhile
		n, err := c.look(c.worker)
		if err != nil || n.tcpdumps["2 "+stem("web")] != pid {
			t.Errorf("without an API server the capture did not go on as PID %s: %v, %v", pid, n, err)
		}
		if _, err := c.onNode(control, "mv /etc/kubernetes/kube-apiserver.yaml "+manifest); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
			if _, err := c.try("get", "--raw", "/readyz", "--request-timeout=2s"); err == nil {
				break
			} else if time.Now().After(deadline) {
				t.Fatalf("the API server does not come back: %v", err)
			}
		}
		back := time.Now()
		close(stop)
		changing.Wait()
		c.annotate("web-2", "5")
		c.exact([]string{"2 " + stem("web"), "5 " + stem("web-2")})
		c.row("API server stopped and started while annotations change", "captures go on (same PID), then as annotated", time.Since(back))
		if got := c.pid("2 " + stem("web")); got != pid {
			t.Errorf("the capture was restarted: PID %s, then %s", pid, got)
		}
		c.annotate("web-2", "-")
		c.exact([]string{"2 " + stem("web")})
	})

	step("from birth to the end", func(t *testing.T) { // C3: the first packet, and the last
		const births = 50
		var manifests []string
		for i := range births {
			manifests = append(manifests, c.manifest(fmt.Sprintf("birth-%d", i), podOptions{
				labels: map[string]string{"app": "birth"}, restart: "Never", annotations: map[string]string{annotation: "1"},
				command: `for i in {1..40}; do echo "packet $i." >/dev/udp/192.0.2.1/4444; done`}))
		}
		c.create(manifests...)
		c.kubectl("-n", c.space, "wait", "--for=jsonpath={.status.phase}=Succeeded", "pod", "-l", "app=birth", "--timeout=300s")
		var kept []string
		for i := range births {
			kept = append(kept, stem(fmt.Sprintf("birth-%d", i)))
		}
		c.exact([]string{"2 " + stem("web")}, kept...)
		first, complete := 0, 0
		for i := range births {
			text := c.read(fmt.Sprintf("/capture-birth-%d.pcap", i), "udp", "port", "4444")
			if strings.Contains(text, "packet 1.") {
				first++
			}
			if strings.Count(text, "packet ") == 40 {
				complete++
			}
		}
		fmt.Printf("of %d Pods the first packet is in the file of %d, and all 40 up to their end of %d\n", births, first, complete)
		if first != births || complete != births {
			t.Errorf("the first packet of %d of %d Pods, all packets of %d", first, births, complete)
		}
		c.kubectl("-n", c.space, "delete", "pod", "-l", "app=birth", "--wait=true")
		c.exact([]string{"2 " + stem("web")})
	})

	step("special Pods", func(t *testing.T) { // C3, C4
		say := func(what string) string { return `echo "` + what + `" >/dev/udp/192.0.2.1/4444; ` }
		forever := "trap exit TERM; sleep infinity & wait"
		with := func(n string) map[string]string { return map[string]string{annotation: n} }
		c.create(
			c.manifest("host", podOptions{host: true, annotations: with("1")}),
			c.manifest("several", podOptions{annotations: with("1"), init: say("from init"), command: say("from main") + forever,
				second: say("from second") + forever}),
			c.manifest("crash", podOptions{annotations: with("1"), command: say("crashing") + "exit 1"}),
			c.manifest("web.pcap0", podOptions{annotations: with("2")}))
		c.waitReady("host", "several", "web.pcap0")
		all := []string{"2 " + stem("web"), "1 " + stem("host"), "1 " + stem("several"), "1 " + stem("crash"), "2 " + stem("web.pcap0")}
		c.exact(all)
		if got := c.event("host", "CaptureStarted"); !strings.Contains(got, "whole node's traffic") {
			t.Errorf("the Event of a Pod with the host's network does not warn: %s", got)
		}
		pid := c.pid("1 " + stem("crash"))
		for _, what := range []string{"from init", "from main", "from second"} {
			if got := c.read(stem("several"), "udp", "port", "4444"); !strings.Contains(got, what) {
				t.Errorf("the packet %q is not in the file: %s", what, got)
			}
		}
		c.kubectl("-n", c.space, "wait", "--for=jsonpath={.status.containerStatuses[0].restartCount}=2", "pod/crash", "--timeout=90s")
		if got := c.pid("1 " + stem("crash")); got != pid {
			t.Errorf("a container that crashes disturbed the capture: PID %s, then %s", pid, got)
		}
		// The same name in another namespace has the first 8 of its UID in its file names; web's end touches no other's.
		other := c.space + "-2"
		c.kubectl("create", "namespace", other)
		defer c.try("delete", "namespace", other, "--wait=true")
		if _, err := c.pipe(c.manifest("web", podOptions{annotations: with("3")}), "-n", other, "create", "-f", "-"); err != nil {
			t.Fatal(err)
		}
		uid := c.kubectl("-n", other, "get", "pod", "web", "-o", "jsonpath={.metadata.uid}")
		twin := "3 " + stem("web_"+uid[:8])
		c.exact(append(all, twin))
		c.annotate("web", "-")
		c.exact(append(all[1:], twin))
		c.kubectl("delete", "namespace", other, "--wait=true")
		c.delete("host", "several", "crash", "web.pcap0")
		c.annotate("web", "2")
		c.exact([]string{"2 " + stem("web")})
	})

	step("static Pod", func(t *testing.T) { // C3: its cgroup has another UID than the API
		path := "/etc/kubernetes/manifests/e2e-static.yaml"
		var pod map[string]any
		if err := json.Unmarshal([]byte(c.manifest("e2e-static", podOptions{annotations: map[string]string{annotation: "1"}})), &pod); err != nil {
			t.Fatal(err)
		}
		delete(pod["spec"].(map[string]any), "nodeName")
		text, _ := json.Marshal(pod)
		write := exec.Command("docker", "exec", "-i", c.worker, "bash", "-c", "cat >"+path)
		write.Stdin = bytes.NewReader(text)
		if out, err := write.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		defer c.onNode(c.worker, "rm -f "+path)
		c.exact([]string{"2 " + stem("web"), "1 " + stem("e2e-static-"+c.worker)})
		c.onNode(c.worker, "rm -f "+path)
		c.exact([]string{"2 " + stem("web")})
	})

	step("filter", func(t *testing.T) { // C9
		filtered := func(expression string) {
			c.kubectl("-n", c.space, "annotate", "--overwrite", "pod", "web", filterAnnotation+"="+expression)
		}
		filtered("udp port 4444 and less 100")
		send := `for p in 4444 4445; do echo hello >/dev/udp/192.0.2.1/$p; done`
		c.exact([]string{"2 " + stem("web")})
		c.eventWith("web", "CaptureStarted", "udp port 4444")
		c.kubectl("-n", c.space, "exec", "web", "--", "bash", "-c", send)
		deadline := time.Now().Add(settle)
		for !strings.Contains(c.read(stem("web")+"0"), ".4444: UDP") {
			if time.Now().After(deadline) {
				t.Fatal("what the filter lets through is not in the file")
			}
		}
		if got := c.read(stem("web") + "0"); strings.Contains(got, ".4445: UDP") {
			t.Errorf("what the filter keeps out is in the file: %s", got)
		}
		for _, wrong := range []string{"tcp port", "-w /tmp/evil", `"quoted"`, "$(reboot)"} {
			filtered(wrong)
			c.eventWith("web", "CaptureFailed", strconv.Quote(wrong))
			c.exact(nil)
		}
		filtered("tcp\nport 80")
		c.eventWith("web", "CaptureInvalid", `"tcp\nport 80"`)
		c.exact(nil)
		c.kubectl("-n", c.space, "annotate", "pod", "web", filterAnnotation+"-")
		c.exact([]string{"2 " + stem("web")})
	})

	step("no room", func(t *testing.T) { // C4
		c.annotate("web-2", "1000000")
		if got := c.event("web-2", "CaptureWaiting"); !strings.Contains(got, "1000000 files") {
			t.Errorf("CaptureWaiting does not say what waits: %s", got)
		}
		c.exact([]string{"2 " + stem("web")})
		c.annotate("web", "1000")
		c.exact([]string{"1000 " + stem("web")})
		c.annotate("web-2", "1001") // beside web's, more than daemonset.yaml's ephemeral-storage holds
		c.eventWith("web-2", "CaptureWaiting", "1001 files")
		c.exact([]string{"1000 " + stem("web")})
		c.annotate("web", "-")
		c.row("a capture that waits for room gets it", "it starts by itself", c.exact([]string{"1001 " + stem("web-2")}))
		c.annotate("web-2", "-")
		c.exact(nil)
		c.annotate("web", "2")
		c.exact([]string{"2 " + stem("web")})
	})

	step("joined while it runs", func(t *testing.T) { // the README's line
		c.kubectl("-n", c.space, "exec", "web", "--", "bash", "-c",
			`payload=$(printf %01000d 7); for i in {1..1500}; do echo "number $i. $payload" >/dev/udp/192.0.2.1/4444; done`)
		readme, err := os.ReadFile("README.md")
		if err != nil {
			t.Fatal(err)
		}
		line := regexp.MustCompile(`(?m)^kubectl exec .*ls -tr .*$`).FindString(string(readme))
		line = strings.NewReplacer("kubectl exec", "kubectl --context kind-"+c.name+" exec", "$CAPTURE", c.capturePod(),
			"capture-traffic-pod", "capture-web", "> traffic-pod.pcap", "").Replace(line)
		deadline := time.Now().Add(settle)
		for {
			joined, err := exec.Command("bash", "-c", line).Output()
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			numbers := regexp.MustCompile(`number (\d+)\. 0{999}7`).FindAllSubmatch(joined, -1)
			for i := 1; i < len(numbers); i++ {
				a, _ := strconv.Atoi(string(numbers[i-1][1]))
				if b, _ := strconv.Atoi(string(numbers[i][1])); b != a+1 {
					t.Fatalf("after packet %d comes %d", a, b)
				}
			}
			// What comes back as ICMP quotes a packet, but not all of it.
			if len(numbers) > 900 && string(numbers[len(numbers)-1][1]) == "1500" {
				break // both files are in it
			} else if time.Now().After(deadline) {
				t.Fatalf("%d of the packets are in the joined file", len(numbers))
			}
		}
	})

	step("30 at once", func(t *testing.T) { // issue: many at once, by label
		var manifests, names, want []string
		for i := range 30 {
			name := fmt.Sprintf("many-%d", i)
			manifests = append(manifests, c.manifest(name, podOptions{labels: map[string]string{"app": "many"}}))
			names, want = append(names, name), append(want, "3 "+stem(name))
		}
		c.create(manifests...)
		c.waitReady(names...)
		want = append(want, "2 "+stem("web"))
		c.kubectl("-n", c.space, "annotate", "pod", "-l", "app=many", annotation+"=3")
		c.row("30 Pods annotated at once", "all captured", c.exact(want))
		c.kubectl("-n", c.space, "annotate", "pod", "-l", "app=many", annotation+"-")
		c.row("30 Pods released at once", "all stopped, files gone", c.exact([]string{"2 " + stem("web")}))
		c.kubectl("-n", c.space, "delete", "pod", "-l", "app=many", "--wait=true")
	})

	step("node restarted", func(t *testing.T) {
		pid := c.pid("2 " + stem("web"))
		began := time.Now()
		if out, err := exec.Command("docker", "restart", c.worker).CombinedOutput(); err != nil {
			t.Fatalf("docker restart: %v: %s", err, out)
		}
		c.another(pid, "2 "+stem("web"))
		c.row("the node's container restarted", "captured anew when its Pods are back", time.Since(began))
	})

	w := tabwriter.NewWriter(os.Stdout, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| fault\t| what happens\t| right again after\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|")
	for _, r := range c.table {
		fmt.Fprintf(w, "| %s\t| %s\t| %s\t|\n", r[0], r[1], r[2])
	}
	w.Flush()
}

// another waits until a capture is exact and runs as another PID.
func (c *cluster) another(pid, key string) time.Duration {
	c.t.Helper()
	began := time.Now()
	for {
		c.exact([]string{key})
		if n, err := c.look(c.worker); err == nil && n.tcpdumps[key] != "" && n.tcpdumps[key] != pid {
			return time.Since(began)
		}
		if time.Since(began) > settle {
			c.t.Fatalf("%s still runs as PID %s", key, pid)
		}
	}
}
