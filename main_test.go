package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

// The promises, in the order of main.go.

func init() {
	// No request of any test may go there. The proxy of the environment is read once in a process: not t.Setenv.
	os.Setenv("HTTPS_PROXY", "http://proxy.test:3128")
	namesake.namespace = "other"
}

const (
	uidA = "1b2c3d4e-0000-a" // of web; the UIDs of all pods in these stories begin alike
	uidB = "1b2c3d4e-0000-b" // of db

	// What is told. Of a tcpdump that does not begin with fresh files it is again.
	started = "Normal CaptureStarted"
	again   = "Warning CaptureStarted: tcpdump began again at the first file, and the packets in that one are lost"
	stopped = "Normal CaptureStopped"
	waiting = "Warning CaptureWaiting"
	failed  = "Warning CaptureFailed"
	invalid = "Warning CaptureInvalid"
)

// newWeb is web when it was deleted and made again. namesake has web's name in another namespace.
var web, db, newWeb, namesake = podNamed("web", uidA, "3"), podNamed("db", uidB, "3"),
	podNamed("web", "1b2c3d4e-0000-c", "3"), podNamed("web", "1b2c3d4e-0000-d", "3")

// of is a pod that asks for another number of files, or with "" for nothing; on is one with an interface, and
// filtered one with a filter.
func (p pod) of(value string) pod {
	p.value, p.files, p.annotated = value, podNamed("", "", value).files, value != ""
	return p
}

func (p pod) on(iface string) pod        { p.iface = iface; return p }
func (p pod) filtered(filter string) pod { p.filter = filter; return p }

// startedIn is what is told of a pod with a network of its own, and of one with the host's.
func startedIn(net string) string {
	if net == host {
		return "Warning CaptureStarted: this pod has the host's network, so the files hold the whole node's traffic"
	}
	return started
}

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
func (w *world) born(pid int, p pod) {
	w.proc.pod(pid, p.uid)
	w.see(p)
}

// finishes ends a pod's process. Its cgroup and its eth0 go, which the last tcpdump notices.
func (w *world) finishes(pid int, p pod) {
	w.proc.end(pid)
	w.proc.gone(p.uid)
	w.proc.interfaces(p.uid, "lo")
	w.kids.last().exit("tcpdump: pcap_loop: The interface disappeared\n"+closing, errStatus)
}

// joins starts a process of web in a network.
func (p *fakeProc) joins(pid int, net string) {
	p.add(fakeProcess{pid: pid, cgroup: cgroupOf(web.uid), net: net, root: "pod", born: pid})
}

const longestWait = 34 * time.Second // for another try, and a little

// uids are those of the pods that have a network.
var uids = map[string]string{"web": "0eb", "db": "0db", "new": "0ef"}

// following tells a story of the program on a node with three pods. The story starts it (follows).
func following(t *testing.T, limit int64, story func(w *world)) {
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
	all := map[string]string{annotation: a.n, filterAnnotation: a.filter, interfaceAnnotation: a.iface, "note": a.note}
	maps.DeleteFunc(all, func(_, value string) bool { return value == "" })
	return w.api.put(fakePod{"default", name, uids[name], all, 0})
}

// watchedFrom checks the versions of all watches.
func (w *world) watchedFrom(want ...string) {
	w.Helper()
	synctest.Wait()
	var got []string
	for _, r := range w.api.asked("watch") {
		got = append(got, r.query.Get("resourceVersion"))
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

// limitOf is the time limit that a watch asked for.
func limitOf(r fakeRequest) time.Duration {
	limit, _ := time.ParseDuration(r.query.Get("timeoutSeconds") + "s")
	return limit
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

// ---- Configuration ----

// environment is what readConfig reads, right but for some "<name>=<value>".
func environment(set ...string) func(string) string {
	all := map[string]string{"NODE_NAME": "node-1",
		"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
	for _, text := range set {
		name, value, _ := strings.Cut(text, "=")
		all[name] = value
	}
	return func(name string) string { return all[name] }
}

// The environment configures the program. All that is missing or wrong is named at once, with what is accepted.
func TestConfiguration(t *testing.T) {
	hostname, _ := os.Hostname()
	least := 64<<20 + 1_000_000 + 262_144 + 16 // the log, and one file
	for set, change := range map[string]func(c *config){
		"none":                              func(c *config) {},
		"KUBERNETES_SERVICE_HOST=fd00::1":   func(c *config) { c.url = "https://[fd00::1]:443" },
		"DISK_LIMIT=1073741824":             func(c *config) { c.diskLimit = 1<<30 - 64<<20 },
		fmt.Sprintf("DISK_LIMIT=%d", least): func(c *config) { c.diskLimit = 1_262_160 },
		"DISK_FREE=0":                       func(c *config) { c.diskFree = 0 },
		"DISK_FREE=99":                      func(c *config) { c.diskFree = 99 },
	} {
		want := config{nodeName: "node-1", podName: hostname, url: "https://10.96.0.1:443", proc: "/proc", root: "/",
			account: "/var/run/secrets/kubernetes.io/serviceaccount", diskLimit: math.MaxInt64 - 64<<20, diskFree: 15}
		change(&want)
		got, err := readConfig(environment(set))
		must(t, err)
		is(t, "with "+set, got, want)
	}
	for _, wrong := range [][]string{{"NODE_NAME="}, {"KUBERNETES_SERVICE_HOST="}, {"KUBERNETES_SERVICE_PORT="},
		{"DISK_FREE=100"}, {"DISK_FREE=-1"}, {"DISK_FREE=15%"}, {"DISK_LIMIT=1Gi"}, {fmt.Sprint("DISK_LIMIT=", least-1)},
		{"NODE_NAME=", "DISK_LIMIT=1Gi", "DISK_FREE=100"},
	} {
		_, err := readConfig(environment(wrong...))
		for _, set := range wrong {
			name, value, _ := strings.Cut(set, "=")
			says(t, err, name+" is "+strings.Replace(strconv.Quote(value), `""`, "empty", 1))
		}
	}
	says(t, run(t.Context(), []string{"help"}), `"help" is no command: accepted are cat and live`)
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

// A program that can't do its work does not begin, and says what it lacks.
func TestStart(t *testing.T) {
	proc, root := newProc(t), t.TempDir()
	_, err := newAgent(testConfig(t, proc.dir, root))
	must(t, err)
	_, err = newAgent(testConfig(t, proc.dir, root))
	says(t, err, "another packetcapture runs in this container")
	proc.grow("/systemd", "/user.slice")
	_, err = newAgent(testConfig(t, proc.dir, t.TempDir()))
	says(t, err, "no cgroup kubepods is in "+proc.dir+"/1/root/sys/fs/cgroup/systemd or ", "/pids")
	_, err = newAgent(testConfig(t, t.TempDir(), t.TempDir()))
	says(t, err, "hostPID", "CAP_SYS_PTRACE", "AppArmor", "Unconfined", "/1/ns/net: no such file")
}

// ---- The watch ----

// The program is ready when the watch has delivered: not when it is only accepted, and whatever comes later.
func TestReady(t *testing.T) {
	following(t, 0, func(w *world) {
		w.api.fail("watch", fault{times: 5, code: 500})
		w.api.fail("watch", fault{times: 1, code: 200, body: string(errorFrame(500, "no leader"))})
		w.follows()
		w.untilWatching()
		is(t, "delivered", w.delivered.Load(), 0)
		w.marked()
		is(t, "delivered", w.delivered.Load(), 1)
	})
}

// The first watch has all pods, in any order. What they are annotated with before the program starts is captured.
// A static pod's cgroup has another UID than the API's: two annotations name it, and one alone could be anybody's.
// After that each change is applied when it comes, and leaves nothing to the next.
func TestFirstWatch(t *testing.T) {
	following(t, 0, func(w *world) {
		w.annotate("web", asks{n: "5"})
		w.annotate("new", asks{note: "no capture"})
		w.proc.pod(60, "abc")
		w.api.put(fakePod{"kube-system", "etcd", "0e7c", map[string]string{annotation: "2", filterAnnotation: " tcp port 80\n",
			interfaceAnnotation: "lo", hashAnnotation: "abc", mirrorAnnotation: "abc"}, 0})
		w.api.put(fakePod{"shop", "thief", "0bad", map[string]string{annotation: "1", hashAnnotation: uids["db"]}, 0})
		w.follows()
		w.runs(files{"etcd": 2, "web": 5})
		w.pass(2 * time.Second)
		w.api.push("", ends) // the versions so far came in no order: none is one to go on from
		w.watchedFrom("0", "0")
		w.annotate("db", asks{n: "4"})
		w.annotate("web", asks{n: "6", note: strings.Repeat("x", 1_500_000)}) // bufio.Scanner would end at 64 KB
		w.api.push(string(watchFrame("DELETED", fakePod{"default", "web", "01d", nil, 9000}.object())), goesOn)
		w.runs(files{"db": 4, "etcd": 2, "web": 6}) // what is late about its predecessor stops nothing
		last := w.annotate("db", asks{})
		w.api.push("", ends)
		w.runs(files{"etcd": 2, "web": 6})
		w.watchedFrom("0", "0", last)
		is(t, "tcpdumps", w.kids.started(), 4)
		w.logged(`the interface is lo; the filter is \"tcp port 80\"`, 1)
		w.logged("the filter is", 1)
	})
}

// When the server has no history any more, the program begins anew, at once. Captures whose pods have gone
// meanwhile are stopped, but only when all pods have come; the others go on.
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
			w.marked()
			w.runs(files{"new": 1, "web": 5})
			is(t, "tcpdumps", w.kids.started(), 3)
			w.logged("410 Gone", 0)
		})
	}
}

// A watch that ends at its time limit is no failure: the next one goes on from the last version. The limits differ,
// so that the watches of many nodes spread; the fake checks that they are 300 to 600 s. No watch is kept for longer,
// though the server may answer pings.
func TestTimeLimit(t *testing.T) {
	following(t, 0, func(w *world) {
		w.api.bookmarkEvery = time.Minute
		w.follows()
		w.pass(24 * time.Hour)
		watches, limits := w.api.asked("watch"), map[time.Duration]bool{}
		for i, gap := range gaps(watches) {
			limits[gap] = true
			is(t, "the time until the next watch", gap, limitOf(watches[i]))
			is(t, "the next watch begins anew", watches[i+1].query.Get("resourceVersion") == anyVersion, false)
		}
		is(t, "a day sees 60 limits", len(limits) >= 60, true)
		is(t, "the log", w.log.String(), "")

		w.api.freeze()
		w.pass(22 * time.Minute) // one is open, the next is not answered
		watches = w.api.asked("watch")[len(watches)-1:]
		for i, gap := range gaps(watches) {
			late := gap - limitOf(watches[i]) - 30*time.Second
			is(t, "a watch is given up in time", late >= 0 && late <= longestWait, true)
		}
		is(t, "there is a third watch", len(watches) > 2, true)
		w.api.thaw()
		w.pass(longestWait)
		w.annotate("db", asks{n: "1"})
		w.runs(files{"db": 1})
	})
}

// A broken event applies nothing. Whatever ends a watch, the next one goes on from the version of the last event, and
// not that of an ERROR. It waits unless the server ended the watch in time; the waits begin anew if the watch has
// shown that it works.
func TestEndOfWatch(t *testing.T) {
	const least, after6 = 800 * time.Millisecond, 15 * time.Second
	mark, frame := string(bookmarkFrame(9)), func(kind, uid string) string {
		return string(watchFrame(kind, fakePod{"default", "web", uid, nil, 9}.object()))
	}
	deleted := frame("DELETED", uids["web"])
	deleted = deleted[:len(deleted)-3] // all of it but the last braces
	type test struct {
		silent time.Duration // before the text
		text   string
		end    ending
		wait   time.Duration // up to twice that
		from   string
	}
	each(t, map[string]test{
		"in time, after MODIFIED": {text: frame("MODIFIED", "01d"), end: ends, from: "v9"},
		"in time, after DELETED":  {text: frame("DELETED", "01d"), end: ends, from: "v9"},
		"in time, after BOOKMARK": {text: mark, end: ends, from: "v9"},
		"in time, without any":    {silent: 2 * time.Second, end: ends, from: "0"},
		"lost after an event":     {text: mark, end: breaks, wait: least, from: "v9"},
		"lost after a while":      {silent: 2 * time.Second, end: breaks, wait: least, from: "v102"},
		"a 200 alone":             {end: ends, wait: after6, from: "v102"},
		"an ERROR":                {text: string(errorFrame(500, "")), wait: after6, from: "v102"},
		"half an event":           {text: mark[:20], end: ends, wait: after6, from: "v102"},
		"cut":                     {text: mark + deleted, end: ends, wait: least, from: "v9"},
		"a page":                  {text: mark + "<html>", wait: least, from: "v9"},
		"another object":          {text: mark + `{"type":"DELETED","object":42}`, wait: least, from: "v9"},
		"no resourceVersion":      {text: mark + `{"type":"DELETED","object":{"metadata":{"uid":"0eb"}}}`, wait: least, from: "v9"},
		"BOOKMARK of nothing":     {text: mark + `{"type":"BOOKMARK","object":{"metadata":{}}}`, wait: least, from: "v9"},
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
		w.runs(files{"web": 5})
		w.pass(longestWait)
		watches := w.api.asked("watch")[before:]
		if len(watches) == 0 {
			w.Fatal("it watches no more")
		}
		if wait := watches[0].at.Sub(ended); wait < test.wait || wait > 2*test.wait {
			w.Errorf("it waited %v, want from %v to twice that", wait, test.wait)
		}
		is(w, "it watches from", watches[0].query.Get("resourceVersion"), test.from)
		w.runs(files{"web": 5})
		w.annotate("web", asks{n: "6"})
		w.runs(files{"web": 6})
	})
}

// lost is the error of a connection whose port differs each time.
type lost struct{ port int }

func (l *lost) Error() string {
	l.port++
	return fmt.Sprintf("read tcp 10.0.0.9:%d->10.96.0.1:443: read: connection reset by peer", l.port)
}

// Whatever the trouble, the server is asked again after growing waits, on top of what it asks for. The log tells once
// when it begins and when it ends, the second time too. The version is kept, and captures go on.
func TestTrouble(t *testing.T) {
	type test struct {
		fault
		says       string
		retryAfter time.Duration
		fromAny    bool // not the last version
	}
	each(t, map[string]test{
		"410 as the answer":    {fault: fault{code: 410}, says: "410 Gone", fromAny: true},
		"410 as an event":      {fault: fault{code: 200, body: string(errorFrame(410, ""))}, says: "410 Gone", fromAny: true},
		"200, then closed":     {fault: fault{code: 200}, says: "EOF"},
		"an ERROR":             {fault: fault{code: 200, body: string(errorFrame(500, "no leader"))}, says: "no leader"},
		"401":                  {fault: fault{code: 401}, says: "401 Unauthorized"},
		"403":                  {fault: fault{code: 403}, says: "403 Forbidden: so the test wants it"},
		"429":                  {fault: fault{code: 429, retryAfter: "40"}, says: "429 Too Many", retryAfter: 40 * time.Second},
		"502 of a proxy":       {fault: fault{code: 502, body: "<html>"}, says: "502 Bad Gateway"},
		"refused":              {fault: fault{err: syscall.ECONNREFUSED}, says: "connection refused"},
		"lost":                 {fault: fault{err: &lost{}}, says: "connection reset"},
		"Retry-After below 0":  {fault: fault{code: 429, retryAfter: "-100"}, says: "429 Too"},
		"Retry-After of years": {fault: fault{code: 429, retryAfter: "99999999999"}, says: "429 Too", retryAfter: time.Minute},
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
			checkBackoff(w, waits, 800*time.Millisecond, 30*time.Second, test.retryAfter)
			if atOnce := len(watches) - 1 - len(waits); atOnce > 1 || atOnce > 0 && !test.fromAny {
				w.Errorf("%d requests came at once", atOnce)
			}
			w.logged("WARN", outage+1)
			w.logged(test.says, outage+1)
			w.logged("https://", 0)
			w.logged("watched again", outage)
			w.api.heal()
			w.untilWatching()
			watches = w.api.asked("watch")
			from := map[bool]string{true: anyVersion, false: last}[test.fromAny]
			is(w, "it watches from", watches[len(watches)-1].query.Get("resourceVersion"), from)
			if test.code == 200 && !test.fromAny { // then another 200 says nothing
				w.logged("watched again", outage)
			}
			w.marked()
			w.logged("watched again", outage+1)
		}
		w.annotate("db", asks{n: "1"})
		w.runs(files{"db": 1, "web": 5})
		is(w, "tcpdumps", w.kids.started(), 2)
	})
}

// ---- The annotations ----

// An invalid annotation produces one Event, with what was read and what is accepted. It starts nothing, and does not
// affect the running capture. When the annotations are put back, an Event says that the capture went on; the same
// mistake is then told again.
func TestMistakes(t *testing.T) {
	type mistake struct {
		asks
		annotation, value string
	}
	var mistakes []mistake // FuzzAnnotations has more
	for _, n := range []string{"0", "5abc", " 5 ", "05", "٣", "5\x00", "-w /etc/passwd", strings.Repeat("\x00", 100<<10),
		strings.Repeat("ü", 128), strings.Repeat("ü", 129), "6", "2147483648"} {
		mistakes = append(mistakes, mistake{asks{n: n}, annotation, n})
	}
	for _, filter := range []string{"tcp\nport 80", "tcp\u202eport", strings.Repeat("a", maxFilter+1), "refused"} {
		mistakes = append(mistakes, mistake{asks{n: "5", filter: filter}, filterAnnotation, filter})
	}
	for _, iface := range []string{"-i", "a/b", "eth0\n", "sixteen-letters-", "$(reboot)"} {
		mistakes = append(mistakes, mistake{asks{n: "5", iface: iface}, interfaceAnnotation, iface})
	}
	for name, good := range map[string]asks{"nothing runs": {}, "a capture runs": {n: "5"}} {
		t.Run(name, func(t *testing.T) {
			following(t, 5, func(w *world) {
				running, end, putBack := files(nil), "; nothing is captured", []string(nil)
				if good.n != "" {
					running, end = files{"web": 5}, "; what was asked for before goes on as it was"
					putBack = []string{"Normal CaptureContinued"}
				}
				w.annotate("web", good)
				w.follows()
				w.news()
				for _, bad := range append(mistakes, mistakes...) {
					w.annotate("web", bad.asks)
					w.pass(time.Minute)
					bad.note = "a change of something else"
					w.annotate("web", bad.asks)
					w.runs(running)

					begin := fmt.Sprintf("the annotation %s is %q: accepted is ", bad.annotation, cut(bad.value))
					news := w.news()
					if len(news) != 1 || news[0].kind+" "+news[0].reason != invalid ||
						!strings.HasPrefix(news[0].message, begin) || !strings.HasSuffix(news[0].message, end) ||
						len(news[0].message) > 1024 { // the API server's limit
						t.Errorf("told of %.99q: %v", bad, news)
					}
					w.annotate("web", good)
					w.told(putBack...)
				}
				w.runs(running)
				is(t, "tcpdumps", w.kids.started(), len(running))
				is(t, "filters that tcpdump was asked about", w.kids.compiled, []string{"refused", "refused"})
			})
		})
	}
}

// A valid annotation after a mistake is applied, whatever ran before. Another mistake is told, the same is not.
func TestMistakeAfterMistake(t *testing.T) {
	following(t, 5, func(w *world) {
		w.follows()
		const refused = `: the annotation tcpdump.antrea.io/filter is "refused": accepted is a pcap filter expression, ` +
			`in which hosts and ports are numbers; tcpdump: can't parse`
		for _, change := range []struct {
			asks asks
			told []string
		}{
			{asks{n: "many"}, []string{invalid + `: the annotation tcpdump.antrea.io is "many": accepted is the number ` +
				`of files to rotate through, a plain decimal number from 1 to 5; nothing is captured`}},
			{asks{n: "many", filter: "udp"}, nil},
			{asks{n: "2"}, []string{started}},
			{asks{n: "2", filter: "refused"}, []string{invalid + refused}},
			{asks{n: "2", iface: "a/b"}, []string{invalid + ": the annotation tcpdump.antrea.io/interface is "}},
			{asks{n: "3"}, []string{stopped, started}},
			{asks{n: "3", filter: "refused"}, []string{invalid + refused}},
			{asks{}, []string{stopped}},
		} {
			w.annotate("web", change.asks)
			w.told(change.told...)
		}
	})
}

// A filter is compiled by tcpdump before anything is stopped, and as the interface has it. Where that takes more
// than 5 s, the filter is refused; the program's end refuses none.
func TestFilters(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.joins(50, uidA)
		w.proc.add(fakeProcess{60, cgroupOf(db.uid), host, "pod", 60})
		for _, test := range []struct {
			pod  pod
			link string
		}{{web, "EN10MB"}, {web.on("any"), "LINUX_SLL2"}, {db, "LINUX_SLL2"}, {db.on("ens3"), "EN10MB"}} {
			w.see(test.pod.filtered("host ::1 or \\reboot"))
			is(t, "link type", w.kids.links[len(w.kids.links)-1], test.link)
		}
		w.lose(db)
		w.news()
		for said, told := range map[string]string{
			"tcpdump: data link type LINUX_SLL2\ntcpdump: unknown host 'db'\n": "tcpdump: unknown host 'db'",
			"tcpdump: syntax error in filter expression\n":                     "tcpdump: syntax error in filter expression",
			"nonsense\n": "exit status 1",
		} {
			w.kids.behave(behaviour{syntax: said})
			w.see(web.filtered("udp"))
			w.told(invalid + ": in which hosts and ports are numbers; " + told + "; what was asked for before goes on")
			w.kids.behave(behaviour{})
			w.see(web.on("any").filtered("host ::1 or \\reboot"))
			w.told("Normal CaptureContinued")
		}
		w.kids.behave(behaviour{compile: time.Minute})
		w.see(web.filtered("slow"))
		w.told(invalid + ": slow")
		time.AfterFunc(time.Second, w.end)
		w.see(web.filtered("slower"))
		w.told(stopped)
	})
}

// ---- A capture, from its start to its last file ----

// A pod that is annotated before it runs is captured from its birth: within 25 ms after its network is there.
// After five minutes of waiting it is looked for every second, which costs little.
func TestBirth(t *testing.T) {
	for _, test := range []struct{ waited, notWithin, within time.Duration }{
		{waited: 10 * time.Millisecond, within: 25 * time.Millisecond},
		{waited: 5*time.Minute - time.Second + 10*time.Millisecond, within: 25 * time.Millisecond},
		{waited: 310*time.Second + 10*time.Millisecond, notWithin: 900 * time.Millisecond, within: time.Second},
	} {
		simulate(t, 0, func(w *world) {
			w.see(web)
			w.pass(test.waited)
			w.proc.pod(50, web.uid)
			w.pass(test.notWithin)
			is(t, fmt.Sprintf("tcpdumps %v after %v", test.notWithin, test.waited), w.kids.started(), 0)
			w.pass(test.within - test.notWithin)
			w.runs(files{"web": 3})
		})
	}
}

// A capture that can't start says after 3 s what it waits for, and says it once. It starts by itself, and
// holds up no other.
func TestWaiting(t *testing.T) {
	for name, test := range map[string]struct {
		pod           pod
		told          string
		before, comes func(w *world)
		stops         bool // another capture does, when it comes
	}{
		"the pod is not on the node": {pod: web, told: "the pod's network: it does not run yet, or has ended",
			before: func(w *world) {},
			comes:  func(w *world) { w.proc.joins(50, uidA) }},
		"its network has no eth0": {pod: web, told: "the pod's network: it does not run yet, or has ended",
			before: func(w *world) { w.proc.joins(50, uidA); w.proc.interfaces(uidA, "lo") },
			comes:  func(w *world) { w.proc.interfaces(uidA, "lo", "eth0") }},
		"too few files are free": {pod: web, told: "room: N=3 is asked for, and 8 of the 10 files",
			before: func(w *world) { w.proc.joins(50, uidA); w.born(60, db.of("8")); w.told(started) },
			comes:  func(w *world) { w.lose(db) }, stops: true},
		"its name is taken": {pod: newWeb, told: "its file name: an earlier capture has not ended yet",
			before: func(w *world) { w.proc.pod(50, newWeb.uid); w.born(60, web); w.told(started) },
			comes:  func(w *world) { w.lose(web) }, stops: true},
	} {
		t.Run(name, func(t *testing.T) {
			simulate(t, 10, func(w *world) {
				test.before(w)
				w.see(test.pod)
				w.pass(3*time.Second - 1)
				w.told()
				w.pass(birthPoll)
				w.told(waiting + ": Waiting for " + test.told)
				w.born(70, podNamed("another", "70", "2"))
				w.told(started)
				w.pass(2 * time.Minute)
				w.told()
				test.comes(w)
				w.pass(time.Second)
				w.told(map[bool][]string{false: {started}, true: {stopped, started}}[test.stops]...)
			})
		})
	}
}

// A pod that has finished keeps its files until the pod goes, or its annotation changes or goes. An Event says so
// if the pod is still there some seconds later.
func TestFinishedPod(t *testing.T) {
	const counted = ": Stopped: 7 packets captured, 2 dropped by the kernel; "
	for name, story := range map[string]func(w *world){
		"it is deleted": func(w *world) {
			w.pass(waitingTime - time.Second)
			w.expectKept(started)
			w.lose(web)
			w.expect(nil, stopped+counted+"its files (300 bytes) are deleted")
		},
		"it stays": func(w *world) {
			w.pass(10 * time.Minute)
			w.expectKept(started, stopped+counted+"the pod's network is gone, the files (300 bytes) stay until the "+
				"annotation or the pod goes")
			w.see(web.of("2"))
			w.pass(time.Minute)
			w.expect(nil, stopped+counted+"its files (300 bytes) are deleted", waiting+": the pod's network")
			w.born(60, db.of("5")) // it has no room any more
			w.expect(files{"db": 5}, started)
		},
		"its files take room": func(w *world) {
			w.pass(time.Second)
			w.born(60, db)
			w.pass(time.Minute)
			w.expectKept(started, stopped, waiting+": 3 of the 5 files")
			w.lose(web)
			w.pass(time.Second)
			w.expect(files{"db": 3}, stopped, started)
		},
		"it gets a new network, as after a restart of the node": func(w *world) {
			w.pass(time.Minute)
			w.proc.joins(60, "new")
			w.pass(time.Second)
			w.expect(files{"web": 3}, started, stopped, again)
		},
	} {
		t.Run(name, func(t *testing.T) {
			simulate(t, 5, func(w *world) {
				w.born(50, web)
				w.pass(time.Minute)
				w.finishes(50, web)
				story(w)
			})
		})
	}
}

// A crash loop without a pause process, as under CRI-O, leaves a pod without a process for minutes. Its capture
// goes on in the same tcpdump while the kubelet keeps the pod's cgroup and the network has eth0. A new network,
// that of a new sandbox, is captured within a second, even if the old one lives on.
func TestCrashLoop(t *testing.T) {
	for _, test := range []struct{ net, iface string }{{uidA, ""}, {uidA, "any"}, {host, ""}} {
		simulate(t, 0, func(w *world) {
			w.proc.joins(50, test.net)
			w.see(web.on(test.iface))
			for pid := 50; pid < 53; pid++ {
				w.proc.end(pid)
				w.pass(10 * time.Minute)
				w.proc.joins(pid+1, test.net)
				w.pass(10*time.Second + 300*time.Millisecond)
			}
			w.expect(files{"web": 3}, startedIn(test.net))
			is(t, "tcpdumps", w.kids.started(), 1)
			w.proc.end(53)
			w.proc.joins(54, "new")
			w.pass(time.Second)
			w.expect(files{"web": 3}, stopped+": the pod's new network is captured", again)
			is(t, "network", filepath.Base(w.kids.last().network), "net-new")
		})
	}
}

// Where tcpdump does not notice that its pod has ended, it is told to end; but not before it has had two more
// seconds to read its ring, in which the pod's very last packets are.
func TestRingIsRead(t *testing.T) {
	ends := func(w *world) { w.proc.end(50); w.proc.gone(uidA) }
	losesNetwork := func(w *world) { w.proc.interfaces(uidA, "lo") }
	for _, test := range []struct {
		net, iface string
		happens    func(w *world)
	}{
		{uidA, "any", ends}, {uidA, "lo", ends}, {host, "", ends},
		{uidA, "any", losesNetwork}, {uidA, "lo", losesNetwork},
	} {
		for _, at := range []time.Duration{1, 500 * time.Millisecond, time.Second - 1} {
			simulate(t, 0, func(w *world) {
				w.proc.joins(50, test.net)
				w.see(web.on(test.iface))
				w.pass(time.Minute + at)
				test.happens(w)
				w.pass(2 * time.Second)
				w.expect(files{"web": 3}, startedIn(test.net))
				w.pass(time.Second)
				w.expectKept()
				is(t, "signals", w.kids.last().signals, []string{"terminated"})
				w.pass(waitingTime + time.Second)
				w.expectKept(stopped + ": the pod's network is gone, the files (300 bytes) stay")
			})
		}
	}
}

// A tcpdump that ends by itself is started again, and one that can't be started is tried again: after pauses
// that double from 0.2 s to 5 minutes, and begin anew when it has run for a minute. An Event has the reason,
// and is not told twice in a row.
func TestRestarts(t *testing.T) {
	for words, b := range map[string]behaviour{
		"can't be started: resource temporarily unavailable": {refusal: syscall.EAGAIN},
		"ended by itself (tcpdump: eth0: no permission)":     {words: "tcpdump: eth0: no permission\n"},
		"ended by itself (exit status 1)":                    {words: "\n"},
	} {
		simulate(t, 0, func(w *world) {
			w.kids.behave(b)
			w.born(50, web)
			w.pass(time.Hour)
			w.told(failed + ": tcpdump " + words)
			waits := gaps(w.kids.attempts)
			is(t, "it is started again and again", len(waits) > 15, true)
			checkBackoff(t, waits, 200*time.Millisecond, 5*time.Minute, 0)

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
			is(t, "Events: it has failed, and started again", len(w.news()), 2*n+1)
		})
	}
}

// What is removed while its tcpdump starts leaves nothing, and no Event says that it started: also if tcpdump
// listens before it ends.
func TestRemovedWhileStarting(t *testing.T) {
	for _, shutdown := range []time.Duration{100 * time.Millisecond, 1500 * time.Millisecond} {
		simulate(t, 0, func(w *world) {
			w.kids.behave(behaviour{startup: time.Second, shutdown: shutdown})
			w.born(50, web)
			w.lose(web)
			w.pass(shutdown)
			w.expect(nil, stopped+": nothing was captured")
		})
	}
}

// An Event tells of a tcpdump that can't be ended. Its files stay, and the capture that replaces it waits for it.
func TestImmortal(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{deaf: true, immortal: true})
		w.born(50, web)
		w.kids.behave(behaviour{})
		w.see(web.of("4"))
		w.pass(time.Hour)
		w.expect(files{"web": 3}, started, failed+": tcpdump (PID 100000) can't be ended: SIGTERM and SIGKILL were sent")
		is(t, "signals", w.kids.last().signals, []string{"terminated", "killed"})
		w.kids.last().exit(closing, errKilled)
		w.pass(0)
		w.expect(files{"web": 4}, stopped, started)
	})
}

// ---- tcpdump ----

// Events name the files as tcpdump does.
func TestFileNames(t *testing.T) {
	for n, want := range map[int]string{1: "/web.pcap", 10: "10 files, /web.pcap0 to /web.pcap9",
		11: "11 files, /web.pcap00 to /web.pcap10", 101: "101 files, /web.pcap000 to /web.pcap100"} {
		is(t, "files", fileNames("/web.pcap", n), want)
	}
	simulate(t, 0, func(w *world) {
		w.born(50, web)
		w.expect(files{"web": 3}, started+": Capturing into 3 files, "+w.root+"/capture-web.pcap0 to "+w.root+
			"/capture-web.pcap2, rotated at 1 MB, in kube-system/packetcapture-x; the interface is eth0")
	})
}

// tcpdump's arguments are the promised ones, and descriptor 3 is the pod's network, of which nothing stays
// open. A filter is one argument behind "--", whatever it says.
func TestArguments(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.joins(50, uidA)
		for _, filter := range []string{"", "tcp port 80", "-w /etc/passwd", "--", `'"; $(reboot) \`, "host ü"} {
			w.see(web.of("7").filtered(filter))
			want := []string{"--net=/proc/self/fd/3", "--", "tcpdump", "-C", "1", "-W", "7",
				"-w", w.root + "/capture-web.pcap", "-U", "-Z", "root", "-p", "-i", "eth0", "-B", "4096"}
			if filter != "" {
				want = append(want, "--", filter)
			}
			is(t, "arguments", w.kids.last().arguments, want)
			is(t, "network", filepath.Base(w.kids.last().network), "net-"+uidA)
		}
		is(t, "files that are open", openIn(t, w.proc.dir), nil)
	})
}

// The device is eth0, or any in the host's network, of which an Event warns; or what the annotation says, if the
// pod has it: tcpdump itself would take "2" for the second interface, and has devices that are none.
func TestDevice(t *testing.T) {
	for _, test := range []struct{ net, iface, device string }{
		{net: uidA, iface: "", device: "eth0"}, {net: uidA, iface: "lo", device: "lo"},
		{net: uidA, iface: "any", device: "any"}, {net: uidA, iface: "eth0.100", device: "eth0.100"},
		{net: host, iface: "", device: "any"}, {net: host, iface: "ens3", device: "ens3"},
		{net: uidA, iface: "2"}, {net: uidA, iface: "nflog"}, {net: host, iface: "eth0"},
	} {
		simulate(t, 0, func(w *world) {
			w.proc.interfaces(uidA, "lo", "eth0", "eth0.100")
			w.proc.joins(50, test.net)
			w.see(web.on(test.iface))
			if w.pass(time.Minute); test.device == "" {
				w.expect(nil, waiting+": the interface "+test.iface+": the pod has lo, e")
				w.proc.interfaces(test.net, "lo", "eth0", test.iface)
				w.pass(time.Second)
				w.expect(files{"web": 3}, startedIn(test.net))
				return
			}
			is(t, "device", w.kids.last().option("-i"), test.device)
			w.expect(files{"web": 3}, startedIn(test.net))
		})
	}
}

// Of what tcpdump says on stderr its first warning, its last complaint and its counts are kept, however it
// comes. All of it is read.
func TestStderr(t *testing.T) {
	const listening = "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n"
	const counts = "7 packets captured, 2 dropped by the kernel"
	const gone, long = "tcpdump: pcap_loop: The interface disappeared", "tcpdump: expression rejects all packets "
	for _, test := range []struct{ text, warning, complaint, counts string }{
		{text: ""},
		{text: listening + closing, counts: counts},
		{text: listening + "1 packet captured\n1 packet received by filter\n0 packets dropped by kernel\n",
			counts: "1 packet captured, 0 dropped by the kernel"},
		{text: listening + gone + "\n" + closing, complaint: gone, counts: counts},
		{text: listening + strings.Repeat("noise\n", 20_000) + closing, counts: counts},
		{text: "tcpdump: data link type LINUX_SLL2\n" + listening},
		{text: "Warning: first\n" + listening + "Warning: late\n", warning: "Warning: first"},
		{text: "tcpdump: WARNING: eth0: no IPv4\n" + listening, warning: "tcpdump: WARNING: eth0: no IPv4"},
		{text: "nsenter: failed to execute tcpdump\n", complaint: "nsenter: failed to execute tcpdump"},
		{text: gone, complaint: gone}, // without a line break
		{text: strings.Repeat(long, 9), complaint: strings.Repeat(long, 9)[:128] + "…"},
		{text: strings.Repeat("x", 1<<20) + "\n"}, // longer than a line may be
	} {
		stderr := strings.NewReader(test.text)
		for _, reader := range []io.Reader{stderr, iotest.OneByteReader(stderr), iotest.DataErrReader(stderr)} {
			stderr.Reset(test.text)
			said, listens := &report{}, false
			child := &process{stderr: reader, wait: func() error { return errStatus }}
			err := said.read(child, func() { listens = true })
			got := []any{said.warning, said.complaint, strings.Join(said.counts, ", "), listens, stderr.Len(), err}
			hasListening := strings.Contains(test.text, listening)
			want := []any{test.warning, test.complaint, test.counts, hasListening, 0, errStatus}
			is(t, fmt.Sprintf("%.99q: warning, complaint, counts, listens, bytes left, error", test.text), got, want)
		}
	}
}

// ---- Files, and the room for them ----

// A capture's end deletes its own files alone, whatever is named like them. A Pod name that another namespace's
// capture has already gets _ and 8 characters of the UID.
func TestSimilarNames(t *testing.T) {
	others := []string{"capture-my-web.pcap", "capture-web.pcap0.gz", "capture-web.pcap0.pcap0", "capture-web.pcap0~",
		"capture-web.pcapng", "capture-web_1b2c3d4f.pcap1"}
	simulate(t, 0, func(w *world) {
		w.born(50, web)
		w.born(51, namesake)
		others = append(others, w.kids.last().files...)
		for _, name := range append(others, "capture-web.pcap", "capture-web.pcap099") {
			must(t, os.WriteFile(w.root+"/"+name, nil, 0o644))
		}
		is(t, "its link", readLink(w.root+"/captures/other_web"), w.root+"/capture-web_1b2c3d4e.pcap")
		w.lose(web)
		slices.Sort(others)
		is(t, "files", namesIn(w, w.root), others)
		for _, name := range others {
			must(t, os.Remove(w.root+"/"+name))
		}
		w.kids.last().files = nil
	})
}

// The files of all captures are bounded, here by 5. What does not fit waits, and holds up nobody. A change that
// needs no more files than before keeps its room, whoever waits, while the old tcpdump still ends. Of a larger
// number an Event says what is free.
func TestRoom(t *testing.T) {
	a, b, c := podNamed("a", "a", ""), podNamed("b", "b", ""), podNamed("c", "c", "")
	unborn := podNamed("unborn", "f", "5")
	type change struct {
		pod     pod
		running files // 4 s later
		events  []string
	}
	for name, story := range map[string][]change{
		"a smaller number keeps its room, and leaves the rest": {
			{a.of("5"), files{"a": 5}, []string{started}},
			{b.of("5"), files{"a": 5}, []string{waiting}},
			{c.of("1"), files{"a": 5}, []string{waiting}},
			{a.of("4"), files{"a": 4, "c": 1}, []string{stopped, started, started}},
		},
		"a changed filter or interface keeps its room": {
			{a.of("5"), files{"a": 5}, []string{started}},
			{b.of("1"), files{"a": 5}, []string{waiting}},
			{a.of("5").filtered("udp"), files{"a": 5}, []string{stopped, started}},
			{a.of("5").on("lo"), files{"a": 5}, []string{stopped, started}},
			{a.of("5").on("net1"), nil, []string{stopped, waiting + ": the interface net1"}},
			{a.of("5"), files{"a": 5}, []string{started}},
		},
		"a larger number needs what is free": {
			{a.of("3"), files{"a": 3}, []string{started}},
			{b.of("1"), files{"a": 3, "b": 1}, []string{started}},
			{a.of("5"), files{"a": 3, "b": 1}, []string{invalid + `: is "5": accepted is at most 4 now`}},
			{a.of("3"), files{"a": 3, "b": 1}, []string{"Normal CaptureContinued"}},
			{a.of("4"), files{"a": 4, "b": 1}, []string{stopped, started}},
		},
		"one that waits changes, and goes": {
			{a.of("3"), files{"a": 3}, []string{started}},
			{b.of("3"), files{"a": 3}, []string{waiting + ": N=3"}},
			{b.of("4"), files{"a": 3}, []string{waiting + ": N=4"}},
			{b.of("2"), files{"a": 3, "b": 2}, []string{started}},
			{c.of("1"), files{"a": 3, "b": 2}, []string{waiting}},
			{c.of(""), files{"a": 3, "b": 2}, []string{stopped + ": nothing was captured"}},
		},
		"one that waits holds no more than it asks for": {
			{a.of("5"), files{"a": 5}, []string{started}},
			{a.of("1").on("net1"), nil, []string{stopped, waiting + ": the interface net1"}},
			{b.of("4"), files{"b": 4}, []string{started}},
		},
		"a pod without a network takes none": {
			{unborn, nil, []string{waiting + ": the pod's network"}},
			{a.of("5"), files{"a": 5}, []string{started}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			simulate(t, 5, func(w *world) {
				w.kids.behave(behaviour{shutdown: 700 * time.Millisecond})
				for i, p := range []pod{a, b, c} {
					w.proc.pod(50+i, p.uid)
				}
				for _, change := range story {
					w.see(change.pod)
					w.pass(waitingTime + time.Second)
					w.expect(change.running, change.events...)
				}
			})
		})
	}
}

// A part of the disk stays free: a capture waits until there is more. One that runs stops with a Warning, and
// its files stay.
func TestDiskFull(t *testing.T) {
	simulate(t, 0, func(w *world) {
		is(t, "full when 0 % stay free", w.disk.isFull(), false)
		w.disk.diskFree = 101
		is(t, "full when 101 % stay free", w.disk.isFull(), true)
		w.disk.diskFree = 15
		// With the link there, the path leads to /proc, in which nothing is free.
		link := w.root + "/captures/full"
		w.disk.root = link + "/../.."
		must(t, os.Symlink("/proc/self/fd", link))
		w.born(50, web)
		w.pass(time.Hour)
		w.expect(nil, waiting+": disk space: 15 % of the disk")
		must(t, os.Remove(link))
		w.pass(time.Second)
		w.expect(files{"web": 3}, started)
		must(t, os.Symlink("/proc/self/fd", link))
		w.pass(time.Second)
		w.expectKept(failed + ": the disk is full")
		w.pass(time.Hour)
		w.expectKept(stopped + ": the files (300 bytes) stay until the annotation or the pod goes")
		must(t, os.Remove(link))
		w.pass(time.Second)
		w.expect(files{"web": 3}, again)
	})
}

// ---- A pod's cgroup, its processes and its network ----

// newGroups is what finds pods in a tree of cgroups.
func newGroups(t *testing.T, proc *fakeProc) *cgroups {
	t.Helper()
	g, err := newCgroups(proc.dir)
	must(t, err)
	return g
}

// networkOf is the name of the network that is found for a pod, "" if there is none.
func networkOf(g *cgroups, p pod) string {
	s, ok := g.find(p, sandbox{})
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
// names, in each class of pods, and a level deeper in kind. Its processes may be further below, or beside it.
// What is no UID never becomes a path.
func TestCgroupNames(t *testing.T) {
	const v1, v2, pids = "/systemd", "", "/pids"
	for _, test := range []struct{ name, hierarchy, pods, process string }{
		{"v1", v1, "", "/kubepods/burstable/podUID/cafe"},
		{"v1, systemd", v1, "", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_ID.slice/x"},
		{"v1, no hierarchy of systemd's", pids, "", "/kubepods/podUID/cafe"},
		{"v2, Guaranteed", v2, "", "/kubepods/podUID/cafe"},
		{"v2, Burstable", v2, "", "/kubepods/burstable/podUID/cafe"},
		{"v2, BestEffort", v2, "", "/kubepods/besteffort/podUID/cafe"},
		{"v2, systemd, Guaranteed", v2, "", "/kubepods.slice/kubepods-podU_ID.slice/cri-containerd-cafe.scope"},
		{"v2, systemd, Burstable", v2, "", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_ID.slice/x"},
		{"a container's own", v2, "", "/kubepods.slice/kubepods-podU_ID.slice/crio-cafe.scope/container/within"},
		{"kind", v2, "", "/kubelet/kubepods/burstable/podUID/cafe"},
		{"kind, v1", v1, "", "/kubelet/kubepods/podUID/cafe"},
		{"kind, systemd, Guaranteed", v2, "", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podU_ID.slice/x"},
		{"kind, systemd, Burstable", v2, "", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/" +
			"kubelet-kubepods-burstable-podU_ID.slice/x.scope"},
		{"systemd for the kubelet alone, v1", v1, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_ID.slice",
			"/system.slice/containerd.service/kubepods-burstable-podU_ID.slice:cri-containerd:cafe"},
		{"systemd for the kubelet alone, v2", v2, "/kubepods.slice/kubepods-podU_ID.slice",
			"/system.slice/kubepods-podU_ID.slice:cri-containerd:cafe"},
	} {
		t.Run(test.name, func(t *testing.T) {
			proc, static := newProc(t), web
			proc.grow(test.hierarchy)
			static.kubeletUID = "0123456789abcdef0123456789abcdef" // names its cgroup
			for i, uid := range []string{web.uid, db.uid, static.kubeletUID} {
				named := strings.NewReplacer("UID", uid, "U_ID", strings.ReplaceAll(uid, "-", "_"))
				proc.make(named.Replace(cmp.Or(test.pods, test.process)))
				proc.add(fakeProcess{pid: 50 + i, cgroup: named.Replace(test.process), net: uid, root: "pod"})
			}
			for _, p := range []pod{web, db, static} {
				is(t, "network", networkOf(newGroups(t, proc), p), p.kubeletUID)
			}
			for _, uid := range []string{uidA + "0", uidA[:8], "c"} {
				is(t, "network of "+uid, networkOf(newGroups(t, proc), podNamed("web", uid, "3")), "")
			}
		})
	}
	proc := newProc(t)
	proc.grow("", "/kubepods/pod", "/kubepods/pod..", "/kubepods/podxyz", "/kubepods/pod"+uidA+"/cafe", "/kubepods/secret")
	g := newGroups(t, proc)
	is(t, "cgroup of a UID", g.of(web), proc.dir+"/1/root/sys/fs/cgroup/kubepods/pod"+uidA)
	for _, uid := range []string{"", "..", "xyz", uidA + "/cafe", uidA + "/../secret", uidA + "/", "/", "*"} {
		is(t, fmt.Sprintf("cgroup of %q", uid), g.of(podNamed("web", uid, "3")), "")
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
		"the cgroup is empty":                       {nil, ""},
		"the pause process":                         {[]in{{"pod", "pod"}}, "pod"},
		"the runtime is still to join":              {[]in{{host, host}}, ""},
		"it has the network, and not yet its files": {[]in{{"pod", host}}, "pod"},
		"CRI-O's monitor, with the host's files":    {[]in{{host, host}, {"pod", "pod"}}, "pod"},
		"hostNetwork":                               {[]in{{host, "pod"}}, host},
		"hostNetwork under CRI-O":                   {[]in{{host, host}, {host, "pod"}}, host},
		"a network within":                          {[]in{{"pod", "pod"}, {"nested", "web"}, {"nested", "web"}}, "pod"},
		"gVisor's gofer has an empty network":       {[]in{{"empty", "gofer"}, {"pod", "pod"}}, "pod"},
		"the network is being set up":               {[]in{{"empty", "pod"}}, ""},
		"it has eth0, among others":                 {[]in{{"multus", "pod"}}, "multus"},
		"it has another interface":                  {[]in{{"eth00", "pod"}}, ""},
	} {
		for _, step := range []int{1, -1} { // PIDs go round
			proc := newProc(t)
			proc.interfaces("empty", "lo")
			proc.interfaces("eth00", "lo", "eth00")
			proc.interfaces("multus", "lo", "net1", "eth00", "eth0")
			proc.make(cgroupOf(uidA))
			for i, ps := range test.processes {
				pid, born := 100+i*step, 9_999+i
				proc.add(fakeProcess{pid: pid, cgroup: cgroupOf(uidA), net: ps.net, root: ps.root, born: born})
			}
			is(t, name, networkOf(newGroups(t, proc), web), test.network)
			is(t, "files that are open", openIn(t, proc.dir), nil)
		}
	}
}

// A process may end, and its PID become another's, between the look and the start of tcpdump. That is never
// captured.
func TestReusedPID(t *testing.T) {
	own, others := cgroupOf(uidA), cgroupOf(uidB)
	another := fakeProcess{pid: 51, cgroup: own, net: "pod", root: "pod"} // of the pod
	for name, test := range map[string]struct {
		now    []fakeProcess
		opened bool
	}{
		"the pod's":                       {[]fakeProcess{{pid: 50, cgroup: own, net: "pod", root: "pod"}}, true},
		"another pod's":                   {[]fakeProcess{{pid: 50, cgroup: others, net: "other", root: "other"}}, false},
		"another pod's, and this goes on": {[]fakeProcess{{pid: 50, cgroup: others, net: "other", root: "other"}, another}, false},
		"another pod's in this network":   {[]fakeProcess{{pid: 50, cgroup: others, net: "pod", root: "other"}}, false},
		"the host's":                      {[]fakeProcess{{pid: 50, net: host, root: host}, another}, false},
		"nobody's":                        {[]fakeProcess{another}, false},
	} {
		proc := newProc(t)
		proc.joins(50, "pod")
		g := newGroups(t, proc)
		s, _ := g.find(web, sandbox{})
		proc.end(50)
		for _, ps := range test.now {
			proc.add(ps)
		}
		now, _ := g.find(web, s)
		is(t, "its network is found when the PID is "+name, now.network == "" || now.network == s.network, true)
		file, err := g.open(s, web)
		is(t, "opened when the PID is "+name, err == nil, test.opened)
		file.Close()
		is(t, "files that are open", openIn(t, proc.dir), nil)
	}
}

// A pod is looked for again when its network's file is open. The list of its processes is a FIFO here: the
// program waits at it for the test, which looks what is open then.
func TestOpenLooksAgain(t *testing.T) {
	proc := newProc(t)
	proc.joins(50, "pod")
	g, list, ended := newGroups(t, proc), proc.tree(cgroupOf(uidA)+"/cgroup.procs"), make(chan error)
	s, _ := g.find(web, sandbox{})
	must(t, os.Remove(list), syscall.Mkfifo(list, 0o600))
	go func() {
		_, err := g.open(s, web)
		ended <- err
	}()
	fifo, err := os.OpenFile(list, os.O_WRONLY, 0)
	must(t, err)
	is(t, "files of the network that are open", len(openIn(t, proc.dir+"/net-pod")), 1)
	must(t, fifo.Close())
	says(t, <-ended, "has ended") // the pod has no process any more
}

// ---- Events ----

// An Event goes to its pod's namespace, and to the UID that the kubelet uses.
func TestEventIsPosted(t *testing.T) {
	following(t, 0, func(w *world) {
		w.follows()
		w.pass(time.Hour)
		static := map[string]string{annotation: "x", hashAnnotation: "hash", mirrorAnnotation: "hash"}
		w.api.put(fakePod{"shop", "web", "0123456789", static, 0})
		synctest.Wait()
		posted := w.api.posted()
		if len(posted) != 1 {
			t.Fatalf("posted %v", posted)
		}
		type fields = map[string]any
		at := time.Date(2000, 1, 1, 1, 0, 0, 0, time.UTC)
		is(t, "Event", posted[0], fields{
			"apiVersion": "v1", "kind": "Event",
			"metadata":       fields{"namespace": "shop", "name": fmt.Sprintf("packetcapture-%x-01234567", at.UnixNano())},
			"involvedObject": fields{"apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "web", "uid": "hash"},
			"type":           "Warning", "reason": "CaptureInvalid", "message": posted[0]["message"], "count": 1.0,
			"source":         fields{"component": "packetcapture", "host": "node-1"},
			"firstTimestamp": "2000-01-01T01:00:00Z", "lastTimestamp": "2000-01-01T01:00:00Z",
		})
		w.logged(fmt.Sprintf("level=WARN msg=CaptureInvalid namespace=shop pod=web message=%q", posted[0]["message"]), 1)
		w.annotate("web", asks{n: "5"})
		w.logged("level=INFO msg=CaptureStarted", 1)
	})
}

// An Event is tried again while the server is away, for 10 minutes at most, and not if it is refused. One that was
// taken although the answer was lost is not taken twice. The next one is posted all the same.
func TestEventIsTriedAgain(t *testing.T) {
	type test struct {
		fault
		tries      int // 0: as many as go into 10 minutes
		retryAfter time.Duration
		isLost     bool
	}
	each(t, map[string]test{
		"503":                  {fault: fault{times: 8, code: 503}, tries: 9},
		"502 of a proxy":       {fault: fault{times: 1, code: 502, body: "<html>"}, tries: 2},
		"429 with Retry-After": {fault: fault{times: 1, code: 429, retryAfter: "40"}, tries: 2, retryAfter: 40 * time.Second},
		"401":                  {fault: fault{times: 1, code: 401}, tries: 2},
		// An answer is waited for for 10 s.
		"a webhook hangs": {fault: fault{times: 1, hangs: time.Hour}, tries: 2, retryAfter: 10 * time.Second},
		"a lost answer":   {fault: fault{times: 1, err: io.ErrUnexpectedEOF, isDone: true}, tries: 2},
		"503 for long":    {fault: fault{code: 503}, isLost: true},
		"403":             {fault: fault{code: 403}, tries: 1, isLost: true}, // of a namespace that is being deleted
		"422":             {fault: fault{code: 422}, tries: 1, isLost: true},
	}, func(w *world, test test) {
		w.follows()
		w.api.fail("post", test.fault)
		w.annotate("web", asks{n: "x"})
		w.pass(10*time.Minute + longestWait)
		posts, taken := w.api.asked("post"), map[bool]int{false: 1}[test.isLost]
		if took := posts[len(posts)-1].at.Sub(posts[0].at); test.tries == 0 && took < 10*time.Minute-longestWait {
			w.Errorf("it was tried for %v", took)
		} else if test.tries > 0 {
			is(w, "tries", len(posts), test.tries)
		}
		checkBackoff(w, gaps(posts), 800*time.Millisecond, 30*time.Second, test.retryAfter)
		is(w, "taken", len(w.api.posted()), taken)
		w.logged("an Event is not posted", 1-taken)
		w.pass(time.Hour)
		is(w, "posts", len(w.api.asked("post")), len(posts))
		w.api.heal()
		w.annotate("web", asks{n: "y"})
		synctest.Wait()
		is(w, "taken", len(w.api.posted()), taken+1)
	})
}

// The watch never waits for a start, a stop or an Event: the server would close it. Here no tcpdump starts soon,
// and Events wait while the server takes none; then they come in their order.
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
		hangs  time.Duration // an Event of another namespace
		within time.Duration
		posted []string
	}
	last := []string{stopped + ": 7 packets captured"}
	each(t, map[string]test{
		"at once":                       {posted: last},
		"while the server thinks":       {frozen: 4 * time.Second, within: 4 * time.Second, posted: last},
		"while the server answers none": {frozen: time.Hour, within: exitGrace},
		"while another namespace hangs": {hangs: time.Hour, within: exitGrace, posted: last},
	}, func(w *world, test test) {
		w.annotate("web", asks{n: "5"})
		w.follows()
		w.news()
		w.pass(time.Minute)
		if test.frozen > 0 {
			w.api.freeze()
		}
		if test.hangs > 0 {
			w.api.fail("post shop", fault{hangs: test.hangs})
			w.api.put(fakePod{"shop", "web", "05", map[string]string{annotation: "x"}, 0})
		}
		synctest.Wait()
		began := time.Now()
		time.AfterFunc(test.frozen, w.api.thaw)
		w.end()
		w.program.Wait()
		is(w, "the end is in time", time.Since(began) <= test.within, true)
		w.told(test.posted...)
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
		last, before := w.marked(), len(w.api.asked("watch"))
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
		is(t, "tcpdumps", w.kids.started(), 2)
		for _, r := range w.api.asked("watch")[before:] {
			is(t, "a watch from", r.query.Get("resourceVersion"), last)
		}
	})
}

// The client speaks HTTP/2, without which there are no pings, also to an IPv6 address. Only a server of the CA is
// given the token. The CA may be replaced; one that can't be read leaves the last.
func TestConnection(t *testing.T) {
	_, key, err := ed25519.GenerateKey(nil)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(nil, template, template, key.Public(), key)
	must(t, err)
	otherCA := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			t.Logf("this machine has no %s: %v", address, err)
			continue
		}
		f := newFakeAPI(t)
		f.fail("watch", fault{code: 200, body: string(bookmarkFrame(9))})
		f.serve(listener)
		host, port, _ := net.SplitHostPort(listener.Addr().String())
		cfg, err := readConfig(environment("KUBERNETES_SERVICE_HOST="+host, "KUBERNETES_SERVICE_PORT="+port))
		must(t, err)
		watcher := func() func() error { // watches until the server ends it at once
			c := newClient(cfg.url, f.account)
			w := newPodWatch(&agent{config: config{nodeName: "node-1"}, api: c, ready: func() {}})
			return func() error {
				defer c.http.CloseIdleConnections()
				if err := w.watch(t.Context()); err != io.EOF {
					return err
				}
				return nil
			}
		}
		watch := watcher()
		f.mount("ca.crt", otherCA)
		says(t, watch(), "certificate")
		is(t, "requests to a server of another CA", len(f.asked("watch")), 0)
		f.mount("ca.crt", string(someCA))
		must(t, watch())
		is(t, "HTTP's version", f.asked("watch")[0].proto, 2)
		for _, text := range []string{otherCA[:100], "", "missing"} {
			if f.mount("ca.crt", text); text == "missing" {
				must(t, os.Remove(f.account+"/ca.crt"))
			}
			must(t, watch())
			says(t, watcher()(), "ca.crt holds no certificate")
		}
	}
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

// Pings keep a connection that is silent, and end one that is half open. No proxy is asked: init has set HTTPS_PROXY.
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
			connections = append(connections, &freezing{Conn: ours})
			conn := tls.Client(connections[len(connections)-1], &tls.Config{
				RootCAs: roots, ServerName: "example.com", NextProtos: []string{"h2"}})
			return conn, conn.HandshakeContext(ctx)
		}
		w.agent.api.http.Transport = transport
		w.follows()
		w.pass(4 * time.Minute)
		if got := w.api.asked("watch"); len(got) != 1 || got[0].proto != 2 || len(connections) != 1 {
			t.Fatalf("%d watches, %d connections", len(got), len(connections))
		}
		w.marked() // so that the next ping is as late as it can be
		connections[0].frozen.Store(true)
		w.annotate("web", asks{n: "6"})
		w.pass(50 * time.Second)
		w.logged("the pods can't be watched", 1)
		w.runs(files{"web": 6})
		is(t, "watches", len(w.api.asked("watch")), 2)
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

// writeFiles writes the files of a capture of default/web, and returns their root.
func writeFiles(t *testing.T, all contents) (root string) {
	root = t.TempDir()
	must(t, os.Mkdir(root+"/captures", 0o755), os.Symlink(root+"/capture-web.pcap", root+"/captures/default_web"))
	for digits, text := range all {
		must(t, os.WriteFile(root+"/capture-web.pcap"+digits, text, 0o644))
	}
	return root
}

// cat writes the files as one pcap: the oldest first, none left out because of its time, whole packets alone.
// It says on stderr how much that was.
func TestCat(t *testing.T) {
	torn := pcap(1, 2, 3)
	for name, test := range map[string]struct {
		files   contents
		packets string
		want    []byte
	}{
		"one file":            {contents{"": pcap(1, 2)}, "2 packets", pcap(1, 2)},
		"the ring has turned": {contents{"0": pcap(7, 8), "1": pcap(3, 4), "2": pcap(5)}, "5 packets", pcap(3, 4, 5, 7, 8)},
		"two digits":          {contents{"09": pcap(30), "10": pcap(1), "00": pcap(12)}, "3 packets", pcap(1, 12, 30)},
		"equal times":         {contents{"0": pcap(5, 5), "1": pcap(5), "2": pcap(5, 6)}, "5 packets", pcap(5, 5, 5, 5, 6)},
		"time 0":              {contents{"0": pcap(0, 3), "1": pcap(0), "2": pcap(2)}, "4 packets", pcap(0, 3, 0, 2)},
		"a torn packet":       {contents{"0": torn[:len(torn)-1], "1": pcap(4)}, "3 packets", pcap(1, 2, 4)},
		"a torn header":       {contents{"0": append(pcap(1), 1, 2, 3)}, "1 packet", pcap(1)},
		"an endless packet":   {contents{"0": append(pcap(1), bytes.Repeat([]byte{255}, 16)...)}, "1 packet", pcap(1)},
		"just begun":          {contents{"0": pcap(1), "1": pcap(), "2": nil, "3": pcap()[:23]}, "1 packet", pcap(1)},
	} {
		root := writeFiles(t, test.files)
		must(t, os.WriteFile(root+"/capture-web-2.pcap0", pcap(99), 0o644))
		var out, said bytes.Buffer
		must(t, cat(root, "default/web", &out, &said))
		is(t, name, out.String(), string(test.want))
		is(t, name+": it says", said.String(), fmt.Sprintf("%s, %d bytes\n", test.packets, len(test.want)))
	}
	says(t, cat(writeFiles(t, nil), "default/web", io.Discard, io.Discard), "default/web has no file to read yet")
}

// writerFunc is what happens when something is written.
type writerFunc func(text []byte) (int, error)

func (w writerFunc) Write(text []byte) (int, error) { return w(text) }

// A file that is overwritten or deleted while cat reads the others is left out, and cat says so. A reader that
// goes away ends it.
func TestCatChanges(t *testing.T) {
	gone := errors.New("the reader has gone")
	becomes := func(text []byte) func(string) error {
		return func(path string) error { return os.WriteFile(path, text, 0o644) }
	}
	for name, test := range map[string]struct {
		change  func(second string) error // when the first file is written
		want    []byte
		missing bool
		err     error
	}{
		"more packets":    {becomes(pcap(3, 4)), pcap(1, 3, 4, 5), false, nil},
		"overwritten":     {becomes(pcap(9, 10)), pcap(1, 5), true, nil},
		"cut to nothing":  {becomes(nil), pcap(1, 5), true, nil},
		"deleted":         {os.Remove, pcap(1, 5), true, nil},
		"the reader goes": {func(p string) error { return gone }, pcap(1), false, gone},
	} {
		root := writeFiles(t, contents{"0": pcap(1), "1": pcap(3), "2": pcap(5)})
		var out, said bytes.Buffer
		err := cat(root, "default/web", writerFunc(func(text []byte) (n int, err error) {
			if out.Len() == 0 {
				err = test.change(root + "/capture-web.pcap1")
			}
			out.Write(text)
			return len(text), err
		}), &said)
		is(t, name+": error", err, test.err)
		is(t, name, out.String(), string(test.want))
		says := strings.Contains(said.String(), "missing: "+root+"/capture-web.pcap1 was overwritten or deleted\n")
		is(t, name+": it says that packets are missing", says, test.missing)
	}
}

// Of a pod that is not captured itself cat writes no packet, whatever other pod has its name. The error lists
// what is captured.
func TestCatOthers(t *testing.T) {
	root := writeFiles(t, contents{"0": pcap(1), "1": pcap(2)})
	must(t, os.WriteFile(root+"/capture-x.pcap", pcap(1), 0o644),
		os.Symlink(root+"/capture-db.pcap", root+"/captures/ns2_db"))
	for _, name := range []string{"ns2/web", "web", "default", "default_web", "/web", "default/", "default/web/", "../x", "",
		"default/../captures/default_web", "../../captures/default_web", "default/x", "/capture-web.pcap0", "-f"} {
		var out, said bytes.Buffer
		says(t, cat(root, name, &out, &said), strconv.Quote(name)+" is not captured here", "default/web", "ns2/db")
		is(t, name+": written", out.String()+said.String(), "")
	}
}
