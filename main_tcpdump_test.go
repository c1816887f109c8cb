package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The real tcpdump in real network namespaces, with real packets. Of the node only /proc is made up: it holds the
// test's own processes.

const (
	patience = 30 * time.Second // for what should take some seconds at most, on a machine that is busy
	webFile  = "capture-web.pcap"
)

// realNode is the program as it runs on a node, with real children. The test stands where the watch is.
type realNode struct {
	*testing.T
	*podWatch
	proc *fakeProc
	root string
	ctx  context.Context

	mu   sync.Mutex
	pids map[string][]int // of the tcpdumps that were started, by their -w
}

// needNetwork skips a test that can't have its namespaces here; in CI that is a failure.
func needNetwork(t *testing.T) {
	t.Helper()
	var missing error
	for _, command := range []string{"tcpdump", "ip", "nsenter", "bash", "mount"} {
		_, err := exec.LookPath(command)
		missing = errors.Join(missing, err)
	}
	if missing == nil {
		name := randomName()
		missing = exec.Command("ip", "netns", "add", name).Run() // only root can
		exec.Command("ip", "netns", "delete", name).Run()
	}
	if missing != nil && os.Getenv("CI") == "true" {
		t.Fatalf("no real captures in CI: %v", missing)
	} else if missing != nil {
		t.Skipf("no real captures: %v", missing)
	}
}

func newRealNode(t *testing.T) *realNode {
	t.Helper()
	needNetwork(t)
	t.Parallel()
	return &realNode{T: t, proc: newProc(t), root: t.TempDir(), pids: map[string][]int{}}
}

func randomName() string { return fmt.Sprintf("test-%08x", rand.Uint32()) }

// command runs a line's words, none of which holds a space.
func (n *realNode) command(format string, values ...any) {
	n.Helper()
	words := strings.Fields(fmt.Sprintf(format, values...))
	if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
		n.Fatalf("%s: %v: %s", words, err, out)
	}
}

// run begins the program, with annotated pods. It ends with the test, which must have waited for all Warnings. Then no process
// and no file may be left (C5).
func (n *realNode) run(pods ...pod) {
	n.Helper()
	node, err := newNode(testConfig(n, n.proc.dir, n.root))
	must(n, err)
	node.start = n.startReal
	n.podWatch = newPodWatch(node)
	ctx, end := context.WithCancel(context.Background())
	n.ctx = ctx
	n.Cleanup(func() {
		began := time.Now()
		end()
		n.alive.Wait()
		if took := time.Since(began); took > 5*time.Second {
			n.Errorf("the end took %v", took)
		}
		for stem, pids := range n.pids {
			if slices.ContainsFunc(pids, isTcpdump) {
				n.Errorf("a tcpdump of %s is left, of %v", stem, pids)
			}
		}
		if slices.ContainsFunc(n.files(), isCapture) {
			n.Errorf("files are left: %q", n.files())
		}
		for len(n.events.news) > 0 {
			if e := <-n.events.news; e.kind == "Warning" {
				n.Errorf("told %s: %s", e.reason, e.message)
			}
		}
	})
	n.see(pods...)
}

// startReal starts a child, which the made-up /proc then shows as it is.
func (n *realNode) startReal(ctx context.Context, stderr io.Writer, network *os.File, arguments ...string) (*child, error) {
	c, err := start(ctx, stderr, network, arguments...)
	if err == nil && network != nil {
		n.mu.Lock()
		defer n.mu.Unlock()
		stem := filepath.Base(arguments[slices.Index(arguments, "-w")+1])
		n.pids[stem] = append(n.pids[stem], c.pid)
		os.Remove(n.proc.path(c.pid, ""))
		must(n, os.Symlink(fmt.Sprintf("/proc/%d", c.pid), n.proc.path(c.pid, "")))
	}
	return c, err
}

// pid is that of the last tcpdump of a stem, 0 if there was none.
func (n *realNode) pid(stem string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]int{0}, n.pids[stem]...)[len(n.pids[stem])]
}

func isTcpdump(pid int) bool { return readFile(fmt.Sprintf("/proc/%d/comm", pid)) == "tcpdump\n" }

func (n *realNode) see(pods ...pod) {
	for _, p := range pods {
		n.apply(n.ctx, p)
	}
}

// link is a network namespace that a veth pair named eth0 joins to another. Each end has one address, and a
// neighbour that does not exist: what is sent to that passes the pair, and nobody answers.
type link struct {
	*realNode
	pod, peer string // names of the namespaces
	holder    *exec.Cmd
}

// newLink makes a pod's network and, in the made-up /proc, the process that holds it.
func (n *realNode) newLink(uid string) *link {
	n.Helper()
	l := &link{realNode: n, pod: randomName(), peer: randomName()}
	for _, name := range []string{l.pod, l.peer} {
		n.command("ip netns add %s", name)
		n.Cleanup(func() { exec.Command("ip", "netns", "delete", name).Run() })
	}
	for _, name := range []string{"eth0", "net0"} { // net0 stays down
		n.command("ip link add %[1]s netns %[2]s type veth peer name %[1]s netns %[3]s", name, l.pod, l.peer)
	}
	for i, name := range []string{l.pod, l.peer} {
		n.command("ip -n %s link set eth0 addrgenmode none", name) // IPv6 would send by itself
		n.command("ip -n %s link set eth0 up", name)
		n.command("ip -n %s address add 10.99.0.%d/24 dev eth0", name, i+1)
		n.command("ip -n %s neighbour add 10.99.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent", name)
	}
	l.holder = exec.Command("nsenter", "--net=/run/netns/"+l.pod, "sleep", "600")
	must(n, l.holder.Start())
	n.Cleanup(l.kill)
	pid := l.holder.Process.Pid
	l.until("the process is in its namespace", func() bool { return readFile(fmt.Sprintf("/proc/%d/comm", pid)) == "sleep\n" })
	n.proc.pod(pid, uid)
	n.proc.enter(pid, pid)
	return l
}

// enter gives a fake process the network of a real one.
func (p *fakeProc) enter(fake, real int) {
	for _, file := range []string{"ns/net", "net"} {
		must(p, os.Remove(p.path(fake, file)), os.Symlink(fmt.Sprintf("/proc/%d/%s", real, file), p.path(fake, file)))
	}
}

// kill ends the pod's process, and what the made-up /proc says of it.
func (l *link) kill() {
	l.holder.Process.Kill()
	l.holder.Wait()
	os.RemoveAll(l.proc.path(l.holder.Process.Pid, ""))
}

// finish ends the pod as a runtime and a CNI do.
func (l *link) finish() {
	l.command("ip -n %s link delete eth0", l.pod)
	l.command("ip netns delete %s", l.pod)
	l.kill()
}

// isDestroyed waits until the pod's namespace is, and with it the other end of net0: no file of ours keeps it.
func (l *link) isDestroyed() {
	l.Helper()
	l.until("the namespace is destroyed", func() bool { return exec.Command("ip", "-n", l.peer, "link", "show", "net0").Run() != nil })
}

// say sends UDP packets from one of the namespaces, numbered from first to last, each with some bytes behind it.
func (l *link) say(from, what string, port, first, last, padding int) {
	l.Helper()
	script := fmt.Sprintf("exec 3>/dev/udp/10.99.0.9/%d; printf -v pad %%0%dd 0; "+
		`for ((i = %d; i <= %d; i++)); do printf "<%s-%%d>$pad" $i >&3; done`, port, padding, first, last, what)
	if out, err := exec.Command("nsenter", "--net=/run/netns/"+from, "bash", "-c", script).CombinedOutput(); err != nil {
		l.Fatalf("%v: %s", err, out)
	}
}

// until polls until a condition holds.
func (n *realNode) until(what string, holds func() bool) {
	n.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// told waits for the next Events, and checks them as world.told does.
func (n *realNode) told(wanted ...string) {
	n.Helper()
	for _, want := range wanted {
		select {
		case e := <-n.events.news:
			what, words, _ := strings.Cut(want, ": ")
			if what != e.kind+" "+e.reason || !strings.Contains(e.message, words) {
				n.Fatalf("told %s %s: %s, want %s", e.kind, e.reason, e.message, want)
			}
		case <-time.After(patience):
			n.Fatalf("never told: %s", want)
		}
	}
}

func (n *realNode) files() []string { return namesIn(n, n.root) }

// packets are the UDP packets' texts in a file, and how many packets of any kind it holds.
func (n *realNode) packets(name string) (texts []string, all int) {
	// It may be read in the middle of a packet, which tcpdump then complains of: the next look sees it whole.
	out, _ := exec.Command("tcpdump", "-Z", "root", "-nn", "-tt", "-A", "-r", filepath.Join(n.root, name)).Output()
	for _, found := range regexp.MustCompile(`<([a-z]+-[0-9]+)>`).FindAllSubmatch(out, -1) {
		texts = append(texts, string(found[1]))
	}
	return texts, len(regexp.MustCompile(`(?m)^[0-9]{9,}\.`).FindAll(out, -1))
}

// holds waits until a file holds exactly these packets, and nothing else at all.
func (n *realNode) holds(name string, want ...string) {
	n.Helper()
	var got []string
	var all int
	defer func() {
		if n.Failed() {
			n.Logf("%s holds %d packets: %q", name, all, got)
		}
	}()
	n.until("the packets are in the file", func() bool { got, all = n.packets(name); return len(got) >= len(want) })
	if !slices.Equal(got, want) || all != len(want) {
		n.Errorf("other packets than %q are in %s", want, name)
	}
}

// numbered are the texts of packets first to last.
func numbered(what string, first, last int) (texts []string) {
	for i := first; i <= last; i++ {
		texts = append(texts, fmt.Sprintf("%s-%d", what, i))
	}
	return texts
}

// C3, C4, C5: exactly a pod's own packets are captured, in both directions; a tcpdump that is killed is started again;
// when the annotation goes, the process and the files go, and those of others stay.
func TestTcpdump(t *testing.T) {
	n := newRealNode(t)
	web, db := n.newLink(uidA), n.newLink(uidB)
	n.run(podNamed("web", uidA, "1"), podNamed("db", uidB, "11"))
	n.told("Normal CaptureStarted: ", "Normal CaptureStarted: ")
	web.say(web.pod, "out", 4000, 1, 20, 1)
	db.say(db.pod, "other", 4000, 1, 20, 1)
	web.say(web.peer, "in", 4000, 1, 20, 1)
	n.holds(webFile, append(numbered("out", 1, 20), numbered("in", 1, 20)...)...)
	n.holds("capture-db.pcap00", numbered("other", 1, 20)...)

	killed, other := n.pid(webFile), n.pid("capture-db.pcap")
	if !isTcpdump(killed) {
		t.Error("the child is not tcpdump itself, which signals would miss")
	}
	must(t, syscall.Kill(killed, syscall.SIGKILL))
	n.told("Warning CaptureFailed: tcpdump ended by itself (signal: killed); it is tried again in ",
		"Warning CaptureStarted: the packets in that one are lost")
	web.say(web.pod, "again", 4000, 1, 20, 1)
	n.holds(webFile, numbered("again", 1, 20)...)

	running := n.pid(webFile)
	n.forget(uidA)
	n.told("Normal CaptureStopped: 20 packets captured, 0 dropped by the kernel")
	if running == killed || isTcpdump(running) || !isTcpdump(other) || n.pid("capture-db.pcap") != other {
		t.Error("a wrong child runs")
	}
	if files := n.files(); !slices.Equal(files, []string{"capture-db.pcap00"}) {
		t.Errorf("files %q", files)
	}
}

// C3, C4: more than 1 MB turns to the next file, which root may write in its folder, and after the last to the first.
func TestRotation(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	n.run(podNamed("web", uidA, "2"))
	n.told("Normal CaptureStarted: 2 files")
	size := func(name string) (size int64) {
		if info, err := os.Stat(filepath.Join(n.root, name)); err == nil {
			size = info.Size()
		}
		return size
	}
	pid, most, last := n.pid(webFile), int64(0), int64(0)
	n.until("file 0 is written again", func() bool {
		before := last
		web.say(web.pod, "big", 4000, 1, 400, 1300)
		last = size(webFile + "0")
		most = max(most, last, size(webFile+"1"))
		return last < before
	})
	if size(webFile+"1") < 1_000_000 || most > fileBytes {
		t.Errorf("file 1 has %d bytes, the largest had %d", size(webFile+"1"), most)
	}
	if files := n.files(); !slices.Equal(files, []string{webFile + "0", webFile + "1"}) || n.pid(webFile) != pid {
		t.Errorf("files %q, or another tcpdump", files)
	}
	if _, all := n.packets(webFile + "1"); all < 1_000_000/1400 {
		t.Errorf("file 1 holds %d packets", all)
	}
}

// C2, C8, C9: tcpdump takes the filter, or refuses it before anything starts; either way it is nothing but a filter. A mistake
// leaves alone what runs. C7: a filter that the kernel refuses runs in tcpdump, which is told.
func TestFilter(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	p := podNamed("web", uidA, "1")
	n.run()
	evil := filepath.Join(n.root, "evil")
	for _, filter := range []string{"udp prot 4001", "-w " + evil, "--version", "$(touch " + evil + ")", "'`touch " + evil + "`",
		"tcp.port == 80", "“tcp port 80”", "host name.invalid", "tcp port http-that-is-none"} {
		p.filter = filter
		n.see(p)
		n.told("Warning CaptureInvalid: which is refused (")
		if files := n.files(); len(files) > 0 || n.pid(webFile) != 0 {
			t.Errorf("filter %q: files %q, pid %d", filter, files, n.pid(webFile))
		}
	}
	p.filter = " udp port 4001\n"
	n.see(p)
	n.told("Normal CaptureStarted: the filter is \"udp port 4001\"")
	for i := range 3 {
		web.say(web.pod, "not", 4000, 3*i, 3*i+2, 1)
		web.say(web.pod, "this", 4001, i, i, 1)
	}
	n.holds(webFile, numbered("this", 0, 2)...)
	running, mistake := n.pid(webFile), p.on("any")
	mistake.filter = "ether host 02:00:00:00:00:09" // which is right on eth0
	n.see(mistake)
	n.told("Warning CaptureInvalid: the capture that runs goes on as it was")
	web.say(web.pod, "this", 4001, 3, 3, 1)
	n.holds(webFile, numbered("this", 0, 3)...)
	if n.pid(webFile) != running || !isTcpdump(running) {
		t.Error("a mistake ended a good capture")
	}
	p.filter = "outbound and (ip protochain 17)"
	n.see(p)
	n.told("Normal CaptureStopped: 4 packets captured", "Warning CaptureStarted: Kernel filter failed")
}

// C9: no filter that is accepted takes tcpdump long, or much memory. Of many kinds this one takes the most.
func TestWorstFilter(t *testing.T) {
	n := newRealNode(t)
	n.run()
	filter := "portrange 1-2"
	for i := 2; len(filter)+len(" or portrange 99-100") <= maxFilter; i++ {
		filter += fmt.Sprintf(" or portrange %d-%d", i, i+1)
	}
	p := podNamed("web", uidA, "1")
	p.filter = filter
	_, err := n.check(t.Context(), p)
	must(t, err)
	tcpdump := exec.Command("bash", "-c", `ulimit -v 65536 && exec tcpdump -y EN10MB -d -- "$1"`, "bash", filter) // KiB
	must(t, tcpdump.Run())
	if took := tcpdump.ProcessState.UserTime(); took > time.Second {
		t.Errorf("it took %v", took)
	}
}

// C10: the interface that is asked for, and no other; one that comes later is captured then.
func TestInterface(t *testing.T) {
	n := newRealNode(t)
	web, p := n.newLink(uidA), podNamed("web", uidA, "1")
	n.command("ip -n %s link set lo up", web.pod)
	n.run(p.on("any"))
	n.told("Normal CaptureStarted: the interface is any")
	web.say(web.pod, "out", 4000, 1, 3, 1)
	n.holds(webFile, numbered("out", 1, 3)...)
	n.see(p.on("lo"))
	n.told("Normal CaptureStopped: ", "Normal CaptureStarted: the interface is lo")
	web.say(web.pod, "out", 4000, 4, 6, 1)
	n.command("nsenter --net=/run/netns/%s bash -c echo>/dev/udp/127.0.0.1/4000", web.pod)
	n.until("a packet of lo is there", func() bool { _, all := n.packets(webFile); return all > 0 })
	if texts, _ := n.packets(webFile); len(texts) > 0 {
		t.Errorf("packets of eth0 are captured on lo: %q", texts)
	}
	for _, name := range []string{"net1", "2", "nflog"} {
		n.see(p.on(name))
		n.told("Normal CaptureStopped: ",
			"Warning CaptureFailed: the pod has no interface "+name+", but lo, eth0, net0; it is tried again in ")
		if files := n.files(); len(files) > 0 {
			t.Errorf("files %q", files)
		}
		if name == "nflog" { // tcpdump has a device of that name, and would take it, as it would take 2 for eth0
			break
		}
		n.command("ip -n %s link add %s up type veth", web.pod, name)
		n.told("Normal CaptureStarted: the interface is " + name)
		n.command("ip -n %s link delete %s", web.pod, name)
		n.told("Warning CaptureFailed: tcpdump ended by itself (")
	}
}

// C10: on any, a pod's very last packets are in the file, each time. C3: its network is not kept alive after that.
func TestLastPackets(t *testing.T) {
	n := newRealNode(t)
	n.run()
	links := map[string]*link{}
	for i := range 4 {
		name, uid := fmt.Sprint("web-", i), fmt.Sprint(uidA[1:], i)
		links[name] = n.newLink(uid)
		n.see(podNamed(name, uid, "1").on("any"))
		n.told("Normal CaptureStarted: ")
	}
	for _, l := range links {
		l.say(l.pod, "last", 4000, 1, 40, 1)
		l.finish()
	}
	for name, l := range links {
		l.isDestroyed()
		n.told("Normal CaptureStopped: the pod's network is gone, the files stay")
		n.holds("capture-"+name+".pcap", numbered("last", 1, 40)...)
	}
}

// C5: a pod whose network is gone keeps its files, until it is deleted. C3: nothing of ours keeps the network alive.
func TestNetworkGone(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	n.run(podNamed("web", uidA, "1"))
	n.told("Normal CaptureStarted: ")
	web.say(web.pod, "last", 4000, 1, 5, 1)
	n.holds(webFile, numbered("last", 1, 5)...)
	web.finish()
	web.isDestroyed()
	n.told("Normal CaptureStopped: 5 packets captured, 0 dropped by the kernel; the pod's network is gone, the files stay")
	n.holds(webFile, numbered("last", 1, 5)...)
	n.forget(uidA)
	n.told("Normal CaptureStopped: deleted")
}

// C3: the host's network, which here is a namespace of the test's, is captured on all devices, with a Warning.
func TestHostNetworkForReal(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	n.proc.enter(1, web.holder.Process.Pid)
	n.command("ip -n %s link set eth0 down", web.pod)
	n.command("ip -n %s link set eth0 name ens3 up", web.pod)
	n.command("ip -n %s neighbour add 10.99.0.9 lladdr 02:00:00:00:00:09 dev ens3 nud permanent", web.pod)
	n.run(podNamed("web", uidA, "1"))
	n.told("Warning CaptureStarted: the whole node's traffic")
	web.say(web.pod, "out", 4000, 1, 5, 1)
	n.holds(webFile, numbered("out", 1, 5)...)
}

// C5: a child that does not end on SIGTERM is killed, and its end is told by the signal's name.
func TestStart(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	said := newStderr()
	c, err := start(ctx, said, nil, "sh", "-c", "trap '' TERM; echo 'tcpdump: listening on x' >&2; exec sleep 60")
	must(t, err)
	ended := make(chan error)
	go func() { ended <- c.wait() }()
	<-said.listening
	began := time.Now()
	cancel()
	got := said.lastWords(<-ended)
	if took := time.Since(began); got != "signal: killed" || took < termGrace || took > 2*termGrace {
		t.Errorf("it took %v, and its last words are %q", took, got)
	}
	if _, err := start(t.Context(), said, nil, "/there-is-none"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("started: %v", err)
	}
}

// C4: on a disk with too little room a capture waits, and starts by itself when there is enough. A disk that fills up all the
// same, of which tcpdump says nothing, is told, and when there is room the capture goes on. What a capture writes into the room
// that it was given fills no disk.
func TestFullDisk(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	n.command("mount -t tmpfs -o size=1m tmpfs %s", n.root)
	n.Cleanup(func() { syscall.Unmount(n.root, syscall.MNT_DETACH) })
	n.run(podNamed("web", uidA, "1"))
	n.told("Warning CaptureWaiting: 1 file can take")
	n.command("mount -o remount,size=2m %s", n.root)
	n.told("Normal CaptureStarted: ")
	web.say(web.pod, "big", 4000, 1, 650, 1400)
	n.until("the file is nearly full", func() bool { info, _ := os.Stat(filepath.Join(n.root, webFile)); return info.Size() > 900_000 })
	if n.disk.isFull() || len(n.events.news) > 0 {
		t.Fatal("the disk is said to be full, with room for all that may be written")
	}
	other := filepath.Join(n.root, "other")
	os.WriteFile(other, make([]byte, 2<<20), 0o644) // fails in the middle, which is the point
	n.told("Warning CaptureFailed: disk is full", "Warning CaptureWaiting: disk is full")
	if isTcpdump(n.pid(webFile)) {
		t.Error("tcpdump goes on")
	}
	must(t, os.Remove(other))
	n.told("Warning CaptureStarted: the packets in that one are lost")
}
