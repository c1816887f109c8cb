//go:build e2e

// What the program stands: floods of packets, and floods of changes, beside the same in quiet. `make measure` runs these
// with TestMeasure; they need no cluster, but root, tcpdump and network namespaces.
package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The test binary is also the program, for TestLoad, and a sender, for TestLoss.
func init() {
	if text := os.Getenv("TEST_PROGRAM"); text != "" {
		var cfg struct{ API, Health, Account, Proc, Root string }
		check(0, json.Unmarshal([]byte(text), &cfg))
		ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		check(0, run(ctx, config{node: "node-1", pod: "packetcapture-x", api: cfg.API, health: cfg.Health, account: cfg.Account,
			proc: cfg.Proc, root: cfg.Root, limit: 1 << 40, logLevel: slog.LevelWarn}))
		os.Exit(0)
	}
	if rate, err := strconv.Atoi(os.Getenv("TEST_FLOOD")); err == nil {
		fmt.Println(flood(rate, 2*time.Second))
		os.Exit(0)
	}
}

// ---- Floods of packets ----

// flood sends packets of 200 bytes for a time, and returns how many. What a pause of the machine has delayed is sent at
// once: a burst. It sends no more after that time, so a machine that can't send as fast sends fewer.
func flood(rate int, during time.Duration) (sent int) {
	conn, err := net.Dial("udp", "10.99.0.9:4000")
	check(0, err)
	packet := make([]byte, 200-42) // behind the headers of Ethernet, IPv4 and UDP
	began := time.Now()
	for now := began; now.Sub(began) < during; now = time.Now() {
		due := int(now.Sub(began).Seconds() * float64(rate))
		for stop := min(due, sent+1000); sent < stop; sent++ {
			conn.Write(packet) // to a neighbour that does not exist: nothing refuses it
		}
		if sent >= due {
			time.Sleep(100 * time.Microsecond)
		}
	}
	return sent
}

// udpPackets counts the packets of 200 bytes to port 4000 in pcap files.
func udpPackets(t *testing.T, folder string) (count int) {
	t.Helper()
	for _, path := range check(filepath.Glob(folder + "/*.pcap*")) {
		text := check(os.ReadFile(path))
		for at := 24; at+16 <= len(text); {
			length := int(binary.LittleEndian.Uint32(text[at+8:]))
			if at += 16; at+length > len(text) {
				t.Errorf("%s is cut", path)
				break
			}
			if frame := text[at : at+length]; length == 200 && binary.BigEndian.Uint16(frame[36:]) == 4000 {
				count++
			}
			at += length
		}
	}
	return count
}

// plainTcpdump starts tcpdump as the program does, with further flags, and returns when it listens. What end returns is
// when it has been stopped.
func plainTcpdump(t *testing.T, l *link, files int, flags ...string) (end func()) {
	t.Helper()
	p := &capture{grant: grant{have: request{n: files}, stem: filepath.Join(l.root, "plain.pcap")}}
	arguments := p.arguments()
	arguments[0] = "--net=/run/netns/" + l.pod
	child := exec.Command("nsenter", append(arguments, flags...)...)
	listens := make(chan bool)
	stderr := check(start(child))
	ended := make(chan error, 1)
	go func() {
		io.CopyBuffer(&output{onListen: func() { close(listens) }}, struct{ io.Reader }{stderr}, make([]byte, 512))
		ended <- child.Wait()
	}()
	<-listens
	return func() {
		child.Process.Signal(syscall.SIGTERM)
		<-ended
	}
}

// ways are how tcpdump could be called; the first is how the program calls it.
var ways = []struct {
	name  string
	flags []string
}{
	{"the program", nil},
	{"tcpdump's -B 2048", []string{"-B", "2048"}},
	{"-B 16384", []string{"-B", "16384"}},
	{"-B 2048 --immediate-mode", []string{"-B", "2048", "--immediate-mode"}},
	{"-B 16384 --immediate-mode", []string{"-B", "16384", "--immediate-mode"}},
}

// capturing begins a capture in a new Pod's network in one of the ways. What end returns is when it has ended.
func capturing(t *testing.T, way, files int) (l *link, end func()) {
	n := &node{T: t, proc: newProc(t), root: t.TempDir(), done: make(chan struct{})}
	l = n.newLink(uidA)
	if ways[way].flags != nil {
		return l, plainTcpdump(t, l, files, ways[way].flags...)
	}
	n.run(podNamed("web", uidA, strconv.Itoa(files)))
	n.told("Normal CaptureStarted: ")
	return l, func() {}
}

// TestLoss floods a Pod's network, and has it go away behind a few packets. The program must keep what the best of all
// plain tcpdumps keeps: with a larger ring it is a little less at the highest rate, without the ring's delay far more. (C3)
func TestLoss(t *testing.T) {
	needNetwork(t)
	compare := func(what string, run func(way int) (lost, sent int)) (share []float64) {
		row := "| " + what
		for way := range ways {
			lost, sent := run(way)
			row += fmt.Sprintf(" | %d of %d", lost, sent)
			share = append(share, float64(lost)/float64(sent))
		}
		fmt.Println(row + " |")
		return share
	}
	head := "| packets lost of those sent"
	for _, way := range ways {
		head += " | " + way.name
	}
	fmt.Println(head + " |\n|---" + strings.Repeat("|---", len(ways)) + "|")
	for _, rate := range []int{5_000, 50_000, 200_000} {
		share := compare(fmt.Sprintf("2 s at %d a second, or what can be sent", rate), func(way int) (lost, sent int) {
			l, end := capturing(t, way, 400) // room for all that is sent
			defer l.finish()
			l.must("ip", "-n", l.pod, "link", "set", "lo", "up") // the test binary listens there as it starts
			sender := exec.Command("nsenter", "--net=/run/netns/"+l.pod, os.Args[0])
			sender.Env = append(os.Environ(), "TEST_FLOOD="+strconv.Itoa(rate))
			sent = check(strconv.Atoi(strings.TrimSpace(string(check(sender.Output())))))
			seen, before := udpPackets(t, l.root), -1
			for ; seen != before; seen = udpPackets(t, l.root) {
				before = seen
				time.Sleep(1500 * time.Millisecond) // the ring is read within a second
			}
			end()
			return sent - seen, sent
		})
		if best := slices.Min(share[1:]); share[0] > best+0.001 {
			t.Errorf("the program lost %.4f of all packets, the best plain tcpdump %.4f", share[0], best)
		}
	}
	for _, delay := range []time.Duration{1300 * time.Millisecond, 0} {
		share := compare(fmt.Sprintf("the last 40 before the network goes away %s later, of 20 Pods", delay), func(way int) (lost, sent int) {
			var group sync.WaitGroup
			counts := make([]int, 20)
			for i := range counts {
				l, end := capturing(t, way, 1)
				group.Go(func() {
					l.say(l.pod, "last", 4000, 1, 40, 100)
					time.Sleep(delay)
					l.must("ip", "-n", l.pod, "link", "delete", "eth0")
					l.finish()
					if ways[way].flags == nil {
						l.told("Normal CaptureStopped: the Pod's network is gone")
					}
					end()
					texts, _ := l.packets(filepath.Base(check(filepath.Glob(l.root + "/*.pcap"))[0]))
					counts[i] = len(texts)
				})
			}
			group.Wait()
			for _, count := range counts {
				lost += 40 - count
			}
			return lost, 40 * len(counts)
		})
		if delay > 0 && share[0] > 0 {
			t.Error("the last packets of a Pod are lost")
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

func (f *flooder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method == "POST":
		w.WriteHeader(http.StatusCreated)
	case r.URL.Query().Get("watch") == "":
		f.lists.Add(1)
		io.WriteString(w, *f.list.Load())
	default:
		w.(http.Flusher).Flush()
		for {
			select {
			case frame := <-f.frames:
				io.WriteString(w, frame)
				w.(http.Flusher).Flush()
				if strings.HasSuffix(frame, gone) {
					return
				}
			case <-r.Context().Done():
				return
			}
		}
	}
}

const gone = `{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}` + "\n"

func listOf(items ...string) *string {
	text := `{"kind":"PartialObjectMetadataList","metadata":{"resourceVersion":"12345"},"items":[` + strings.Join(items, ",") + "]}"
	return &text
}

func modified(object string) string { return `{"type":"MODIFIED","object":` + object + "}\n" }

// TestLoad has the program, with a real tcpdump, meet floods of changes: no stop may be delayed by more than 100 ms, and
// memory may not grow. (C5, C6)
func TestLoad(t *testing.T) {
	needNetwork(t)
	n := &node{T: t, proc: newProc(t), root: t.TempDir()}
	l := n.newLink(uidA)
	defer l.finish()
	uid := `"uid":"` + uidA + `"`
	web := func(n string) string { // 3 kB
		text := podJSON("web", 3000, map[bool]string{true: `"` + annotation + `":"` + n + `"`}[n != ""])
		return regexp.MustCompile(`"uid":"[^"]*"`).ReplaceAllString(text, uid)
	}
	var others []string
	for i := range 499 {
		others = append(others, podJSON(fmt.Sprintf("other-%d", i), 20_000, ""))
	}
	f := &flooder{frames: make(chan string)}
	f.list.Store(listOf(web("")))
	ca, account := newAuthority(t), t.TempDir()
	server := httptest.NewUnstartedServer(f)
	server.EnableHTTP2 = true
	server.TLS = &tls.Config{Certificates: []tls.Certificate{ca.issue(t)}}
	server.StartTLS()
	defer server.Close()
	for name, text := range map[string]string{"token": "t", "namespace": "kube-system", "ca.crt": string(ca.pem)} {
		must(t, os.WriteFile(filepath.Join(account, name), []byte(text), 0o600))
	}
	listener := check(net.Listen("tcp", "127.0.0.1:0"))
	health := listener.Addr().String() // free a moment ago
	listener.Close()
	program := exec.Command(os.Args[0])
	cfg := check(json.Marshal(map[string]string{"API": server.URL, "Health": health, "Account": account, "Proc": n.proc.dir, "Root": n.root}))
	program.Env = append(os.Environ(), "TEST_PROGRAM="+string(cfg), "GOMAXPROCS=1", "GOGC=25") // as in daemonset.yaml
	program.Stderr = os.Stderr
	must(t, program.Start())
	defer func() {
		program.Process.Signal(syscall.SIGTERM)
		program.Wait()
	}()
	pid := program.Process.Pid
	f.frames <- modified(podJSON("other", 3000, "")) // it watches
	memory := func() float64 { return status(pid, "RssAnon") }
	file := filepath.Join(n.root, "capture-web.pcap")
	// stops annotates the Pod a number of times, and measures how long after the stop began its file is gone.
	stops := func(times int, begin func() time.Time) (median time.Duration) {
		var took []time.Duration
		for range times {
			f.frames <- modified(web("1"))
			until(t, "a file", func() bool { return exists(file) })
			time.Sleep(300 * time.Millisecond) // it captures quietly
			began := begin()
			took = append(took, until(t, "no file", func() bool { return !exists(file) }).Sub(began))
		}
		slices.Sort(took)
		return took[len(took)/2]
	}
	event := func() time.Time {
		f.frames <- modified(web(""))
		return time.Now()
	}
	list := func() time.Time {
		before := f.lists.Load()
		f.frames <- gone
		until(t, "it lists", func() bool { return f.lists.Load() > before })
		return time.Now()
	}
	row := func(what, measured, beside string) { fmt.Printf("| %s | %s | %s |\n", what, measured, beside) }
	fmt.Println("| load | measured | beside |\n|---|---|---|")

	quiet, idle := stops(20, event), memory()
	change := modified(podJSON("other", 3000, ""))
	stopFlood, flooded := make(chan bool), make(chan int)
	before := cpu(pid)
	go func() {
		count := 0
		defer func() { flooded <- count }()
		for tick := time.NewTicker(10 * time.Millisecond); ; {
			select {
			case <-stopFlood:
				return
			case <-tick.C:
				for range 10 {
					f.frames <- change
					count++
				}
			}
		}
	}()
	began := time.Now()
	busy := stops(20, event)
	close(stopFlood)
	count := <-flooded
	row("A stop, at 1,000 changes a second", ms(busy), ms(quiet)+" without")
	row("CPU for a change, at "+fmt.Sprintf("%.0f", float64(count)/time.Since(began).Seconds())+" a second",
		fmt.Sprintf("%.3f ms", float64((cpu(pid)-before).Microseconds())/1000/float64(count)), "0.12 ms")

	short := stops(3, list)
	f.list.Store(listOf(append(others, web(""))...))
	// What stops a capture waits for the loop; how long that is, /healthz tells, which waits for it too.
	stopAsking, asked := make(chan bool, 1), make(chan time.Duration)
	go func() {
		slowest := time.Duration(0)
		defer func() { asked <- slowest }()
		for len(stopAsking) == 0 {
			began := time.Now()
			response, err := http.Get("http://" + health + "/healthz")
			if err != nil || response.StatusCode != 200 {
				t.Errorf("/healthz: %v", err)
				return
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
			slowest = max(slowest, time.Since(began))
			time.Sleep(2 * time.Millisecond)
		}
	}()
	long := stops(3, list)
	stopAsking <- true
	slowest := <-asked
	row("The loop's slowest answer while lists of 500 Pods of 20 kB are read", ms(slowest), "100 ms")
	row("A stop that such a list tells, all of which is read first", ms(long), ms(short)+" by a list of one")
	row("Memory after these lists", fmt.Sprintf("%+.1f MiB", memory()-idle), fmt.Sprintf("%.1f MB a list", float64(len(*f.list.Load()))/1e6))
	var grown [2]float64
	for i, total := range []int{10_000, 90_000} {
		for range total {
			f.frames <- change
		}
		grown[i] = memory()
	}
	row("Memory after 100,000 changes", fmt.Sprintf("%.1f MiB anonymous", grown[1]), fmt.Sprintf("%.1f MiB after 10,000", grown[0]))
	if busy > quiet+100*time.Millisecond || slowest > 100*time.Millisecond {
		t.Errorf("a stop waits for %s at 1,000 changes a second, in quiet %s; while it lists, the loop for %s", busy, quiet, slowest)
	}
	if grown[1] > grown[0]+1 || grown[0] > idle+10 {
		t.Errorf("memory grows: %.1f MiB, after lists and 10,000 changes %.1f, after 100,000 %.1f", idle, grown[0], grown[1])
	}
}
