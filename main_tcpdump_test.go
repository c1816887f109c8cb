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

const patience = 10 * time.Second // for what should take a second at most, on a machine that is busy

// realNode is the program as it runs on a node, with real children. The test stands where the watch is.
type realNode struct {
	*testing.T
	*podWatch
	proc *fakeProc
	root string
	ctx  context.Context
	end  context.CancelFunc

	mu   sync.Mutex
	pids map[string]int // of the tcpdump that was started last, by its -w
}

// needNetwork skips a test that can't have its namespaces here; in CI that is a failure.
func needNetwork(t *testing.T) {
	t.Helper()
	missing := ""
	for _, command := range []string{"tcpdump", "ip", "nsenter", "bash"} {
		if _, err := exec.LookPath(command); err != nil {
			missing = err.Error()
		}
	}
	if os.Geteuid() != 0 {
		missing = "it must be root"
	}
	if missing == "" {
		name := randomName()
		if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
			missing = string(out)
		}
		exec.Command("ip", "netns", "delete", name).Run()
	}
	if missing != "" && os.Getenv("CI") == "true" {
		t.Fatalf("no real captures in CI: %s", missing)
	} else if missing != "" {
		t.Skipf("no real captures: %s", missing)
	}
}

func randomName() string { return fmt.Sprintf("test-%08x", rand.Uint32()) }

// must runs a command.
func (n *realNode) must(name string, arguments ...string) {
	n.Helper()
	if out, err := exec.Command(name, arguments...).CombinedOutput(); err != nil {
		n.Fatalf("%s %q: %v: %s", name, arguments, err, out)
	}
}

func newRealNode(t *testing.T) *realNode {
	t.Helper()
	needNetwork(t)
	t.Parallel()
	return &realNode{T: t, proc: newProc(t), root: t.TempDir(), pids: map[string]int{}}
}

// run begins the program, with annotated pods.
func (n *realNode) run(pods ...pod) {
	n.Helper()
	node, err := newNode(testConfig(n, n.proc.dir, n.root))
	must(n, err)
	node.start = n.startReal
	n.podWatch = newPodWatch(node)
	n.ctx, n.end = context.WithCancel(context.Background())
	n.Cleanup(func() { n.end(); n.alive.Wait() })
	n.see(pods...)
}

// startReal starts a child, which the made-up /proc then shows as it is.
func (n *realNode) startReal(ctx context.Context, stderr io.Writer, network *os.File, arguments ...string) (*child, error) {
	c, err := start(ctx, stderr, network, arguments...)
	if err == nil && network != nil {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.pids[filepath.Base(arguments[slices.Index(arguments, "-w")+1])] = c.pid
		os.Remove(n.proc.path(c.pid, ""))
		must(n, os.Symlink(fmt.Sprintf("/proc/%d", c.pid), n.proc.path(c.pid, "")))
	}
	return c, err
}

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
		n.must("ip", "netns", "add", name)
		n.Cleanup(func() { exec.Command("ip", "netns", "delete", name).Run() })
	}
	n.must("ip", "link", "add", "eth0", "netns", l.pod, "type", "veth", "peer", "name", "eth0", "netns", l.peer)
	for i, name := range []string{l.pod, l.peer} {
		n.must("ip", "-n", name, "link", "set", "eth0", "addrgenmode", "none") // IPv6 would send by itself
		n.must("ip", "-n", name, "link", "set", "eth0", "up")
		n.must("ip", "-n", name, "address", "add", fmt.Sprintf("10.99.0.%d/24", i+1), "dev", "eth0")
		n.must("ip", "-n", name, "neighbour", "add", "10.99.0.9", "lladdr", "02:00:00:00:00:09", "dev", "eth0", "nud", "permanent")
	}
	l.holder = exec.Command("nsenter", "--net=/run/netns/"+l.pod, "sleep", "600")
	must(n, l.holder.Start())
	n.Cleanup(l.finish)
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

// finish ends the pod's process, and what the fake /proc says of it.
func (l *link) finish() {
	l.holder.Process.Kill()
	l.holder.Wait()
	os.RemoveAll(l.proc.path(l.holder.Process.Pid, ""))
}

// say sends UDP packets from one of the namespaces, numbered from first to last, each with some bytes behind it.
func (l *link) say(from, what string, port, first, last, padding int) {
	l.Helper()
	l.must("nsenter", "--net=/run/netns/"+from, "bash", "-c", fmt.Sprintf("exec 3>/dev/udp/10.99.0.9/%d; printf -v pad %%0%dd 0; "+
		`for ((i = %d; i <= %d; i++)); do printf "<%s-%%d>$pad" $i >&3; done`, port, padding, first, last, what))
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

// told waits for the next Event, and checks it as world.told does.
func (n *realNode) told(want string) {
	n.Helper()
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

// pid is that of the last tcpdump of a stem.
func (n *realNode) pid(stem string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pids[stem]
}

func (n *realNode) files() []string { return namesIn(n, n.root) }

func isGone(pid int) bool { return syscall.Kill(pid, 0) == syscall.ESRCH }

// packets are the UDP packets' texts in files, and how many packets of any kind these hold.
func (n *realNode) packets(names ...string) (texts []string, all int) {
	n.Helper()
	for _, name := range names {
		// It may be read in the middle of a packet, which tcpdump then complains of: the next look sees it whole.
		out, _ := exec.Command("tcpdump", "-Z", "root", "-nn", "-tt", "-A", "-r", filepath.Join(n.root, name)).Output()
		for _, found := range regexp.MustCompile(`<([a-z]+-[0-9]+)>`).FindAllSubmatch(out, -1) {
			texts = append(texts, string(found[1]))
		}
		all += len(regexp.MustCompile(`(?m)^[0-9]{9,}\.`).FindAll(out, -1))
	}
	return texts, all
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
	n.run(podNamed("web", uidA, "1"), podNamed("db", uidB, "2"))
	n.told("Normal CaptureStarted: ")
	n.told("Normal CaptureStarted: ")
	web.say(web.pod, "out", 4000, 1, 20, 1)
	db.say(db.pod, "other", 4000, 1, 20, 1)
	web.say(web.peer, "in", 4000, 1, 20, 1)
	n.holds("capture-web.pcap", append(numbered("out", 1, 20), numbered("in", 1, 20)...)...)
	n.holds("capture-db.pcap0", numbered("other", 1, 20)...)

	killed, other := n.pid("capture-web.pcap"), n.pid("capture-db.pcap")
	if got := readFile(fmt.Sprintf("/proc/%d/comm", killed)); got != "tcpdump\n" {
		t.Errorf("the child is %q", got)
	}
	must(t, syscall.Kill(killed, syscall.SIGKILL))
	n.told("Warning CaptureFailed: tcpdump ended by itself (signal: killed); it is tried again in ")
	n.told("Warning CaptureStarted: the packets in that one are lost")
	web.say(web.pod, "again", 4000, 1, 20, 1)
	n.holds("capture-web.pcap", numbered("again", 1, 20)...)

	running := n.pid("capture-web.pcap")
	n.forget(uidA)
	n.told("Normal CaptureStopped: 20 packets captured, 0 dropped by the kernel")
	if !isGone(running) || !isGone(killed) || isGone(other) || n.pid("capture-db.pcap") != other {
		t.Error("a wrong child runs")
	}
	n.until("the files are deleted", func() bool { return slices.Equal(n.files(), []string{"capture-db.pcap0"}) })
}

// C3, C4: more than 1 MB turns to the next file, which root may write in its folder, and after the last to the first.
func TestRotation(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	n.run(podNamed("web", uidA, "2"))
	n.told("Normal CaptureStarted: 2 files")
	size := func(name string) int64 {
		info, err := os.Stat(filepath.Join(n.root, name))
		if err != nil {
			return -1
		}
		return info.Size()
	}
	pid := n.pid("capture-web.pcap")
	most, turns, last := int64(0), 0, int64(0)
	n.until("file 0 is written again", func() bool {
		web.say(web.pod, "big", 4000, 1, 400, 1300)
		now := size("capture-web.pcap0")
		most = max(most, now, size("capture-web.pcap1"))
		if now < last {
			turns++
		}
		last = now
		return turns > 0
	})
	if size("capture-web.pcap1") < 1_000_000 || most > fileBytes {
		t.Errorf("file 1 has %d bytes, the largest had %d", size("capture-web.pcap1"), most)
	}
	if files := n.files(); !slices.Equal(files, []string{"capture-web.pcap0", "capture-web.pcap1"}) {
		t.Errorf("files %q", files)
	}
	if _, all := n.packets("capture-web.pcap1"); all < 1_000_000/1400 {
		t.Errorf("file 1 holds %d packets", all)
	}
	if n.pid("capture-web.pcap") != pid {
		t.Error("tcpdump did not survive the turn")
	}
}

// C9, C8: tcpdump takes the filter, or refuses it before anything starts; either way it is nothing but a filter.
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
		n.told("Warning CaptureInvalid: which is refused (tcpdump: ")
		if files := n.files(); len(files) > 0 || n.pid("capture-web.pcap") != 0 {
			t.Errorf("filter %q: files %q, pid %d", filter, files, n.pid("capture-web.pcap"))
		}
	}
	p.filter = " udp port 4001\n"
	n.see(p)
	n.told("Normal CaptureStarted: the filter is \"udp port 4001\"")
	for i := range 3 {
		web.say(web.pod, "not", 4000, 3*i, 3*i+2, 1)
		web.say(web.pod, "this", 4001, i, i, 1)
	}
	n.holds("capture-web.pcap", numbered("this", 0, 2)...)
	running := n.pid("capture-web.pcap")
	p.filter = "udp prot 4001"
	n.see(p)
	n.told("Warning CaptureInvalid: the capture that runs goes on as it was")
	web.say(web.pod, "this", 4001, 3, 3, 1)
	n.holds("capture-web.pcap", numbered("this", 0, 3)...)
	if n.pid("capture-web.pcap") != running || isGone(running) {
		t.Error("a typo ended a good capture")
	}
}

// C9: no filter that is accepted takes tcpdump long. This one is among the worst.
func TestWorstFilter(t *testing.T) {
	n := newRealNode(t)
	n.run()
	filter := "port 1"
	for i := 2; len(filter)+len(" or port 10") <= maxFilter; i++ {
		filter += fmt.Sprintf(" or port %d", i)
	}
	began := time.Now()
	must(t, n.compile(t.Context(), request{filter: filter}))
	if took := time.Since(began); took > compileTime {
		t.Errorf("it took %v", took)
	}
}

// C7: a filter that the kernel refuses runs in tcpdump, which is told.
func TestKernelFilterFailed(t *testing.T) {
	n := newRealNode(t)
	n.newLink(uidA)
	p := podNamed("web", uidA, "1")
	p.filter = "outbound and (ip protochain 17)"
	n.run(p)
	n.told("Warning CaptureStarted: Kernel filter failed")
}

// C10: the interface that is asked for, and no other.
func TestInterface(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	p := podNamed("web", uidA, "1")
	p.iface, p.hasIface = "any", true
	n.run(p)
	n.told("Normal CaptureStarted: the interface is any")
	n.must("ip", "-n", web.pod, "link", "set", "lo", "up")
	web.say(web.pod, "out", 4000, 1, 3, 1)
	n.holds("capture-web.pcap", numbered("out", 1, 3)...)
	p.iface = "lo"
	n.see(p)
	n.told("Normal CaptureStopped: ")
	n.told("Normal CaptureStarted: the interface is lo")
	web.say(web.pod, "out", 4000, 4, 6, 1)
	n.must("nsenter", "--net=/run/netns/"+web.pod, "bash", "-c", "for i in 1 2; do echo \"<lo-$i>\" >/dev/udp/127.0.0.1/4000; done || true")
	n.until("the packets of lo are there", func() bool { texts, _ := n.packets("capture-web.pcap"); return slices.Contains(texts, "lo-1") })
	if texts, _ := n.packets("capture-web.pcap"); slices.Contains(texts, "out-4") {
		t.Errorf("packets of eth0 are captured on lo: %q", texts)
	}
	n.forget(uidA)
	n.told("Normal CaptureStopped: ")
	for _, name := range []string{"net1", "2", "nflog"} {
		n.until("the last one's files are gone", func() bool { return len(n.files()) == 0 })
		p.iface = name
		n.see(p)
		n.told("Warning CaptureFailed: the pod has no interface " + name + ", but lo, eth0; it is tried again in ")
		if files := n.files(); len(files) > 0 {
			t.Errorf("files %q", files)
		}
		if name == "nflog" {
			break // tcpdump has a device of that name, and would take it
		}
		n.must("ip", "-n", web.pod, "link", "add", name, "up", "type", "veth")
		n.told("Normal CaptureStarted: the interface is " + name)
		n.must("ip", "-n", web.pod, "link", "delete", name)
		n.told("Warning CaptureFailed: tcpdump ended by itself (")
		n.forget(uidA)
		n.told("Normal CaptureStopped: ")
	}
}

// C10: on any, a pod's very last packets are in the file, and its network is not kept alive for long.
func TestLastPackets(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	p := podNamed("web", uidA, "1")
	p.iface, p.hasIface = "any", true
	n.run(p)
	n.told("Normal CaptureStarted: ")
	web.say(web.pod, "last", 4000, 1, 40, 1)
	n.must("ip", "-n", web.pod, "link", "delete", "eth0")
	n.must("ip", "netns", "delete", web.pod)
	web.finish()
	n.until("tcpdump has ended", func() bool { return isGone(n.pid("capture-web.pcap")) })
	n.told("Normal CaptureStopped: the files stay")
	n.holds("capture-web.pcap", numbered("last", 1, 40)...)
}

// C5: a pod whose network is gone keeps its files, until it is deleted. Nothing of ours keeps the network alive.
func TestNetworkGone(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	n.run(podNamed("web", uidA, "1"))
	n.told("Normal CaptureStarted: ")
	web.say(web.pod, "last", 4000, 1, 5, 1)
	n.holds("capture-web.pcap", numbered("last", 1, 5)...)
	n.until("no namespace is open here", func() bool { // other tests open theirs for a moment
		links, _ := filepath.Glob("/proc/self/fd/*")
		return !slices.ContainsFunc(links, func(link string) bool {
			target, _ := os.Readlink(link)
			return strings.HasPrefix(target, "net:")
		})
	})
	web.finish()
	n.must("ip", "-n", web.pod, "link", "delete", "eth0")
	n.told("Normal CaptureStopped: 5 packets captured, 0 dropped by the kernel; the pod's network is gone, the files stay")
	n.holds("capture-web.pcap", numbered("last", 1, 5)...)
	n.forget(uidA)
	n.told("Normal CaptureStopped: deleted")
	if files := n.files(); len(files) > 0 {
		t.Errorf("files %q", files)
	}
}

// C3, C5: the host's network, which here is a namespace of the test's, is captured on all devices, with a Warning.
func TestHostNetworkForReal(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	n.proc.enter(1, web.holder.Process.Pid)
	n.run(podNamed("web", uidA, "1"))
	n.told("Warning CaptureStarted: the whole node's traffic")
	n.must("ip", "-n", web.pod, "link", "set", "lo", "up")
	web.say(web.pod, "out", 4000, 1, 5, 1)
	n.holds("capture-web.pcap", numbered("out", 1, 5)...)
}

// C5: told to end, the program leaves no process and no file.
func TestEndForReal(t *testing.T) {
	n := newRealNode(t)
	n.newLink(uidA)
	n.newLink(uidB)
	n.run(podNamed("web", uidA, "1"), podNamed("db", uidB, "3"))
	n.told("Normal CaptureStarted: ")
	n.told("Normal CaptureStarted: ")
	pids := []int{n.pid("capture-web.pcap"), n.pid("capture-db.pcap")}
	began := time.Now()
	n.end()
	n.alive.Wait()
	if took := time.Since(began); took > exitGrace {
		t.Errorf("it took %v", took)
	}
	if files := n.files(); len(files) > 0 || !isGone(pids[0]) || !isGone(pids[1]) {
		t.Errorf("files %q are left, or processes", files)
	}
}

// C5: a child that does not end on SIGTERM is killed, and its end is told by the signal's name.
func TestStart(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	said := newStderr()
	c, err := start(ctx, said, nil, "bash", "-c", "trap '' TERM; echo 'tcpdump: listening on x' >&2; while :; do read -t 1 <> <(:); done")
	must(t, err)
	ended := make(chan error)
	go func() { ended <- c.wait() }()
	<-said.listening
	began := time.Now()
	cancel()
	err = <-ended
	if took := time.Since(began); took < termGrace || took > 2*termGrace {
		t.Errorf("it took %v", took)
	}
	if got := said.lastWords(err); got != "signal: killed" {
		t.Errorf("its last words are %q", got)
	}
	if _, err := start(t.Context(), said, nil, "/there-is-none"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("started: %v", err)
	}
}

// C4: on a disk with too little room a capture waits, and starts by itself when there is enough.
func TestSmallDisk(t *testing.T) {
	n := newRealNode(t)
	n.newLink(uidA)
	n.must("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", n.root)
	n.Cleanup(func() { syscall.Unmount(n.root, syscall.MNT_DETACH) })
	n.run(podNamed("web", uidA, "1"))
	n.told("Warning CaptureWaiting: 1 file can take")
	n.must("mount", "-o", "remount,size=4m", n.root)
	n.told("Normal CaptureStarted: ")
}

// C4: a full disk, of which tcpdump says nothing, is told, and when there is room the capture goes on. What a capture
// has written into the room that it was given fills no disk.
func TestFullDisk(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	n.must("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", n.root)
	n.Cleanup(func() { syscall.Unmount(n.root, syscall.MNT_DETACH) })
	n.run(podNamed("web", uidA, "1"))
	n.told("Normal CaptureStarted: ")
	file := filepath.Join(n.root, "capture-web.pcap")
	web.say(web.pod, "big", 4000, 1, 650, 1400)
	n.until("the file is nearly full", func() bool { info, _ := os.Stat(file); return info.Size() > 900_000 })
	if n.disk.isFull() || len(n.events.news) > 0 {
		t.Fatal("the disk is said to be full, with room for all that may be written")
	}
	other := filepath.Join(n.root, "other")
	os.WriteFile(other, make([]byte, 2<<20), 0o644) // fails in the middle, which is the point
	n.told("Warning CaptureFailed: disk is full")
	n.told("Warning CaptureWaiting: disk is full")
	if !isGone(n.pid("capture-web.pcap")) {
		t.Error("tcpdump goes on")
	}
	must(t, os.Remove(other))
	n.told("Warning CaptureStarted: the packets in that one are lost")
}
