package main

import (
	"context"
	"errors"
	"fmt"
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
	const needs = `for c in tcpdump nsenter mount; do command -v $c; done && ip netns add $0 && ip netns delete $0` // only root can
	err := exec.Command("bash", "-e", "-c", needs, randomName()).Run()
	if err != nil && os.Getenv("CI") == "true" {
		t.Fatalf("no real captures in CI: %v", err)
	} else if err != nil {
		t.Skipf("no real captures: %v", err)
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
			is(n, "a tcpdump of "+stem+" is left", slices.ContainsFunc(pids, isTcpdump), false)
		}
		is(n, "files are left", len(n.files()) > 0, false)
		close(n.news)
		for e := range n.news {
			is(n, "a Warning is told: "+e.message, e.kind == "Warning", false)
		}
	})
	n.see(pods...)
}

// startReal starts a child, which the made-up /proc then shows as it is.
func (n *realNode) startReal(ctx context.Context, network *os.File, arguments ...string) (*child, error) {
	c, err := start(ctx, network, arguments...)
	if err != nil || network == nil {
		return c, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	stem := filepath.Base(arguments[slices.Index(arguments, "-w")+1])
	n.pids[stem] = append(n.pids[stem], c.pid)
	os.Remove(n.proc.path(c.pid, ""))
	return c, os.Symlink(fmt.Sprintf("/proc/%d", c.pid), n.proc.path(c.pid, ""))
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
	until(l, "the process is in its namespace", func() bool { return readFile(fmt.Sprintf("/proc/%d/comm", pid)) == "sleep\n" })
	n.proc.pod(pid, uid)
	for _, file := range []string{"ns/net", "net"} { // the fake process gets the network of the real one
		must(n, os.Remove(n.proc.path(pid, file)), os.Symlink(fmt.Sprintf("/proc/%d/%s", pid, file), n.proc.path(pid, file)))
	}
	return l
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
	until(l, "the namespace is destroyed", func() bool { return exec.Command("ip", "-n", l.peer, "link", "show", "net0").Run() != nil })
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
func until(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// told waits for the next Events, and checks them as world.told does.
func (n *realNode) told(wanted ...string) {
	n.Helper()
	for _, want := range wanted {
		select {
		case e := <-n.news:
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

// packets are a file's, in order: the text of a UDP packet of say's, "other" for one of any other kind.
func (n *realNode) packets(name string) (packets []string) {
	// It may be read in the middle of a packet, which tcpdump then complains of: the next look sees it whole.
	out, _ := exec.Command("tcpdump", "-Z", "root", "-nn", "-tt", "-A", "-r", filepath.Join(n.root, name)).Output()
	for _, packet := range regexp.MustCompile(`(?m)^[0-9]{9,}\.`).Split(string(out), -1)[1:] {
		text := append(regexp.MustCompile(`<([a-z]+-[0-9]+)>`).FindStringSubmatch(packet), "other", "other")[1]
		packets = append(packets, text)
	}
	return packets
}

// holds waits until a file holds the packets first to last of each kind that was said, and nothing else at all.
func (n *realNode) holds(name string, first, last int, kinds ...string) {
	n.Helper()
	var want []string
	for _, kind := range kinds {
		for i := first; i <= last; i++ {
			want = append(want, fmt.Sprintf("%s-%d", kind, i))
		}
	}
	until(n, "the packets are in the file", func() bool { return len(n.packets(name)) >= len(want) })
	is(n, "packets in "+name, n.packets(name), want)
}

// C3, C4, C5: exactly a pod's own packets are captured, in both directions; a tcpdump that is killed is started again;
// when the pod's network goes, its files stay, and nothing of ours keeps the network alive; when the pod goes, its files go, and
// those of others stay.
func TestTcpdump(t *testing.T) {
	n := newRealNode(t)
	web, db := n.newLink(uidA), n.newLink(uidB)
	n.run(podNamed("web", uidA, "1"), podNamed("db", uidB, "11"))
	n.told(started, started)
	web.say(web.pod, "out", 4000, 1, 20, 1)
	db.say(db.pod, "other", 4000, 1, 20, 1)
	web.say(web.peer, "in", 4000, 1, 20, 1)
	n.holds(webFile, 1, 20, "out", "in")
	n.holds("capture-db.pcap00", 1, 20, "other")

	killed, other := n.pid(webFile), n.pid("capture-db.pcap")
	is(t, "the child is tcpdump itself, which signals would miss", isTcpdump(killed), true)
	must(t, syscall.Kill(killed, syscall.SIGKILL))
	n.told(failed+": tcpdump ended by itself (signal: killed); it is tried again in ", again)
	is(t, "the killed one is started", n.pid(webFile) != killed, true)
	web.say(web.pod, "again", 4000, 1, 20, 1)
	n.holds(webFile, 1, 20, "again")

	web.finish()
	web.isDestroyed()
	n.told(stopped + ": 20 packets captured, 0 dropped by the kernel, since tcpdump began again; the pod's network is gone, the files stay")
	n.holds(webFile, 1, 20, "again")
	n.forget(uidA)
	n.told(stopped + ": deleted")
	is(t, "files of the other pod", n.files(), []string{"capture-db.pcap00"})
	is(t, "the other tcpdump goes on", isTcpdump(other) && n.pid("capture-db.pcap") == other, true)
	n.forget(uidB)
	n.told(stopped + ": 20 packets captured, 0 dropped by the kernel; its files")
	is(t, "files", n.files(), nil)
	is(t, "it goes on", isTcpdump(other), false)
}

// C3, C4: more than 1 MB turns to the next file, which root may write in its folder, and after the last to the first.
func TestRotation(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	n.run(podNamed("web", uidA, "2"))
	n.told(started + ": 2 files")
	size := func(name string) (size int64) {
		if info, err := os.Stat(filepath.Join(n.root, name)); err == nil {
			size = info.Size()
		}
		return size
	}
	pid, most, last := n.pid(webFile), int64(0), int64(0)
	until(n, "file 0 is written again", func() bool {
		before := last
		web.say(web.pod, "big", 4000, 1, 400, 1300)
		last = size(webFile + "0")
		most = max(most, last, size(webFile+"1"))
		return last < before
	})
	if full := size(webFile + "1"); full < 1_000_000 || most > fileBytes || len(n.packets(webFile+"1")) < 1_000_000/1400 {
		t.Errorf("file 1 has %d bytes, the largest had %d", full, most)
	}
	is(t, "files", n.files(), []string{webFile + "0", webFile + "1"})
	is(t, "the PID of tcpdump", n.pid(webFile), pid)
}

// C2, C8, C9: tcpdump takes the filter, or refuses it before anything starts; either way it is nothing but a filter. A mistake
// leaves alone what runs. C7: a filter that the kernel refuses runs in tcpdump, which is told.
func TestFilter(t *testing.T) {
	n := newRealNode(t)
	web, p := n.newLink(uidA), podNamed("web", uidA, "1")
	n.run()
	evil := filepath.Join(n.root, "evil")
	for _, filter := range []string{"udp prot 4001", "-w " + evil, "--version", "$(touch " + evil + ")", "'`touch " + evil + "`",
		"tcp.port == 80", "“tcp port 80”", "host name.invalid", "tcp port http-that-is-none"} {
		n.see(p.filtered(filter))
		n.told(invalid + ": hosts and ports are numbers; tcpdump: ")
		is(t, "files with the filter "+filter, n.files(), nil)
		is(t, "PID of a tcpdump", n.pid(webFile), 0)
	}
	n.see(p.filtered(" udp port 4001\n"))
	n.told(started + ": the filter is \"udp port 4001\"")
	for i := range 3 {
		web.say(web.pod, "not", 4000, 3*i, 3*i+2, 1)
		web.say(web.pod, "this", 4001, i, i, 1)
	}
	n.holds(webFile, 0, 2, "this")
	running := n.pid(webFile)
	n.see(p.on("any").filtered("ether host 02:00:00:00:00:09")) // which is right on eth0
	n.told(invalid + ": what was asked for before goes on as it was")
	web.say(web.pod, "this", 4001, 3, 3, 1)
	n.holds(webFile, 0, 3, "this")
	is(t, "PID of tcpdump after a mistake", n.pid(webFile), running)
	n.see(p.filtered("outbound and (ip protochain 17)"))
	n.told(stopped+": 4 packets captured", "Warning CaptureStarted: Kernel filter failed")
}

// C9: no filter that is accepted takes tcpdump long, or much memory. Of many kinds this one takes the most.
func TestWorstFilter(t *testing.T) {
	n := newRealNode(t)
	n.run()
	filter := "portrange 1-2"
	for i := 2; len(filter)+len(" or portrange 99-100") <= maxFilter; i++ {
		filter += fmt.Sprintf(" or portrange %d-%d", i, i+1)
	}
	p := web.filtered(filter)
	p.value, p.files = "1", 1
	is(t, "refusal", n.refusal(t.Context(), p), "")
	tcpdump := exec.Command("bash", "-c", `ulimit -v 65536 && exec tcpdump -y EN10MB -d -- "$1"`, "bash", filter) // KiB
	must(t, tcpdump.Run())
	is(t, "it took a second", tcpdump.ProcessState.UserTime() > time.Second, false)
}

// C10: the interface that is asked for, and no other; one that comes later is captured then.
func TestInterface(t *testing.T) {
	n := newRealNode(t)
	web, p := n.newLink(uidA), podNamed("web", uidA, "1")
	n.command("ip -n %s link set lo up", web.pod)
	n.run(p.on("any"))
	n.told(started + ": the interface is any")
	web.say(web.pod, "out", 4000, 1, 3, 1)
	n.holds(webFile, 1, 3, "out")
	n.see(p.on("lo"))
	n.told(stopped, started+": the interface is lo")
	web.say(web.pod, "out", 4000, 4, 6, 1)
	n.command("nsenter --net=/run/netns/%s bash -c echo>/dev/udp/127.0.0.1/4000", web.pod)
	until(n, "a packet of lo is there", func() bool { return len(n.packets(webFile)) > 0 })
	is(t, "packets of eth0 are captured on lo", slices.ContainsFunc(n.packets(webFile), func(text string) bool { return text != "other" }), false)
	for _, name := range []string{"net1", "2", "nflog"} {
		n.see(p.on(name))
		n.told(stopped, failed+": the pod has no interface "+name+", but lo, eth0, net0; it is tried again in ")
		is(t, "files", n.files(), nil)
		if name == "nflog" { // tcpdump has a device of that name, and would take it, as it would take 2 for eth0
			break
		}
		n.command("ip -n %s link add %s up type veth", web.pod, name)
		n.told(started + ": the interface is " + name)
		n.command("ip -n %s link delete %s", web.pod, name)
		n.told(failed + ": tcpdump ended by itself (")
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
		n.told(started)
	}
	for _, l := range links {
		l.say(l.pod, "last", 4000, 1, 40, 1)
		l.finish()
	}
	for name, l := range links {
		l.isDestroyed()
		n.told(stopped + ": the pod's network is gone, the files stay")
		n.holds("capture-"+name+".pcap", 1, 40, "last")
	}
}

// C5: how a real child's end is told: by the signal's name, by its complaint, or by its status. One that does not end on SIGTERM
// is killed.
func TestStart(t *testing.T) {
	for script, want := range map[string]string{
		"echo tcpdump: x >&2; kill -SEGV $$": "signal: segmentation fault",
		"kill -KILL $$":                      "signal: killed",
		"echo tcpdump: x >&2; exit 1":        "tcpdump: x",
		"exit 3":                             "exit status 3",
		"exit 0":                             "exit status 0",
		"trap '' TERM; echo tcpdump: listening on x >&2; exec sleep 60": "signal: killed",
	} {
		ctx, cancel := context.WithCancel(t.Context())
		listening, began := make(chan bool), time.Now()
		said := &report{listening: func() { close(listening) }}
		c, err := start(ctx, nil, "sh", "-c", "ulimit -c 0; "+script)
		must(t, err)
		go func() {
			select {
			case <-listening:
				cancel()
			case <-ctx.Done(): // at the test's end
			}
		}()
		is(t, script, said.lastWords(said.read(c, func() {})), want)
		if took := time.Since(began); strings.Contains(script, "listening") && (took < termGrace || took > 2*termGrace) {
			t.Errorf("SIGKILL took %v", took)
		}
	}
	_, err := start(t.Context(), nil, "/there-is-none")
	is(t, "there is no such program", errors.Is(err, os.ErrNotExist), true)
}

// C4: on a disk with too little room a capture waits, and starts by itself when there is enough. A disk that fills up all the
// same, of which tcpdump says nothing, is told, and when there is room the capture goes on. What a capture writes into the room
// that it was given fills no disk.
func TestFullDisk(t *testing.T) {
	n := newRealNode(t)
	web := n.newLink(uidA)
	n.newLink(uidB)
	n.command("mount -t tmpfs -o size=2m tmpfs %s", n.root)
	n.Cleanup(func() { syscall.Unmount(n.root, syscall.MNT_DETACH) })
	n.run(podNamed("web", uidA, "1"))
	n.told(waiting + ": N=1 can take") // one file, and none to spare
	n.command("mount -o remount,size=3m %s", n.root)
	n.told(started)
	web.say(web.pod, "big", 4000, 1, 650, 1400)
	until(n, "the file is nearly full", func() bool { info, _ := os.Stat(filepath.Join(n.root, webFile)); return info.Size() > 900_000 })
	is(t, "the disk is full, with room for all that may be written", n.disk.isFull() || len(n.news) > 0, false)
	n.command("mount -o remount,size=3500k %s", n.root) // web's file has 0.9 MB, and can take 0.4 more
	n.see(podNamed("db", uidB, "1"))
	n.told(waiting + ": N=1 can take")
	n.command("mount -o remount,size=4000k %s", n.root)
	n.told(started)
	n.forget(uidB)
	n.told(stopped)
	other := filepath.Join(n.root, "other")
	os.WriteFile(other, make([]byte, 4<<20), 0o644) // fails in the middle, which is the point
	n.told(failed + ": disk is full: the capture stops")
	is(t, "tcpdump goes on", isTcpdump(n.pid(webFile)), false)
	must(t, os.Remove(other))
	n.told(again)
}
