package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
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

// The test binary is also `packetcapture live`, of a program whose files are in the folder TEST_LIVE, and
// the program itself, with the root TEST_ROOT.
func init() {
	if root := os.Getenv("TEST_ROOT"); root != "" {
		if err := syscall.Chroot(root); err != nil {
			panic(err)
		}
		main()
		os.Exit(0)
	}
	if root := os.Getenv("TEST_LIVE"); root != "" {
		ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		if err := live(ctx, root, "default/web"); err != nil {
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

func newRealNode(t *testing.T, diskFree int64) *realNode {
	needTools(t)
	t.Parallel()

	n := &realNode{T: t, api: newFakeAPI(t), proc: t.TempDir(), root: t.TempDir()}
	n.bash(`mkdir -p $0/1/root/sys/fs/cgroup/kubepods; ln -s /proc/self/ns $0/1`, n.proc)
	a := testAgent(t, n.proc, n.root)
	a.account, a.limit, a.diskFree, a.api = n.api.account, 1<<20, diskFree, n.api
	n.podWatch = newPodWatch(t, a)
	ctx, stop := context.WithCancel(context.Background())
	n.ctx = ctx
	// At the end no process and no file may be left, and no Warning that nobody has waited for.
	n.end = sync.OnceFunc(func() {
		stop()
		began := time.Now()
		a.alive.Wait()
		is(t, "the end takes less than 5 s", time.Since(began) < 5*time.Second, true)
		is(t, "files that are left", namesIn(t, n.root), nil)
		is(t, "processes that are left", n.bash(`pgrep -f "^(tcpdump|nsenter) .*$0" || true`, n.root), "")
		for _, e := range n.api.posted()[n.heard:] {
			is(t, fmt.Sprintf("kind of %q", e["message"]), e["type"], any("Normal"))
		}
	})
	return n
}

// needTools skips a test where there can be no real captures. In CI it fails.
func needTools(t *testing.T) {
	t.Helper()
	const needs = "for c in tcpdump nsenter ip mount pgrep; do command -v $c; done && unshare --net --mount true"
	if err := exec.Command("bash", "-ec", needs).Run(); err != nil && os.Getenv("CI") == "true" {
		t.Fatalf("no real captures in CI: %v", err)
	} else if err != nil {
		t.Skipf("no real captures: %v", err)
	}
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

// told waits for an Event of a reason that has these words. No other Warning may come before it.
func (n *realNode) told(reason, words string) {
	n.Helper()
	n.until(reason+" is told: "+words, func() bool {
		for _, e := range n.api.posted()[n.heard:] {
			n.heard++
			if e["reason"] == reason && strings.Contains(e["message"].(string), words) {
				return true
			} else if e["type"] == "Warning" {
				n.Fatalf("told is %v: %v; want %s: %s", e["reason"], e["message"], reason, words)
			}
		}
		return false
	})
}

// link is a pod whose eth0 joins its network to another one.
type link struct {
	*realNode
	name, uid, stem string
	pod, peer       string // the names of the two networks
	cgroup          string // a folder
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

func (n *realNode) newLink(name string) *link {
	n.Helper()
	uid := fmt.Sprintf("%08x", rand.Uint32())
	l := &link{n, name, uid, n.root + "/capture-" + name + ".pcap", "test-" + uid, "test-" + uid + "-peer",
		n.proc + "/1/root/sys/fs/cgroup/kubepods/pod" + uid}
	n.Cleanup(func() { n.end(); l.finish(); l.bash("ip netns delete $0", l.peer) })
	n.bash(linkScript, l.pod, l.peer, l.cgroup, n.proc)
	return l
}

// finish ends the pod as a CNI, a runtime and the kubelet do, and waits until no file of ours keeps its
// network: then net0's other end goes too.
func (l *link) finish() {
	l.Helper()
	l.bash(`[[ -d $2 ]] || exit 0
		ip -n $0 link delete eth0; ip netns delete $0; kill -9 $(<$2/cgroup.procs); rm -r $2
		for i in {1..300}; do ip -n $1 link show net0 || exit 0; sleep 0.1; done; exit 1`, l.pod, l.peer, l.cgroup)
}

// see has the watch say that the pod is there, or has changed, and waits for what is told of that.
func (l *link) see(asked spec, reason, words string) {
	l.Helper()
	p := podNamed(l.name, l.uid, asked.value).filtered(asked.filter).on(asked.iface)
	l.apply(l.ctx, p.pod, p.spec)
	l.told(reason, words)
}

// say sends UDP packets from one of the networks, numbered from first to last, of 1.4 kB each.
func (l *link) say(from, what string, port, first, last int) {
	l.Helper()
	script := `exec 3>/dev/udp/10.99.0.9/%d; printf -v pad %%01400d 0
		for ((i = %d; i <= %d; i++)); do printf "<%s-%%d>$pad" $i >&3; done`
	l.bash("exec nsenter --net=/run/netns/$0 bash -c \"$1\"", from, fmt.Sprintf(script, port, first, last, what))
}

var packetText = regexp.MustCompile(`<[a-z]+-[0-9]+>`)

// packets are those of a file in order: what say has sent. Behind these each other packet is "other".
func (l *link) packets(digits string) []string {
	data := readFile(l.stem + digits)
	packets := packetText.FindAllString(data, -1)
	for count, _ := countPackets([]byte(data)); len(packets) < count; {
		packets = append(packets, "other")
	}
	return packets
}

// holds waits until a file has the packets first to last of each kind that was said, and no others.
func (l *link) holds(digits string, first, last int, kinds ...string) {
	l.Helper()
	var want []string
	for _, kind := range kinds {
		for i := first; i <= last; i++ {
			want = append(want, fmt.Sprintf("<%s-%d>", kind, i))
		}
	}
	l.until("the packets are in the file", func() bool { return len(l.packets(digits)) >= len(want) })
	is(l, "packets", l.packets(digits), want)
}

// pid is that of the tcpdump that writes the files, 0 if none does.
func (l *link) pid() int {
	pid, _ := strconv.Atoi(l.bash(`pgrep -f "^tcpdump .*-w $0 " || true`, l.stem))
	return pid
}

// A pod's own packets are captured in both directions, and no others. A tcpdump that is killed is
// started again. When the pod ends its files stay, and nothing of ours keeps its network; when the
// annotation goes the files go, and those of others stay.
func TestTcpdump(t *testing.T) {
	n := newRealNode(t, 0)
	web, db := n.newLink("web"), n.newLink("db")
	web.see(spec{value: "1"}, "CaptureStarted", "the interface is eth0")
	db.see(spec{value: "11"}, "CaptureStarted", "capture-db.pcap* (N=11")
	web.say(web.pod, "out", 4000, 1, 20)
	db.say(db.pod, "other", 4000, 1, 20)
	web.say(web.peer, "in", 4000, 1, 20)
	web.holds("", 1, 20, "out", "in")

	must(t, syscall.Kill(web.pid(), syscall.SIGKILL))
	n.told("CaptureFailed", "tcpdump has ended (signal: killed); it is tried again")
	n.told("CaptureStarted", "started over at the first file")
	web.say(web.pod, "again", 4000, 1, 20)
	web.holds("", 1, 20, "again")

	web.finish()
	n.told("CaptureStopped", "20 packets captured, 0 packets dropped by the kernel since tcpdump started over; the pod's network is gone; the files (")
	web.holds("", 1, 20, "again")
	n.forget(web.uid)
	n.told("CaptureStopped", "are deleted")
	is(t, "files", namesIn(t, n.root), []string{"capture-db.pcap00"})
	db.say(db.pod, "other", 4000, 21, 40)
	db.holds("00", 1, 40, "other") // its tcpdump goes on, and has not begun again
}

// A file of more than 1 MB is followed by the next one, and the last one by the first.
func TestRotation(t *testing.T) {
	web := newRealNode(t, 0).newLink("web")
	web.see(spec{value: "2"}, "CaptureStarted", "(N=2")
	web.say(web.pod, "big", 4000, 1001, 2800) // 2.6 MB
	web.until("file 0 is written again", func() bool { return slices.Contains(web.packets("0"), "<big-2800>") })
	first, last := web.packets("0"), web.packets("1")
	is(t, "file 1 goes on in file 0", first[0] > slices.Max(last) && len(first)+len(last) < 1800, true)
	size := len(readFile(web.stem + "1"))
	is(t, fmt.Sprintf("%d bytes are a full file", size), size >= 1_000_000 && size <= fileBytes, true)
	is(t, "files", namesIn(t, web.root), []string{"capture-web.pcap0", "capture-web.pcap1"})
}

// A filter that tcpdump refuses is told, and nothing starts. One that it takes is nothing but a filter.
// A mistake leaves alone what runs. A filter that the kernel refuses works in tcpdump, and is told. No
// filter that is accepted takes tcpdump long, or much memory.
func TestFilter(t *testing.T) {
	web := newRealNode(t, 0).newLink("web")
	evil := web.root + "/evil"
	for _, filter := range []string{"udp prot 4001", "-w " + evil, "--version", "$(touch " + evil + ")",
		"'`touch " + evil + "`", "“tcp port 80”", "tcp port http-that-is-none", "host name.invalid"} {
		web.see(spec{value: "1", filter: filter}, "CaptureInvalid", "numeric hosts and ports (tcpdump: ")
	}
	is(t, "files", namesIn(t, web.root), nil)
	web.see(spec{value: "1", filter: "udp port 4001"}, "CaptureStarted", `the filter is "udp port 4001"`)
	for i := range 3 {
		web.say(web.pod, "not", 4000, 3*i, 3*i+2)
		web.say(web.pod, "this", 4001, i, i)
	}
	web.holds("", 0, 2, "this")

	mistake := spec{value: "1", filter: "ether host 02:00:00:00:00:09", iface: "any"} // eth0 could have it
	web.see(mistake, "CaptureInvalid", "nothing changes")
	web.say(web.pod, "this", 4001, 3, 3)
	web.holds("", 0, 3, "this") // none is lost: tcpdump has not begun again
	web.see(spec{value: "1", filter: "outbound and (ip protochain 17)"}, "CaptureStarted", "Kernel filter failed")

	worst := "portrange 1-2" // of many kinds this one takes the most
	for i := 2; len(worst)+len(" or portrange 99-100") <= 1024; i++ {
		worst += fmt.Sprintf(" or portrange %d-%d", i, i+1)
	}
	web.bash(`ulimit -v 65536 -t 1; exec tcpdump -y EN10MB -d -- "$0"`, worst) // KiB, seconds
	web.see(spec{value: "1", filter: worst}, "CaptureStarted", "portrange")
}

// The interface that is asked for is captured, and no other. One that comes later is captured then. On
// any, a pod's very last packets are in the file.
func TestInterface(t *testing.T) {
	web := newRealNode(t, 0).newLink("web")
	web.bash("ip -n $0 link set lo up", web.pod)
	web.see(spec{value: "1", iface: "lo"}, "CaptureStarted", "the interface is lo")
	web.say(web.pod, "out", 4000, 1, 3)
	web.bash("nsenter --net=/run/netns/$0 bash -c 'echo >/dev/udp/127.0.0.1/4000'", web.pod)
	web.until("a packet of lo is there", func() bool { return len(web.packets("")) > 0 })
	is(t, "the first packet", web.packets("")[0], "other")

	// tcpdump takes 2 for eth0.
	web.see(spec{value: "1", iface: "2"}, "CaptureWaiting", "the interface 2: the pod has lo, eth0, net0")
	web.bash("ip -n $0 link add 2 up type veth", web.pod)
	web.told("CaptureStarted", "the interface is 2")
	web.bash("ip -n $0 link delete 2", web.pod)
	web.told("CaptureFailed", "tcpdump has ended (")

	web.see(spec{value: "1", iface: "any"}, "CaptureStarted", "the interface is any")
	web.say(web.pod, "last", 4000, 1, 40)
	web.finish()
	web.told("CaptureStopped", "the pod's network is gone; the files (")
	web.holds("", 1, 40, "last")
}

// A tcpdump that does not end on SIGTERM is killed. One that is given no network has an empty one, from
// which no look-up of a name in a filter leaves.
func TestStartWithoutNetwork(t *testing.T) {
	needTools(t)
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/tcpdump", []byte("#!/bin/bash\ntrap '' TERM\n\"$@\" >&2\nexec sleep 60\n"), 0o755))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	ctx, cancel := context.WithCancel(t.Context())
	p := start(ctx, nil, "ip", "-brief", "link")
	interfaces := make([]byte, 1000)
	n, _ := p.stderr.Read(interfaces)
	is(t, "one interface, which is down", regexp.MustCompile(`^lo +DOWN .*\n$`).Match(interfaces[:n]), true)
	cancel()
	began := time.Now()
	io.Copy(io.Discard, p.stderr)
	is(t, "end", fmt.Sprint(p.wait()), "signal: killed")
	took := time.Since(began)
	is(t, fmt.Sprintf("SIGKILL comes in time, after %v", took), took >= termGrace && took <= 2*termGrace, true)
}

// The disk is full when less is free than a file takes, or less than DISK_FREE percent. A capture waits
// then, or is stopped and keeps its files: tcpdump itself would say nothing. Both go on by themselves.
func TestFullDisk(t *testing.T) {
	for diskFree, size := range map[int64]int{0: 1, 50: 6} { // percent, MiB
		t.Run(fmt.Sprintf("DISK_FREE=%d", diskFree), func(t *testing.T) {
			web := newRealNode(t, diskFree).newLink("web")
			web.bash(`mount -t tmpfs -o size=$1m tmpfs $0; mkdir $0/captures
				head -c $(($1 * 600000)) /dev/zero >$0/big`, web.root, strconv.Itoa(size))
			t.Cleanup(func() { syscall.Unmount(web.root, syscall.MNT_DETACH) })
			web.see(spec{value: "1"}, "CaptureWaiting", "Waiting for disk space: ")
			web.bash("mount -o remount,size=$1m $0", web.root, strconv.Itoa(2*size+1))
			web.told("CaptureStarted", "")
			web.say(web.pod, "kept", 4000, 1, 20)
			web.holds("", 1, 20, "kept")
			web.bash("cat /dev/zero >$0/big || true", web.root)
			web.told("CaptureFailed", "too little disk is free")
			web.holds("", 1, 20, "kept")
			is(t, "PID", web.pid(), 0)
			web.bash("rm $0/big", web.root)
			web.told("CaptureStarted", "started over at the first file")
		})
	}
}

// A signal ends cat, also while nobody reads what it writes.
func TestCatEnds(t *testing.T) {
	needTools(t)
	root := writeFiles(t, contents{"": pcap(make([]uint32, 10_000)...)}) // more than a pipe holds
	must(t, os.Remove(root+"/captures/default_web"), os.Symlink("/capture-web.pcap", root+"/captures/default_web"))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Args = []string{"packetcapture", "cat", "default/web"}
	cmd.Env = append(os.Environ(), "TEST_ROOT="+root)
	stdout, err := cmd.StdoutPipe()
	must(t, err, cmd.Start())
	_, err = stdout.Read(make([]byte, 1))
	must(t, err, cmd.Process.Signal(syscall.SIGTERM))
	is(t, "cat ends", fmt.Sprint(cmd.Wait()), "signal: terminated")
}

// A live view is a second tcpdump with the capture's filter, which ends with its stdin, at a signal, and with
// the capture. A tcpdump of another container is not the capture's, whatever its arguments are.
func TestLive(t *testing.T) {
	web := newRealNode(t, 0).newLink("web")
	for way, isOurs := range map[string]bool{"unshare --mount": false, "env": true} {
		const script = ` bash -c 'exec -a tcpdump bash -c "read; true" x -w "$0" -p' $0`
		imitation := exec.Command("bash", "-c", "exec "+way+script, web.stem)
		stdin, err := imitation.StdinPipe()
		must(t, err, imitation.Start())
		web.until("it looks like tcpdump", func() bool { return web.pid() != 0 })
		process, _ := findTcpdump(web.stem)
		is(t, "it is taken for the capture's by "+way, process != "", isOurs)
		must(t, stdin.Close(), imitation.Wait())
	}
	web.see(spec{value: "1", filter: "udp port 4001"}, "CaptureStarted", "")
	for _, end := range []string{"its stdin closes", "SIGTERM", "the capture stops"} {
		stdout, err := os.Create(t.TempDir() + "/live.pcap")
		must(t, err)
		cmd := exec.Command(os.Args[0])
		var said strings.Builder
		cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), "TEST_LIVE="+web.root), stdout, &said
		stdin, err := cmd.StdinPipe()
		must(t, err, cmd.Start())
		web.until("it listens", func() bool { return readFile(stdout.Name()) != "" })
		web.say(web.pod, "not", 4000, 1, 3)
		web.say(web.pod, "this", 4001, 1, 1)
		web.until("a packet comes", func() bool { return packetText.MatchString(readFile(stdout.Name())) })
		is(t, "the packet", packetText.FindString(readFile(stdout.Name())), "<this-1>")
		switch end {
		case "its stdin closes":
			must(t, stdin.Close())
		case "SIGTERM":
			must(t, cmd.Process.Signal(syscall.SIGTERM))
		default:
			web.forget(web.uid)
		}
		is(t, end+": it ends without an error", cmd.Wait() == nil, end != "its stdin closes")
		for _, counts := range []string{"1 packet captured\n", "0 packets dropped by kernel\n"} {
			is(t, "tcpdump says what it had", strings.Contains(said.String(), counts), true)
		}
	}
}
