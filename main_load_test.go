//go:build measure

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
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
	if text := os.Getenv("TEST_PROGRAM"); text != "" {
		var cfg struct{ API, Account, Proc, Root string }
		check(0, json.Unmarshal([]byte(text), &cfg))
		ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		check(newNode(config{nodeName: "node-1", podName: "packetcapture-x", api: cfg.API, account: cfg.Account, proc: cfg.Proc,
			root: cfg.Root, diskLimit: 1 << 40})).run(ctx)
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

// table adds a table to stdout and to the measurements in OUTPUTS; its first row is the head.
func table(t *testing.T, rows *[][]string) {
	if t.Failed() {
		return
	}
	text := "\n"
	for i, row := range *rows {
		text += "| " + strings.Join(row, " | ") + " |\n"
		if i == 0 {
			text += strings.Repeat("|---", len(row)) + "|\n"
		}
	}
	fmt.Print(text)
	folder := "outputs"
	if other := os.Getenv("OUTPUTS"); other != "" {
		folder = other
	}
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
var ways = []struct {
	name, device string
	flags        []string
}{
	{"the program", "eth0", nil},
	{"the program, interface any", "any", nil},
	{"tcpdump's -B 2048", "eth0", []string{"-B", "2048"}},
	{"-B 16384", "eth0", []string{"-B", "16384"}},
	{"-B 2048 --immediate-mode", "eth0", []string{"-B", "2048", "--immediate-mode"}},
	{"-B 16384 --immediate-mode", "eth0", []string{"-B", "16384", "--immediate-mode"}},
}

// capturing begins a capture of UDP in a new network, in one of the ways, and returns when it listens.
func capturing(t *testing.T, way, files int) (l *link, end func()) {
	n := newLoadNode(t)
	l = n.newLink(uidA)
	ctx, cancel := context.WithCancel(context.Background())
	c := &capture{asked: request{n: files}, stem: n.root + "/plain.pcap"}
	arguments := append(append(c.arguments(ways[way].device), ways[way].flags...), "udp port 4000")
	file := check(os.Open("/run/netns/" + l.pod))
	defer file.Close()
	said := newStderr()
	child := check(start(ctx, said, file, arguments...))
	ended := make(chan error, 1)
	go func() { ended <- child.wait() }()
	select {
	case <-said.listening:
	case <-time.After(patience):
		t.Errorf("tcpdump does not listen: %s", said.lastWords(nil))
	}
	return l, func() { cancel(); <-ended }
}

// C3: with other rings tcpdump must not lose less than the program's does, at any rate.
func TestLoss(t *testing.T) {
	head := []string{"packets lost of those sent"}
	for _, way := range ways {
		head = append(head, way.name)
	}
	rows := [][]string{head}
	defer table(t, &rows)
	compare := func(what string, run func(t *testing.T, way int) (lost, sent int)) (share []float64) {
		row := []string{what}
		for way := range ways {
			t.Run(what+", "+ways[way].name, func(t *testing.T) { // after which its networks are gone
				lost, sent := run(t, way)
				row = append(row, fmt.Sprintf("%d of %d", lost, sent))
				share = append(share, float64(lost)/float64(sent))
			})
		}
		rows = append(rows, row)
		return share
	}
	for _, rate := range []int{5_000, 50_000, 200_000} {
		share := compare(fmt.Sprintf("2 s at %d a second, or what can be sent", rate), func(t *testing.T, way int) (lost, sent int) {
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
		})
		if best := slices.Min(share[2:]); share[0] > best+0.001 {
			t.Errorf("the program lost %.4f of all packets, the best plain tcpdump %.4f", share[0], best)
		}
	}
	for _, delay := range []time.Duration{1300 * time.Millisecond, 0} {
		share := compare(fmt.Sprintf("the last 40 before the network goes away %v later, of 20 pods", delay), func(t *testing.T, way int) (lost, sent int) {
			var group sync.WaitGroup
			var kept atomic.Int32
			for range 20 {
				l, end := capturing(t, way, 1)
				group.Go(func() {
					l.say(l.pod, "last", 4000, 1, 40, 100)
					time.Sleep(delay)
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
		})
		if delay > 0 && share[0] > 0 || share[1] > 0 {
			t.Error("the last packets of a pod are lost")
		}
	}
}

// ---- Floods of changes ----

// flooder is an API server that says what it is told to, over TLS and HTTP/2.
type flooder struct {
	list   atomic.Pointer[string]
	frames chan string // of the watch
	lists  atomic.Int32
}

const gone = `{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}` + "\n"

func (f *flooder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method == "POST":
		w.WriteHeader(http.StatusCreated)
	case r.URL.Query().Get("watch") == "":
		f.lists.Add(1)
		io.WriteString(w, *f.list.Load())
	default:
		for frame := ""; frame != gone; {
			w.(http.Flusher).Flush()
			select {
			case frame = <-f.frames:
				io.WriteString(w, frame)
			case <-r.Context().Done():
				return
			}
		}
	}
}

// podObject is a pod's metadata as JSON, of some size.
func podObject(name, uid, files string, bytes int) string {
	annotations := map[string]string{"other": strings.Repeat("x", bytes)}
	if files != "" {
		annotations[annotation] = files
	}
	return string(check(json.Marshal(map[string]any{"kind": "PartialObjectMetadata", "metadata": map[string]any{"namespace": "default",
		"name": name, "uid": uid, "resourceVersion": "12345", "annotations": annotations}})))
}

func listOf(items ...string) *string {
	text := `{"kind":"PartialObjectMetadataList","metadata":{"resourceVersion":"12345"},"items":[` + strings.Join(items, ",") + "]}"
	return &text
}

func modified(pod string) string { return `{"type":"MODIFIED","object":` + pod + "}\n" }

// loaded is the program in a process of its own, which captures the one pod web with a real tcpdump.
type loaded struct {
	*testing.T
	*flooder
	pid  int
	file string
}

func newLoaded(t *testing.T) *loaded {
	l := &loaded{t, &flooder{frames: make(chan string)}, 0, ""}
	l.list.Store(listOf(l.web("")))
	n, ca, account := newLoadNode(t), newAuthority(t), t.TempDir()
	n.newLink(uidA)
	server := httptest.NewUnstartedServer(l)
	server.EnableHTTP2, server.TLS = true, &tls.Config{Certificates: []tls.Certificate{ca.issue(t)}}
	server.StartTLS()
	t.Cleanup(server.Close)
	for name, text := range map[string]string{"token": "t", "namespace": "kube-system", "ca.crt": string(ca.pem)} {
		must(t, os.WriteFile(filepath.Join(account, name), []byte(text), 0o600))
	}
	program := exec.Command(os.Args[0])
	cfg := check(json.Marshal(map[string]string{"API": server.URL, "Account": account, "Proc": n.proc.dir, "Root": n.root}))
	program.Env = append(os.Environ(), "TEST_PROGRAM="+string(cfg), "GOMAXPROCS=1", "GOGC=25") // as in daemonset.yaml
	program.Stderr = os.Stderr
	must(t, program.Start())
	t.Cleanup(func() { program.Process.Signal(syscall.SIGTERM); program.Wait() })
	l.pid, l.file = program.Process.Pid, filepath.Join(n.root, "capture-web.pcap")
	return l
}

func (l *loaded) web(files string) string { return podObject("web", uidA, files, 3000) }

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
	for deadline := time.Now().Add(30 * time.Second); !done(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(deadline) {
			l.Fatalf("not within 30 s: %s", what)
		}
	}
	return time.Now()
}

// stops is the median of how long after a stop was told the file of web is gone.
func (l *loaded) stops(times int, tell func() time.Time) time.Duration {
	var took []time.Duration
	exists := func() bool { _, err := os.Lstat(l.file); return err == nil }
	for range times {
		l.frames <- modified(l.web("1"))
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
	rows := [][]string{{"load", "measured", "beside"}}
	defer table(t, &rows)
	row := func(what, measured, beside string) { rows = append(rows, []string{what, measured, beside}) }
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }
	event := func() time.Time { l.frames <- modified(l.web("")); return time.Now() }
	list := func() time.Time {
		before := l.lists.Load()
		l.frames <- gone
		return l.until("it lists", func() bool { return l.lists.Load() > before })
	}
	change := modified(podObject("other", uidB, "", 3000))
	l.frames <- change // it watches
	quiet, idle := l.stops(20, event), l.memory()

	stop, flooded := make(chan bool), make(chan int)
	before, began := l.cpu(), time.Now()
	go func() {
		count := 0
		defer func() { flooded <- count }()
		for tick := time.NewTicker(10 * time.Millisecond); ; {
			select {
			case <-stop:
				return
			case <-tick.C:
				for range 10 {
					l.frames <- change
					count++
				}
			}
		}
	}()
	busy := l.stops(20, event)
	close(stop)
	count := <-flooded
	row("A stop, at 1,000 changes a second", ms(busy), ms(quiet)+" without")
	row(fmt.Sprintf("CPU for a change, at %.0f a second", float64(count)/time.Since(began).Seconds()),
		fmt.Sprintf("%.3f ms", float64((l.cpu()-before).Microseconds())/1000/float64(count)), "0.12 ms")

	short := l.stops(3, list)
	others := []string{l.web("")}
	for i := range 499 {
		others = append(others, podObject(fmt.Sprintf("other-%d", i), fmt.Sprintf("uid-%d", i), "", 20_000))
	}
	l.list.Store(listOf(others...))
	long := l.stops(3, list)
	row("A stop that a list of 500 pods of 20 kB tells, all of which is read first", ms(long), ms(short)+" by a list of one")
	row("Memory after these lists", fmt.Sprintf("%+.1f MiB", l.memory()-idle), fmt.Sprintf("%.1f MB a list", float64(len(*l.list.Load()))/1e6))
	var grown [2]float64
	for i, total := range []int{10_000, 90_000} {
		for range total {
			l.frames <- change
		}
		grown[i] = l.memory()
	}
	row("Memory after 100,000 changes", fmt.Sprintf("%.1f MiB anonymous", grown[1]), fmt.Sprintf("%.1f MiB after 10,000", grown[0]))
	if busy > quiet+100*time.Millisecond {
		t.Errorf("a stop takes %v at 1,000 changes a second, in quiet %v", busy, quiet)
	}
	if grown[1] > grown[0]+1 || grown[0] > idle+20 {
		t.Errorf("memory grows: %.1f MiB, after lists and 10,000 changes %.1f, after 100,000 %.1f", idle, grown[0], grown[1])
	}
}
