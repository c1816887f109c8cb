//go:build measure

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What the program stands: floods of packets, and floods of changes, beside the same in quiet. `make measure` runs these
// after those on a cluster. They need root, tcpdump and network namespaces.

// The test binary is also the program, for TestLoad, and a sender, for TestLoss.
func init() {
	if words := strings.Fields(os.Getenv("TEST_PROGRAM")); len(words) > 0 {
		ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		check(newNode(config{nodeName: "node-1", podName: "packetcapture-x", api: words[0], account: words[1], proc: words[2],
			root: words[3], diskLimit: 1 << 40})).run(ctx)
		os.Exit(0)
	}
	if rate, err := strconv.Atoi(os.Getenv("TEST_FLOOD")); err == nil {
		fmt.Println(flood(rate, 2*time.Second))
		os.Exit(0)
	}
}

func check[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// row is a table's row.
func row(cells ...string) string { return "| " + strings.Join(cells, " | ") + " |\n" }

// table adds a table to stdout and to the measurements in OUTPUTS.
func table(t *testing.T, head []string, rows string) {
	if t.Failed() {
		return
	}
	text := "\n" + row(head...) + strings.Repeat("|---", len(head)) + "|\n" + rows
	fmt.Print(text)
	folder := cmp.Or(os.Getenv("OUTPUTS"), "outputs")
	must(t, os.MkdirAll(folder, 0o755))
	file := check(os.OpenFile(filepath.Join(folder, "measure.txt"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644))
	defer file.Close()
	check(io.WriteString(file, text))
}

// newLoadNode runs alone, unlike the tests: it measures.
func newLoadNode(t *testing.T) *realNode {
	needNetwork(t)
	return &realNode{T: t, proc: newProc(t), root: t.TempDir(), pids: map[string][]int{}}
}

// ---- Floods of packets ----

// flood sends packets of 200 bytes for a time, and returns how many. What a pause of the machine has delayed is sent at
// once: a burst. A machine that can't send as fast sends fewer.
func flood(rate int, during time.Duration) (sent int) {
	conn := check(net.Dial("udp", "10.99.0.9:4000"))
	packet := make([]byte, 200-42) // behind the headers of Ethernet, IPv4 and UDP
	began := time.Now()
	for now := began; now.Sub(began) < during; now = time.Now() {
		due := int(now.Sub(began).Seconds() * float64(rate))
		for stop := min(due, sent+1000); sent < stop; sent++ {
			conn.Write(packet)
		}
		if sent >= due {
			time.Sleep(100 * time.Microsecond)
		}
	}
	return sent
}

// countPackets counts the packets in a folder's pcap files.
func countPackets(folder string) (count int) {
	for _, path := range check(filepath.Glob(folder + "/*.pcap*")) {
		text := check(os.ReadFile(path))
		for at := pcapHeader; at+packetHeader <= len(text); count++ {
			at += packetHeader + int(binary.LittleEndian.Uint32(text[at+8:]))
		}
	}
	return count
}

// ways are how tcpdump could be called; the first is how the program calls it.
var ways = []struct{ name, device, flags string }{
	{"the program", "eth0", ""},
	{"the program, interface any", "any", ""},
	{"tcpdump's -B 2048", "eth0", "-B 2048"},
	{"-B 16384", "eth0", "-B 16384"},
	{"-B 2048 --immediate-mode", "eth0", "-B 2048 --immediate-mode"},
	{"-B 16384 --immediate-mode", "eth0", "-B 16384 --immediate-mode"},
}

// capturing begins a capture of UDP in a new network, in one of the ways, and returns when it listens.
func capturing(t *testing.T, way, files int) (l *link, end func()) {
	n := newLoadNode(t)
	l = n.newLink(uidA)
	ctx, cancel := context.WithCancel(context.Background())
	c := &capture{pod: pod{files: files}, stem: n.root + "/plain.pcap"}
	arguments := append(append(c.arguments(ways[way].device), strings.Fields(ways[way].flags)...), "udp port 4000")
	file := check(os.Open("/run/netns/" + l.pod))
	defer file.Close()
	listening := make(chan bool)
	said := &report{listening: func() { close(listening) }}
	child := check(start(ctx, file, arguments...))
	ended := make(chan error, 1)
	go func() { ended <- said.read(child, func() {}) }()
	select {
	case <-listening:
	case <-time.After(patience):
		t.Errorf("tcpdump does not listen: %s", said.lastWords(nil))
	}
	return l, func() { cancel(); <-ended }
}

// lossInFlood is how many of a flood's packets no file has.
func lossInFlood(t *testing.T, way, rate int) (lost, sent int) {
	l, end := capturing(t, way, 400) // room for all that is sent
	defer end()
	l.command("ip -n %s link set lo up", l.pod) // the test binary listens there as it starts
	sender := exec.Command("nsenter", "--net=/run/netns/"+l.pod, os.Args[0])
	sender.Env = append(os.Environ(), "TEST_FLOOD="+strconv.Itoa(rate))
	sent = check(strconv.Atoi(string(bytes.TrimSpace(check(sender.Output())))))
	seen := countPackets(l.root)
	for before := -1; seen != before; seen = countPackets(l.root) {
		before = seen
		time.Sleep(1500 * time.Millisecond) // the ring is read within a second
	}
	return sent - seen, sent
}

// lossAtEnd is how many of the last packets of 20 pods no file has, when their networks go away some time later.
func lossAtEnd(t *testing.T, way int, later time.Duration) (lost, sent int) {
	var group sync.WaitGroup
	var kept atomic.Int32
	for range 20 {
		l, end := capturing(t, way, 1)
		group.Go(func() {
			l.say(l.pod, "last", 4000, 1, 40, 100)
			time.Sleep(later)
			l.command("ip -n %s link delete eth0", l.pod)
			if ways[way].device == "any" {
				time.Sleep(lastPackets) // as the program does
			}
			end()
			kept.Add(int32(countPackets(l.root)))
		})
	}
	group.Wait()
	return 800 - int(kept.Load()), 800
}

// C3: with other rings tcpdump must not lose less than the program's does, at any rate.
func TestLoss(t *testing.T) {
	head, rows := []string{"packets lost of those sent"}, ""
	for _, way := range ways {
		head = append(head, way.name)
	}
	compare := func(what string, run func(t *testing.T, way int) (lost, sent int)) (share []float64) {
		cells := []string{what}
		for way := range ways {
			t.Run(what+", "+ways[way].name, func(t *testing.T) { // after which its networks are gone
				lost, sent := run(t, way)
				cells = append(cells, fmt.Sprintf("%d of %d", lost, sent))
				share = append(share, float64(lost)/float64(sent))
			})
		}
		rows += row(cells...)
		return share
	}
	for _, rate := range []int{5_000, 50_000, 200_000} {
		what := fmt.Sprintf("2 s at %d a second, or what can be sent", rate)
		share := compare(what, func(t *testing.T, way int) (lost, sent int) { return lossInFlood(t, way, rate) })
		if best := slices.Min(share[2:]); share[0] > best+0.001 {
			t.Errorf("the program lost %.4f of all packets, the best plain tcpdump %.4f", share[0], best)
		}
	}
	for _, delay := range []time.Duration{1300 * time.Millisecond, 0} {
		what := fmt.Sprintf("the last 40 before the network goes away %v later, of 20 pods", delay)
		share := compare(what, func(t *testing.T, way int) (lost, sent int) { return lossAtEnd(t, way, delay) })
		if delay > 0 && share[0] > 0 || share[1] > 0 {
			t.Error("the last packets of a pod are lost")
		}
	}
	table(t, head, rows)
}

// ---- Floods of changes ----

// loaded is the program in a process of its own, which captures the one pod web with a real tcpdump.
type loaded struct {
	*testing.T
	*fakeAPI
	pid   int
	file  string
	other []byte // a change of another pod
}

func newLoaded(t *testing.T) *loaded {
	n, f := newLoadNode(t), newFakeAPI(t)
	n.newLink(uidA)
	server := f.serve(check(net.Listen("tcp", "127.0.0.1:0")))
	program := exec.Command(os.Args[0])
	words := strings.Join([]string{server.URL, f.account, n.proc.dir, n.root}, " ")
	program.Env = append(os.Environ(), "TEST_PROGRAM="+words, "GOMAXPROCS=1", "GOGC=25") // as in daemonset.yaml
	program.Stderr = os.Stderr
	must(t, program.Start())
	t.Cleanup(func() { program.Process.Signal(syscall.SIGTERM); program.Wait() })
	other := watchFrame("MODIFIED", sized("other", uidB, "", 3000).object())
	l := &loaded{t, f, program.Process.Pid, filepath.Join(n.root, "capture-web.pcap"), other}
	l.until("it watches", func() bool { return f.watching() > 0 })
	return l
}

// sized is a pod with an annotation of some size beside that of the number of files, if any.
func sized(name, uid, files string, size int) fakePod {
	annotations := map[string]string{"other": strings.Repeat("x", size)}
	if files != "" {
		annotations[annotation] = files
	}
	return fakePod{"default", name, uid, annotations, 1}
}

// flood has the watch see changes of another pod.
func (l *loaded) flood(changes int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for range changes {
		l.send(frame{data: l.other})
	}
}

// byEvent tells the watch that web is not annotated any more.
func (l *loaded) byEvent() time.Time {
	l.put(sized("web", uidA, "", 3000))
	return time.Now()
}

// byList returns what has the program list, and returns when it does: web, which is not annotated any more, and others.
func (l *loaded) byList(others int) (tell func() time.Time, size int) {
	items := []any{sized("web", uidA, "", 3000).object()}
	for i := range others {
		items = append(items, sized(fmt.Sprintf("other-%d", i), fmt.Sprintf("uid-%d", i), "", 20_000).object())
	}
	text := string(toJSON(items))
	return func() time.Time {
		before := len(l.asked("list"))
		version := l.bookmark()
		l.fail("list", fault{times: 1, code: 200, body: fmt.Sprintf(`{"metadata":{"resourceVersion":%q},"items":%s}`, version, text)})
		l.push(string(errorFrame(410, "too old")), goesOn)
		return l.until("it lists", func() bool { return len(l.asked("list")) > before })
	}, len(text)
}

// memory is in MiB, and of the program alone: no pages of files.
func (l *loaded) memory() float64 {
	_, rest, _ := strings.Cut(readFile(fmt.Sprintf("/proc/%d/status", l.pid)), "RssAnon:")
	return check(strconv.ParseFloat(strings.Fields(rest)[0], 64)) / 1024
}

func (l *loaded) cpu() (spent time.Duration) {
	for _, path := range check(filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", l.pid))) {
		spent += time.Duration(check(strconv.Atoi(strings.Fields(readFile(path))[0])))
	}
	return spent
}

func (l *loaded) until(what string, done func() bool) time.Time {
	l.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(deadline) {
			l.Fatalf("not within %v: %s", patience, what)
		}
	}
	return time.Now()
}

// stops is the median of how long after a stop was told the file of web is gone.
func (l *loaded) stops(times int, tell func() time.Time) time.Duration {
	var took []time.Duration
	exists := func() bool { _, err := os.Lstat(l.file); return err == nil }
	for range times {
		l.put(sized("web", uidA, "1", 3000))
		l.until("a file", exists)
		time.Sleep(300 * time.Millisecond) // it captures quietly
		began := tell()
		took = append(took, l.until("no file", func() bool { return !exists() }).Sub(began))
	}
	slices.Sort(took)
	return took[times/2]
}

// C5, C6: no stop is delayed by more than 100 ms by 1,000 changes a second, and memory does not grow.
func TestLoad(t *testing.T) {
	l := newLoaded(t)
	rows := ""
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }
	quiet, idle := l.stops(20, l.byEvent), l.memory()

	count, done := 0, make(chan bool)
	flooding, stop := context.WithCancel(context.Background())
	before, began := l.cpu(), time.Now()
	go func() {
		defer close(done)
		for ; flooding.Err() == nil; time.Sleep(time.Until(began.Add(time.Duration(count) * time.Millisecond))) {
			l.flood(10)
			count += 10
		}
	}()
	busy := l.stops(20, l.byEvent)
	stop()
	<-done
	rows += row("A stop, at 1,000 changes a second", ms(busy), ms(quiet)+" without")
	rows += row(fmt.Sprintf("CPU for a change, at %.0f a second", float64(count)/time.Since(began).Seconds()),
		fmt.Sprintf("%.3f ms", float64((l.cpu()-before).Microseconds())/1000/float64(count)), "0.12 ms")

	byOne, _ := l.byList(0)
	byMany, size := l.byList(499)
	short, long := l.stops(3, byOne), l.stops(3, byMany)
	rows += row("A stop that a list of 500 pods of 20 kB tells, all of which is read first", ms(long), ms(short)+" by a list of one")
	rows += row("Memory after these lists", fmt.Sprintf("%+.1f MiB", l.memory()-idle), fmt.Sprintf("%.1f MB a list", float64(size)/1e6))
	var grown [2]float64
	for i, changes := range []int{10_000, 90_000} {
		l.flood(changes)
		l.stops(1, l.byEvent) // what comes behind them
		grown[i] = l.memory()
	}
	rows += row("Memory after 100,000 changes",
		fmt.Sprintf("%.1f MiB anonymous", grown[1]), fmt.Sprintf("%.1f MiB after 10,000", grown[0]))
	if busy > quiet+100*time.Millisecond {
		t.Errorf("a stop takes %v at 1,000 changes a second, in quiet %v", busy, quiet)
	}
	if grown[1] > grown[0]+1 || grown[0] > idle+20 {
		t.Errorf("memory grows: %.1f MiB, after lists and 10,000 changes %.1f, after 100,000 %.1f", idle, grown[0], grown[1])
	}
	table(t, []string{"load", "measured", "beside"}, rows)
}
