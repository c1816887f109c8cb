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
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
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
	node                 string    // under test
	namespace            string    // the test's own
	births               int       // pods that are created with the annotation
	beside               *[]string // captures that run beside all steps, as exact takes them
	loopPID              *string   // of the crash loop's tcpdump
	outer                *testing.T
	table                *[][]string
	bash                 *bash // on the node
}

func newCluster(t *testing.T) *cluster {
	c := &cluster{T: t, name: os.Getenv("CLUSTER"), image: os.Getenv("IMAGE"), table: &[][]string{}, beside: &[]string{}, loopPID: new(string), outer: t, births: 20, bash: new(bash)}
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
	runtime                string // name of a RuntimeClass
	volume                 string // name of a ConfigMap
	isHost, never, isPlain bool   // the host's network; never restarted; not assigned to the node
	hasOwnUsers            bool   // a user namespace
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
	if o.runtime != "" {
		spec["runtimeClassName"] = o.runtime
	}
	if o.volume != "" {
		spec["volumes"] = []object{{"name": "volume", "configMap": object{"name": o.volume}}}
		containers[0]["volumeMounts"] = []object{{"name": "volume", "mountPath": "/volume"}}
	}
	if o.hasOwnUsers {
		spec["hostUsers"] = false
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

// elsewhere is another namespace, in which Events and all else are made. It is deleted after the step.
func (c *cluster) elsewhere(suffix string) *cluster {
	other := *c
	other.namespace += suffix
	c.kubectl("create", "namespace", other.namespace)
	c.Cleanup(func() {
		c.try("-n", other.namespace, "delete", "pod", "--all", "--timeout=3m")
		c.try("delete", "namespace", other.namespace, "--wait=false")
	})
	return &other
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

// events are a pod's Events of a reason since the step began, in their order, each as "<type>: <message>".
func (c *cluster) events(pod, reason string) []string {
	out, _ := c.try("get", "events", "--field-selector", "involvedObject.name="+pod+",reason="+reason,
		"--sort-by=.metadata.name", "-o", `jsonpath={range .items[*]}{.type}: {.message}{"\n"}{end}`)
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
	readers  int               // packetcapture cat and live, and the tcpdump of live
	files    []string          // the names of all capture files
	links    []string          // and what the links in /captures name
}

var (
	captureLine = regexp.MustCompile(`^(\d+) .*?tcpdump -C 1 -W (\d+) -w /capture-(\S+)\.pcap `)
	readerLine  = regexp.MustCompile(`^\d+ (\S*packetcapture (cat|live) |.*\btcpdump .*-w - )`)
)

// look reaches the program's files through /proc: its root is no file system of the node.
func (c *cluster) look() (n census, err error) {
	n.tcpdumps = map[string]string{}
	out, err := c.onNode(`for p in /proc/[0-9]*; do
			read -r comm <$p/comm || continue
			case $comm in tcpdump|nsenter|packetcapture) echo "${p#/proc/} $(tr '\0' ' ' <$p/cmdline)" ;; esac
			[[ $comm == packetcapture ]] || continue
			ls $p/root/ | sed -n 's/^capture-/file capture-/p'
			for link in $p/root/captures/*; do [[ ! -L $link ]] || echo "link $(readlink $link)"; done
		done 2>/dev/null; true`)
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line) + " "
		kind, rest, _ := strings.Cut(line, " ")
		m := captureLine.FindStringSubmatch(line)
		switch {
		case kind == "file":
			n.files = append(n.files, strings.TrimSpace(rest))
		case kind == "link":
			n.links = append(n.links, strings.Trim(rest, " /"))
		case m != nil:
			key := m[2] + " " + m[3]
			if n.tcpdumps[key] != "" {
				n.doubles++
			}
			n.tcpdumps[key] = m[1]
		case readerLine.MatchString(line):
			n.readers++
		case strings.HasSuffix(line, "packetcapture "):
			n.program = kind
		}
	}
	for _, names := range []*[]string{&n.files, &n.links} { // a reader has the same as the program
		slices.Sort(*names)
		*names = slices.Compact(*names)
	}
	return n, err
}

// exact waits until the node has exactly what is wanted beside c.beside, and returns how long that took. "3 web" is a capture of web into
// 3 files that runs, and has its first file; "- job" is one whose files are left.
func (c *cluster) exact(want ...string) time.Duration {
	c.Helper()
	return c.until(func() string {
		n, err := c.look()
		if err != nil {
			return err.Error()
		}
		return n.wrong(slices.Concat(want, *c.beside))
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
		if !is || !slices.Contains(n.links, stem) {
			return "no file or no link " + stem
		}
	}
	if len(n.links) > len(found) {
		return fmt.Sprintf("links that nobody asked for: %q, asked for is %q", n.links, want)
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
		return n.wrong(slices.Concat([]string{key}, *c.beside))
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

// ---- What is written ----

// row is a line of the table; took is 0 where time is not what matters.
func (c *cluster) row(fault, happens string, took time.Duration) {
	after := ""
	if took > 0 {
		after = fmt.Sprintf("%.1f s", took.Seconds())
	}
	*c.table = append(*c.table, []string{fault, happens, after})
}

// write writes tables to stdout and to a file of OUTPUTS, below a line that says what they were seen on.
func (c *cluster) write(file string, tables ...[][]string) {
	on := c.kubectl("get", "node", c.node, "-o", "jsonpath={.status.capacity.cpu} cores, kernel {.status.nodeInfo.kernelVersion}, "+
		"Kubernetes {.status.nodeInfo.kubeletVersion}, {.status.nodeInfo.containerRuntimeVersion}")
	text := new(strings.Builder)
	fmt.Fprintf(text, "%s, %s\n", on, time.Now().UTC().Format(time.DateOnly))
	for _, table := range tables {
		fmt.Fprintln(text)
		w := tabwriter.NewWriter(text, 0, 0, 1, ' ', 0)
		rule := slices.Repeat([]string{"---"}, len(table[0]))
		for _, row := range slices.Insert(table, 1, rule) {
			fmt.Fprintf(w, "| %s\t|\n", strings.Join(row, "\t| "))
		}
		w.Flush()
	}
	fmt.Print(text)
	folder := cmp.Or(os.Getenv("OUTPUTS"), "../outputs")
	c.must(os.MkdirAll(folder, 0o755))
	c.must(os.WriteFile(filepath.Join(folder, file), []byte(text.String()), 0o644))
}
