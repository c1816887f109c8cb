//go:build e2e

package test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// steps are what happens to a cluster. Each begins with the idle pods web and web-2 and nothing captured
// but what runs beside, and leaves them so. A crash loop takes a minute, so other steps run beside it:
// those that do not restart the program.
var steps = []struct {
	name    string
	anyNode bool // it needs kubectl alone, and so is a part of TestNode
	run     func(c *cluster)
}{
	{"rights", true, (*cluster).rights},
	{"a crash loop without a pause process begins", false, (*cluster).crashLoopBegins},
	{"annotated, changed, removed", true, (*cluster).changed},
	{"mistakes while a capture runs", false, (*cluster).mistakes},
	{"another pod's packets", false, (*cluster).anotherPods},
	{"a namespace whose webhook hangs", false, (*cluster).webhook},
	{"other runtimes and user namespaces", false, (*cluster).runtimes},
	{"interfaces", false, (*cluster).interfaces},
	{"room for few", false, (*cluster).room},
	{"a crash loop without a pause process keeps its tcpdump", false, (*cluster).crashLoopEnds},
	{"several containers, crashes, names", false, (*cluster).special},
	{"filter", false, (*cluster).filter},
	{"cat and live", false, (*cluster).reading},
	{"make pcap and make live", false, (*cluster).makePcapAndLive},
	{"cat while 5 MB/s rotate", false, (*cluster).catFast},
	{"100 alternations", false, (*cluster).alternations},
	{"deleted and recreated", false, (*cluster).deleted},
	{"finished", false, (*cluster).finished},
	{"from birth to the end", true, (*cluster).born},
	{"the last packets of a sidecar", false, (*cluster).sidecars},
	{"host network", true, (*cluster).hostNetwork},
	{"static pod", true, (*cluster).static},
	{"the packetcapture pod itself", true, (*cluster).itself},
	{"rollout, to an API server that has a name", false, (*cluster).rollout},
	{"kill -9 of tcpdump and of the program", true, (*cluster).killed},
	{"30 at once", false, (*cluster).many},
	{"API server away", false, (*cluster).serverAway},
	{"node restarted", false, (*cluster).nodeRestarted},
}

// TestE2E breaks what can break on the cluster, and writes what became of it to OUTPUTS.
func TestE2E(t *testing.T) {
	c := newCluster(t)
	*c.table = [][]string{{"fault", "what happens", "right again after"}}
	c.steps(false)
	if !t.Failed() && !strings.Contains(flag.Lookup("test.run").Value.String(), "/") {
		c.write("e2e.txt", *c.table)
	}
}

// TestNode is what matters on a node of another kind (NODE), whose root NODE_SH runs commands as.
func TestNode(t *testing.T) {
	c := newCluster(t)
	c.births = 1
	c.steps(true)
}

func (c *cluster) steps(anyNode bool) {
	web, web2 := c.manifest("web", options{}), c.manifest("web-2", options{})
	c.create(web, web2)
	c.wait(ready, "web", "web-2")
	c.kubectl("label", "pod", "web", "web-2", "step-")
	c.exact()
	for _, step := range steps {
		if anyNode && !step.anyNode {
			continue
		}
		c.Run(step.name, func(t *testing.T) {
			inner := *c
			inner.T = t
			t.Cleanup(func() {
				inner.annotate("web", "-", "/filter-", "/interface-")
				inner.annotate("web-2", "-", "/filter-", "/interface-")
				inner.kubectl("delete", "pod", "-l", "step", "--timeout=3m")
				inner.exact()
			})
			inner.kubectl("delete", "--raw", "/api/v1/namespaces/"+c.namespace+"/events") // all by one request
			step.run(&inner)
		})
	}
}

// rights are the least: the service account may watch pods and create Events, and the program has the
// capabilities that daemonset.yaml lists.
func (c *cluster) rights() {
	const account = "--as=system:serviceaccount:kube-system:packetcapture"
	var may []string
	for line := range strings.Lines(c.kubectl("auth", "can-i", "--list", "--no-headers", account)) {
		resource, rest, _ := strings.Cut(line, " ")
		verbs := rest[strings.LastIndex(rest, "[")+1 : strings.LastIndex(rest, "]")]
		isEverybodys := strings.HasPrefix(resource, "self") || strings.HasPrefix(line, " ") // reviews of itself, /version and the like
		if !isEverybodys {
			may = append(may, verbs+" "+resource)
		}
	}
	slices.Sort(may)
	if want := []string{"create events", "watch pods"}; !slices.Equal(may, want) {
		c.Errorf("the service account may %q, not only %q", may, want)
	}
	if out, err := c.try("get", "pods", account); err == nil || !strings.Contains(err.Error(), "forbidden") {
		c.Errorf("the service account may list pods: %v: %s", err, out)
	}

	n, err := c.look()
	c.must(err)
	out, err := c.onNode("grep -E '^(Cap(Prm|Eff|Bnd)|NoNewPrivs|Seccomp):' /proc/" + n.program + "/status")
	c.must(err)
	const sysPtrace, sysAdmin, netRaw, setgid = 1 << 19, 1 << 21, 1 << 13, 1 << 6
	set := fmt.Sprintf("%016x", sysPtrace|sysAdmin|netRaw|setgid)
	want := "CapPrm: " + set + " CapEff: " + set + " CapBnd: " + set + " NoNewPrivs: 1 Seccomp: 2" // 2: a filter
	if got := strings.Join(strings.Fields(out), " "); got != want {
		c.Errorf("the program has %s, want %s", got, want)
	}
}

func (c *cluster) changed() {
	c.annotate("web", "=3")
	c.row("annotated", "captured", c.exact("3 web"))
	c.annotate("web", "=12")
	c.row("N changed", "captured anew, old files gone", c.exact("12 web"))
	pid := c.pid("12 web")
	c.annotate("web", "=12")
	c.kubectl("label", "--overwrite", "pod", "web", "seen=yes")
	c.annotate("web-2", "=1")
	c.exact("12 web", "1 web-2")
	if got := c.pid("12 web"); got != pid {
		c.Errorf("tcpdump was restarted by what did not concern it: PID %s, then %s", pid, got)
	}
	c.annotate("web", "-")
	c.row("annotation removed", "stopped, files gone; web-2 goes on", c.exact("1 web-2"))
	c.annotate("web-2", "-")
	c.exact()
	c.told("web-2", "CaptureStopped", "Normal", "captured, 0 packets dropped by the kernel; its files (")
}

func (c *cluster) mistakes() {
	c.annotate("web", "=3", "/filter=udp", "/interface=any")
	c.exact("3 web")
	pid := c.pid("3 web")
	c.kubectl("exec", "web", "--", "bash", "-c", say("before"))
	c.holds("web.pcap0", "before")
	mistakes := []string{"=012", "=50000", "=5abc", "=0", "=", "=3",
		"/filter=tcp.port == 80", "/filter=“tcp”", "/filter=tcp\nport 80", "/filter=-w /tmp/evil", "/filter=$(reboot)",
		"/filter=" + strings.Repeat("udp or ", 150) + "tcp", "/filter=udp",
		"/interface=-i", "/interface=a/b", "/interface=sixteen-letters0", "/interface=any"}
	for _, mistake := range mistakes {
		c.annotate("web", mistake)
	}
	for _, mistake := range mistakes {
		if key, value, _ := strings.Cut(mistake, "="); value != "3" && value != "udp" && value != "any" {
			quoted := strconv.Quote(value)
			c.told("web", "CaptureInvalid", "Warning", " "+annotation+key+" is "+quoted[:min(len(quoted)-1, 100)], "nothing changes")
		}
	}
	c.exact("3 web")
	if got := c.pid("3 web"); got != pid {
		c.Errorf("a mistake restarted the capture: PID %s, then %s", pid, got)
	}
	c.holds("web.pcap0", "before")

	twice := func() string {
		if told := strings.Count(strings.Join(c.events("web", "CaptureInvalid"), "\n"), `"7up"`); told != 2 {
			return fmt.Sprintf("the same mistake was made twice, and %d Events tell it", told)
		}
		return ""
	}
	for range 2 {
		c.annotate("web", "=7up")
		c.told("web", "CaptureInvalid", `"7up"`)
		c.annotate("web", "=3")
	}
	c.until(twice)
	c.until(func() string {
		last := c.kubectl("get", "events", "--field-selector", "involvedObject.name=web", "--sort-by=.metadata.name",
			"-o", "jsonpath={.items[-1:].reason}")
		if last != "CaptureContinued" {
			return "the annotations are valid again, and the last Event is " + last
		}
		return ""
	})

	c.annotate("web-2", "=05")
	c.told("web-2", "CaptureInvalid", `"05"`, "nothing changes")
	c.exact("3 web")
	c.row("a mistake in N, filter or interface, and back", "told each time, also that it is over; the capture goes on, same PID", 0)
}

func (c *cluster) killed() {
	c.annotate("web", "=3")
	c.exact("3 web")
	for _, what := range []string{"tcpdump", "the program"} {
		n, err := c.look()
		c.must(err)
		pid := n.tcpdumps["3 web"]
		if what == "tcpdump" {
			c.onNode("kill -9 " + pid)
			c.row("`kill -9` of tcpdump", "started again, Event", c.another(pid, "3 web"))
			c.told("web", "CaptureFailed", "Warning", "signal: killed", "it is tried again")
			c.told("web", "CaptureStarted", "Warning", "started over at the first file")
		} else {
			c.onNode("kill -9 " + n.program)
			c.row("`kill -9` of the program", "no tcpdump outlives it; captured anew", c.another(pid, "3 web"))
		}
	}
}

// rollout has the program find its API server by a name, which some clusters give all pods instead of an
// address. The last Events are told also when the program ends.
func (c *cluster) rollout() {
	c.annotate("web", "=3")
	c.exact("3 web")
	roll := func(what string, env ...string) {
		pid, began := c.pid("3 web"), time.Now()
		c.kubectl(append([]string{"-n", "kube-system", "set", "env", "daemonset/packetcapture"}, env...)...)
		c.kubectl("-n", "kube-system", "rollout", "status", "daemonset/packetcapture", "--timeout=3m")
		c.another(pid, "3 web")
		c.row(what, "captured anew by the new pod", time.Since(began))
	}
	defer roll("rollout back to its address", "KUBERNETES_SERVICE_HOST-", "KUBERNETES_SERVICE_PORT-")
	roll("rollout to an API server that has a name", "KUBERNETES_SERVICE_HOST="+c.name+"-control-plane", "KUBERNETES_SERVICE_PORT=6443")
	c.told("web", "CaptureStopped", "its files (")
	host := c.kubectl("-n", "kube-system", "exec", c.capturePod(), "--", "bash", "-c", "echo $KUBERNETES_SERVICE_HOST")
	if host != c.name+"-control-plane" {
		c.Errorf("the program's API server is %s", host)
	}
}

func (c *cluster) deleted() {
	c.create(c.manifest("again", options{annotations: []string{"=2"}}))
	c.wait(ready, "again")
	c.exact("2 again")
	began := time.Now()
	c.kubectl("delete", "pod", "again")
	took := time.Since(began)
	c.row("pod deleted", "stopped, files gone; one Event", c.exact())
	c.told("again", "CaptureStopped", "are deleted")
	// A pod that is still there 3 s after its network has gone is told so before.
	if told := c.events("again", "CaptureStopped"); len(told) != 1 && took < 3*time.Second {
		c.Errorf("a pod that is deleted has the Events %q", told)
	}
	c.create(c.manifest("again", options{annotations: []string{"=2"}}))
	c.wait(ready, "again")
	c.row("pod recreated with the annotation", "captured", c.exact("2 again"))
}

// A finished pod keeps its files, and after a restart of the program, when it has none, takes no room.
func (c *cluster) finished() {
	c.create(c.manifest("job", options{never: true, command: say("last words"), annotations: []string{"=1000"}}))
	c.wait(succeeded, "job")
	c.row("pod finished", "tcpdump ends, files stay", c.exact("- job"))
	c.holds("job.pcap000", "last words")
	c.told("job", "CaptureStopped", "; the pod's network is gone; the files (", "stay until it is back")
	n, err := c.look()
	c.must(err)
	c.onNode("kill -9 " + n.program)
	c.exact()
	c.annotate("web", "=1001")
	c.row("program restarted beside a finished pod", "that takes no room", c.exact("1001 web"))
	if told := c.events("web", "CaptureWaiting"); len(told) > 0 {
		c.Errorf("it had to wait: %q", told)
	}
}

func (c *cluster) alternations() {
	for i := range 100 {
		c.annotate("web-2", []string{"=3", "=4", "-"}[i%3])
	}
	c.row("100 alternations of 3, 4 and no annotation", "exactly the last one", c.exact("3 web-2"))
}

func (c *cluster) serverAway() {
	c.annotate("web", "=2")
	c.exact("2 web")
	pid := c.pid("2 web")
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var changing sync.WaitGroup
	changing.Go(func() { // annotations change as often as the API server takes it
		for i := 0; ctx.Err() == nil; i++ {
			c.try("annotate", "--overwrite", "--request-timeout=2s", "pod", "web-2", annotation+"="+strconv.Itoa(3+i%2))
		}
	})
	onServer := func(script string) {
		c.must(exec.Command("docker", "exec", c.name+"-control-plane", "bash", "-c", "cd /etc/kubernetes; "+script).Run())
	}
	onServer("mv manifests/kube-apiserver.yaml . && for i in {1..300}; do pkill -9 -x kube-apiserver || exit 0; sleep 0.2; done; exit 1")
	for away := time.Now(); time.Since(away) < 5*time.Second; {
		if n, err := c.look(); err != nil || n.tcpdumps["2 web"] != pid {
			c.Errorf("without an API server the capture did not go on as PID %s: %v, %v", pid, n, err)
			break
		}
	}
	onServer("! pgrep -x kube-apiserver && mv kube-apiserver.yaml manifests/")
	c.until(func() string {
		_, err := c.try("get", "--raw", "/readyz", "--request-timeout=2s")
		return strings.TrimPrefix(fmt.Sprint(err), "<nil>")
	})
	back := time.Now()
	stop()
	changing.Wait()
	c.annotate("web-2", "=5")
	c.exact("2 web", "5 web-2")
	c.row("API server killed, and started while annotations change", "captures go on (same PID), then as annotated", time.Since(back))
	if got := c.pid("2 web"); got != pid {
		c.Errorf("the capture was restarted: PID %s, then %s", pid, got)
	}
}

// Pods send 40 packets as the very first thing they do, and exit.
func (c *cluster) born() {
	c.complete("birth", c.births, 40, "pods created with the annotation, which send 40 packets at once and exit",
		options{never: true, annotations: []string{"=1"}, command: `for i in {1..40}; do ` + say("packet $i.") + `done`})
}

// A native sidecar is ended when all else has, and the pod's network goes at once after that.
func (c *cluster) sidecars() {
	c.complete("side", 10, 4, "Jobs whose sidecar sends 3 packets as it is ended, interface any",
		options{never: true, annotations: []string{"=1", "/interface=any"}, command: say("packet 1"),
			sidecar: `trap 'for i in 2 3 4; do ` + say("packet $i") + `done; exit' TERM; sleep infinity & wait`})
}

// complete has pods run to their end. All of the packets that each sent must be in its file.
func (c *cluster) complete(prefix string, pods, packets int, what string, o options) {
	c.Helper()
	var manifests []map[string]any
	var kept []string
	for i := range pods {
		name := fmt.Sprintf("%s-%d", prefix, i)
		manifest := c.manifest(name, o)
		// With many pods at once the runtime fails to create some containers, which then have sent nothing.
		manifest["spec"].(map[string]any)["restartPolicy"] = "OnFailure"
		manifests, kept = append(manifests, manifest), append(kept, "- "+name)
	}
	c.create(manifests...)
	c.wait(succeeded, "-l", "app="+prefix)
	c.exact(kept...)
	counts, err := c.try("-n", "kube-system", "exec", c.capturePod(), "--", "bash", "-c", `for file in /capture-`+prefix+`-*; do
			tcpdump -Z root -nn -A -r "$file" udp port 4444 2>/dev/null | grep -c "packet "
		done; true`)
	c.must(err)
	complete := 0
	for _, count := range strings.Fields(counts) {
		if count == strconv.Itoa(packets) {
			complete++
		}
	}
	c.row(fmt.Sprintf("%d %s", pods, what), fmt.Sprintf("all packets of %d are in their files", complete), 0)
	if complete != pods {
		c.Errorf("all packets of %d of %d pods are in their files", complete, pods)
	}
}

func (c *cluster) hostNetwork() {
	c.create(c.manifest("host", options{isHost: true, annotations: []string{"=1"}}),
		c.manifest("hostjob", options{isHost: true, never: true, command: fmt.Sprint("sleep ", 6*int(slow)), annotations: []string{"=1"}}))
	c.exact("1 host", "1 hostjob")
	c.told("host", "CaptureStarted", "Warning", "the node's traffic")
	c.wait(succeeded, "hostjob")
	c.row("pod with the host's network finished", "tcpdump ends, files stay", c.exact("1 host", "- hostjob"))
	c.kubectl("delete", "pod", "host", "hostjob")
	c.exact()
}

// A static pod's cgroups have another UID than the API.
func (c *cluster) static() {
	text, err := json.Marshal(c.manifest("static", options{isPlain: true, annotations: []string{"=1"}}))
	c.must(err)
	path := "/etc/kubernetes/manifests/static.yaml"
	c.Cleanup(func() { c.onNode("rm -f " + path) })
	_, err = c.onNode(fmt.Sprintf("mkdir -p /etc/kubernetes/manifests; cat >%s <<'END'\n%s\nEND", path, text))
	c.must(err)
	c.exact("1 static-" + c.node)
	_, err = c.onNode("rm -f " + path)
	c.must(err)
	c.exact()
}

// Tcpdump compiles filters in the packetcapture pod, and looks up no name from there.
func (c *cluster) itself() {
	name := c.capturePod()
	annotate := func(change string) error {
		_, err := c.try("-n", "kube-system", "annotate", "pod", name, annotation+change)
		return err
	}
	defer annotate("-")
	c.must(annotate("=1"))
	c.exact("1 " + name)
	c.annotate("web", "=1", "/filter=host e2e.example.com")
	c.told("web", "CaptureInvalid", `"host e2e.example.com"`, "numeric hosts and ports")
	c.holds(name+".pcap", ".8080: Flags [S]") // a probe, which came later
	if got := c.read(name+".pcap", "port", "53"); strings.Contains(got, "example") || strings.Contains(got, ".53: ") {
		c.Errorf("a name in a filter was looked up: %s", got)
	}
	c.exact("1 " + name)
}

func (c *cluster) special() {
	c.create(c.manifest("several", options{annotations: []string{"=1"}, init: say("from init"), command: say("from main") + idle,
		second: say("from second") + idle}),
		c.manifest("crash", options{annotations: []string{"=1"}, command: say("crashing") + "exit 1"}),
		c.manifest("web.pcap0", options{annotations: []string{"=2"}}))
	c.wait(ready, "several", "web.pcap0")
	c.annotate("web", "=2")
	all := []string{"2 web", "1 several", "1 crash", "2 web.pcap0"}
	c.exact(all...)
	pid := c.pid("1 crash")
	c.holds("several.pcap", "from init", "from main", "from second")
	c.wait("jsonpath={.status.containerStatuses[0].restartCount}=1", "crash")
	if got := c.pid("1 crash"); got != pid {
		c.Errorf("a container that crashes disturbed the capture: PID %s, then %s", pid, got)
	}
	// The same name in another namespace has the first 8 of its UID in its file names; web's end touches no other's.
	other := c.elsewhere("-2")
	other.create(other.manifest("web", options{annotations: []string{"=3"}}))
	twin := "web_" + other.uid("web")[:8]
	c.exact(append(all, "3 "+twin)...)
	c.annotate("web", "-")
	c.exact(append(all[1:], "3 "+twin)...)
}

func (c *cluster) filter() {
	c.annotate("web", "=2")
	c.exact("2 web")
	pid := c.pid("2 web")
	c.annotate("web", "/filter= udp port 4444 and less 100 ")
	c.another(pid, "2 web")
	c.told("web", "CaptureStarted", `the filter is "udp port 4444 and less 100"`)
	c.kubectl("exec", "web", "--", "bash", "-c", `for p in 4445 4444; do echo hello >/dev/udp/192.0.2.1/$p; done`)
	c.holds("web.pcap0", ".4444: UDP")
	if got := c.read("web.pcap0"); strings.Contains(got, ".4445: UDP") {
		c.Errorf("what the filter keeps out is in the file: %s", got)
	}
	pid = c.pid("2 web")
	c.annotate("web", "/filter-")
	c.another(pid, "2 web")
}

func (c *cluster) interfaces() {
	c.create(c.manifest("pair", options{annotations: []string{"=1", "/interface=lo"},
		command: "while true; do cat </dev/tcp/127.0.0.1/4444; sleep 0.2; done",
		second: `exec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1:4444", Listen => 9, ReuseAddr => 1);
			while ($c = $s->accept) { print $c "over loopback\n"; close $c }'`}))
	c.annotate("web", "=1", "/interface=net9")
	c.exact("1 pair")
	c.holds("pair.pcap", "over loopback")
	c.told("web", "CaptureWaiting", "Warning", "Waiting for the interface net9: the pod has lo, eth0")
	c.exact("1 pair")
	link := `for p in /proc/[0-9]*; do
		tr _ - <$p/cgroup | grep -q ` + c.uid("web") + ` && exec nsenter -t ${p#/proc/} -n ip link `
	defer c.onNode(link + "delete net9; done 2>/dev/null")
	c.onNode(link + "add net9 up type veth; done 2>/dev/null")
	c.row("the interface comes that is asked for", "captured", c.exact("1 pair", "1 web"))
}

// A crash loop whose pod has no pause process, as with CRI-O, has no process at all between two runs.
// The pauses grow: 10 s, 20 s, 40 s.
func (c *cluster) crashLoopBegins() {
	c.runtimeClass("nopause")
	loop := c.manifest("loop", options{runtime: "nopause", annotations: []string{"=1"}, command: say("crashing") + "exit 1"})
	delete(loop["metadata"].(map[string]any), "labels") // it is not of this step alone
	c.Cleanup(func() {
		if len(*c.beside) == 0 {
			c.try("delete", "pod", "loop")
		}
	})
	c.create(loop)
	c.exact("1 loop")
	*c.beside = []string{"1 loop"}
	*c.loopPID = c.pid("1 loop")
}

func (c *cluster) crashLoopEnds() {
	if len(*c.beside) == 0 {
		c.Skip("there is no crash loop")
	}
	c.until(func() string { // the last two runs have 20 s in between
		if seen := strings.Count(c.read("loop.pcap"), "crashing"); seen < 4 {
			return fmt.Sprintf("packets of %d of 4 runs are captured", seen)
		}
		return ""
	})
	if got := c.pid("1 loop"); got != *c.loopPID {
		c.Errorf("the pauses ended the capture: PID %s, then %s", *c.loopPID, got)
	}
	*c.beside = nil
	c.kubectl("delete", "pod", "loop")
	c.row("a crash loop without a pause process, over a pause of 20 s", "each run is captured, by the same tcpdump", 0)
}

// runtimeClass names a handler of the node's containerd, as pods ask for it.
func (c *cluster) runtimeClass(name string) {
	_, err := c.pipe(fmt.Sprintf(`{"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": %q}, "handler": %[1]q}`, name),
		"apply", "-f", "-")
	c.must(err)
	c.outer.Cleanup(func() { c.try("delete", "runtimeclass", name, "--ignore-not-found") })
}

// A pod is found whoever makes its cgroups, with or without a pause process, and in a user namespace. Without a
// pause process nothing is in the pod's network before its container, whose first packets may be missed.
func (c *cluster) runtimes() {
	c.runtimeClass("cgroupfs")
	c.runtimeClass("nopause")
	once, again := say("hello")+idle, "while "+say("hello")+"do sleep 0.1; done"
	c.create(c.manifest("cgroupfs", options{runtime: "cgroupfs", annotations: []string{"=1"}, command: once}),
		c.manifest("nopause", options{runtime: "nopause", annotations: []string{"=1"}, command: again}),
		c.manifest("users", options{hasOwnUsers: true, annotations: []string{"=1"}, command: once}))
	c.exact("1 cgroupfs", "1 nopause", "1 users")
	for _, name := range []string{"cgroupfs", "nopause", "users"} {
		c.holds(name+".pcap", "hello")
	}
	c.kubectl("delete", "pod", "cgroupfs", "nopause", "users")
	c.row("pods of a runtime with cgroupfs, with hostUsers: false", "captured from their first packet on", 0)
	c.row("a pod without a pause process", "captured, maybe without its first packets", 0)
}

// A namespace in which no Event can be created, because its admission webhook hangs, does not hold up
// the Events of another one.
func (c *cluster) webhook() {
	noisy := c.elsewhere("-noisy")
	_, err := c.pipe(fmt.Sprintf(`{"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
		"metadata": {"name": %q}, "webhooks": [{"name": "hangs.example.com", "timeoutSeconds": 10, "failurePolicy": "Fail",
		"clientConfig": {"url": "https://192.0.2.1/"}, "sideEffects": "None", "admissionReviewVersions": ["v1"],
		"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": %[1]q}},
		"rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["events"]}]}]}`, noisy.namespace),
		"apply", "-f", "-")
	c.must(err)
	mend := func() { c.try("delete", "validatingwebhookconfiguration", noisy.namespace, "--ignore-not-found") }
	defer mend()
	noisy.create(noisy.manifest("noisy", options{annotations: []string{"=1"}}))
	c.exact("1 noisy")
	for i := range 3 {
		noisy.annotate("noisy", fmt.Sprint("=", i+2)) // each has its Events
	}
	c.annotate("web", "=3")
	c.exact("4 noisy", "3 web")
	began := time.Now()
	c.told("web", "CaptureStarted")
	took := time.Since(began)
	if took > 5*time.Second*slow {
		c.Errorf("the Events of another namespace took %v", took)
	}
	if told := noisy.events("noisy", "CaptureStarted"); len(told) > 0 {
		c.Errorf("the webhook does not hang: %q", told)
	}
	c.row("the webhook for Events of a namespace hangs", "the Events of others come", took)
	mend()
	noisy.told("noisy", "CaptureStarted", "(N=4")
}

// Whoever fits goes first. Who has room keeps it when the filter changes, whoever waits for it.
func (c *cluster) room() {
	const files = (2<<30 - 64<<20) / 1_262_160 // for captures, of daemonset.yaml's ephemeral-storage
	free := files - len(*c.beside) - 5
	c.annotate("web", "=1000")
	c.exact("1000 web")
	c.annotate("web-2", "=1001")
	c.told("web-2", "CaptureWaiting", "Warning", "N=1001")
	c.create(c.manifest("small", options{annotations: []string{"=5"}}))
	c.exact("1000 web", "5 small")

	pid := c.pid("1000 web")
	c.annotate("web", "/filter=udp")
	c.until(func() string {
		if n, err := c.look(); err != nil || n.tcpdumps["1000 web"] == pid || n.tcpdumps["1000 web"] == "" {
			return fmt.Sprintf("the filter is not changed: %v, %v", n.tcpdumps, err)
		}
		return ""
	})
	c.row("the filter of a capture changes while another waits for room", "it keeps its room, the other one waits", c.exact("1000 web", "5 small"))

	pid = c.pid("1000 web")
	c.annotate("web", fmt.Sprint("=", free+1))
	c.told("web", "CaptureInvalid", "Warning", fmt.Sprintf("%q", fmt.Sprint(free+1)), fmt.Sprintf(" %d ", free), "nothing changes")
	c.exact("1000 web", "5 small")
	if got := c.pid("1000 web"); got != pid {
		c.Errorf("an N that there is no room for restarted the capture: PID %s, then %s", pid, got)
	}
	c.row("N grows beyond what is free", "refused, and told how many files are; the capture goes on, same PID", 0)
	c.annotate("web", "-")
	c.row("a capture that waits for room gets it", "it starts by itself", c.exact("1001 web-2", "5 small"))
}

// ---- What reads a capture ----

var wrote = regexp.MustCompile(`(?m)^(\d+) packets?, (\d+) bytes$`)

// packetcapture is what a command in the capture pod writes and says.
func (c *cluster) packetcapture(args ...string) (data []byte, said string, err error) {
	cmd := c.command(append([]string{"-n", "kube-system", "exec", c.capturePod(), "--", "packetcapture"}, args...)...)
	stderr := new(bytes.Buffer)
	cmd.Stderr = stderr
	data, err = cmd.Output()
	return data, stderr.String(), err
}

// numbers checks that a pcap is whole and in order, and returns what its packets are numbered, and how often it is not
// the next number that follows.
func (c *cluster) numbers(data []byte) (numbers []int, gaps int) {
	c.Helper()
	if len(data) < 24 || binary.LittleEndian.Uint32(data) != 0xa1b2c3d4 {
		c.Fatalf("it is no pcap: % x", data[:min(len(data), 24)])
	}
	for data = data[24:]; len(data) > 0; {
		if len(data) < 16 || len(data) < 16+int(binary.LittleEndian.Uint32(data[8:])) {
			c.Fatalf("the last packet is torn: %d bytes", len(data))
		}
		size := 16 + int(binary.LittleEndian.Uint32(data[8:]))
		text := data[bytes.LastIndexByte(data[:size], '<')+1 : size] // the headers may hold one too
		text, _, _ = bytes.Cut(text, []byte(">"))
		number, err := strconv.Atoi(string(text))
		switch last := len(numbers) - 1; {
		case err != nil:
			c.Fatalf("a packet has no number: %q", data[:size])
		case last >= 0 && number <= numbers[last]:
			c.Fatalf("packet %d comes after %d", number, numbers[last])
		case last >= 0 && number > numbers[last]+1:
			gaps++
		}
		numbers, data = append(numbers, number), data[size:]
	}
	return numbers, gaps
}

// counted checks what cat says of what it wrote, and returns how many gaps it did not tell.
func (c *cluster) counted(data []byte, said string) (numbers []int, untold int) {
	c.Helper()
	numbers, gaps := c.numbers(data)
	match := wrote.FindStringSubmatch(said)
	if match == nil || match[1] != strconv.Itoa(len(numbers)) || match[2] != strconv.Itoa(len(data)) {
		c.Errorf("cat wrote %d packets, %d bytes, and says: %s", len(numbers), len(data), said)
	}
	return numbers, max(0, gaps-strings.Count(said, "may be missing"))
}

// flow has web send numbered packets of 1,400 bytes. What wait returns is the last number.
func (c *cluster) flow(perSecond, seconds int) (wait func() int) {
	cmd := c.command("exec", "web", "--", "bash", "-c", fmt.Sprintf(`exec 3>/dev/udp/192.0.2.1/4444
		printf -v pad %%01350d 0
		begun=${EPOCHREALTIME/./}
		for ((i = 1; (now = ${EPOCHREALTIME/./} - begun) < %d; )); do
			for ((due = now * %d / 1000000; i <= due; i++)); do
				until printf '<%%d>%%s' $i "$pad" >&3; do :; done # an ICMP error makes the next one fail
			done 2>/dev/null
			sleep 0.02
		done
		echo $((i - 1))`, seconds*1_000_000, perSecond))
	out := new(bytes.Buffer)
	cmd.Stdout = out
	c.must(cmd.Start())
	return func() int {
		c.must(cmd.Wait())
		last, _ := strconv.Atoi(strings.TrimSpace(out.String()))
		return last
	}
}

// make begins a make of the repository, as a script does: with nothing to read on stdin.
func (c *cluster) make(args ...string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
	args = append(args, "--no-print-directory", "CLUSTER="+c.name, "CONTEXT="+c.context, "NAMESPACE="+c.namespace)
	cmd, stdout, stderr = exec.Command("make", args...), new(bytes.Buffer), new(bytes.Buffer)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "..", stdout, stderr
	return cmd, stdout, stderr
}

// live begins `packetcapture live`. What wait returns is what it wrote and said when it ended.
func (c *cluster) live(name string) (cmd *exec.Cmd, wait func() ([]byte, string)) {
	c.Helper()
	cmd = c.command("-n", "kube-system", "exec", "-i", c.capturePod(), "--", "packetcapture", "live", name)
	_, err := cmd.StdinPipe()
	c.must(err)
	out, said := new(bytes.Buffer), new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = out, said
	c.must(cmd.Start())
	c.readers(2) // it and its tcpdump
	return cmd, func() ([]byte, string) { cmd.Wait(); return out.Bytes(), said.String() }
}

// readers waits until so many processes of cat and live run.
func (c *cluster) readers(want int) {
	c.Helper()
	c.until(func() string {
		if n, err := c.look(); err != nil || n.readers != want {
			return fmt.Sprintf("%d readers run, not %d: %v", n.readers, want, err)
		}
		return ""
	})
}

// refused checks that a command gives a sentence and no packet.
func (c *cluster) refused(what string, data []byte, said string, err error) {
	c.Helper()
	if err == nil || len(data) > 0 || len(strings.Fields(said)) < 5 {
		c.Errorf("%s: %v, %d bytes, and it says: %s", what, err, len(data), said)
	}
}

func (c *cluster) reading() {
	for _, args := range [][]string{{"cat"}, {"cat", "nobody"}, {"cat", ""}, {"cat", "-x", "web"}, {"dump", "web"}, {"cat", "web"},
		{"live", "web"}, {"live", c.namespace + "/web"}, {"cat", "../" + c.namespace + "/web"}} {
		data, said, err := c.packetcapture(args...)
		c.refused(fmt.Sprintf("packetcapture %q", args), data, said, err)
	}
	c.annotate("web", "=3", "/filter=udp port 4444")
	c.exact("3 web")
	_, wait := c.live(c.namespace + "/web")
	last := c.flow(500, 5)() // 3.4 MB: over three rotations
	c.until(func() string {
		data, said, err := c.packetcapture("cat", c.namespace+"/web")
		if err != nil {
			return err.Error()
		}
		numbers, untold := c.counted(data, said)
		if untold > 0 {
			c.Errorf("%d gaps are not told: %s", untold, said)
		}
		if len(numbers) == 0 || numbers[len(numbers)-1] != last {
			return fmt.Sprintf("the last packet is %d, and not in %d", last, len(numbers))
		}
		return ""
	})
	c.annotate("web", "-")
	data, said := wait() // it ends with the capture
	if numbers, _ := c.numbers(data); len(numbers) != last {
		c.Errorf("live wrote %d of %d packets: %s", len(numbers), last, said)
	}

	c.annotate("web", "=3") // a client that goes, while no packet comes
	c.exact("3 web")
	client, _ := c.live(c.namespace + "/web")
	client.Process.Kill()
	c.readers(0)
	c.row("the client of `live` killed while no packet comes", "`live` ends", 0)
}

// makePcapAndLive runs the Makefile's two targets as a script would.
func (c *cluster) makePcapAndLive() {
	c.annotate("web", "=3", "/filter=udp port 4444")
	c.exact("3 web")
	file := c.TempDir() + "/out.pcap"
	live, stdout, said := c.make("live", "POD=web")
	c.must(live.Start())
	c.readers(2)
	last := c.flow(50, 2)()
	c.until(func() string {
		cmd, _, said := c.make("-C", "test/..", "pcap", "POD=web", "OUT="+file)
		if err := cmd.Run(); err != nil {
			return fmt.Sprintf("make pcap: %v: %s", err, said)
		}
		data, err := os.ReadFile(file)
		c.must(err)
		if numbers, _ := c.numbers(data); len(numbers) != last {
			return fmt.Sprintf("make pcap has %d of %d packets", len(numbers), last)
		}
		return ""
	})
	live.Process.Signal(syscall.SIGTERM)
	live.Wait()
	c.readers(0)
	if numbers, _ := c.numbers(stdout.Bytes()); len(numbers) != last {
		c.Errorf("make live wrote %d of %d packets: %s", len(numbers), last, said)
	}
	c.row("`make live` of a script, without a stdin, killed", "it had each packet, and no process is left", 0)

	live, _, said = c.make("live", "POD=web")
	c.must(live.Start())
	c.readers(2)
	c.annotate("web", "-")
	began := time.Now()
	if err := live.Wait(); err != nil {
		c.Errorf("make live, when the annotation goes: %v: %s", err, said)
	}
	c.row("annotation removed", "`make live` ends", time.Since(began))
	c.readers(0)
}

// anotherPods: a pod that is not captured itself gives no packets, also where another one has its name.
func (c *cluster) anotherPods() {
	c.annotate("web", "=1", "/filter=udp port 4444")
	c.exact("1 web")
	c.kubectl("exec", "web", "--", "bash", "-c", say("<1>"))
	c.holds("web.pcap", "<1>")
	other := c.elsewhere("-2")
	other.create(other.manifest("web", options{annotations: []string{"=5 "}}))
	other.wait(ready, "web")
	for _, why := range []string{"CaptureInvalid", "CaptureWaiting"} {
		other.told("web", why)
		for _, args := range [][]string{{"cat", "web"}, {"cat", other.namespace + "/web"}, {"live", other.namespace + "/web"}} {
			data, said, err := c.packetcapture(args...)
			c.refused(fmt.Sprintf("packetcapture %q after %s", args, why), data, said, err)
		}
		file := c.TempDir() + "/web.pcap"
		for _, target := range []string{"pcap", "live"} {
			cmd, stdout, said := other.make(target, "POD=web", "OUT="+file)
			err := cmd.Run()
			c.refused("make "+target+" after "+why, stdout.Bytes(), said.String(), err)
		}
		if _, err := os.Stat(file); err == nil {
			c.Errorf("make pcap has left a file after %s", why)
		}
		if why == "CaptureInvalid" {
			other.annotate("web", "=5", "/interface=net9")
		}
	}
	c.row("a pod that is not captured, where another has its name", "`cat`, `live`, `make pcap` and `make live` give a sentence, no packet", 0)
}

// catFast: a packet that is missing was dropped by the kernel, which happens on a busy machine, or cat tells of the gap.
func (c *cluster) catFast() {
	c.annotate("web", "=3", "/filter=udp port 4444")
	c.exact("3 web")
	_, wait := c.live(c.namespace + "/web")
	flow := c.flow(3600, 20)
	tries, untold := 0, 0
	for began := time.Now(); time.Since(began) < 20*time.Second; tries++ {
		data, said, err := c.packetcapture("cat", c.namespace+"/web")
		c.must(err)
		numbers, gaps := c.counted(data, said)
		untold = max(untold, gaps)
		lines, err := c.pipe(string(data), "-n", "kube-system", "exec", "-i", c.capturePod(), "--", "tcpdump", "-Z", "root", "-nn", "-r", "-")
		if count := strings.Count(lines, ".4444: UDP"); err != nil || count != len(numbers) {
			c.Errorf("tcpdump reads %d of %d packets: %v", count, len(numbers), err)
		}
	}
	last := flow()
	sent := last // tcpdump reads its ring once a second: it has read all when it has one that was sent later
	c.until(func() string {
		sent++
		c.kubectl("exec", "web", "--", "bash", "-c", say(fmt.Sprintf("<%d>", sent)))
		data, said, err := c.packetcapture("cat", c.namespace+"/web")
		c.must(err)
		if numbers, _ := c.counted(data, said); len(numbers) == 0 || numbers[len(numbers)-1] <= last {
			return fmt.Sprintf("after packet %d nothing more is captured", last)
		}
		return ""
	})
	c.annotate("web", "-")
	data, _ := wait()
	numbers, _ := c.numbers(data)
	var captured, dropped int
	c.told("web", "CaptureStopped")
	for _, message := range c.events("web", "CaptureStopped") {
		_, counts, _ := strings.Cut(message, "Stopped: ")
		fmt.Sscanf(counts, "%d packets captured, %d packets", &captured, &dropped)
	}
	if all := captured + dropped; all < last || all > sent || untold > dropped || dropped > sent/4 {
		c.Errorf("of %d packets %d were captured and %d dropped; %d gaps of a cat were not told", sent, captured, dropped, untold)
	}
	c.row(fmt.Sprintf("%d times `cat`, and `live`, while 5 MB/s rotate through 3 files for 20 s", tries),
		fmt.Sprintf("each a whole pcap in order; the kernel dropped %d of %d packets; `live` has %d", dropped, sent, len(numbers)), 0)
}

func (c *cluster) many() {
	var manifests []map[string]any
	var want []string
	for i := range 30 {
		name := fmt.Sprintf("many-%d", i)
		manifests, want = append(manifests, c.manifest(name, options{})), append(want, "3 "+name)
	}
	c.create(manifests...)
	c.wait(ready, "-l", "app=many")
	c.kubectl("annotate", "pod", "-l", "app=many", annotation+"=3")
	c.row("30 pods annotated at once", "all captured", c.exact(want...))
	c.kubectl("annotate", "pod", "-l", "app=many", annotation+"-")
	c.row("30 pods released at once", "all stopped, files gone", c.exact())
}

func (c *cluster) nodeRestarted() {
	c.annotate("web", "=2")
	c.exact("2 web")
	pid, began := c.pid("2 web"), time.Now()
	c.must(exec.Command("docker", "restart", "--time", "1", c.node).Run())
	c.another(pid, "2 web")
	c.row("the node's container restarted", "captured anew when its pods are back", time.Since(began))
}
