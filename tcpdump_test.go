package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
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

// The real tcpdump in real network namespaces, with real packets. Of the node only the tree of cgroups
// is made up, and the API server is a fake.

const (
	webUID, dbUID = "1b2c3d4e-0000-4000-8000-0000000000aa", "1b2c3d4e-0000-4000-8000-0000000000bb"
	webFile       = "capture-web.pcap"
)

// The test binary is also `packetcapture live`, of a program whose files are in the folder TEST_LIVE.
func init() {
	if root := os.Getenv("TEST_LIVE"); root != "" {
		if err := live(context.Background(), root, "default/web"); err != nil {
			panic(err)
		}
		os.Exit(0)
	}
}

// realNode is a program that captures with the real tcpdump. The test stands where its watch is.
type realNode struct {
	*testing.T
	*podWatch
	api        *fakeAPI
	proc, root string
	ctx        context.Context
	end        func() // of the program
	heard      int    // Events that the test has seen
}

// newRealNode skips the test where it can't have network namespaces. In CI that is a failure.
func newRealNode(t *testing.T, diskFree int64) *realNode {
	t.Helper()
	const needs = "for c in tcpdump nsenter ip mount pgrep; do command -v $c; done && unshare --net --mount true"
	if err := exec.Command("bash", "-ec", needs).Run(); err != nil && os.Getenv("CI") == "true" {
		t.Fatalf("no real captures in CI: %v", err)
	} else if err != nil {
		t.Skipf("no real captures: %v", err)
	}
	t.Parallel()

	n := &realNode{T: t, api: newFakeAPI(t), proc: t.TempDir(), root: t.TempDir()}
	n.bash(`mkdir -p $0/1/root/sys/fs/cgroup/kubepods; touch $0/1/root/sys/fs/cgroup/cgroup.controllers; ln -s /proc/self/ns $0/1`, n.proc)
	a, err := newAgent(config{nodeName: "node-1", url: "https://127.0.0.1:1", account: n.api.account, proc: n.proc, root: n.root,
		diskLimit: 1 << 40, diskFree: diskFree})
	must(t, err)
	a.api.http.Transport, n.podWatch = n.api, newPodWatch(a)
	ctx, stop := context.WithCancel(context.Background())
	n.ctx = ctx
	n.end = sync.OnceFunc(func() { // no process and no file may be left, and no Warning that nobody has waited for
		stop()
		began := time.Now()
		a.alive.Wait()
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("the end took %v", took)
		}
		a.events.posting.Wait()
		is(t, "files that are left", n.bash("ls $0 | grep capture- || true", n.root), "")
		is(t, "processes that are left", n.bash(`pgrep -f "^(tcpdump|nsenter) .*$0" || true`, n.root), "")
		for _, e := range n.api.posted()[n.heard:] {
			is(t, fmt.Sprintf("kind of %q", e["message"]), e["type"], any("Normal"))
		}
	})
	t.Cleanup(n.end)
	return n
}

// bash runs a script, and returns what it writes.
func (n *realNode) bash(script string, arguments ...string) string {
	n.Helper()
	out, err := exec.Command("bash", append([]string{"-ec", script}, arguments...)...).CombinedOutput()
	if err != nil {
		n.Fatalf("%s %q: %v: %s", script, arguments, err, out)
	}
	return strings.TrimSpace(string(out))
}

// until polls until a condition holds.
func (n *realNode) until(what string, holds func() bool) {
	n.Helper()
	for deadline := time.Now().Add(30 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.Fatalf("not within 30 s: %s", what)
		}
	}
}

// see has the watch say that a pod is there, or has changed. Annotations are written behind the
// common part of their names: "=3", "/filter=tcp".
func (n *realNode) see(name, uid string, annotations ...string) {
	all := map[string]string{}
	for _, text := range annotations {
		key, value, _ := strings.Cut(text, "=")
		all[annotation+key] = value
	}
	var o object
	o.Metadata.Namespace, o.Metadata.Name, o.Metadata.UID, o.Metadata.Annotations = "default", name, uid, all
	n.apply(n.ctx, o.pod())
}

// told waits for an Event of a reason that has these words. No other Warning may come before it.
func (n *realNode) told(reason string, words ...string) {
	n.Helper()
	n.until(fmt.Sprintf("%s with %q is told", reason, words), func() bool {
		for posted := n.api.posted(); n.heard < len(posted); {
			e := posted[n.heard]
			lacks := func(word string) bool { return !strings.Contains(e["message"].(string), word) }
			if n.heard++; e["reason"] == reason && !slices.ContainsFunc(words, lacks) {
				return true
			} else if e["type"] == "Warning" {
				n.Fatalf("told is %v: %v; want %s with %q", e["reason"], e["message"], reason, words)
			}
		}
		return false
	})
}

// pid is that of the tcpdump that writes a file, 0 if none does.
func (n *realNode) pid(file string) int {
	pid, _ := strconv.Atoi(n.bash(`pgrep -f "^tcpdump .*-w $0 " || true`, n.root+"/"+file))
	return pid
}

// A packet begins with its time. What say has sent has its text between angle brackets.
var packetTime, packetText = regexp.MustCompile(`(?m)^[0-9]{9,}\.`), regexp.MustCompile(`<([a-z]+-[0-9]+)>`)

// packets returns those of a file in order: what say has sent, or "other".
func (n *realNode) packets(file string) (packets []string) {
	// The last packet may be half written: then tcpdump complains, and the next look sees it whole.
	out, _ := exec.Command("tcpdump", "-Z", "root", "-nn", "-tt", "-A", "-r", n.root+"/"+file).Output()
	for _, packet := range packetTime.Split(string(out), -1)[1:] {
		packets = append(packets, append(packetText.FindStringSubmatch(packet), "other", "other")[1])
	}
	return packets
}

// holds waits until a file has the packets first to last of each kind that was said, and no others.
func (n *realNode) holds(file string, first, last int, kinds ...string) {
	n.Helper()
	var want []string
	for _, kind := range kinds {
		for i := first; i <= last; i++ {
			want = append(want, fmt.Sprintf("%s-%d", kind, i))
		}
	}
	n.until("the packets are in "+file, func() bool { return len(n.packets(file)) >= len(want) })
	is(n, "packets in "+file, n.packets(file), want)
}

// link is the network of a pod, which its eth0 joins to another one.
type link struct {
	*realNode
	pod, peer, cgroup string // names of the namespaces; a folder
}

// Each end of eth0 has an address, and a neighbour that does not exist: what is sent to that one passes,
// and nobody answers. net0 stays down. The cgroup ($2) and /proc ($3) have a process of the pod.
const linkScript = `
for ns in $0 $1; do ip netns add $ns; done
for name in eth0 net0; do ip link add $name netns $0 type veth peer name $name netns $1; done
for ns in $0 $1; do
	ip -n $ns link set eth0 addrgenmode none # IPv6 would send by itself
	ip -n $ns link set eth0 up
	ip -n $ns address add 10.99.0.$((++i))/24 dev eth0
	ip -n $ns neighbour add 10.99.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent
done
until [[ $(ip -n $0 -o link show eth0) == *" state UP "* ]]; do sleep 0.01; done
nsenter --net=/run/netns/$0 sleep 600 >/dev/null 2>&1 &
until [[ $(</proc/$!/comm) == sleep ]]; do sleep 0.01; done
mkdir $2; echo $! >$2/cgroup.procs; ln -s /proc/$! $3`

func (n *realNode) newLink(uid string) *link {
	n.Helper()
	name := fmt.Sprintf("test-%08x", rand.Uint32())
	l := &link{n, name, name + "-peer", n.proc + "/1/root/sys/fs/cgroup/kubepods/pod" + uid}
	n.Cleanup(func() { n.end(); l.finish(); l.bash("ip netns delete $0 || true", l.peer) })
	n.bash(linkScript, l.pod, l.peer, l.cgroup, n.proc)
	return l
}

// finish ends the pod as a CNI, a runtime and the kubelet do.
func (l *link) finish() {
	l.bash(`[[ -d $1 ]] || exit 0; ip -n $0 link delete eth0; ip netns delete $0; kill -9 $(<$1/cgroup.procs); rm -r $1`, l.pod, l.cgroup)
}

// isDestroyed waits until no file of ours keeps the pod's network: then net0's other end goes too.
func (l *link) isDestroyed() {
	l.Helper()
	l.bash(`for i in {1..300}; do ip -n $0 link show net0 || exit 0; sleep 0.1; done; exit 1`, l.peer)
}

// say sends UDP packets from one of the namespaces, numbered from first to last and padded.
func (l *link) say(from, what string, port, first, last, padding int) {
	l.Helper()
	l.bash(fmt.Sprintf(`exec nsenter --net=/run/netns/$0 bash -c 'exec 3>/dev/udp/10.99.0.9/%d; printf -v pad %%0%dd 0
		for ((i = %d; i <= %d; i++)); do printf "<%s-%%d>$pad" $i >&3; done'`, port, padding, first, last, what), from)
}

// A pod's own packets are captured in both directions, and no others. A tcpdump that is killed is
// started again. When the pod ends its files stay, and nothing of ours keeps its network; when the
// annotation goes the files go, and those of others stay.
func TestTcpdump(t *testing.T) {
	n := newRealNode(t, 0)
	web, db := n.newLink(webUID), n.newLink(dbUID)
	n.see("web", webUID, "=1")
	n.told("CaptureStarted", webFile, "the interface is eth0")
	n.see("db", dbUID, "=11")
	n.told("CaptureStarted", "capture-db.pcap00")
	web.say(web.pod, "out", 4000, 1, 20, 1)
	db.say(db.pod, "other", 4000, 1, 20, 1)
	web.say(web.peer, "in", 4000, 1, 20, 1)
	n.holds(webFile, 1, 20, "out", "in")
	n.holds("capture-db.pcap00", 1, 20, "other")

	must(t, syscall.Kill(n.pid(webFile), syscall.SIGKILL))
	n.told("CaptureFailed", "tcpdump ended by itself (signal: killed); it is tried again")
	n.told("CaptureStarted", "began again at the first file")
	web.say(web.pod, "again", 4000, 1, 20, 1)
	n.holds(webFile, 1, 20, "again")

	other := n.pid("capture-db.pcap")
	web.finish()
	web.isDestroyed()
	n.told("CaptureStopped", "20 packets captured, 0 dropped by the kernel, since tcpdump began again", "the files", "stay")
	n.holds(webFile, 1, 20, "again")
	n.forget(webUID)
	n.told("CaptureStopped", "are deleted")
	is(t, "files", n.bash("ls $0", n.root), "capture-db.pcap00\ncaptures")
	is(t, "PID of the other tcpdump", n.pid("capture-db.pcap"), other)
}

// A file of more than 1 MB is followed by the next one, and the last one by the first.
func TestRotation(t *testing.T) {
	n := newRealNode(t, 0)
	web := n.newLink(webUID)
	n.see("web", webUID, "=2")
	n.told("CaptureStarted", "2 files")
	web.say(web.pod, "big", 4000, 1, 1800, 1400) // 2.6 MB
	n.until("file 0 is written again", func() bool { return slices.Contains(n.packets(webFile+"0"), "big-1800") })
	first, second := n.packets(webFile+"0"), n.packets(webFile+"1")
	is(t, "the packets go on from file 1 to file 0", first[0] > second[len(second)-1] && len(first)+len(second) < 1800, true)
	if size := len(readFile(n.root + "/" + webFile + "1")); size < 1_000_000 || size > fileBytes {
		t.Errorf("file 1 has %d bytes", size)
	}
	is(t, "files", n.bash("ls $0", n.root), webFile+"0\n"+webFile+"1\ncaptures")
}

// A filter that tcpdump refuses is told, and nothing starts. One that it takes is nothing but a filter.
// A mistake leaves alone what runs. A filter that the kernel refuses works in tcpdump, and is told.
func TestFilter(t *testing.T) {
	n := newRealNode(t, 0)
	web, evil := n.newLink(webUID), n.root+"/evil"
	for _, filter := range []string{"udp prot 4001", "-w " + evil, "--version", "$(touch " + evil + ")",
		"'`touch " + evil + "`", "tcp.port == 80", "“tcp port 80”", "tcp port http-that-is-none"} {
		n.see("web", webUID, "=1", "/filter="+filter)
		n.told("CaptureInvalid", "hosts and ports are numbers; tcpdump: ", "nothing is captured")
	}
	is(t, "files", n.bash("ls $0", n.root), "captures")
	n.see("web", webUID, "=1", "/filter= udp port 4001\n")
	n.told("CaptureStarted", `the filter is "udp port 4001"`)
	for i := range 3 {
		web.say(web.pod, "not", 4000, 3*i, 3*i+2, 1)
		web.say(web.pod, "this", 4001, i, i, 1)
	}
	n.holds(webFile, 0, 2, "this")

	pid := n.pid(webFile)
	n.see("web", webUID, "=1", "/interface=any", "/filter=ether host 02:00:00:00:00:09") // eth0 could have it
	n.told("CaptureInvalid", "goes on as it was")
	web.say(web.pod, "this", 4001, 3, 3, 1)
	n.holds(webFile, 0, 3, "this")
	is(t, "PID after a mistake", n.pid(webFile), pid)
	n.see("web", webUID, "=1", "/filter=outbound and (ip protochain 17)")
	n.told("CaptureStarted", "Kernel filter failed")
}

// A name in a filter is refused at once, and no DNS packet leaves for it. Two other look-ups show that
// such a packet would be seen here.
func TestNameInFilter(t *testing.T) {
	n := newRealNode(t, 0)
	seen := t.TempDir() + "/dns"
	sniffer := exec.Command("tcpdump", "-Z", "root", "-i", "any", "-U", "--immediate-mode", "-w", seen, "udp port 53")
	must(t, sniffer.Start())
	defer func() { sniffer.Process.Kill(); sniffer.Wait() }()
	n.until("the sniffer listens", func() bool { return readFile(seen) != "" })
	for _, name := range []string{"before", "after"} {
		n.bash("timeout 3 tcpdump -y EN10MB -d -- host $0.invalid || true", name)
		n.until("the machine looks up the name "+name, func() bool { return strings.Contains(readFile(seen), name) })
		began := time.Now()
		n.see(name, webUID, "=1", "/filter=host asked-for.invalid")
		n.told("CaptureInvalid", "hosts and ports are numbers; tcpdump: ", "asked-for")
		if took := time.Since(began); took > 2*time.Second || strings.Contains(readFile(seen), "asked-for") {
			t.Errorf("a name was looked up, or took %v to be refused", took)
		}
		n.forget(webUID)
	}
}

// No filter that is accepted takes tcpdump long, or much memory. Of many kinds this one takes the most.
func TestWorstFilter(t *testing.T) {
	n := newRealNode(t, 0)
	filter := "portrange 1-2"
	for i := 2; len(filter)+len(" or portrange 99-100") <= maxFilter; i++ {
		filter += fmt.Sprintf(" or portrange %d-%d", i, i+1)
	}
	n.bash(`ulimit -v 65536 -t 1; exec tcpdump -y EN10MB -d -- "$0"`, filter) // KiB, seconds
	n.newLink(webUID)
	n.see("web", webUID, "=1", "/filter="+filter)
	n.told("CaptureStarted")
}

// The interface that is asked for is captured, and no other. One that comes later is captured then.
func TestInterface(t *testing.T) {
	n := newRealNode(t, 0)
	web := n.newLink(webUID)
	n.bash("ip -n $0 link set lo up", web.pod)
	n.see("web", webUID, "=1", "/interface=any")
	n.told("CaptureStarted", "the interface is any")
	web.say(web.pod, "out", 4000, 1, 3, 1)
	n.holds(webFile, 1, 3, "out")
	n.see("web", webUID, "=1", "/interface=lo")
	n.told("CaptureStarted", "the interface is lo")
	web.say(web.pod, "out", 4000, 4, 6, 1)
	n.bash("nsenter --net=/run/netns/$0 bash -c 'echo >/dev/udp/127.0.0.1/4000'", web.pod)
	n.until("a packet of lo is there", func() bool { return len(n.packets(webFile)) > 0 })
	is(t, "packets of eth0 on lo", strings.Contains(fmt.Sprint(n.packets(webFile)), "out"), false)

	for _, name := range []string{"net1", "2"} { // tcpdump takes 2 for eth0
		n.see("web", webUID, "=1", "/interface="+name)
		n.told("CaptureWaiting", "Waiting for the interface "+name+": the pod has lo, eth0, net0")
		n.bash("ip -n $0 link add $1 up type veth", web.pod, name)
		n.told("CaptureStarted", "the interface is "+name)
		n.bash("ip -n $0 link delete $1", web.pod, name)
		n.told("CaptureFailed", "tcpdump ended by itself (")
	}
	n.see("web", webUID, "=1", "/interface=nflog") // a device of tcpdump that is no interface
	n.told("CaptureWaiting", "Waiting for the interface nflog: ")
}

// On any, a pod's very last packets are in the file, each time. Its network is not kept after that.
func TestLastPackets(t *testing.T) {
	n := newRealNode(t, 0)
	links := map[string]*link{}
	for i := range 4 {
		name, uid := fmt.Sprint("web-", i), fmt.Sprint(webUID[1:], i)
		links[name] = n.newLink(uid)
		n.see(name, uid, "=1", "/interface=any")
		n.told("CaptureStarted")
	}
	for _, l := range links {
		l.say(l.pod, "last", 4000, 1, 40, 1)
		l.finish()
	}
	for name, l := range links {
		l.isDestroyed()
		n.told("CaptureStopped", "the files", "stay")
		n.holds("capture-"+name+".pcap", 1, 40, "last")
	}
}

// A program that does not end on SIGTERM is killed.
func TestKill(t *testing.T) {
	newRealNode(t, 0)
	ctx, cancel := context.WithCancel(t.Context())
	p, err := start(ctx, nil, "bash", "-c", "trap '' TERM; echo it ignores SIGTERM >&2; exec sleep 60")
	must(t, err)
	p.stderr.Read(make([]byte, 100))
	cancel()
	began := time.Now()
	io.Copy(io.Discard, p.stderr)
	is(t, "end", fmt.Sprint(p.wait()), "signal: killed")
	if took := time.Since(began); took < termGrace || took > 2*termGrace {
		t.Errorf("SIGKILL came after %v", took)
	}
}

// The disk is full when less is free than a file takes, or less than DISK_FREE percent. A capture waits
// then, or is stopped and keeps its files: tcpdump itself would say nothing. Both go on by themselves.
func TestFullDisk(t *testing.T) {
	for diskFree, size := range map[int64]int{0: 1, 50: 6} { // percent, MiB
		t.Run(fmt.Sprintf("DISK_FREE=%d", diskFree), func(t *testing.T) {
			n := newRealNode(t, diskFree)
			web := n.newLink(webUID)
			n.bash("mount -t tmpfs -o size=$1m tmpfs $0; mkdir $0/captures; head -c $(($1 * 600000)) /dev/zero >$0/big", n.root, strconv.Itoa(size))
			t.Cleanup(func() { syscall.Unmount(n.root, syscall.MNT_DETACH) })
			n.see("web", webUID, "=1")
			n.told("CaptureWaiting", "Waiting for disk space: ")
			n.bash("mount -o remount,size=$1m $0", n.root, strconv.Itoa(2*size+1))
			n.told("CaptureStarted")
			web.say(web.pod, "kept", 4000, 1, 20, 1)
			n.holds(webFile, 1, 20, "kept")
			n.bash("cat /dev/zero >$0/big || true", n.root)
			n.told("CaptureFailed", "disk is full")
			n.holds(webFile, 1, 20, "kept")
			is(t, "PID", n.pid(webFile), 0)
			n.bash("rm $0/big", n.root)
			n.told("CaptureStarted", "began again at the first file")
		})
	}
}

// A live view is a second tcpdump with the capture's filter, which ends with its stdin and with the
// capture. A tcpdump of another container is not the capture's, whatever its arguments are.
func TestLive(t *testing.T) {
	n := newRealNode(t, 0)
	web := n.newLink(webUID)
	for way, isOurs := range map[string]bool{"unshare --mount": false, "env": true} {
		imitation := exec.Command("bash", "-c", "exec "+way+` bash -c 'exec -a tcpdump bash -c "read; true" x -w "$0" -p' $0`, n.root+"/"+webFile)
		stdin, err := imitation.StdinPipe()
		must(t, err, imitation.Start())
		n.until("it looks like tcpdump", func() bool { return n.pid(webFile) != 0 })
		stat, _, _ := findTcpdump(n.root + "/" + webFile)
		is(t, "it is taken for the capture's by "+way, stat != nil, isOurs)
		must(t, stdin.Close(), imitation.Wait())
	}
	n.see("web", webUID, "=1", "/filter=udp port 4001")
	n.told("CaptureStarted")
	begin := func() (stdin io.Closer, stdout io.Reader, wait func() error) {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "TEST_LIVE="+n.root)
		in, err := cmd.StdinPipe()
		must(t, err)
		out, err := cmd.StdoutPipe()
		must(t, err, cmd.Start())
		_, err = io.ReadFull(out, make([]byte, pcapHeader)) // it listens
		must(t, err)
		return in, out, cmd.Wait
	}
	stdin, stdout, wait := begin()
	web.say(web.pod, "not", 4000, 1, 3, 1)
	web.say(web.pod, "this", 4001, 1, 1, 1)
	packet := make([]byte, 100)
	count, err := stdout.Read(packet)
	must(t, err, stdin.Close())
	is(t, "it ends with an error when stdin ends", wait() != nil, true)
	is(t, "the first packet is this-1", strings.Contains(string(packet[:count]), "<this-1>"), true)
	_, _, wait = begin()
	n.forget(webUID)
	must(t, wait())
}
