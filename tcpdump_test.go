package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The real tcpdump in real network namespaces, with real packets. Of the node only /proc is made up: it holds the
// test's own processes.

const patience = 10 * time.Second // for what should take a second at most, on a machine that is busy

// node is a controller as it runs on a node, with real children.
type node struct {
	*testing.T
	c    *controller
	proc *fakeProc
	root string
	end  context.CancelFunc
	done chan struct{}
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
func (n *node) must(name string, arguments ...string) {
	n.Helper()
	if out, err := exec.Command(name, arguments...).CombinedOutput(); err != nil {
		n.Fatalf("%s %q: %v: %s", name, arguments, err, out)
	}
}

func newNode(t *testing.T) *node {
	t.Helper()
	needNetwork(t)
	t.Parallel()
	return &node{T: t, proc: newProc(t), root: t.TempDir(), done: make(chan struct{})}
}

// run begins the program, whose Pods are listed.
func (n *node) run(pods ...pod) {
	n.Helper()
	var err error
	n.c, err = newController(testConfig(n, n.proc.dir, n.root))
	must(n, err)
	ctx, cancel := context.WithCancel(context.Background())
	n.end = cancel
	go func() { n.c.loop(ctx); close(n.done) }()
	n.Cleanup(func() { cancel(); <-n.done })
	n.send("LISTED", pods...)
}

func (n *node) send(kind string, pods ...pod) { n.c.changes <- change{kind, pods} }

// link is a network namespace that a veth pair named eth0 joins to another. Each end has one address, and a
// neighbour that does not exist: what is sent to that passes the pair, and nobody answers.
type link struct {
	*node
	pod, peer string // names of the namespaces
	holder    *exec.Cmd
}

// newLink makes a Pod's network and, in the fake /proc, the process that holds it.
func (n *node) newLink(uid string) *link {
	n.Helper()
	l := &link{node: n, pod: randomName(), peer: randomName()}
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
	must(p, os.Remove(p.path(fake, "ns/net")), os.Symlink(fmt.Sprintf("/proc/%d/ns/net", real), p.path(fake, "ns/net")))
}

// finish ends the Pod's process, and what the fake /proc says of it.
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
func (n *node) until(what string, holds func() bool) {
	n.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// told waits for the next Event, and checks it as world.told does.
func (n *node) told(want string) {
	n.Helper()
	select {
	case e := <-n.c.recorder.news:
		what, words, _ := strings.Cut(want, ": ")
		if what != e.kind+" "+e.reason || !strings.Contains(e.message, words) {
			n.Fatalf("told %s %s: %s, want %s", e.kind, e.reason, e.message, want)
		}
	case <-time.After(patience):
		n.Fatalf("never told: %s", want)
	}
}

// pid is that of a capture's tcpdump, 0 if none runs.
func (n *node) pid(uid string) int {
	pid := make(chan int)
	n.c.inbox <- func() {
		p := n.c.captures[uid]
		if p == nil || p.cmd == nil {
			go func() { pid <- 0 }()
			return
		}
		go func(found int) { pid <- found }(p.cmd.Process.Pid)
	}
	return <-pid
}

func isGone(pid int) bool { return syscall.Kill(pid, 0) == syscall.ESRCH }

// packets are the UDP packets' texts in files, and how many packets of any kind these hold.
func (n *node) packets(names ...string) (texts []string, all int) {
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
func (n *node) holds(name string, want ...string) {
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

func (n *node) files() []string { return (&world{T: n.T, root: n.root}).files() }

// C3, C4, C5: exactly a Pod's own packets are captured, in both directions; a tcpdump that is killed is started again;
// when the annotation goes, the process and the files go, and those of others stay.
func TestTcpdump(t *testing.T) {
	n := newNode(t)
	web, db := n.newLink(uidA), n.newLink(uidB)
	n.run(podNamed("web", uidA, "1"), podNamed("db", uidB, "2"))
	n.told("Normal CaptureStarted: ")
	n.told("Normal CaptureStarted: ")
	web.say(web.pod, "out", 4000, 1, 20, 1)
	db.say(db.pod, "other", 4000, 1, 20, 1)
	web.say(web.peer, "in", 4000, 1, 20, 1)
	n.holds("capture-web.pcap", append(numbered("out", 1, 20), numbered("in", 1, 20)...)...)
	n.holds("capture-db.pcap0", numbered("other", 1, 20)...)

	killed, other := n.pid(uidA), n.pid(uidB)
	if got := readFile(fmt.Sprintf("/proc/%d/comm", killed)); got != "tcpdump\n" {
		t.Errorf("the child is %q", got)
	}
	must(t, syscall.Kill(killed, syscall.SIGKILL))
	n.told("Warning CaptureFailed: signal: killed")
	n.told("Normal CaptureStarted: capture-web.pcap")
	web.say(web.pod, "again", 4000, 1, 20, 1)
	n.holds("capture-web.pcap", numbered("again", 1, 20)...)

	running := n.pid(uidA)
	n.send("LISTED", podNamed("db", uidB, "2"))
	n.told("Normal CaptureStopped: 20 packets captured, 0 dropped by the kernel")
	if !isGone(running) || !isGone(killed) || n.pid(uidB) != other {
		t.Error("a wrong child runs")
	}
	if files := n.files(); !slices.Equal(files, []string{"capture-db.pcap0"}) {
		t.Errorf("files %q", files)
	}
}

// C3, C4: more than 1 MB turns to the next file, which root may write in its folder, and after the last to the first.
func TestRotation(t *testing.T) {
	n := newNode(t)
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
	pid := n.pid(uidA)
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
	if n.pid(uidA) != pid {
		t.Error("tcpdump did not survive the turn")
	}
}

// C9, C8: tcpdump takes the filter, or refuses it; either way it is nothing but a filter.
func TestFilter(t *testing.T) {
	n := newNode(t)
	web := n.newLink(uidA)
	p := podNamed("web", uidA, "1")
	n.run()
	evil := filepath.Join(n.root, "evil")
	for _, filter := range []string{"udp prot 4001", "-w " + evil, "--version", "$(touch " + evil + ")", "'`touch " + evil + "`"} {
		p.filter = filter
		n.send("MODIFIED", p)
		n.told("Warning CaptureFailed: refuses the filter")
		if files := n.files(); len(files) > 0 || n.pid(uidA) != 0 {
			t.Errorf("filter %q: files %q, pid %d", filter, files, n.pid(uidA))
		}
	}
	p.filter = "udp port 4001"
	n.send("MODIFIED", p)
	n.told("Normal CaptureStarted: udp port 4001")
	for i := range 3 {
		web.say(web.pod, "not", 4000, 3*i, 3*i+2, 1)
		web.say(web.pod, "this", 4001, i, i, 1)
	}
	n.holds("capture-web.pcap", numbered("this", 0, 2)...)
}

// C5: a Pod whose network is gone keeps its files, until it is deleted.
func TestNetworkGone(t *testing.T) {
	n := newNode(t)
	web := n.newLink(uidA)
	n.run(podNamed("web", uidA, "1"))
	n.told("Normal CaptureStarted: ")
	web.say(web.pod, "last", 4000, 1, 5, 1)
	n.holds("capture-web.pcap", numbered("last", 1, 5)...)
	web.finish()
	n.must("ip", "-n", web.pod, "link", "delete", "eth0")
	n.told("Normal CaptureStopped: 5 packets captured, 0 dropped by the kernel; the Pod's network is gone, the files stay")
	n.holds("capture-web.pcap", numbered("last", 1, 5)...)
	n.send("DELETED", podNamed("web", uidA, "1"))
	n.told("Normal CaptureStopped: deleted")
	if files := n.files(); len(files) > 0 {
		t.Errorf("files %q", files)
	}
}

// C3, C5: the host's network, which here is a namespace of the test's, is captured on all devices, with a Warning.
func TestHostNetworkForReal(t *testing.T) {
	n := newNode(t)
	web := n.newLink(uidA)
	n.proc.enter(1, web.holder.Process.Pid)
	n.run(podNamed("web", uidA, "1"))
	n.told("Warning CaptureStarted: the whole node's traffic")
	n.must("ip", "-n", web.pod, "link", "set", "lo", "up")
	web.say(web.pod, "out", 4000, 1, 5, 1)
	n.holds("capture-web.pcap", numbered("out", 1, 5)...)
	must(t, syscall.Kill(n.pid(uidA), syscall.SIGKILL))
	n.told("Warning CaptureFailed: signal: killed")
	n.told("Warning CaptureStarted: ")
	web.finish()
	n.told("Normal CaptureStopped: the files stay")
}

// C5: told to end, the program leaves no process and no file.
func TestEndForReal(t *testing.T) {
	n := newNode(t)
	n.newLink(uidA)
	n.newLink(uidB)
	n.run(podNamed("web", uidA, "1"), podNamed("db", uidB, "3"))
	n.told("Normal CaptureStarted: ")
	n.told("Normal CaptureStarted: ")
	pids := []int{n.pid(uidA), n.pid(uidB)}
	began := time.Now()
	n.end()
	<-n.done
	if took := time.Since(began); took > exitGrace {
		t.Errorf("it took %v", took)
	}
	if files := n.files(); len(files) > 0 || !isGone(pids[0]) || !isGone(pids[1]) {
		t.Errorf("files %q are left, or processes", files)
	}
}

// C4: on a disk with too little room a capture waits, and starts by itself when there is enough.
func TestSmallDisk(t *testing.T) {
	n := newNode(t)
	n.newLink(uidA)
	n.must("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", n.root)
	n.Cleanup(func() { syscall.Unmount(n.root, syscall.MNT_DETACH) })
	n.run(podNamed("web", uidA, "1"))
	n.told("Warning CaptureWaiting: 1 files")
	n.must("mount", "-o", "remount,size=4m", n.root)
	n.told("Normal CaptureStarted: ")
}

// C4: a full disk, of which tcpdump says nothing, is told, and when there is room the capture goes on. What a capture
// has written into the room that it was given fills no disk.
func TestFullDisk(t *testing.T) {
	n := newNode(t)
	web := n.newLink(uidA)
	n.must("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", n.root)
	n.Cleanup(func() { syscall.Unmount(n.root, syscall.MNT_DETACH) })
	n.run(podNamed("web", uidA, "1"))
	n.told("Normal CaptureStarted: ")
	file := filepath.Join(n.root, "capture-web.pcap")
	web.say(web.pod, "big", 4000, 1, 650, 1400)
	n.until("the file is nearly full", func() bool { info, _ := os.Stat(file); return info.Size() > 900_000 })
	n.pid(uidA) // the second question is answered after the first has had its effect
	if n.pid(uidA); len(n.c.recorder.news) > 0 {
		t.Fatalf("with room for all that it may write: %v", <-n.c.recorder.news)
	}
	other := filepath.Join(n.root, "other")
	os.WriteFile(other, make([]byte, 2<<20), 0o644) // fails in the middle, which is the point
	n.told("Warning CaptureFailed: disk is full")
	n.until("tcpdump has ended", func() bool { return n.pid(uidA) == 0 })
	must(t, os.Remove(other))
	n.told("Normal CaptureStarted: ")
}

// C4: a disk that fills up after a capture has got its room, and before it starts, is told too.
func TestFullDiskBeforeTheStart(t *testing.T) {
	n := newNode(t)
	n.must("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", n.root)
	n.Cleanup(func() { syscall.Unmount(n.root, syscall.MNT_DETACH) })
	n.run(podNamed("web", uidA, "1"))
	n.until("it has its room", func() bool {
		has := make(chan bool)
		n.c.inbox <- func() { p := n.c.captures[uidA]; has <- p != nil && p.have.n == 1 }
		return <-has
	})
	other := filepath.Join(n.root, "other")
	os.WriteFile(other, make([]byte, 3<<20), 0o644) // fails in the middle, which is the point
	n.newLink(uidA)
	n.told("Warning CaptureWaiting: the disk is full")
	must(t, os.Remove(other))
	n.told("Normal CaptureStarted: ")
}

// C4: a file that can't be deleted is told and tried again, and its room is not given to others meanwhile.
func TestFileThatStays(t *testing.T) {
	n := newNode(t)
	n.newLink(uidA)
	n.run(podNamed("web", uidA, "1"))
	n.told("Normal CaptureStarted: ")
	file := filepath.Join(n.root, "capture-web.pcap")
	n.must("mount", "--bind", file, file)
	n.Cleanup(func() { syscall.Unmount(file, syscall.MNT_DETACH) })
	n.send("LISTED")
	n.told("Warning CaptureFailed: can't be deleted: remove " + file)
	n.must("umount", file)
	n.until("the file is deleted", func() bool { return len(n.files()) == 0 })
}
