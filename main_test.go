package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// The promises, in the order of main.go.

// No request of any test may go to a proxy. That of the environment is read once in a process: not t.Setenv.
func init() { os.Setenv("HTTPS_PROXY", "http://proxy.test:3128") }

const (
	uidA = "1b2c3d4e-0000-a" // of web; the UIDs of all pods in these stories begin alike
	uidB = "1b2c3d4e-0000-b" // of db

	// What is told. Of a tcpdump that does not begin with fresh files it is again.
	started   = "Normal CaptureStarted"
	again     = "Warning CaptureStarted: tcpdump began again at the first file, and the packets in that one"
	stopped   = "Normal CaptureStopped"
	waiting   = "Warning CaptureWaiting"
	failed    = "Warning CaptureFailed"
	invalid   = "Warning CaptureInvalid"
	continued = "Normal CaptureContinued"
)

var web, db = podNamed("web", uidA, "3"), podNamed("db", uidB, "3")

// of is a pod that asks for another number of files, or with "" for nothing; on is one with an interface, and
// filtered one with a filter.
func (p annotated) of(value string) annotated {
	p.value, p.files, p.annotated = value, podNamed("", "", value).files, value != ""
	return p
}

func (p annotated) on(iface string) annotated        { p.iface = iface; return p }
func (p annotated) filtered(filter string) annotated { p.filter = filter; return p }

// expectKept checks that the last tcpdump has ended, that its files are there, and which Events came.
func (w *world) expectKept(events ...string) {
	w.Helper()
	last := w.kids.last()
	paths, _ := findFiles(last.stem)
	is(w, "tcpdump lives", last.lives(), false)
	is(w, "files that are kept", len(paths), len(last.files))
	w.told(events...)
}

// born sees a pod whose network is there.
func (w *world) born(pid int, p annotated) {
	w.proc.pod(pid, p.uid)
	w.see(p)
}

// finishes ends a pod's process. Its cgroup and its eth0 go, which the last tcpdump notices.
func (w *world) finishes(pid int, p annotated) {
	w.proc.end(pid)
	w.proc.gone(p.uid)
	w.kids.last().exit("tcpdump: pcap_loop: The interface disappeared\n"+closing, errStatus)
}

// joins starts a process of web in a network.
func (p *fakeProc) joins(pid int, net string) {
	p.add(fakeProcess{pid: pid, cgroup: cgroupOf(uidA), net: net, root: "pod", born: pid})
}

const longestWait = 34 * time.Second // for another try, and a little

// uids are those of the pods that have a network.
var uids = map[string]string{"web": "0eb", "db": "0db", "new": "0ef"}

// following tells a story of the program on a node with three pods. The story starts it (follows).
func following(t *testing.T, limit int, story func(w *world)) {
	t.Helper()
	simulate(t, limit, func(w *world) {
		for i, name := range []string{"web", "db", "new"} {
			w.proc.pod(50+i, uids[name])
		}
		story(w)
	})
}

// each tells a story for each case of a table.
func each[T any](t *testing.T, cases map[string]T, story func(w *world, test T)) {
	for name, test := range cases {
		t.Run(name, func(t *testing.T) { following(t, 0, func(w *world) { story(w, test) }) })
	}
}

// asks are a pod's annotations.
type asks struct{ n, filter, iface, note string }

// annotate stores a pod of the namespace default. What is "" is not there.
func (w *world) annotate(name string, a asks) string {
	all := map[string]string{
		annotation: a.n, filterAnnotation: a.filter, interfaceAnnotation: a.iface, "note": a.note}
	maps.DeleteFunc(all, func(_, value string) bool { return value == "" })
	return w.api.put(fakePod{"default", name, uids[name], all, 0})
}

func fromOf(watch fakeRequest) string { return watch.query.Get("resourceVersion") }

// watchedFrom checks the versions of all watches.
func (w *world) watchedFrom(want ...string) {
	w.Helper()
	synctest.Wait()
	var got []string
	for _, watch := range w.api.asked("watch") {
		got = append(got, fromOf(watch))
	}
	is(w, "watches from", got, want)
}

// marked has the watch get a bookmark.
func (w *world) marked() string { defer synctest.Wait(); return w.api.bookmark() }

// untilWatching returns at the moment, on 100 ms, at which a watch is open, or gives up after 10 minutes.
func (w *world) untilWatching() {
	synctest.Wait()
	for began := time.Now(); w.api.watching() == 0 && time.Since(began) < 10*time.Minute; {
		w.pass(100 * time.Millisecond)
	}
}

// gaps are the times between requests that do not come at once.
func gaps(requests []fakeRequest) (gaps []time.Duration) {
	for i := range requests[1:] {
		if gap := requests[i+1].at.Sub(requests[i].at); gap > 0 {
			gaps = append(gaps, gap)
		}
	}
	return gaps
}

// checkBackoff checks the waits after failures: from least to twice that, then twice as long each time, up to
// most; never the same. What the API server asks for comes on top.
func checkBackoff(t testing.TB, waits []time.Duration, least, most, retryAfter time.Duration) {
	t.Helper()
	seen := map[time.Duration]bool{}
	for i, wait := range waits {
		if wait -= retryAfter; wait < least || wait > 2*least || seen[wait] {
			t.Errorf("wait %d is %v, want from %v to %v: %v", i, wait, least, 2*least, waits)
		}
		seen[wait], least = true, min(2*least, most/2)
	}
}

// says checks that an error has some words.
func says(t testing.TB, err error, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(fmt.Sprint(err), word) {
			t.Errorf("the error is %v, want %s", err, word)
		}
	}
}

// ---- Configuration ----

// The environment configures the program. All that is missing or wrong is named at once.
func TestConfiguration(t *testing.T) {
	read := func(set ...string) (config, error) {
		all := map[string]string{
			"NODE_NAME": "node-1", "KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
		for _, text := range set {
			name, value, _ := strings.Cut(text, "=")
			all[name] = value
		}
		return readConfig(func(name string) string { return all[name] })
	}
	want := config{nodeName: "node-1", url: "https://[fd00::1]:443", proc: "/proc", root: "/",
		account: "/var/run/secrets/kubernetes.io/serviceaccount", limit: math.MaxInt32, diskFree: 15}
	want.podName, _ = os.Hostname()
	got, err := read()
	must(t, err)
	is(t, "the standard", got, want)
	least := 64<<20 + 1_000_000 + 262_144 + 16 // the log, and one file
	got, err = read(fmt.Sprint("DISK_LIMIT=", least), "DISK_FREE=0")
	must(t, err)
	want.limit, want.diskFree = 1, 0
	is(t, "the least", got, want)
	_, err = read("DISK_FREE=99")
	must(t, err)

	for _, wrong := range [][]string{{"DISK_FREE=-1", fmt.Sprint("DISK_LIMIT=", least-1)}, {"DISK_FREE=100"},
		{"NODE_NAME=", "KUBERNETES_SERVICE_HOST=", "KUBERNETES_SERVICE_PORT=", "DISK_LIMIT=1Gi", "DISK_FREE=15%"},
	} {
		_, err := read(wrong...)
		for _, set := range wrong {
			name, value, _ := strings.Cut(set, "=")
			says(t, err, name+" is "+strings.Replace(strconv.Quote(value), `""`, "empty", 1))
		}
	}
}

// A program that can't do its work does not begin, and says what it lacks.
func TestStart(t *testing.T) {
	proc, root := newProc(t), t.TempDir()
	_, err := newAgent(testConfig(t, proc.dir, root))
	must(t, err)
	_, err = newAgent(testConfig(t, proc.dir, root))
	says(t, err, "another packetcapture runs in this container")
	proc.grow("/systemd", "/user.slice")
	_, err = newAgent(testConfig(t, proc.dir, t.TempDir()))
	says(t, err, "no cgroup kubepods is in "+proc.dir+"/1/root/sys/fs/cgroup, nor in systemd or pids")
	_, err = newAgent(testConfig(t, t.TempDir(), t.TempDir()))
	says(t, err, "hostPID", "CAP_SYS_PTRACE", "AppArmor", "Unconfined", "/1/ns/net: no such file")
	says(t, run(t.Context(), []string{"help"}), `"help" is no command: accepted are cat and live`)
}

// ---- The watch ----

// The first watch that delivers makes the program ready, and what its pods are annotated with is captured.
// Of a static pod the kubelet's UID counts, which two annotations name. Each later change is applied when it
// comes.
func TestFirstWatch(t *testing.T) {
	following(t, 0, func(w *world) {
		w.annotate("web", asks{n: "5"})
		w.annotate("new", asks{note: "no capture"})
		w.proc.pod(60, "abc")
		w.api.put(fakePod{"kube-system", "etcd", "0e7c", map[string]string{annotation: "2",
			filterAnnotation: " tcp port 80\n", interfaceAnnotation: "lo",
			"kubernetes.io/config.hash": "abc", "kubernetes.io/config.mirror": "abc"}, 0})
		thief := map[string]string{annotation: "1", "kubernetes.io/config.hash": uids["db"]}
		w.api.put(fakePod{"shop", "thief", "0bad", thief, 0})
		w.api.fail("watch", fault{times: 1, code: 500})
		w.api.fail("watch", fault{times: 1, code: 200, body: string(errorFrame(500, "no leader"))})
		w.follows()
		w.pass(2 * time.Second)
		is(t, "delivered", w.delivered.Load(), 0)
		w.untilWatching()
		is(t, "delivered", w.delivered.Load(), 4)
		w.runs(files{"etcd": 2, "web": 5})
		w.logged(`the interface is lo; the filter is \"tcp port 80\"`, 1)
		w.logged("the filter is", 1)

		w.pass(2 * time.Second)
		w.api.push("", ends) // the versions so far came in no order: none is one to go on from
		w.watchedFrom("0", "0", "0", "0")
		w.annotate("db", asks{n: "4"})
		w.annotate("web", asks{n: "6", note: strings.Repeat("x", 1_500_000)}) // longer than any buffer
		w.api.push(string(watchFrame("DELETED", fakePod{"default", "web", "01d", nil, 9000}.object())), goesOn)
		w.runs(files{"db": 4, "etcd": 2, "web": 6}) // what is late about its predecessor stops nothing
		w.api.remove("default", "web")
		last := w.annotate("db", asks{})
		w.api.push("", ends)
		w.runs(files{"etcd": 2})
		w.watchedFrom("0", "0", "0", "0", last)
		is(t, "tcpdumps", w.kids.started(), 4)
	})
}

// When the server has no history any more, or a whole watch has brought nothing, the program begins anew, at
// once. Captures whose pods have gone meanwhile are stopped, but only when all pods have come.
func TestGone(t *testing.T) {
	for _, goneIs200 := range []bool{false, true} {
		following(t, 0, func(w *world) {
			w.annotate("web", asks{n: "5"})
			w.annotate("db", asks{n: "5"})
			w.follows()
			last := w.marked()
			w.api.fail("watch", fault{times: 1, code: 500})
			w.api.push("", ends)
			synctest.Wait()
			w.api.remove("default", "db")
			w.annotate("new", asks{n: "1"})
			w.api.compact(goneIs200)
			w.untilWatching()
			w.watchedFrom("0", last, last, "0")
			is(t, "waits", len(gaps(w.api.asked("watch")[1:])), 1)
			w.runs(files{"db": 5, "new": 1, "web": 5}) // there may be more pods to come
			now := w.marked()
			w.runs(files{"new": 1, "web": 5})
			is(t, "tcpdumps", w.kids.started(), 3)
			w.logged("410 Gone", 0)

			for range 2 {
				w.api.push("", ends)
				w.pass(2 * time.Second)
			}
			w.watchedFrom("0", last, last, "0", now, "0")
		})
	}
}

// A watch that ends at its time limit is no failure. The limits differ, so that the nodes' watches spread;
// the fake checks that they are 300 to 600 s. No watch is kept for longer.
func TestTimeLimit(t *testing.T) {
	following(t, 0, func(w *world) {
		w.api.bookmarkEvery = time.Minute
		w.follows()
		w.pass(24 * time.Hour)
		watches, limits := w.api.asked("watch"), map[time.Duration]bool{}
		for i, gap := range gaps(watches) {
			limit, _ := time.ParseDuration(watches[i].query.Get("timeoutSeconds") + "s")
			is(t, "the time until the next watch", gap, limit)
			is(t, "the next watch begins anew", fromOf(watches[i+1]) == anyVersion, false)
			limits[gap] = true
		}
		is(t, "a day sees 60 limits", len(limits) >= 60, true)
		is(t, "the log", w.log.String(), "")

		w.api.freeze()
		w.pass(22 * time.Minute) // one is open, the next is not answered
		is(t, "there is a third watch", len(w.api.asked("watch")) >= len(watches)+2, true)
	})
}

// A broken event applies nothing. When a watch has shown that it works, the next one goes on from its last
// event's version, and the waits begin anew.
func TestBrokenWatch(t *testing.T) {
	mark, deleted := string(bookmarkFrame(9)), `{"type":"DELETED","object":{"metadata":{"uid":"0eb"`
	type test struct {
		silent time.Duration // before the text
		text   string
		end    ending
		from   string
	}
	each(t, map[string]test{
		"cut in an event":     {text: mark + deleted, end: ends, from: "v9"},
		"no resourceVersion":  {text: mark + deleted + "}}}", from: "v9"},
		"lost after an event": {text: mark, end: breaks, from: "v9"},
		"lost after a second": {silent: time.Second, end: breaks, from: "v102"},
	}, func(w *world, test test) {
		w.annotate("web", asks{n: "5"})
		w.follows()
		w.marked()
		w.api.fail("watch", fault{times: 6, code: 500})
		w.api.push("", ends)
		w.untilWatching()
		w.pass(test.silent)
		before, ended := len(w.api.asked("watch")), time.Now()
		w.api.push(test.text, test.end)
		w.pass(longestWait)
		watches := w.api.asked("watch")[before:]
		if len(watches) == 0 {
			w.Fatal("it watches no more")
		}
		is(w, "it watches from", fromOf(watches[0]), test.from)
		checkBackoff(w, []time.Duration{watches[0].at.Sub(ended)}, 800*time.Millisecond, 30*time.Second, 0)
		w.runs(files{"web": 5})
		is(w, "tcpdumps", w.kids.started(), 1)
	})
}

// lost is the error of a connection whose port differs each time.
type lost struct{ port int }

func (l *lost) Error() string {
	l.port++
	return fmt.Sprintf("read tcp 10.0.0.9:%d->10.96.0.1:443: read: connection reset by peer", l.port)
}

// Whatever the trouble, the server is asked again after growing waits, on top of what it asks for. The log
// tells once when it begins and when it ends, the second time too.
func TestTrouble(t *testing.T) {
	type test struct {
		fault
		says       string
		retryAfter time.Duration
	}
	each(t, map[string]test{
		"200, then closed": {fault: fault{code: 200}, says: "EOF"},
		"an ERROR":         {fault: fault{code: 200, body: string(errorFrame(500, "no"))}, says: "500 Internal"},
		"502 of a proxy":   {fault: fault{code: 502, body: "<html>"}, says: "502 Bad Gateway: no Status"},
		"lost":             {fault: fault{err: &lost{}}, says: "connection reset"},
		"Retry-After below 0": {
			fault: fault{code: 429, retryAfter: "-100"}, says: "429 Too Many Requests: so the test wants it"},
		"Retry-After of years": {
			fault: fault{code: 429, retryAfter: "99999999999"}, says: "429 Too Many", retryAfter: time.Minute},
	}, func(w *world, test test) {
		w.annotate("web", asks{n: "5"})
		w.follows()
		for outage := range 2 {
			last, before := w.marked(), len(w.api.asked("watch"))
			w.api.fail("watch", test.fault)
			w.api.push("", ends)
			w.pass(20 * time.Minute)
			watches := w.api.asked("watch")[before:]
			waits := gaps(watches)
			is(w, "it is tried again and again", len(waits) > 10, true)
			is(w, "requests that came at once", len(watches)-1-len(waits), 0)
			checkBackoff(w, waits, 800*time.Millisecond, 30*time.Second, test.retryAfter)
			w.logged("WARN", outage+1)
			w.logged(test.says, outage+1)
			w.logged("https://", 0)
			w.logged("watched again", outage)

			w.api.heal()
			w.untilWatching()
			watches = w.api.asked("watch")
			is(w, "it watches from", fromOf(watches[len(watches)-1]), last)
			w.marked()
			w.logged("watched again", outage+1)
		}
		w.runs(files{"web": 5})
		is(w, "tcpdumps", w.kids.started(), 1)
	})
}

// ---- The annotations ----

// An invalid annotation produces one Event, with what was read and what is accepted. It starts nothing, and
// does not affect the running capture. tcpdump may take 5 s to compile a filter.
func TestMistakes(t *testing.T) {
	const (
		note = "a change of something else"
		kept = "; what was asked for before goes on as it was"
		many = invalid + `: the annotation tcpdump.antrea.io is "many": accepted is the number of files ` +
			"to rotate through, a plain decimal number from 1 to 5; nothing is captured"
		refused = invalid + `: the annotation tcpdump.antrea.io/filter is "refused": accepted is a pcap filter ` +
			"expression, in which hosts and ports are numbers; tcpdump: can't parse filter expression: " +
			"syntax error" + kept
		control = invalid + `: /filter is "tcp\nport 80": accepted is a pcap filter expression, ` +
			"a line of printable text of at most 1024 bytes" + kept
		slash = invalid + `: /interface is "a/b": accepted is the name of a network interface, or any, ` +
			"at most 15 characters of a-z A-Z 0-9 . _ -, not beginning with -" + kept
	)
	following(t, 5, func(w *world) {
		w.follows()
		for _, change := range []struct {
			asks    asks
			tcpdump behaviour // when it compiles
			told    []string
		}{
			{asks: asks{n: "many"}, told: []string{many}},
			{asks: asks{n: "many", filter: "udp", note: note}},
			{asks: asks{}},
			{asks: asks{n: "many"}, told: []string{many}},
			{asks: asks{n: "6"}, told: []string{invalid + `: is "6": accepted is the number of files`}},
			{asks: asks{n: "2"}, told: []string{started}},
			{asks: asks{n: "2", filter: "refused"}, told: []string{refused}},
			{asks: asks{n: "2", filter: "refused", note: note}},
			{asks: asks{n: "2", filter: "tcp\nport 80"}, told: []string{control}},
			{asks: asks{n: "2", iface: "a/b"}, told: []string{slash}},
			{asks: asks{n: "2"}, told: []string{continued}},
			{asks: asks{n: "2", filter: "refused"}, told: []string{refused}},
			{asks: asks{n: "3"}, told: []string{stopped, started}},
			{asks: asks{n: "3", filter: "tcp"}, tcpdump: behaviour{syntax: "nonsense\n"},
				told: []string{invalid + ": hosts and ports are numbers; exit status 1" + kept}},
		} {
			w.kids.behave(change.tcpdump)
			w.annotate("web", change.asks)
			w.pass(6 * time.Second)
			w.told(change.told...)
		}
		is(t, "tcpdumps", w.kids.started(), 2)
		is(t, "filters", w.kids.compiled, []string{"refused", "refused", "tcp"})

		w.kids.behave(behaviour{compile: time.Minute})
		w.annotate("web", asks{n: "3", filter: "icmp"})
		w.pass(time.Second)
		w.end()
		w.told(stopped) // and no filter is refused
	})
}

// ---- A capture, from its start to its last file ----

// A pod that is annotated before it runs is captured 25 ms after its network is there, or a second after
// five minutes. What is missing for a capture is told once, after 3 s. It holds up no other, and starts by
// itself.
func TestWaiting(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.see(web)
		w.see(db)
		w.pass(waitingTime - 1)
		w.told()
		w.pass(25 * time.Millisecond)
		network := waiting + ": Waiting for the pod's network: it does not run yet, or has ended"
		w.told(network, network)
		w.pass(295 * time.Second)
		w.proc.pod(50, web.uid)
		w.pass(25 * time.Millisecond)
		w.expect(files{"web": 3}, started)
		w.pass(10*time.Second - 40*time.Millisecond) // it was just looked for
		w.proc.pod(51, db.uid)
		w.pass(900 * time.Millisecond)
		w.expect(files{"web": 3})
		w.pass(100 * time.Millisecond)
		w.expect(files{"web": 3, "db": 3}, started)

		newer, namesake := podNamed("web", "1b2c3d4e-0000-c", "2"), podNamed("web", "1b2c3d4e-0000-d", "1")
		namesake.namespace = "other"
		w.born(52, newer)
		w.born(53, namesake)
		w.pass(2 * time.Minute)
		w.expect(files{"web": 3, "db": 3, "web_1b2c3d4e": 1},
			started, waiting+": its file name: an earlier capture has not ended yet")
		w.lose(web)
		w.pass(time.Second)
		w.expect(files{"web": 2, "db": 3, "web_1b2c3d4e": 1}, stopped, started)

		heir := podNamed("web", "2c3d4e5f", "1")
		heir.namespace = "other"
		w.born(54, heir)
		w.pass(waitingTime + time.Second)
		w.told(waiting + ": its file name: ")
	})
}

// A pod that has finished keeps its files until the pod goes, or its annotation changes or goes. An Event
// says so if the pod is still there some seconds later. A new network is captured.
func TestFinishedPod(t *testing.T) {
	const counted = stopped + ": Stopped: 7 packets captured, 2 dropped by the kernel"
	const gone = "; the pod's network is gone, the files (300 bytes) stay until the annotation or the pod goes"
	simulate(t, 5, func(w *world) {
		w.born(50, web)
		w.pass(time.Minute)
		w.finishes(50, web)
		w.pass(waitingTime - time.Second)
		w.expectKept(started)
		w.pass(10 * time.Minute)
		w.expectKept(counted + gone)
		w.proc.joins(51, "new")
		w.pass(time.Second)
		w.expect(files{"web": 3}, again)
		w.finishes(51, web)
		w.pass(waitingTime - time.Second)
		w.lose(web)
		w.expect(nil, counted+"; its files (300 bytes) are deleted")

		w.born(52, web)
		w.finishes(52, web)
		w.pass(time.Second)
		w.born(60, db.of("4"))
		w.pass(time.Minute)
		w.expectKept(started, stopped, waiting+": room: N=4 is asked for, and 3 of the 5 files")
		w.see(web.of("2"))
		w.pass(time.Minute)
		w.expect(files{"db": 4}, counted+"; its files (300 bytes) are deleted", started, waiting+": the pod's")
	})
}

// In a crash loop without a pause process, as under CRI-O, a capture goes on in the same tcpdump while the
// pod's cgroup and network stay. A new network is captured within a second, even if the old one lives on.
func TestCrashLoop(t *testing.T) {
	for _, net := range []string{uidA, host} {
		simulate(t, 0, func(w *world) {
			w.proc.joins(50, net)
			w.see(web)
			w.news()
			w.proc.end(50)
			w.pass(10 * time.Minute)
			w.proc.joins(51, net)
			w.pass(10 * time.Second)
			w.expect(files{"web": 3})
			is(t, "tcpdumps", w.kids.started(), 1)
			w.proc.end(51)
			w.proc.joins(52, "new")
			w.pass(time.Second)
			w.expect(files{"web": 3}, again)
			is(t, "network", filepath.Base(w.kids.last().network), "net-new")
		})
	}
}

// Where tcpdump does not notice that its pod has ended, it is told to end; but not before it has had two
// more seconds to read its ring, in which the pod's very last packets are.
func TestRingIsRead(t *testing.T) {
	for _, test := range []struct {
		net, iface   string
		losesNetwork bool          // or its cgroup
		at           time.Duration // in a second
	}{
		{net: uidA, iface: "lo", at: 1},
		{net: uidA, iface: "any", at: time.Second - 1, losesNetwork: true},
		{net: host, at: time.Second - 1},
	} {
		simulate(t, 0, func(w *world) {
			w.proc.joins(50, test.net)
			w.see(web.on(test.iface))
			w.news()
			w.pass(time.Minute + test.at)
			if test.losesNetwork {
				w.proc.interfaces(uidA, "lo")
			} else {
				w.proc.gone(uidA)
			}
			w.pass(2 * time.Second)
			w.expect(files{"web": 3})
			w.pass(time.Second)
			w.expectKept()
			is(t, "signals", w.kids.last().signals, []string{"terminated"})
			w.pass(waitingTime + time.Second)
			w.expectKept(stopped + ": the pod's network is gone, the files (300 bytes) stay")
		})
	}
}

// A tcpdump that ends by itself or can't be started is tried again: after pauses that double from 0.2 s to 5
// minutes, and begin anew when it has run for a minute. An Event has the reason, not twice in a row.
func TestRestarts(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{refusal: syscall.EAGAIN})
		w.born(50, web)
		w.pass(time.Hour)
		w.told(failed + ": tcpdump can't be started: resource temporarily unavailable; it is tried again")
		waits := gaps(w.kids.attempts)
		is(t, "it is started again and again", len(waits) > 15, true)
		checkBackoff(t, waits, 200*time.Millisecond, 5*time.Minute, 0)
		w.kids.behave(behaviour{words: "tcpdump: eth0: no permission\n"})
		w.pass(time.Hour)
		w.told(failed + ": tcpdump ended by itself (tcpdump: eth0: no permission); it is tried again")

		w.kids.behave(behaviour{})
		w.pass(7 * time.Minute)
		w.expect(files{"web": 3}, started)
		w.kids.last().exit("", errKilled) // it has run for a minute
		w.pass(400 * time.Millisecond)
		w.expect(files{"web": 3}, failed+": tcpdump ended by itself (signal: killed)", again)
		before := w.kids.started()
		for range 600 {
			w.kids.last().exit("", errKilled) // at once
			w.pass(time.Second)
		}
		n := w.kids.started() - before
		is(t, "it is started again in 10 minutes 5 to 13 times", n >= 5 && n <= 13, true)
	})
}

// An Event tells of a tcpdump that can't be ended. Its files stay, and the capture that replaces it waits for
// it. No Event says that a capture has started which was removed before.
func TestImmortal(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{startup: time.Second, deaf: true, immortal: true})
		w.born(50, web)
		w.kids.behave(behaviour{})
		w.see(web.of("4"))
		w.pass(time.Hour)
		w.expect(files{"web": 3}, failed+": tcpdump (PID 100000) can't be ended: SIGTERM and SIGKILL were sent")
		is(t, "signals", w.kids.last().signals, []string{"terminated", "killed"})
		w.kids.last().exit(closing, errKilled)
		w.pass(0)
		w.expect(files{"web": 4}, started)
	})
}

// ---- tcpdump ----

// tcpdump's arguments are the promised ones, and descriptor 3 is the pod's network, of which nothing stays
// open. The device is eth0, in the host's network any, of which an Event warns, or what the annotation says,
// if the pod has it: tcpdump would take "2" for the second interface. A filter is one argument, compiled for
// the device.
func TestArguments(t *testing.T) {
	const hosts = "Warning CaptureStarted: this pod has the host's network, " +
		"so the files hold the whole node's traffic"
	for _, test := range []struct {
		net, iface, filter, device, link, told string
		isMissing                              bool // the interface, at first
	}{
		{net: uidA, iface: "", filter: "--", device: "eth0", link: "EN10MB", told: started},
		{net: uidA, iface: "any", filter: "-w /x", device: "any", link: "LINUX_SLL2", told: started},
		{net: uidA, iface: "e.1", filter: "$(reboot) \\", device: "e.1", link: "EN10MB", told: started},
		{net: host, iface: "", filter: "udp", device: "any", link: "LINUX_SLL2", told: hosts},
		{net: host, iface: "ens3", filter: "udp", device: "ens3", link: "EN10MB", told: hosts},
		{net: uidA, iface: "2", device: "2", told: started, isMissing: true},
		{net: host, iface: "eth0", device: "eth0", told: hosts, isMissing: true},
	} {
		simulate(t, 0, func(w *world) {
			w.proc.interfaces(uidA, "lo", "eth0", "e.1")
			w.proc.joins(50, test.net)
			w.see(web.on(test.iface).filtered(test.filter))
			if test.isMissing {
				w.pass(time.Minute)
				w.expect(nil, waiting+": the interface "+test.iface+": the pod has lo, e")
				w.proc.interfaces(test.net, "lo", "eth0", test.iface)
				w.pass(time.Second)
			}
			w.expect(files{"web": 3}, test.told)
			want := []string{"-C", "1", "-W", "3", "-w", w.root + "/capture-web.pcap",
				"-U", "-Z", "root", "-p", "-i", test.device, "-B", "4096"}
			if test.filter != "" {
				want = append(want, "--", test.filter)
				is(t, "link type", w.kids.links, []string{test.link})
			}
			is(t, "arguments", w.kids.last().arguments, want)
			is(t, "network", filepath.Base(w.kids.last().network), "net-"+test.net)
			is(t, "files that are open", openIn(t, w.proc.dir), nil)
		})
	}
}

// An Event names the files as tcpdump does.
func TestFileNames(t *testing.T) {
	for n, want := range map[int]string{1: "/web.pcap", 10: "10 files, /web.pcap0 to /web.pcap9",
		11: "11 files, /web.pcap00 to /web.pcap10"} {
		is(t, "files", fileNames("/web.pcap", n), want)
	}
	simulate(t, 0, func(w *world) {
		w.born(50, web)
		w.told(fmt.Sprintf(started+": Capturing into 3 files, %[1]s0 to %[1]s2, rotated at 1 MB, "+
			"in kube-system/packetcapture-x; the interface is eth0", w.root+"/capture-web.pcap"))
	})
}

// Of what tcpdump says its first warning, its last complaint and its counts are kept. All of it is read.
func TestStderr(t *testing.T) {
	const listening = "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n"
	const gone = "tcpdump: pcap_loop: The interface disappeared"
	long := "tcpdump: " + strings.Repeat("é", 119)
	for _, test := range []struct{ text, warning, complaint, counts string }{
		{text: listening + "1 packet captured\n1 packet received by filter\n0 packets dropped by kernel\n",
			counts: "1 packet captured, 0 dropped by the kernel"},
		{text: "nsenter: first\n" + listening + gone + "\n", complaint: gone},
		{text: "tcpdump: data link type LINUX_SLL2\n" + listening},
		{text: "Warning: first\n" + listening + "Warning: late\n", warning: "Warning: first"},
		{text: "tcpdump: WARNING: eth0: no IPv4\n" + listening, warning: "tcpdump: WARNING: eth0: no IPv4"},
		{text: "nsenter: failed to execute tcpdump", complaint: "nsenter: failed to execute tcpdump"},
		{text: long, complaint: long},
		{text: long + "é", complaint: long + "…"},
		{text: strings.Repeat("x", 1<<20) + "\n"}, // longer than a line may be
	} {
		stderr, warning, listens := strings.NewReader(test.text), "", false
		child := &process{stderr: stderr, wait: func() error { return errStatus }}
		counts, err := child.read(func(said string) { warning, listens = said, true })
		got := []any{warning, err.Error(), counts, listens, stderr.Len()}
		want := []any{test.warning, cmp.Or(test.complaint, errStatus.Error()), test.counts,
			strings.Contains(test.text, listening), 0}
		is(t, fmt.Sprintf("%.99q: warning, error, counts, listens, bytes left", test.text), got, want)
	}
}

// ---- Files, and the room for them ----

// A capture's files are those of its name and a number alone, whatever is named like them.
func TestSimilarNames(t *testing.T) {
	stem := t.TempDir() + "/capture-web.pcap"
	for _, ending := range []string{"", "0", "099", "0.gz", "0.pcap0", "0~", "ng", "_1b2c3d4f.pcap1"} {
		must(t, os.WriteFile(stem+ending, []byte("1234"), 0o644))
	}
	paths, size := findFiles(stem)
	is(t, "paths", paths, []string{stem, stem + "0", stem + "099"})
	is(t, "bytes", size, 12)
}

// The files of all captures are bounded, here by 5. What does not fit waits. A change that needs no more
// files than before keeps its room, whoever waits; of a larger number an Event says what is free.
func TestRoom(t *testing.T) {
	a, b, c := podNamed("a", "a", ""), podNamed("b", "b", ""), podNamed("c", "c", "")
	const most = `: is "5": accepted is at most 4 now, because other captures have the rest of this node's 5`
	for name, story := range map[string][]struct {
		pod     annotated
		running files // 4 s later
		told    []string
	}{
		"a change keeps its room, and leaves the rest": {
			{pod: a.of("5"), running: files{"a": 5}, told: []string{started}},
			{pod: b.of("5"), running: files{"a": 5}, told: []string{waiting + ": N=5"}},
			{pod: b.of("3"), running: files{"a": 5}, told: []string{waiting + ": N=3"}},
			{pod: c.of("1"), running: files{"a": 5}, told: []string{waiting}},
			{pod: a.of("5").filtered("udp"), running: files{"a": 5}, told: []string{stopped, started}},
			{pod: a.of("5").on("net1"), told: []string{stopped, waiting + ": the interface net1"}},
			{pod: a.of("4"), running: files{"a": 4, "c": 1}, told: []string{started, started}},
			{pod: b.of(""), running: files{"a": 4, "c": 1}, told: []string{stopped + ": nothing was captured"}},
		},
		"a larger number needs what is free": {
			{pod: a.of("3"), running: files{"a": 3}, told: []string{started}},
			{pod: c.of("4"), running: files{"a": 3}, told: []string{waiting + ": 3 of the 5 files"}},
			{pod: b.of("1"), running: files{"a": 3, "b": 1}, told: []string{started}},
			{pod: a.of("5"), running: files{"a": 3, "b": 1}, told: []string{invalid + most}},
			{pod: a.of("3"), running: files{"a": 3, "b": 1}, told: []string{continued}},
			{pod: a.of("4"), running: files{"a": 4, "b": 1}, told: []string{stopped, started}},
		},
		"one that waits holds no more than it asks for": {
			{pod: a.of("5"), running: files{"a": 5}, told: []string{started}},
			{pod: a.of("1").on("net1"), told: []string{stopped, waiting + ": the interface net1"}},
			{pod: b.of("4"), running: files{"b": 4}, told: []string{started}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			simulate(t, 5, func(w *world) {
				w.kids.behave(behaviour{shutdown: 700 * time.Millisecond})
				for i, p := range []annotated{a, b, c} {
					w.proc.pod(50+i, p.uid)
				}
				for _, change := range story {
					w.see(change.pod)
					w.pass(waitingTime + time.Second)
					w.expect(change.running, change.told...)
				}
			})
		})
	}
}

// A part of the disk stays free: a capture waits until there is more. One that runs stops with a Warning, and
// its files stay.
func TestDiskFull(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.agent.diskFree = 101
		is(t, "full when 101 % stay free", w.agent.isFull(), true)
		w.agent.diskFree = 15
		// With the link there, the path leads to /proc, in which nothing is free.
		link := w.root + "/captures/full"
		w.agent.root = link + "/../.."
		must(t, os.Symlink("/proc/self/fd", link))
		w.born(50, web)
		w.pass(time.Hour)
		w.expect(nil, waiting+": disk space: 15 % of the disk and 1262160 bytes must be free")
		must(t, os.Remove(link))
		w.pass(time.Second)
		w.expect(files{"web": 3}, started)
		must(t, os.Symlink("/proc/self/fd", link))
		w.pass(time.Hour)
		w.expectKept(failed+": the disk is full", stopped+": the files (300 bytes) stay until")
		must(t, os.Remove(link))
		w.pass(time.Second)
		w.expect(files{"web": 3}, again)
	})
}

// ---- A pod's cgroup, its processes and its network ----

// networkOf is the name of the network that is found for a pod, "" if there is none.
func networkOf(t *testing.T, proc *fakeProc, p annotated) string {
	t.Helper()
	g, err := newCgroups(proc.dir)
	must(t, err)
	s, ok := g.find(p.pod, sandbox{})
	return map[bool]string{true: strings.TrimPrefix(filepath.Base(filepath.Dir(s.network)), "net-")}[ok]
}

// openIn are the files of a folder that are open.
func openIn(t *testing.T, dir string) (open []string) {
	links, err := filepath.Glob("/proc/self/fd/*")
	must(t, err)
	for _, link := range links {
		if target := readLink(link); strings.HasPrefix(target, dir) {
			open = append(open, target)
		}
	}
	return open
}

// A pod is found by its cgroup, whoever makes that: on cgroup v1 and v2, with the kubelet's and systemd's
// names, in each class of pods, and a level deeper in kind. What is no UID never becomes a path.
func TestCgroupNames(t *testing.T) {
	const v1, v2, pids = "/systemd", "", "/pids"
	for _, test := range []struct{ hierarchy, pod, process string }{
		{hierarchy: v2, process: "/kubepods/podUID/cafe"},
		{hierarchy: v2, process: "/kubepods/burstable/podUID/cafe"},
		{hierarchy: v2, process: "/kubepods/besteffort/podUID/cafe"},
		{hierarchy: v2, process: "/kubepods.slice/kubepods-podU_ID.slice/crio-cafe.scope/container/within"},
		{hierarchy: v1, process: "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_ID.slice/x"},
		{hierarchy: pids, process: "/kubepods/podUID/cafe"},
		{hierarchy: v1, process: "/kubelet/kubepods/podUID/cafe"},
		{hierarchy: v2, process: "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/" +
			"kubelet-kubepods-burstable-podU_ID.slice/x.scope"},
		// The kubelet has systemd make them, and the runtime does not.
		{hierarchy: v1, pod: "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_ID.slice",
			process: "/system.slice/containerd.service/kubepods-burstable-podU_ID.slice:cri-containerd:cafe"},
		{hierarchy: v2, pod: "/kubepods.slice/kubepods-podU_ID.slice",
			process: "/system.slice/kubepods-podU_ID.slice:cri-containerd:cafe"},
	} {
		proc, static := newProc(t), web
		proc.grow(test.hierarchy)
		static.kubeletUID = "0123456789abcdef0123456789abcdef" // names its cgroup
		for i, uid := range []string{uidA, uidB, static.kubeletUID} {
			named := strings.NewReplacer("UID", uid, "U_ID", strings.ReplaceAll(uid, "-", "_"))
			proc.make(named.Replace(cmp.Or(test.pod, test.process)))
			proc.add(fakeProcess{pid: 50 + i, cgroup: named.Replace(test.process), net: uid, root: "pod"})
		}
		for _, p := range []annotated{web, db, static} {
			is(t, "network in "+test.process, networkOf(t, proc, p), p.kubeletUID)
		}
		is(t, "network of nobody", networkOf(t, proc, podNamed("web", uidA[:8], "3")), "")
	}

	proc := newProc(t)
	proc.grow("", "/kubepods/pod", "/kubepods/pod..", "/kubepods/podxyz", "/kubepods/pod"+uidA+"/cafe")
	g, err := newCgroups(proc.dir)
	must(t, err)
	for _, uid := range []string{"", "..", "xyz", uidA + "/cafe", uidA + "/", "/", "*"} {
		is(t, fmt.Sprintf("cgroup of %q", uid), g.of(podNamed("web", uid, "3").pod), "")
	}
}

// Of a pod's processes the oldest counts whose network has eth0: never one of the runtime, and not what a
// container has made within.
func TestOldestProcess(t *testing.T) {
	type in struct{ net, root string } // a process
	for name, test := range map[string]struct {
		processes []in // the oldest first
		network   string
	}{
		"the runtime is still to join":      {processes: []in{{host, host}}, network: ""},
		"the pod's files are still to come": {processes: []in{{"pod", host}}, network: "pod"},
		"hostNetwork under CRI-O":           {processes: []in{{host, host}, {host, "pod"}}, network: host},
		"a network within":                  {processes: []in{{"pod", "pod"}, {"nested", "web"}}, network: "pod"},
		"gVisor's gofer has no interface":   {processes: []in{{"empty", "gofer"}, {"pod", "pod"}}, network: "pod"},
		"it has eth0, among others":         {processes: []in{{"multus", "pod"}}, network: "multus"},
		"it has another interface":          {processes: []in{{"eth00", "pod"}}, network: ""},
	} {
		for _, step := range []int{1, -1} { // PIDs go round
			proc := newProc(t)
			proc.interfaces("empty", "lo")
			proc.interfaces("eth00", "lo", "eth00")
			proc.interfaces("multus", "lo", "net1", "eth00", "eth0")
			for i, ps := range test.processes {
				pid, born := 100+i*step, 9_999+i
				proc.add(fakeProcess{pid: pid, cgroup: cgroupOf(uidA), net: ps.net, root: ps.root, born: born})
			}
			is(t, name, networkOf(t, proc, web), test.network)
		}
	}
}

// A process may end, and its PID become another pod's, which is never captured.
func TestReusedPID(t *testing.T) {
	proc := newProc(t)
	proc.joins(50, "pod")
	g, err := newCgroups(proc.dir)
	must(t, err)
	s, _ := g.find(web.pod, sandbox{})
	proc.add(fakeProcess{pid: 50, cgroup: cgroupOf(uidB), net: "other", root: "other"})
	proc.joins(51, "pod")
	now, _ := g.find(web.pod, s)
	is(t, "the network that is found", now.network, s.network)

	_, err = g.open(s)
	says(t, err, "has ended")
	is(t, "files that are open", openIn(t, proc.dir), nil)
	proc.end(50)
	_, err = g.open(s)
	says(t, err, "/50/ns/net: no such file")
}

// ---- Events ----

// An Event goes to its pod's namespace, and to the UID that the kubelet uses. The log has it too.
func TestEventIsPosted(t *testing.T) {
	following(t, 0, func(w *world) {
		w.follows()
		w.pass(time.Hour)
		static := map[string]string{annotation: "x",
			"kubernetes.io/config.hash": "hash", "kubernetes.io/config.mirror": "hash"}
		w.api.put(fakePod{"shop", "web", "0123456789", static, 0})
		synctest.Wait()
		posted := w.api.posted()
		if len(posted) != 1 {
			t.Fatalf("posted %v", posted)
		}
		type fields = map[string]any
		name := fmt.Sprintf("packetcapture-%x-01234567", time.Date(2000, 1, 1, 1, 0, 0, 0, time.UTC).UnixNano())
		is(t, "Event", posted[0], fields{
			"apiVersion": "v1", "kind": "Event", "metadata": fields{"namespace": "shop", "name": name},
			"involvedObject": fields{"apiVersion": "v1", "kind": "Pod",
				"namespace": "shop", "name": "web", "uid": "hash"},
			"type": "Warning", "reason": "CaptureInvalid", "message": posted[0]["message"], "count": 1.0,
			"source":         fields{"component": "packetcapture", "host": "node-1"},
			"firstTimestamp": "2000-01-01T01:00:00Z", "lastTimestamp": "2000-01-01T01:00:00Z",
		})
		line := "level=WARN msg=CaptureInvalid namespace=shop pod=web message=%q"
		w.logged(fmt.Sprintf(line, posted[0]["message"]), 1)
		w.annotate("web", asks{n: "5"})
		w.logged("level=INFO msg=CaptureStarted", 1)
	})
}

// An Event is tried again while the server is away, for 10 minutes at most, and not if it is refused. One
// whose answer was lost is not taken twice. The next one is posted all the same.
func TestEventIsTriedAgain(t *testing.T) {
	type test struct {
		fault
		tries      int // 0: as many as go into 10 minutes
		retryAfter time.Duration
		isLost     bool
	}
	each(t, map[string]test{
		"500": {fault: fault{times: 8, code: 500}, tries: 9},
		"429 with Retry-After": {
			fault: fault{times: 1, code: 429, retryAfter: "40"}, tries: 2, retryAfter: 40 * time.Second},
		"401": {fault: fault{times: 1, code: 401}, tries: 2},
		// An answer is waited for for 10 s.
		"a webhook hangs": {fault: fault{times: 1, hangs: time.Hour}, tries: 2, retryAfter: 10 * time.Second},
		"a lost answer":   {fault: fault{times: 1, err: io.ErrUnexpectedEOF, isDone: true}, tries: 2},
		"503 for long":    {fault: fault{code: 503}, isLost: true},
		"403":             {fault: fault{code: 403}, tries: 1, isLost: true},
	}, func(w *world, test test) {
		w.follows()
		w.api.fail("post", test.fault)
		w.annotate("web", asks{n: "x"})
		w.pass(time.Hour)
		posts := w.api.asked("post")
		if test.tries > 0 {
			is(w, "tries", len(posts), test.tries)
		} else {
			took := posts[len(posts)-1].at.Sub(posts[0].at).Minutes()
			is(w, "it is tried for 10 minutes", took > 9 && took < 11, true)
		}
		checkBackoff(w, gaps(posts), 800*time.Millisecond, 30*time.Second, test.retryAfter)
		w.logged("an Event is not posted", map[bool]int{true: 1}[test.isLost])
		w.api.heal()
		w.annotate("web", asks{n: "y"})
		synctest.Wait()
		is(w, "taken", len(w.api.posted()), map[bool]int{true: 1, false: 2}[test.isLost])
	})
}

// The watch never waits for a start, a stop or an Event: the server would close it. Events that wait come in
// their order, up to 1,000 of a namespace.
func TestFlood(t *testing.T) {
	following(t, 0, func(w *world) {
		w.kids.behave(behaviour{startup: time.Hour, shutdown: time.Second})
		w.api.fail("post", fault{code: 503})
		w.annotate("web", asks{n: "5"})
		w.follows()
		last := ""
		for i := range eventQueue + 100 {
			w.annotate("web", asks{n: fmt.Sprint("x", i)})
			last = w.annotate("web", asks{n: fmt.Sprint(i%7 + 1)})
		}
		synctest.Wait()
		w.api.push("", ends)
		w.watchedFrom("0", last) // all was read in no time
		w.pass(5 * time.Minute)
		w.runs(files{"web": 1})
		w.api.heal()
		w.pass(longestWait)
		news := w.news()
		for i, e := range news {
			is(t, "number of the Event", strings.Contains(e.message, fmt.Sprintf(`"x%d"`, i)), true)
		}
		is(t, "Events that are not lost: one is being posted", len(news), eventQueue+1)
	})
}

// What was told before the end of the program is posted, and holds up its end for 4.5 s at most.
func TestLastEvents(t *testing.T) {
	type test struct {
		frozen time.Duration // the server, after the end
		hangs  bool          // an Event of another namespace
		within time.Duration
		told   []string
	}
	last := []string{stopped + ": 7 packets captured"}
	each(t, map[string]test{
		"while the server thinks":       {frozen: 4 * time.Second, within: 4 * time.Second, told: last},
		"while the server answers none": {frozen: time.Hour, within: 4500 * time.Millisecond},
		"while another namespace hangs": {hangs: true, within: 4500 * time.Millisecond, told: last},
	}, func(w *world, test test) {
		w.annotate("web", asks{n: "5"})
		w.follows()
		w.news()
		w.pass(time.Minute)
		if test.hangs {
			w.api.fail("post shop", fault{hangs: time.Hour})
			w.api.put(fakePod{"shop", "web", "05", map[string]string{annotation: "x"}, 0})
		} else {
			w.api.freeze()
		}
		synctest.Wait()
		began := time.Now()
		time.AfterFunc(test.frozen, w.api.thaw)
		w.end()
		w.program.Wait()
		is(w, "the end is in time", time.Since(began) <= test.within, true)
		w.told(test.told...)
	})
}

// ---- The API server ----

// The token is read for each request, since it is replaced every hour. A 401, or none to read, is waited out.
func TestToken(t *testing.T) {
	following(t, 0, func(w *world) {
		w.annotate("web", asks{n: "5"})
		w.follows()
		w.pass(time.Second / 2) // watches end at whole seconds: never between the two files
		w.api.mount("token", "token-2\n")
		w.api.accept("token-2")
		w.marked()
		w.pass(12 * time.Minute)
		w.logged("WARN", 0)
		must(t, os.Remove(w.api.account+"/token"))
		w.api.push("", ends)
		w.pass(10 * time.Second)
		w.logged("account's token", 1)
		w.api.mount("token", "token-1")
		w.pass(longestWait)
		w.logged("401 Unauthorized", 1)
		w.api.mount("token", "token-2")
		w.pass(longestWait)
		w.annotate("web", asks{n: "6"})
		w.runs(files{"web": 6})
	})
}

// The client speaks HTTP/2, without which there are no pings. Only a server with a certificate of the CA, and
// for its address, is given the token. The CA may be replaced; one that can't be read leaves the last.
func TestConnection(t *testing.T) {
	listener, err := net.Listen("tcp", "0.0.0.0:0")
	must(t, err)
	f := newFakeAPI(t)
	f.fail("watch", fault{code: 200, body: string(bookmarkFrame(9))})
	f.serve(listener)
	clientOf := func(address string) *client {
		return newClient(fmt.Sprintf("https://%s:%d", address, listener.Addr().(*net.TCPAddr).Port), f.account)
	}
	watch := func(c *client) error {
		defer c.http.CloseIdleConnections()
		a := &agent{config: config{nodeName: "node-1"}, api: c, ready: func() {}}
		return newPodWatch(a).watch(t.Context())
	}
	says(t, watch(clientOf("127.0.0.2")), "certificate is valid for 127.0.0.1")
	c := clientOf("127.0.0.1")
	must(t, os.Remove(f.account+"/ca.crt"))
	says(t, watch(c), "ca.crt holds no certificate")
	is(t, "requests without a right certificate", len(f.asked("watch")), 0)
	f.mount("ca.crt", string(someCA))
	must(t, watch(c))
	is(t, "HTTP's version", f.asked("watch")[0].proto, 2)
	f.mount("ca.crt", string(someCA[:100]))
	must(t, watch(c))
}

// pipes is a listener whose connections stay in the process, and in the bubble.
type pipes struct {
	net.Listener // whose own connections are not accepted
	dialed       chan net.Conn
}

func (p pipes) Accept() (net.Conn, error) {
	if conn, isOpen := <-p.dialed; isOpen {
		return conn, nil
	}
	return nil, net.ErrClosed
}

// freezing is a client's end of a connection: once frozen nothing comes any more, and nobody is told.
type freezing struct {
	net.Conn
	frozen atomic.Bool
}

func (c *freezing) Read(data []byte) (int, error) {
	n, err := c.Conn.Read(data)
	for err == nil && c.frozen.Load() {
		n, err = c.Conn.Read(data)
	}
	return n, err
}

// Pings keep a connection that is silent, and end one that is half open. No proxy is asked: init has set one.
func TestFrozenConnection(t *testing.T) {
	following(t, 0, func(w *world) {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		dialed := make(chan net.Conn)
		defer close(dialed)
		w.api.serve(pipes{listener, dialed})
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(someCA)
		var connections []*freezing
		transport := newClient("https://kubernetes.test", w.api.account).http.Transport.(*http.Transport)
		transport.DialTLSContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			dialed <- theirs
			c := &freezing{Conn: ours}
			connections = append(connections, c)
			conn := tls.Client(c, &tls.Config{RootCAs: roots, ServerName: "example.com", NextProtos: []string{"h2"}})
			return conn, conn.HandshakeContext(ctx)
		}
		w.agent.api.http.Transport = transport
		w.follows()
		w.pass(4 * time.Minute)
		is(t, "connections", len(connections), 1)
		w.watchedFrom("0")
		last := w.marked() // so that the next ping is as late as it can be
		connections[0].frozen.Store(true)
		w.annotate("web", asks{n: "6"})
		w.pass(50 * time.Second)
		w.logged("the pods can't be watched", 1)
		w.runs(files{"web": 6})
		w.watchedFrom("0", last)
		w.end()
		w.program.Wait()
		transport.CloseIdleConnections()
	})
}

// ---- cat ----

// pcap is a file of packets, each with its time in seconds.
func pcap(times ...uint32) []byte {
	var b bytes.Buffer
	binary.Write(&b, binary.NativeEndian, []uint32{0xa1b2c3d4, 2 | 4<<16, 0, 0, 262144, 1})
	for _, at := range times {
		data := fmt.Sprintf("packet of %d", at)
		binary.Write(&b, binary.NativeEndian, []uint32{at, 7, uint32(len(data)), uint32(len(data))})
		b.WriteString(data)
	}
	return b.Bytes()
}

// contents are those of a capture's files, by the digits in their names.
type contents map[string][]byte

// writeFiles writes the files of a capture of default/web, each at the time of its first packet, and
// returns their root.
func writeFiles(t *testing.T, all contents) (root string) {
	root = t.TempDir()
	must(t, os.Mkdir(root+"/captures", 0o755),
		os.Symlink(root+"/capture-web.pcap", root+"/captures/default_web"))
	for digits, text := range all {
		path := root + "/capture-web.pcap" + digits
		must(t, os.WriteFile(path, text, 0o644))
		if len(text) > pcapHeader {
			at := time.Unix(int64(binary.NativeEndian.Uint32(text[pcapHeader:])), 0)
			must(t, os.Chtimes(path, at, at))
		}
	}
	return root
}

// cat writes the files as one pcap: the oldest first, none left out because of its time, whole packets alone.
// It says on stderr how much that was.
func TestCat(t *testing.T) {
	for name, test := range map[string]struct {
		files contents
		says  string
		want  []byte
	}{
		"one":    {files: contents{"": pcap(1, 2)}, says: "2 packets", want: pcap(1, 2)},
		"turned": {files: contents{"0": pcap(3), "1": pcap(0, 2)}, says: "3 packets", want: pcap(0, 2, 3)},
		"equal":  {files: contents{"0": pcap(5, 6), "1": pcap(5)}, says: "3 packets", want: pcap(5, 6, 5)},
		"torn":   {files: contents{"0": pcap(1, 2)[:70], "1": pcap(4)}, says: "2 packets", want: pcap(1, 4)},
		"begun":  {files: contents{"0": pcap(1), "1": pcap(), "2": pcap()[:23]}, says: "1 packet", want: pcap(1)},
	} {
		root := writeFiles(t, test.files)
		must(t, os.WriteFile(root+"/capture-web-2.pcap0", pcap(99), 0o644))
		var out, said bytes.Buffer
		must(t, cat(root, "default/web", &out, &said))
		is(t, name, out.String(), string(test.want))
		is(t, name+": it says", said.String(), fmt.Sprintf("%s, %d bytes\n", test.says, len(test.want)))
	}
	err := cat(writeFiles(t, nil), "default/web", io.Discard, io.Discard)
	says(t, err, "default/web has no file to read yet")
}

// writerFunc is what happens when something is written.
type writerFunc func(text []byte) (int, error)

func (w writerFunc) Write(text []byte) (int, error) { return w(text) }

// A file that is overwritten while cat reads another one is left out, and cat says so. A reader that goes
// away ends it.
func TestCatChanges(t *testing.T) {
	gone := errors.New("the reader has gone")
	for name, test := range map[string]struct {
		second []byte // when another file has been read
		err    error  // of the reader
		want   []byte
		warns  bool
	}{
		"more packets":    {second: pcap(3, 4), want: pcap(1, 3, 4, 5)},
		"overwritten":     {second: pcap(9), want: pcap(1, 5), warns: true},
		"the reader goes": {second: pcap(3), err: gone, want: pcap(1)},
	} {
		root := writeFiles(t, contents{"0": pcap(1), "1": pcap(3), "2": pcap(5)})
		var out, said bytes.Buffer
		err := cat(root, "default/web", writerFunc(func(text []byte) (int, error) {
			must(t, os.WriteFile(root+"/capture-web.pcap1", test.second, 0o644))
			out.Write(text)
			return len(text), test.err
		}), &said)
		is(t, name+": error", err, test.err)
		is(t, name, out.String(), string(test.want))
		is(t, name+": it warns", strings.Contains(said.String(), "pcap1 was overwritten or deleted\n"), test.warns)
	}
}

// Of a pod that is not captured itself cat writes no packet, whatever other pod has its name. The error lists
// what is captured.
func TestCatOthers(t *testing.T) {
	root := writeFiles(t, contents{"0": pcap(1), "1": pcap(2)})
	must(t, os.WriteFile(root+"/capture-x.pcap", pcap(1), 0o644),
		os.Symlink(root+"/capture-db.pcap", root+"/captures/ns2_db"))
	for _, name := range []string{"ns2/web", "web", "default_web", "/web", "default/", "default/web/", "",
		"default/../captures/default_web", "../../captures/default_web", "default/x", "/capture-web.pcap0"} {
		var out, said bytes.Buffer
		err := cat(root, name, &out, &said)
		says(t, err, strconv.Quote(name)+" is not captured here", "default/web", "ns2/db")
		is(t, name+": written", out.String()+said.String(), "")
	}
}
