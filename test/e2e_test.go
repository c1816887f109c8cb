//go:build e2e

// Package test holds what needs a cluster, on which `make deploy` has rolled the program out: the end-to-end tests, and
// the measurements beside them. They speak to the cluster through kubectl, and count the processes and files of the
// node under test from outside of the program.
package test

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"
)

const annotation = "tcpdump.antrea.io"

// slow is SLOW, of a slow node.
var slow = func() time.Duration {
	n, _ := strconv.Atoi(os.Getenv("SLOW"))
	return time.Duration(max(n, 1))
}()

// patience is the longest that anything may take to be right.
var patience = 90 * time.Second * slow

// cluster is the cluster under test. Each step has its own copy, with its own T.
type cluster struct {
	*testing.T
	name, context, image string
	node                 string // under test
	namespace            string // the test's own
	births               int    // pods that are created with the annotation
	table                *[][]string
	bash                 *bash // on the node
}

func newCluster(t *testing.T) *cluster {
	c := &cluster{T: t, name: os.Getenv("CLUSTER"), image: os.Getenv("IMAGE"), table: &[][]string{}, births: 20, bash: new(bash)}
	if c.name == "" || c.image == "" {
		t.Fatal("CLUSTER and IMAGE must name the cluster and the image: use make e2e, make node or make measure")
	}
	c.context = "kind-" + c.name
	if context, ok := os.LookupEnv("CONTEXT"); ok {
		c.context = context
	}
	c.node = cmp.Or(os.Getenv("NODE"), c.name+"-worker")
	c.namespace = fmt.Sprintf("e2e-%d", os.Getpid())
	c.kubectl("create", "namespace", c.namespace)
	t.Cleanup(c.bash.end)
	t.Cleanup(func() { c.try("delete", "namespace", c.namespace, "--timeout=3m", fmt.Sprint("--wait=", slow == 1)) })
	return c
}

// command is a kubectl in the test's namespace; a -n in the arguments comes later, and counts.
func (c *cluster) command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	c.Cleanup(cancel) // and so none outlives its step
	args = append([]string{"-n", c.namespace}, args...)
	if c.context != "" {
		args = append([]string{"--context", c.context}, args...)
	}
	return exec.CommandContext(ctx, "kubectl", args...)
}

func (c *cluster) pipe(input string, args ...string) (string, error) {
	cmd := c.command(args...)
	cmd.Stdin = strings.NewReader(input)
	stderr := new(bytes.Buffer)
	cmd.Stderr = stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, stderr)
	}
	return strings.TrimSpace(string(out)), err
}

func (c *cluster) try(args ...string) (string, error) { return c.pipe("", args...) }

func (c *cluster) kubectl(args ...string) string {
	c.Helper()
	out, err := c.try(args...)
	c.must(err)
	return out
}

func (c *cluster) must(err error) {
	c.Helper()
	if err != nil {
		c.Fatal(err)
	}
}

// bash is one on the node, in which all scripts run: it takes seconds to begin one on a slow node.
type bash struct {
	*exec.Cmd // nil before the first script, and after the node was away
	in        io.WriteCloser
	out       *bufio.Reader
}

func (b *bash) end() {
	if b.Cmd != nil {
		b.in.Close()
		b.Wait()
		b.Cmd = nil
	}
}

// onNode runs a script on the node itself, as NODE_SH does it, by default for a node of kind.
func (c *cluster) onNode(script string) (string, error) {
	b := c.bash
	if b.Cmd == nil {
		b.Cmd = exec.Command("bash", "-c", cmp.Or(os.Getenv("NODE_SH"), "docker exec -i "+c.node)+" bash")
		b.Dir = ".." // the folder of the Makefile
		in, err := b.StdinPipe()
		c.must(err)
		out, err := b.StdoutPipe()
		c.must(err)
		c.must(b.Start())
		b.in, b.out = in, bufio.NewReader(out)
	}
	fmt.Fprintf(b.in, "( %s\n) </dev/null 2>&1; echo -e \"\\nended: $?\"\n", script)
	text := new(strings.Builder)
	for {
		line, err := b.out.ReadString('\n')
		status, isEnd := strings.CutPrefix(line, "ended: ")
		switch {
		case err != nil:
			b.end()
			return "", fmt.Errorf("the node does not answer: %w", err)
		case isEnd && status != "0\n":
			return "", fmt.Errorf("on the node: exit status %s%s", status, text)
		case isEnd:
			return strings.TrimSpace(text.String()), nil
		}
		text.WriteString(line)
	}
}

// until polls until nothing is wrong any more, and returns how long that took.
func (c *cluster) until(wrong func() string) time.Duration {
	c.Helper()
	began := time.Now()
	for what := wrong(); what != ""; what = wrong() {
		if time.Since(began) > patience {
			c.Fatalf("not right after %v: %s", patience, what)
		}
		time.Sleep(50 * time.Millisecond * slow * slow) // a look is work for the node, which has other things to do
	}
	return time.Since(began)
}

// ---- Pods, their annotations and Events ----

// options make the pods of the tests. Annotations are written behind the common part of their names: "=3", "/filter=tcp".
type options struct {
	annotations            []string
	command, second        string // of bash; the first sleeps by default, the second container is there if it has one
	init                   string // command of an init container
	sidecar                string // and of one that goes on beside the others and ends after them
	isHost, never, isPlain bool   // the host's network; never restarted; not assigned to the node
}

const idle = "trap exit TERM; sleep infinity & wait"

// say is a command that sends a packet, which nobody answers.
func say(what string) string { return `echo "` + what + `" >/dev/udp/192.0.2.1/4444; ` }

func (c *cluster) manifest(name string, o options) map[string]any {
	type object = map[string]any
	container := func(name, command string) object {
		return object{"name": name, "image": c.image, "imagePullPolicy": "IfNotPresent", "command": []string{"bash", "-c", command}}
	}
	annotations := map[string]string{}
	for _, text := range o.annotations {
		key, value, _ := strings.Cut(text, "=")
		annotations[annotation+key] = value
	}
	containers, inits, restart := []object{container("main", cmp.Or(o.command, idle))}, []object{}, "Always"
	if o.second != "" {
		containers = append(containers, container("second", o.second))
	}
	if o.init != "" {
		inits = append(inits, container("init", o.init))
	}
	if o.sidecar != "" {
		sidecar := container("sidecar", o.sidecar)
		sidecar["restartPolicy"] = "Always"
		inits = append(inits, sidecar)
	}
	if o.never {
		restart = "Never"
	}
	spec := object{"restartPolicy": restart, "terminationGracePeriodSeconds": 2, "automountServiceAccountToken": false,
		"hostNetwork": o.isHost, "containers": containers, "initContainers": inits, "tolerations": []object{{"operator": "Exists"}}}
	if !o.isPlain {
		spec["nodeName"] = c.node
	}
	prefix, _, _ := strings.Cut(name, "-")
	return object{"apiVersion": "v1", "kind": "Pod", "spec": spec,
		"metadata": object{"name": name, "annotations": annotations, "labels": object{"app": prefix, "step": "yes"}}}
}

// create makes pods in one call, without waiting for them.
func (c *cluster) create(manifests ...map[string]any) {
	c.Helper()
	list, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": manifests})
	c.must(err)
	_, err = c.pipe(string(list), "create", "-f", "-")
	c.must(err)
}

// wait waits until pods, or those with a label (-l), are ready, or are as another condition says.
func (c *cluster) wait(condition string, which ...string) {
	c.Helper()
	c.kubectl(append([]string{"wait", "pod", "--for=" + condition, fmt.Sprintf("--timeout=%ds", int(3*patience.Seconds()))}, which...)...)
}

const (
	ready     = "condition=Ready"
	succeeded = "jsonpath={.status.phase}=Succeeded"
)

// annotate changes annotations of a pod: "=3", "/filter=tcp", "/filter-".
func (c *cluster) annotate(name string, changes ...string) {
	c.Helper()
	args := []string{"annotate", "--overwrite", "pod", name}
	for _, change := range changes {
		args = append(args, annotation+change)
	}
	c.kubectl(args...)
}

func (c *cluster) uid(name string) string {
	return c.kubectl("get", "pod", name, "-o", "jsonpath={.metadata.uid}")
}

// events are a pod's Events of a reason since the step began, each as "<type>: <message>".
func (c *cluster) events(pod, reason string) []string {
	out, _ := c.try("get", "events", "--field-selector", "involvedObject.name="+pod+",reason="+reason,
		"-o", `jsonpath={range .items[*]}{.type}: {.message}{"\n"}{end}`)
	return slices.DeleteFunc(strings.Split(out, "\n"), func(line string) bool { return line == "" })
}

// told waits until a pod has an Event of that reason with these words.
func (c *cluster) told(pod, reason string, words ...string) {
	c.Helper()
	c.until(func() string {
		told := c.events(pod, reason)
		for _, message := range told {
			if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(message, word) }) {
				return ""
			}
		}
		return fmt.Sprintf("no Event %s of %s says %q, but %q", reason, pod, words, told)
	})
}

// ---- What runs and lies on the node ----

// census is counted by a look at the node's processes.
type census struct {
	program  string            // PID
	tcpdumps map[string]string // PIDs by "N name", of captures into N files /capture-name.pcap
	doubles  int               // tcpdumps beyond the first of a name
	readers  int               // that run packetcapture cat
	files    []string          // the names of all capture files
}

var (
	tcpdumpLine = regexp.MustCompile(`^(\d+) .*?tcpdump -C 1 -W (\d+) -w /capture-(\S+)\.pcap `)
	programLine = regexp.MustCompile(`^(\d+) \S*packetcapture( cat)?\b`)
)

// look reaches the program's files through /proc: its root is no file system of the node.
func (c *cluster) look() (n census, err error) {
	n.tcpdumps = map[string]string{}
	out, err := c.onNode(`for p in /proc/[0-9]*; do
			read -r comm <$p/comm || continue
			case $comm in tcpdump|nsenter|packetcapture) echo "${p#/proc/} $(tr '\0' ' ' <$p/cmdline)" ;; esac
			[[ $comm != packetcapture ]] || ls $p/root/ | sed -n 's/^capture-/file capture-/p'
		done 2>/dev/null; true`)
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if file, ok := strings.CutPrefix(line, "file "); ok {
			n.files = append(n.files, file)
		} else if m := tcpdumpLine.FindStringSubmatch(line + " "); m != nil {
			key := m[2] + " " + m[3]
			if n.tcpdumps[key] != "" {
				n.doubles++
			}
			n.tcpdumps[key] = m[1]
		} else if m := programLine.FindStringSubmatch(line); m != nil && m[2] != "" {
			n.readers++
		} else if m != nil {
			n.program = m[1]
		}
	}
	slices.Sort(n.files)
	n.files = slices.Compact(n.files) // a reader sees them as well
	return n, err
}

// exact waits until the node has exactly what is wanted, and returns how long that took. "3 web" is a capture of web into
// 3 files that runs, and has its first file; "- job" is one whose files are left.
func (c *cluster) exact(want ...string) time.Duration {
	c.Helper()
	return c.until(func() string {
		n, err := c.look()
		if err != nil {
			return err.Error()
		}
		return n.wrong(want)
	})
}

func (n census) wrong(want []string) string {
	running, found := 0, map[string]bool{}
	for _, key := range want {
		files, name, _ := strings.Cut(key, " ")
		found["capture-"+name+".pcap"] = false
		if files != "-" {
			running++
			if n.tcpdumps[key] == "" {
				return "no tcpdump for " + key
			}
		}
	}
	if len(n.tcpdumps) != running || n.doubles > 0 {
		return fmt.Sprintf("asked for is %q, and %d tcpdumps run: %v", want, len(n.tcpdumps)+n.doubles, n.tcpdumps)
	}
	for _, file := range n.files {
		stem := strings.TrimRight(file, "0123456789")
		if _, ok := found[stem]; !ok {
			return "a file that nobody asked for: " + file
		}
		found[stem] = true
	}
	for stem, is := range found {
		if !is {
			return "no file " + stem
		}
	}
	return ""
}

func (c *cluster) pid(key string) string {
	c.Helper()
	n, err := c.look()
	if err != nil || n.tcpdumps[key] == "" {
		c.Fatalf("no tcpdump for %q: %v, %v", key, n, err)
	}
	return n.tcpdumps[key]
}

// another waits until a capture, which is all that there is, runs as another process.
func (c *cluster) another(pid, key string) time.Duration {
	c.Helper()
	return c.until(func() string {
		n, err := c.look()
		if err == nil && n.tcpdumps[key] == pid {
			return key + " still runs as PID " + pid
		} else if err != nil {
			return err.Error()
		}
		return n.wrong([]string{key})
	})
}

// capturePod is the packetcapture pod that is ready on the node.
func (c *cluster) capturePod() (name string) {
	c.Helper()
	c.until(func() string {
		out, err := c.try("-n", "kube-system", "get", "pods", "-l", "app=packetcapture",
			"--field-selector", "status.phase=Running,spec.nodeName="+c.node, "-o",
			`jsonpath={range .items[?(@.status.containerStatuses[0].ready==true)]}{.metadata.name} {.metadata.deletionTimestamp}{"\n"}{end}`)
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) == 1 {
				name = f[0]
				return ""
			}
		}
		return fmt.Sprintf("no packetcapture pod is ready on %s: %q, %v", c.node, out, err)
	})
	return name
}

// read is what tcpdump says of a file's packets that match a filter.
func (c *cluster) read(file string, filter ...string) string {
	out, err := c.try(append([]string{"-n", "kube-system", "exec", c.capturePod(), "--",
		"tcpdump", "-Z", "root", "-nn", "-A", "-r", "/capture-" + file}, filter...)...)
	if err != nil {
		return err.Error() // the last packet may be torn while it is written
	}
	return out
}

// holds waits until the packets of a file have these words.
func (c *cluster) holds(file string, words ...string) {
	c.Helper()
	c.until(func() string {
		text := c.read(file)
		for _, word := range words {
			if !strings.Contains(text, word) {
				return fmt.Sprintf("%q is not in %s: %s", word, file, text)
			}
		}
		return ""
	})
}

// ---- The tests ----

// steps are what happens to a cluster. Each begins with the idle pods web and web-2 and nothing captured, and leaves them so.
var steps = []struct {
	name    string
	anyNode bool // it needs kubectl alone, and so is a part of TestNode
	run     func(c *cluster)
}{
	{"annotated, changed, removed", true, (*cluster).changed},
	{"mistakes while a capture runs", false, (*cluster).mistakes},
	{"kill -9 of tcpdump and of the program", true, (*cluster).killed},
	{"rollout restart", false, (*cluster).rollout},
	{"deleted and recreated", false, (*cluster).deleted},
	{"finished", false, (*cluster).finished},
	{"100 alternations", false, (*cluster).alternations},
	{"API server away", false, (*cluster).serverAway},
	{"from birth to the end", true, (*cluster).born},
	{"the last packets of a sidecar", false, (*cluster).sidecars},
	{"host network", true, (*cluster).hostNetwork},
	{"static pod", true, (*cluster).static},
	{"the packetcapture pod itself", true, (*cluster).itself},
	{"several containers, crashes, names", false, (*cluster).special},
	{"filter", false, (*cluster).filter},
	{"interfaces", false, (*cluster).interfaces},
	{"room", false, (*cluster).room},
	{"cat", false, (*cluster).cat},
	{"cat while 5 MB/s rotate", false, (*cluster).catFast},
	{"30 at once", false, (*cluster).many},
	{"node restarted", false, (*cluster).nodeRestarted},
}

// TestE2E breaks what can break on the cluster, and writes what became of it to OUTPUTS.
func TestE2E(t *testing.T) {
	c := newCluster(t)
	c.steps(false)
	if !t.Failed() && !strings.Contains(flag.Lookup("test.run").Value.String(), "/") {
		c.write("e2e.txt", "fault", "what happens", "right again after")
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
			defer func() {
				inner.annotate("web", "-", "/filter-", "/interface-")
				inner.annotate("web-2", "-", "/filter-", "/interface-")
				inner.kubectl("delete", "pod", "-l", "step", "--timeout=3m")
				inner.exact()
			}()
			inner.kubectl("delete", "--raw", "/api/v1/namespaces/"+c.namespace+"/events") // all by one request
			step.run(&inner)
		})
	}
}

// row is a line of the table; took is 0 where time is not what matters.
func (c *cluster) row(fault, happens string, took time.Duration) {
	after := ""
	if took > 0 {
		after = fmt.Sprintf("%.1f s", took.Seconds())
	}
	*c.table = append(*c.table, []string{fault, happens, after})
}

// write writes the table to stdout and to a file of OUTPUTS, below a line that says what it was seen on.
func (c *cluster) write(file string, head ...string) {
	on := c.kubectl("get", "node", c.node, "-o", "jsonpath={.status.capacity.cpu} cores, kernel {.status.nodeInfo.kernelVersion}, "+
		"Kubernetes {.status.nodeInfo.kubeletVersion}, {.status.nodeInfo.containerRuntimeVersion}")
	text := new(strings.Builder)
	fmt.Fprintf(text, "%s, %s\n\n", on, time.Now().UTC().Format(time.DateOnly))
	w := tabwriter.NewWriter(text, 0, 0, 1, ' ', 0)
	rule := slices.Repeat([]string{"---"}, len(head))
	for _, row := range append([][]string{head, rule}, *c.table...) {
		fmt.Fprintf(w, "| %s\t|\n", strings.Join(row, "\t| "))
	}
	w.Flush()
	fmt.Print(text)
	folder := cmp.Or(os.Getenv("OUTPUTS"), "../outputs")
	c.must(os.MkdirAll(folder, 0o755))
	c.must(os.WriteFile(filepath.Join(folder, file), []byte(text.String()), 0o644))
}

// C2, C4, C7
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
	c.told("web-2", "CaptureStopped", "Normal", "captured, 0 dropped by the kernel; its files (")
}

// C2, C7, C9, C10
func (c *cluster) mistakes() {
	c.annotate("web", "=3", "/filter=udp", "/interface=any")
	c.exact("3 web")
	pid := c.pid("3 web")
	c.kubectl("exec", "web", "--", "bash", "-c", say("before"))
	c.holds("web.pcap0", "before")
	mistakes := []string{"=012", "=50000", "=5abc", "=0", "=", "=3",
		"/filter=tcp.port == 80", "/filter=“tcp”", "/filter=tcp\nport 80", "/filter=-w /tmp/evil", "/filter=$(reboot)",
		"/filter=" + strings.Repeat("udp or ", 150) + "tcp", "/filter=udp",
		"/interface=-i", "/interface=a/b", "/interface=", "/interface=sixteen-letters0", "/interface=any"}
	for _, mistake := range mistakes {
		c.annotate("web", mistake)
	}
	for _, mistake := range mistakes {
		if key, value, _ := strings.Cut(mistake, "="); value != "3" && value != "udp" && value != "any" {
			quoted := strconv.Quote(value)
			c.told("web", "CaptureInvalid", "Warning", " "+annotation+key+" is "+quoted[:min(len(quoted)-1, 100)], "goes on as it was")
		}
	}
	c.exact("3 web")
	if got := c.pid("3 web"); got != pid {
		c.Errorf("a mistake restarted the capture: PID %s, then %s", pid, got)
	}
	c.holds("web.pcap0", "before")
	c.annotate("web-2", "=05")
	c.told("web-2", "CaptureInvalid", `"05"`, "nothing is captured")
	c.exact("3 web")
	c.row("a mistake in N, filter or interface", "told; the capture goes on, same PID", 0)
}

// C5, C7
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
			c.told("web", "CaptureFailed", "Warning", "signal: killed", "it is tried again in ")
			c.told("web", "CaptureStarted", "Warning", "began again at the first file")
		} else {
			c.onNode("kill -9 " + n.program)
			c.row("`kill -9` of the program", "no tcpdump outlives it; captured anew", c.another(pid, "3 web"))
		}
	}
}

// C5, C7: the last Events are told also when the program ends.
func (c *cluster) rollout() {
	c.annotate("web", "=3")
	c.exact("3 web")
	pid, began := c.pid("3 web"), time.Now()
	c.kubectl("-n", "kube-system", "rollout", "restart", "daemonset/packetcapture")
	c.kubectl("-n", "kube-system", "rollout", "status", "daemonset/packetcapture", "--timeout=3m")
	c.another(pid, "3 web")
	c.row("`kubectl rollout restart`", "captured anew by the new pod", time.Since(began))
	c.told("web", "CaptureStopped", "its files (")
}

// C5, C7
func (c *cluster) deleted() {
	c.create(c.manifest("again", options{annotations: []string{"=2"}}))
	c.wait(ready, "again")
	c.exact("2 again")
	began := time.Now()
	c.kubectl("delete", "pod", "again")
	took := time.Since(began)
	c.row("pod deleted", "stopped, files gone; one Event", c.exact())
	c.told("again", "CaptureStopped", "are deleted")
	// A pod that is still there 5 s after its network has gone is told so before.
	if told := c.events("again", "CaptureStopped"); len(told) != 1 && took < 5*time.Second {
		c.Errorf("a pod that is deleted has the Events %q", told)
	}
	c.create(c.manifest("again", options{annotations: []string{"=2"}}))
	c.wait(ready, "again")
	c.row("pod recreated with the annotation", "captured", c.exact("2 again"))
}

// C4, C5: a finished pod keeps its files, and after a restart of the program, when it has none, takes no room.
func (c *cluster) finished() {
	c.create(c.manifest("job", options{never: true, command: say("last words"), annotations: []string{"=1000"}}))
	c.wait(succeeded, "job")
	c.row("pod finished", "tcpdump ends, files stay", c.exact("- job"))
	c.holds("job.pcap000", "last words")
	c.told("job", "CaptureStopped", "the files stay until the annotation")
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

// C2, C5
func (c *cluster) alternations() {
	for i := range 100 {
		c.annotate("web-2", []string{"=3", "=4", "-"}[i%3])
	}
	c.row("100 alternations of 3, 4 and no annotation", "exactly the last one", c.exact("3 web-2"))
}

// C5, C6
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

// C3: pods send 40 packets as the very first thing they do, and exit.
func (c *cluster) born() {
	c.complete("birth", c.births, 40, "pods created with the annotation, which send 40 packets at once and exit",
		options{never: true, annotations: []string{"=1"}, command: `for i in {1..40}; do ` + say("packet $i.") + `done`})
}

// C10: a native sidecar is ended when all else has, and the pod's network goes at once after that.
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
		manifests, kept = append(manifests, c.manifest(name, o)), append(kept, "- "+name)
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

// C3, C7
func (c *cluster) hostNetwork() {
	c.create(c.manifest("host", options{isHost: true, annotations: []string{"=1"}}))
	c.exact("1 host")
	c.told("host", "CaptureStarted", "Warning", "whole node's traffic")
	c.kubectl("delete", "pod", "host")
	c.exact()
}

// C3: a static pod's cgroups have another UID than the API.
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

// C3, C8: tcpdump compiles filters in the packetcapture pod, and looks up no name from there.
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
	c.told("web", "CaptureInvalid", `"host e2e.example.com"`, "hosts and ports are numbers")
	c.holds(name+".pcap", ".8080: Flags [S]") // a probe that came later: what was sent before is in the file
	if got := c.read(name+".pcap", "port", "53"); strings.Contains(got, "example") || strings.Contains(got, ".53: ") {
		c.Errorf("a name in a filter was looked up: %s", got)
	}
	c.exact("1 " + name)
}

// C3, C4
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
	other := *c
	other.namespace += "-2"
	c.kubectl("create", "namespace", other.namespace)
	defer c.try("delete", "namespace", other.namespace, "--timeout=3m")
	other.create(other.manifest("web", options{annotations: []string{"=3"}}))
	twin := "web_" + other.uid("web")[:8]
	c.exact(append(all, "3 "+twin)...)
	if _, said, err := c.readAll("web"); err == nil || !strings.Contains(said, "/capture-web.pcap /capture-"+twin+".pcap") {
		c.Errorf("cat of a name that two pods have: %v, %s", err, said)
	}
	c.annotate("web", "-")
	c.exact(append(all[1:], "3 "+twin)...)
}

// C9
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

// C10
func (c *cluster) interfaces() {
	c.create(c.manifest("pair", options{annotations: []string{"=1", "/interface=lo"},
		command: "while true; do cat </dev/tcp/127.0.0.1/4444; sleep 0.2; done",
		second: `exec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1:4444", Listen => 9, ReuseAddr => 1);
			while ($c = $s->accept) { print $c "over loopback\n"; close $c }'`}))
	c.exact("1 pair")
	c.holds("pair.pcap", "over loopback")
	c.annotate("web", "=1", "/interface=net9")
	c.told("web", "CaptureFailed", "Warning", "the pod has no interface net9, but ", "it is tried again in ")
	c.exact("1 pair")
	link := `for p in /proc/[0-9]*; do
		tr _ - <$p/cgroup | grep -q ` + c.uid("web") + ` && exec nsenter -t ${p#/proc/} -n ip link `
	defer c.onNode(link + "delete net9; done 2>/dev/null")
	c.onNode(link + "add net9 up type veth; done 2>/dev/null")
	c.row("the interface comes that is asked for", "captured", c.exact("1 pair", "1 web"))
}

// C4: whoever fits goes first.
func (c *cluster) room() {
	c.annotate("web", "=1000")
	c.exact("1000 web")
	c.annotate("web-2", "=1001") // beside web's, more than daemonset.yaml's ephemeral-storage holds
	c.told("web-2", "CaptureWaiting", "Warning", "N=1001", "1000 of the ")
	c.create(c.manifest("small", options{annotations: []string{"=5"}}))
	c.exact("1000 web", "5 small")
	c.annotate("web", "-")
	c.row("a capture that waits for room gets it", "it starts by itself", c.exact("1001 web-2", "5 small"))
}

// ---- cat ----

var wrote = regexp.MustCompile(`(?m)^(\d+) packets?, (\d+) bytes$`)

// readAll is what packetcapture cat writes and says.
func (c *cluster) readAll(args ...string) (data []byte, said string, err error) {
	cmd := c.command(append([]string{"-n", "kube-system", "exec", c.capturePod(), "--", "packetcapture", "cat"}, args...)...)
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

// counted checks what cat says of what it wrote, and that each gap was told.
func (c *cluster) counted(data []byte, said string) (numbers []int) {
	c.Helper()
	numbers, gaps := c.numbers(data)
	match := wrote.FindStringSubmatch(said)
	if match == nil || match[1] != strconv.Itoa(len(numbers)) || match[2] != strconv.Itoa(len(data)) {
		c.Errorf("cat wrote %d packets, %d bytes, and says: %s", len(numbers), len(data), said)
	}
	if told := strings.Count(said, "may be missing"); gaps > told {
		c.Errorf("%d gaps, and %d are told: %s", gaps, told, said)
	}
	return numbers
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

// following begins a cat -f, or what else is to read. What wait returns is what it wrote and said when it ended.
func (c *cluster) following(command ...string) (cmd *exec.Cmd, wait func() ([]byte, string)) {
	cmd = c.command(append([]string{"-n", "kube-system", "exec", "-i", c.capturePod(), "--"}, command...)...)
	_, err := cmd.StdinPipe() // what cat -f reads to know that its client is there
	c.must(err)
	out, said := new(bytes.Buffer), new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = out, said
	c.must(cmd.Start())
	return cmd, func() ([]byte, string) { cmd.Wait(); return out.Bytes(), said.String() }
}

func (c *cluster) readers(want int) {
	c.Helper()
	c.until(func() string {
		if n, err := c.look(); err != nil || n.readers != want {
			return fmt.Sprintf("%d cats run, not %d: %v", n.readers, want, err)
		}
		return ""
	})
}

// C11
func (c *cluster) cat() {
	for _, args := range [][]string{{}, {"nobody"}, {""}, {"-x", "web"}, {"web", "web-2"}} {
		if data, said, err := c.readAll(args...); err == nil || len(data) > 0 || !strings.Contains(said, "packetcapture: ") {
			c.Errorf("cat %q: %v, %s", args, err, said)
		}
	}
	c.annotate("web", "=3", "/filter=udp port 4444")
	c.exact("3 web")
	_, wait := c.following("packetcapture", "cat", "-f", "web")
	c.readers(1)
	last := c.flow(500, 5)() // 3.4 MB: over three rotations
	var numbers []int
	c.until(func() string {
		data, said, err := c.readAll("web")
		if err != nil {
			return err.Error()
		}
		if numbers = c.counted(data, said); len(numbers) == 0 || numbers[len(numbers)-1] != last {
			return fmt.Sprintf("the last packet is %d, and not in %d", last, len(numbers))
		}
		return ""
	})
	c.annotate("web", "-")
	data, said := wait()
	if numbers := c.counted(data, said); len(numbers) != last || strings.Contains(said, "missing") {
		c.Errorf("cat -f wrote %d of %d packets: %s", len(numbers), last, said)
	}
	// A client that is gone, while no packet comes.
	c.annotate("web", "=3")
	c.exact("3 web")
	began := time.Now()
	client, _ := c.following("packetcapture", "cat", "-f", "web")
	c.readers(1)
	c.until(func() string { // a stdin that ends within a second is /dev/null at the other end
		if time.Since(began) < 5*time.Second {
			return "the client has just come"
		}
		return ""
	})
	client.Process.Kill()
	c.readers(0)
	c.row("the client of `cat -f` killed while no packet comes", "`cat -f` ends", 0)
}

// C11
func (c *cluster) catFast() {
	c.annotate("web", "=3", "/filter=udp port 4444")
	c.exact("3 web")
	_, follow := c.following("packetcapture", "cat", "-f", "web")
	// kubectl exec cuts the stream of a slow reader: it reads in the pod, and throws away what comes after 10 s.
	_, slow := c.following("bash", "-c", `packetcapture cat -f web | { for i in {1..100}; do head -c 65536; sleep 0.1; done; cat >/dev/null; }`)
	c.readers(2)
	flow := c.flow(3600, 30)
	tries := 0
	for began := time.Now(); time.Since(began) < 30*time.Second; tries++ {
		data, said, err := c.readAll("web")
		c.must(err)
		numbers := c.counted(data, said)
		lines, err := c.pipe(string(data), "-n", "kube-system", "exec", "-i", c.capturePod(), "--", "tcpdump", "-Z", "root", "-nn", "-r", "-")
		if count := strings.Count(lines, ".4444: UDP"); err != nil || count != len(numbers) {
			c.Errorf("tcpdump reads %d of %d packets: %v", count, len(numbers), err)
		}
	}
	last := flow()
	c.annotate("web", "-")
	data, said := follow()
	numbers := c.counted(data, said)
	if n := len(numbers); n == 0 || numbers[n-1] < last-last/10 {
		c.Errorf("cat -f did not go on to %d", last)
	}
	if _, said := slow(); !strings.Contains(said, "may be missing") {
		c.Errorf("a slow reader is not told what it missed: %s", said)
	}
	c.told("web", "CaptureStopped", "captured, 0 dropped by the kernel")
	c.row(fmt.Sprintf("%d times `cat`, and `cat -f`, while 5 MB/s rotate through 3 files for 30 s", tries),
		fmt.Sprintf("each a whole pcap in order; `cat -f` has %d of %d packets, and says what it missed", len(numbers), last), 0)
}

// C5
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

// C5
func (c *cluster) nodeRestarted() {
	c.annotate("web", "=2")
	c.exact("2 web")
	pid, began := c.pid("2 web"), time.Now()
	c.must(exec.Command("docker", "restart", "--time", "1", c.node).Run())
	c.another(pid, "2 web")
	c.row("the node's container restarted", "captured anew when its pods are back", time.Since(began))
}
