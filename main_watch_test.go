package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// List and watch, the configuration, health, and the posting of Events. Time is that of a bubble wherever it matters, so
// that an hour costs nothing and two moments can be equal.

func init() {
	// No request of any test may go there. The proxy of the environment is read once in a process, hence not t.Setenv.
	os.Setenv("HTTPS_PROXY", "http://proxy.test:3128")
}

const (
	longestWait = 34 * time.Second // for another try, and a little
	goneText    = "too old resource version"
	uidWeb      = "0eb" // of a pod that has a network; those of annotate have none
)

// watcher is a world whose follow watches the fake API server.
type watcher struct {
	*world
	api *fakeAPI
	log *logged
}

// watched tells a story of a watcher in a bubble of time. The story calls follows.
func watched(t *testing.T, story func(w *watcher)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &watcher{newWorld(t, 0), newFakeAPI(t), captureLog(t)}
		w.kube = w.api.kube()
		w.events.kube = w.kube
		w.api.most = 5000 // so that a loop without waits ends
		w.proc.pod(50, uidWeb)
		story(w)
		w.finish(5 * time.Second)
		w.runs()
	})
}

// each tells a story for each case of a table.
func each[T any](t *testing.T, cases map[string]T, story func(w *watcher, test T)) {
	for name, test := range cases {
		t.Run(name, func(t *testing.T) { watched(t, func(w *watcher) { story(w, test) }) })
	}
}

// follows starts follow, which has listed when it returns, if it can.
func (w *watcher) follows() {
	go w.follow(w.ctx)
	synctest.Wait()
}

// put changes a pod of namespace default that has a network.
func (w *watcher) put(annotations ...string) string {
	p := fakePod{"default", "web", uidWeb, map[string]string{}, 0}
	for i, value := range annotations {
		p.annotations[[]string{annotation, filterAnnotation}[i]] = value
	}
	return w.api.put(p)
}

func (w *watcher) runs(want ...string) { w.Helper(); synctest.Wait(); w.world.runs(want...) }

// has checks what is captured, each written as "web=5".
func (w *watcher) has(want ...string) {
	w.Helper()
	synctest.Wait()
	var got []string
	for _, f := range w.captures {
		got = append(got, f.name+"="+f.value)
	}
	if slices.Sort(got); !slices.Equal(got, want) {
		w.Errorf("captured is %q, want %q", got, want)
	}
}

// listedFrom and watchedFrom check the resourceVersions of all requests of a verb.
func (w *watcher) listedFrom(want ...string) { w.Helper(); w.askedFrom("list", want) }

func (w *watcher) watchedFrom(want ...string) { w.Helper(); w.askedFrom("watch", want) }

func (w *watcher) askedFrom(verb string, want []string) {
	w.Helper()
	synctest.Wait()
	var got []string
	for _, r := range w.api.asked(verb) {
		got = append(got, r.query.Get("resourceVersion"))
	}
	if !slices.Equal(got, want) {
		w.Errorf("%s from %q, want %q", verb, got, want)
	}
}

// untilWatching returns at the moment, on 100 ms, at which a watch is open.
func (w *watcher) untilWatching() {
	w.Helper()
	deadline := time.Now().Add(10 * time.Minute)
	for synctest.Wait(); w.api.watching() == 0; w.pass(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.Fatal("it watches no more")
		}
	}
}

// checkLog checks how many lines hold a text.
func (w *watcher) checkLog(text string, want int) {
	w.Helper()
	if got := w.log.lines(text); len(got) != want {
		w.Errorf("%q is logged %d times, want %d: %q", text, len(got), want, got[:min(5, len(got))])
	}
}

func (w *watcher) gone410() { w.api.push(string(errorFrame(410, goneText)), goesOn) }

// gaps are the times between requests.
func gaps(requests []fakeRequest) (gaps []time.Duration) {
	for i := 1; i < len(requests); i++ {
		gaps = append(gaps, requests[i].at.Sub(requests[i-1].at))
	}
	return gaps
}

// checkBackoff checks the waits after failures: from 0.8 to 1.6 s, then twice as long each time, up to most; never the same.
func checkBackoff(t testing.TB, waits []time.Duration, failures int, most time.Duration) {
	t.Helper()
	if len(waits) < failures {
		t.Fatalf("%d tries again, want %d", len(waits), failures)
	}
	seen, base := map[time.Duration]bool{}, 800*time.Millisecond
	for i, wait := range waits[:failures] {
		if wait < base || wait > 2*base || seen[wait] {
			t.Errorf("wait %d is %v, want from %v to %v: %v", i, wait, base, 2*base, waits[:failures])
		}
		seen[wait], base = true, min(2*base, most/2)
	}
}

// ---- Lists ----

func TestFirstList(t *testing.T) { // C6: from the server's cache, metadata alone; C3: whose UID a static pod has
	watched(t, func(w *watcher) {
		w.api.annotate("web", "5")
		w.api.annotate("plain", "")
		w.api.put(fakePod{"kube-system", "etcd-node-1", "uid-etcd", map[string]string{annotation: "2", filterAnnotation: "tcp port 80",
			interfaceAnnotation: "lo", hashAnnotation: "abc", mirrorAnnotation: "abc"}, 0})
		// One of the two alone could be anybody's, with another pod's UID.
		w.api.put(fakePod{"shop", "thief", "uid-thief", map[string]string{annotation: "1", hashAnnotation: "uid-web"}, 0})
		version := w.api.bookmark() // the list's version is newer than that of any of its pods
		w.follows()
		got := map[string]pod{}
		for uid, f := range w.captures {
			got[uid] = f.pod
		}
		want := map[string]pod{
			"uid-web": {namespace: "default", name: "web", uid: "uid-web", kubeletUID: "uid-web", annotated: true, value: "5"},
			"uid-etcd": {namespace: "kube-system", name: "etcd-node-1", uid: "uid-etcd", kubeletUID: "abc", annotated: true, value: "2",
				filter: "tcp port 80", iface: "lo", hasIface: true},
			"uid-thief": {namespace: "shop", name: "thief", uid: "uid-thief", kubeletUID: "uid-thief", annotated: true, value: "1"},
		}
		if !maps.Equal(got, want) {
			w.Errorf("got %+v, want %+v", got, want)
		}
		w.listedFrom("0") // that it sets nothing else is checked by the fake
		w.watchedFrom(version)
	})
}

func TestEventsAreApplied(t *testing.T) { // C2 and C6
	watched(t, func(w *watcher) {
		w.put("5")
		w.api.annotate("db", "3")
		w.follows()
		w.has("db=3", "web=5")
		w.runs("capture-web.pcap 5")
		w.put("5") // the same again: its version is another one
		w.api.annotate("db", "4")
		w.api.annotate("new", "1")
		w.has("db=4", "new=1", "web=5")
		w.api.push(string(watchFrame("DELETED", fakePod{"default", "web", "uid-older", nil, 9000}.object())), goesOn)
		w.has("db=4", "new=1", "web=5") // what is late about its predecessor stops nothing
		if got := w.kids.started(); got != 1 {
			w.Errorf("%d children were started, want 1", got)
		}
		w.put("5", "udp")
		w.runs("capture-web.pcap 5")
		if got := w.kids.started(); got != 2 {
			w.Errorf("%d children were started, want 2", got)
		}
		w.api.annotate("db", "")
		w.api.remove("default", "new")
		w.has("web=5")
		w.put() // without the annotation
		w.has()
		w.runs()
	})
}

// C6: nothing of a broken list is applied, or all captures would be stopped; and no watch goes on without a list.
func TestBrokenList(t *testing.T) {
	each(t, map[string]fault{
		"cut in a pod":         {code: 200, body: `{"metadata":{"resourceVersion":"v1"},"items":[{"metadata":{"name":"a","uid":"a"`},
		"no resourceVersion":   {code: 200, body: `{"metadata":{},"items":[]}`},
		"garbage":              {code: 200, body: "<html>a proxy's page</html>"},
		"nothing":              {code: 200},
		"an array":             {code: 200, body: `[{"resourceVersion":"v1"}]`},
		"items of no list":     {code: 200, body: `{"metadata":{"resourceVersion":"v1"},"items":{}}`},
		"an item of no pod":    {code: 200, body: `{"metadata":{"resourceVersion":"v1"},"items":[7]}`},
		"cut behind the items": {code: 200, body: `{"metadata":{"resourceVersion":"v1"},"items":[]`},
		"cut before the items": {code: 200, body: `{"metadata":{"resourceVersion":"v1"}`},
		"lost":                 {err: io.ErrUnexpectedEOF},
	}, func(w *watcher, met fault) {
		w.put("5")
		w.follows()
		w.api.bookmark()
		synctest.Wait()
		met.times = 1
		w.api.fail("list", met)
		w.gone410()
		w.api.annotate("db", "3")
		w.has("web=5")
		if got := w.api.watching(); got != 0 {
			w.Errorf("%d watches go on without a list", got)
		}
		w.pass(2 * time.Second)
		w.has("db=3", "web=5")
		if got := w.kids.started(); got != 1 {
			w.Errorf("%d children were started, want 1", got)
		}
	})
}

// C6: a list asks for what is no older than the last version, until the server can't serve it. 500 says nothing about that.
func TestRefusedVersion(t *testing.T) {
	each(t, map[string]func(w *watcher){
		"410": func(w *watcher) { w.api.fail("list", fault{times: 1, code: 410}) },
		"504": func(w *watcher) { w.api.fail("list", fault{times: 1, code: 504}) },
		"the server was restored from a backup": func(w *watcher) {
			w.api.mu.Lock()
			defer w.api.mu.Unlock()
			w.api.version, w.api.compacted = 50, 50
		},
	}, func(w *watcher, happens func(w *watcher)) {
		w.follows()
		last := w.put("5")
		w.has("web=5")
		w.api.fail("list", fault{times: 1, code: 500})
		w.gone410()
		synctest.Wait()
		happens(w)
		w.pass(2 * longestWait)
		w.has("web=5")
		w.listedFrom("0", last, last, "")
	})
}

// ---- 410, and versions ----

// C6: a list that has all: what goes on goes on, what is absent is stopped. It comes at once, but not twice within a second.
func TestGone(t *testing.T) {
	each(t, map[string]bool{"as the answer": false, "as an event": true}, func(w *watcher, goneIs200 bool) {
		w.put("5")
		w.api.annotate("db", "5")
		w.follows()
		last := w.api.bookmark()
		w.api.fail("watch", fault{times: 1, code: 500}) // a gap in which a pod goes and one comes
		w.api.drop()
		synctest.Wait()
		w.api.remove("default", "db")
		w.api.annotate("new", "1")
		w.api.compact(goneIs200)
		w.pass(2 * time.Second)
		w.has("new=1", "web=5")
		w.listedFrom("0", last)
		watches, lists := w.api.asked("watch"), w.api.asked("list")
		if len(watches) != 4 || !lists[1].at.Equal(watches[2].at) {
			w.Errorf("it did not list at once: %v, %v", watches, lists)
		}
		if got := w.kids.started(); got != 1 {
			w.Errorf("%d children were started, want 1", got)
		}
	})
	watched(t, func(w *watcher) {
		w.follows()
		last := w.put("5")
		w.api.fail("watch", fault{times: 1, code: 410})
		w.gone410() // what came before it counts
		w.has("web=5")
		w.listedFrom("0", last)
		w.pass(799 * time.Millisecond)
		w.listedFrom("0", last)
		w.pass(time.Second)
		w.listedFrom("0", last, last)
		w.checkLog("410 Gone", 1)
	})
}

func TestVersionIsKept(t *testing.T) { // C6: that of every event but ERROR; a watch goes on from there without a list
	each(t, map[string]func(w *watcher) string{
		"ADDED":    func(w *watcher) string { return w.api.annotate("new", "1") },
		"MODIFIED": func(w *watcher) string { return w.put("6") },
		"plain":    func(w *watcher) string { return w.put() },
		"DELETED":  func(w *watcher) string { return w.api.remove("default", "web") },
		"BOOKMARK": func(w *watcher) string { return w.api.bookmark() },
		"ERROR": func(w *watcher) string {
			last := w.api.bookmark()
			w.api.push(string(errorFrame(500, "etcd has no leader")), goesOn)
			return last
		},
	}, func(w *watcher, happens func(w *watcher) string) {
		first := w.put("5")
		w.follows()
		last := happens(w)
		synctest.Wait()
		w.api.drop()
		w.pass(2 * time.Second)
		w.watchedFrom(first, last)
		w.listedFrom("0")
	})
}

// ---- What an end of a watch means ----

func TestCleanEnd(t *testing.T) { // C6: it watches again at once
	each(t, map[string]func(w *watcher){
		"after a while":     func(w *watcher) { w.pass(2 * time.Second) },
		"after an event":    func(w *watcher) { w.api.bookmark() },
		"at the time limit": func(w *watcher) { w.pass(10*time.Minute + time.Second) },
		"after trouble": func(w *watcher) {
			w.api.fail("watch", fault{times: 1, code: 503})
			w.api.drop()
			w.pass(2 * longestWait)
		},
	}, func(w *watcher, happens func(w *watcher)) {
		w.follows()
		happens(w)
		synctest.Wait()
		began, before := time.Now(), len(w.api.asked("watch"))
		w.api.drop()
		synctest.Wait()
		if got := w.api.asked("watch")[before:]; len(got) != 1 || !got[0].at.Equal(began) {
			w.Errorf("it did not watch again at once: %v", got)
		}
		if !strings.HasSuffix(w.Name(), "after_trouble") {
			w.checkLog("", 0)
		}
	})
}

func TestTimeLimit(t *testing.T) { // C6: its end is no failure, and the watches of many nodes spread
	watched(t, func(w *watcher) {
		w.api.bookmarkEvery = time.Minute
		w.follows()
		w.pass(24 * time.Hour)
		watches, seen := w.api.asked("watch"), map[string]bool{}
		for i, gap := range gaps(watches) {
			seconds := watches[i].query.Get("timeoutSeconds") // that it is in 300..600 is checked by the fake
			if limit, _ := time.ParseDuration(seconds + "s"); gap != limit {
				w.Errorf("a watch of %v was followed by another after %v", limit, gap)
			}
			seen[seconds] = true
		}
		if len(seen) < 60 {
			w.Errorf("a day saw only %d limits", len(seen))
		}
		w.listedFrom("0")
		w.checkLog("", 0)
	})
}

// C6: an event that is cut, or is none, applies nothing; the next watch goes on from the last that was one.
func TestBrokenEvent(t *testing.T) {
	whole := string(watchFrame("DELETED", fakePod{"default", "web", uidWeb, nil, 9000}.object()))
	cut := whole[:len(whole)-3] // all of it but the last braces
	type test struct {
		text string
		end  ending
	}
	each(t, map[string]test{
		"cut":                  {cut, ends},
		"cut by a lost one":    {cut, breaks},
		"a page":               {text: "<html>502 Bad Gateway</html>"},
		"binary":               {text: "k8s\x00\x00\xff\xfe\x01"},
		"a string":             {text: `"ADDED"`},
		"null":                 {text: "null"},
		"an empty object":      {text: "{}"},
		"a list":               {text: "[]"},
		"no object":            {text: `{"type":"DELETED"}`},
		"another object":       {text: `{"type":"DELETED","object":42}`},
		"null for an object":   {text: `{"type":"DELETED","object":null}`},
		"no resourceVersion":   {text: `{"type":"DELETED","object":{"metadata":{"namespace":"default","name":"web","uid":"0eb"}}}`},
		"BOOKMARK of nothing":  {text: `{"type":"BOOKMARK","object":{"metadata":{}}}`},
		"ERROR without object": {text: `{"type":"ERROR"}`},
		"ERROR of nothing":     {text: `{"type":"ERROR","object":{}}`},
		"wrong types":          {text: `{"type":"DELETED","object":{"metadata":{"uid":"0eb","resourceVersion":"v900","annotations":[]}}}`},
	}, func(w *watcher, test test) {
		first := w.put("5")
		w.follows()
		last := w.api.bookmark()
		w.api.push(test.text+"\n", test.end)
		w.has("web=5")
		w.watchedFrom(first) // it waits: this is no end at the time limit
		w.pass(2 * time.Second)
		w.watchedFrom(first, last)
		w.runs("capture-web.pcap 5")
		w.put("6")
		w.has("web=6")
	})
}

func TestLargeEvent(t *testing.T) { // C6: bufio.Scanner would end at 64 KB
	watched(t, func(w *watcher) {
		w.follows()
		w.api.put(fakePod{"default", "web", "uid-web", map[string]string{annotation: "5", "note": strings.Repeat("x", 1_500_000)}, 0})
		w.has("web=5")
		w.api.annotate("web", "6")
		w.has("web=6")
		if got := len(w.api.asked("watch")); got != 1 {
			w.Errorf("watched %d times", got)
		}
	})
}

func TestEventsShareNothing(t *testing.T) { // C6: a variable that is used again keeps what the next event lacks
	watched(t, func(w *watcher) {
		w.follows()
		w.api.put(fakePod{"default", "a", "uid-a", map[string]string{annotation: "5", filterAnnotation: "udp", interfaceAnnotation: "lo",
			hashAnnotation: "abc", mirrorAnnotation: "abc"}, 0})
		w.api.annotate("b", "6")
		w.api.annotate("c", "")
		w.has("a=5", "b=6")
		want := pod{namespace: "default", name: "b", uid: "uid-b", kubeletUID: "uid-b", annotated: true, value: "6"}
		if got := w.captures["uid-b"].pod; got != want {
			w.Errorf("got %+v, want %+v", got, want)
		}
	})
}

// C6 and C7: the reader never waits for a start, a stop or an Event: the server would close the watch. Here nobody takes
// the Events, and no child ends.
func TestReaderNeverWaits(t *testing.T) {
	watched(t, func(w *watcher) {
		w.kids.behave(behaviour{startup: time.Hour, shutdown: time.Second})
		w.put("5")
		w.follows()
		var last string
		for i := range 2000 {
			w.put(fmt.Sprint("x", i))
			last = w.put(fmt.Sprint(i%7 + 1))
		}
		synctest.Wait()
		if w.version != last {
			w.Errorf("the server could only send up to %s of %s", w.version, last)
		}
		w.pass(5 * time.Second)
		w.runs("capture-web.pcap 5")
	})
}

// ---- Trouble ----

// C5 and C6: no trouble ends a capture. What it hangs on is neither a list nor a watch.
func TestCapturesOutliveRequests(t *testing.T) {
	each(t, map[string]func(w *watcher){
		"the list's deadline":  func(w *watcher) { w.pass(2 * time.Minute) },
		"an end":               func(w *watcher) { w.api.drop() },
		"a lost connection":    func(w *watcher) { w.api.push("", breaks) },
		"the watch's deadline": func(w *watcher) { w.api.freeze(); w.pass(20 * time.Minute); w.api.thaw() },
		"another list":         func(w *watcher) { w.gone410() },
		"a refusal":            func(w *watcher) { w.api.fail("watch", fault{times: 5, code: 403}); w.api.drop() },
		"an hour's outage": func(w *watcher) {
			w.api.fail("watch", fault{err: syscall.ECONNREFUSED})
			w.api.push("", breaks)
			w.pass(time.Hour)
			w.api.heal()
		},
	}, func(w *watcher, happens func(w *watcher)) {
		w.put("5")
		w.follows()
		w.proc.pod(51, "0db")
		w.api.put(fakePod{"default", "db", "0db", map[string]string{annotation: "1"}, 0}) // one began with a list, one with a watch
		w.has("db=1", "web=5")
		happens(w)
		w.pass(4 * time.Minute)
		w.runs("capture-db.pcap 1", "capture-web.pcap 5")
		if got := w.kids.started(); got != 2 {
			w.Errorf("%d children were started, want 2", got)
		}
		w.put("6")
		w.has("db=1", "web=6") // and it still follows
	})
}

// C6: any trouble is waited out, what the server asks for is the least, the version is kept, and nothing is listed again.
func TestTroubleIsWaitedOut(t *testing.T) {
	lost := &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
	type test struct {
		fault
		least time.Duration
	}
	each(t, map[string]test{
		"401":                     {fault{code: 401}, 0},
		"403":                     {fault{code: 403}, 30 * time.Second},
		"429":                     {fault{code: 429}, 0},
		"429 with Retry-After":    {fault{code: 429, retryAfter: "40"}, 40 * time.Second},
		"500":                     {fault{code: 500}, 0},
		"502 of a proxy":          {fault{code: 502, body: "<html>"}, 0},
		"503 with Retry-After":    {fault{code: 503, retryAfter: "7"}, 7 * time.Second},
		"504":                     {fault{code: 504}, 0},
		"Retry-After is no time":  {fault{code: 503, retryAfter: "soon"}, 0},
		"Retry-After is negative": {fault{code: 429, retryAfter: "-100"}, 0},
		"lost":                    {fault{err: lost}, 0},
	}, func(w *watcher, test test) {
		test.times = 1
		w.api.fail("list", test.fault)
		w.follows()
		w.pass(test.least + 5*time.Second)
		w.api.bookmark()
		synctest.Wait()
		w.api.fail("watch", test.fault)
		w.api.drop()
		w.pass(test.least + 5*time.Second)
		if lists, watches := w.api.asked("list"), w.api.asked("watch"); len(lists) != 2 || len(watches) != 3 {
			w.Fatalf("%d lists and %d watches", len(lists), len(watches))
		} else {
			for _, wait := range []time.Duration{gaps(lists)[0], gaps(watches)[1]} {
				if wait < test.least+800*time.Millisecond && test.code != 403 || wait < test.least || wait > test.least+3*time.Second {
					w.Errorf("it waited %v, want %v and a little", wait, test.least)
				}
			}
		}
		w.watchedFrom("v100", "v101", "v101")
		if test.code != 504 {
			w.listedFrom("0", "0")
		}
	})
}

func TestBackoff(t *testing.T) { // C6: up to 30 s; until the first watch up to 3 s, and thereafter never again
	each(t, map[string]fault{
		"500":            {code: 500},
		"refused":        {err: syscall.ECONNREFUSED},
		"an ERROR":       {code: 200, body: string(errorFrame(500, "etcd has no leader"))},
		"an instant end": {code: 200},
	}, func(w *watcher, met fault) {
		w.api.fail("watch", met)
		w.follows()
		w.pass(time.Minute)
		checkBackoff(w, gaps(w.api.asked("watch")), 15, 3*time.Second)
		w.api.heal()
		w.untilWatching()
		w.api.bookmark()
		synctest.Wait()
		before := len(w.api.asked("watch"))
		w.api.fail("watch", met)
		w.api.drop()
		w.pass(time.Hour)
		checkBackoff(w, gaps(w.api.asked("watch")[before:]), 110, 30*time.Second)
		w.listedFrom("0")
	})
}

func TestBackoffIsReset(t *testing.T) { // C6
	type test struct {
		happens func(w *watcher)
		resets  bool
	}
	each(t, map[string]test{
		"by an event":          {func(w *watcher) { w.api.bookmark(); synctest.Wait(); w.api.push("", breaks) }, true},
		"by a long watch":      {func(w *watcher) { w.pass(2 * time.Second); w.api.push("", breaks) }, true},
		"not by a 200":         {func(w *watcher) { w.api.drop() }, false},
		"not by an ERROR":      {func(w *watcher) { w.api.push(string(errorFrame(500, "")), ends) }, false},
		"not by half an event": {func(w *watcher) { w.api.push(`{"type":"BOOKMARK"`, ends) }, false},
	}, func(w *watcher, test test) {
		w.follows()
		w.api.bookmark()
		synctest.Wait()
		w.api.fail("watch", fault{times: 6, code: 500})
		w.api.drop()
		w.untilWatching()
		test.happens(w)
		synctest.Wait()
		ended, before := time.Now(), len(w.api.asked("watch"))
		w.pass(longestWait)
		wait := w.api.asked("watch")[before].at.Sub(ended)
		if reset := wait >= 800*time.Millisecond && wait <= 1600*time.Millisecond; reset != test.resets || !reset && wait < 15*time.Second {
			w.Errorf("it waited %v", wait)
		}
	})
}

// C6 and C7: a server that is away, or whose trouble stays, is asked no more often than the backoff allows, and that is
// logged once.
func TestPermanentTrouble(t *testing.T) {
	type test struct {
		verb string
		fault
		perTry int // requests
	}
	each(t, map[string]test{
		"410 as the answer":     {"watch", fault{code: 410}, 4}, // each time once at once
		"410 as an event":       {"watch", fault{code: 200, body: string(errorFrame(410, ""))}, 4},
		"410 of the list":       {"list", fault{code: 410}, 2},
		"200, then closed":      {"watch", fault{code: 200}, 1},
		"200 with garbage":      {"watch", fault{code: 200, body: "no"}, 1},
		"200 with half a list":  {"list", fault{code: 200, body: `{"items":[`}, 1},
		"an event of no object": {"watch", fault{code: 200, body: `{"type":"ADDED"}`}, 1},
		"an ERROR":              {"watch", fault{code: 200, body: string(errorFrame(500, "etcd has no leader"))}, 1},
		"401":                   {"watch", fault{code: 401}, 1},
		"403":                   {"list", fault{code: 403}, 1},
		"429":                   {"watch", fault{code: 429}, 1},
		"500":                   {"watch", fault{code: 500}, 1},
		"504":                   {"list", fault{code: 504}, 1},
		"refused":               {"watch", fault{err: syscall.ECONNREFUSED}, 1},
		"Retry-After of 1 s":    {"watch", fault{code: 429, retryAfter: "1"}, 1},
		"Retry-After of 0 s":    {"watch", fault{code: 429, retryAfter: "0"}, 1},
	}, func(w *watcher, test test) {
		w.follows()
		w.api.bookmark()
		synctest.Wait()
		w.api.fail(test.verb, test.fault)
		if test.verb == "list" {
			w.gone410()
		}
		w.api.drop()
		before := len(w.api.asked(""))
		w.pass(time.Hour)
		// The waits are at least 0.8, 1.6, 3.2, 6.4, 12.8, 15, 15… and at most 33 s.
		most, least := (1+5+(3600-25)/15+1)*test.perTry, 3600/33
		if got := len(w.api.asked("")) - before; got > most || got < least {
			w.Errorf("%d requests in an hour, want %d to %d", got, least, most)
		}
		w.checkLog("WARN", 1)
		w.checkLog("watched again", 0)
	})
}

// C6 and C7: an outage is logged when it begins and, as soon as the watch is back, when it ends; the next one too. The port
// of a connection differs each time, and is no other error. A node waits for one try at most once the server is back.
func TestOutage(t *testing.T) {
	server := &net.TCPAddr{IP: net.IPv4(10, 96, 0, 1), Port: 443}
	each(t, map[string]func(i int) error{
		"refused": func(int) error { return &net.OpError{Op: "dial", Net: "tcp", Addr: server, Err: syscall.ECONNREFUSED} },
		"reset": func(i int) error {
			client := &net.TCPAddr{IP: net.IPv4(10, 0, 0, 9), Port: 40000 + i}
			return &net.OpError{Op: "read", Net: "tcp", Source: client, Addr: server, Err: syscall.ECONNRESET}
		},
	}, func(w *watcher, fails func(i int) error) {
		w.follows()
		for i := range 2 {
			w.api.bookmark()
			synctest.Wait()
			for i := range 50 {
				w.api.fail("watch", fault{times: 1, err: fails(i)})
			}
			w.api.drop()
			w.pass(10 * time.Minute)
			w.checkLog("WARN", i+1)
			w.checkLog("watched again", i)
			w.api.compact(false) // it comes back without its history
			w.api.heal()
			back := time.Now()
			w.untilWatching()
			if took := time.Since(back); took > 30100*time.Millisecond {
				w.Errorf("it watches %v after the server is back", took)
			}
			w.checkLog("watched again", i+1)
		}
	})
}

func TestForbidden(t *testing.T) { // C6: it names the missing verb once, and keeps trying slowly
	watched(t, func(w *watcher) {
		const message = `pods is forbidden: User "x" cannot watch resource "pods" in API group "" at the cluster scope`
		w.put("5")
		w.follows()
		last := w.api.bookmark()
		synctest.Wait()
		w.api.fail("watch", fault{code: 403, body: fmt.Sprintf(`{"kind":"Status","message":%q,"code":403}`, message)})
		w.api.drop()
		w.pass(10 * time.Minute)
		if got := len(w.api.asked("watch")); got < 18 || got > 21 {
			w.Errorf("%d watches in 10 minutes", got)
		}
		w.checkLog("cannot watch resource", 1)
		w.api.heal()
		w.pass(longestWait)
		w.checkLog("watched again", 1)
		w.put("6")
		w.has("web=6")
		if watches := w.api.asked("watch"); watches[len(watches)-1].query.Get("resourceVersion") != last {
			w.Error("the resourceVersion was not kept")
		}
	})
}

// ---- The token and the connection ----

func TestToken(t *testing.T) { // C6: it is read for each request; a 401, or none to read, is waited out
	watched(t, func(w *watcher) {
		first := w.put("5")
		w.follows()
		w.pass(time.Second / 2) // watches end at whole seconds: never between the two files
		for i := range 3 {
			w.pass(time.Hour)
			token := fmt.Sprintf("token-of-hour-%d", i)
			w.api.mount("token", token+"\n")
			w.api.accept(token)
		}
		w.checkLog("WARN", 0)
		w.api.accept("token-2")
		w.api.drop()
		w.pass(10 * time.Second)
		must(w, os.Remove(filepath.Join(w.api.account, "token")))
		w.pass(30 * time.Second)
		w.checkLog("401 Unauthorized", 1)
		w.checkLog("account's token", 1)
		w.api.mount("token", "token-2")
		w.pass(longestWait)
		w.runs("capture-web.pcap 5")
		w.put("6")
		w.has("web=6")
		for _, r := range w.api.asked("watch") {
			if r.query.Get("resourceVersion") != first {
				w.Error("the resourceVersion was not kept")
			}
		}
	})
}

// ask lists over a real connection.
func ask(t *testing.T, k *kube) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return newPodWatch(&node{config: config{nodeName: "node-1"}, kube: k}).list(ctx)
}

func kubeOf(t *testing.T, f *fakeAPI, api string) *kube {
	k := newKube(api, f.account)
	t.Cleanup(k.http.CloseIdleConnections)
	return k
}

func TestConnection(t *testing.T) { // C6: HTTP/2, without which there are no pings; an IPv6 address; a server of the CA
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		f := newFakeAPI(t)
		if listener, err := net.Listen("tcp", address); err != nil {
			t.Logf("this machine has no %s: %v", address, err)
			continue
		} else {
			listener.Close()
		}
		server := f.serve(address, f.ca)
		host, port, _ := net.SplitHostPort(server.Listener.Addr().String())
		cfg, err := readConfig(environment(map[string]string{"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}))
		must(t, err, ask(t, kubeOf(t, f, cfg.api)))
		if got := f.asked("list")[0].proto; got != 2 {
			t.Errorf("it speaks HTTP/%d", got)
		}
	}
	f := newFakeAPI(t)
	server := f.serve("127.0.0.1:0", newAuthority(t))
	if err := ask(t, kubeOf(t, f, server.URL)); err == nil || len(f.asked("")) > 0 {
		t.Errorf("a server of another CA was given the token: %v", err)
	}
	for _, text := range []string{"", "\n", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"} {
		f.mount("ca.crt", text) // without any, and what is missing is named
		if err := ask(t, kubeOf(t, f, server.URL)); err == nil || !strings.Contains(err.Error(), "ca.crt") {
			t.Errorf("with the CA %q: %v", text, err)
		}
	}
}

func TestCARotates(t *testing.T) { // C6
	f := newFakeAPI(t)
	server := f.serve("127.0.0.1:0", f.ca)
	address := server.Listener.Addr().String()
	k := kubeOf(t, f, server.URL)
	must(t, ask(t, k))
	next := newAuthority(t)
	server.Close()
	server = f.serve(address, next)
	if err := ask(t, k); err == nil {
		t.Fatal("the new CA is trusted before it is mounted")
	}
	f.mount("ca.crt", string(next.pem))
	must(t, ask(t, k))
	for name, breaks := range map[string]func(){
		"cut":     func() { f.mount("ca.crt", string(next.pem[:100])) },
		"empty":   func() { f.mount("ca.crt", "") },
		"missing": func() { os.Remove(filepath.Join(f.account, "ca.crt")) },
	} {
		breaks()
		server.CloseClientConnections()
		k.http.CloseIdleConnections()
		if err := ask(t, k); err != nil {
			t.Errorf("with a CA bundle that is %s the old one must stay: %v", name, err)
		}
	}
}

func TestProxyIsIgnored(t *testing.T) { // C6: init has set HTTPS_PROXY
	f := newFakeAPI(t)
	k := kubeOf(t, f, "https://10.96.0.1:443") // a proxy is never asked for a loopback address
	var dialed []string
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		dialed = append(dialed, address)
		return nil, errors.New("no network here")
	}
	transport := k.http.Transport.(*http.Transport)
	transport.DialContext, transport.DialTLSContext = dial, dial
	if err := ask(t, k); err == nil || !slices.Equal(dialed, []string{"10.96.0.1:443"}) {
		t.Errorf("dialed %q: %v", dialed, err)
	}
}

// pipes is a listener whose connections stay in the process, and in the bubble.
type pipes struct {
	accepted chan net.Conn
	closed   chan struct{}
}

func newPipes() *pipes { return &pipes{make(chan net.Conn), make(chan struct{})} }

func (p *pipes) dial() net.Conn {
	ours, theirs := net.Pipe()
	p.accepted <- theirs
	return ours
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.accepted:
		return conn, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { close(p.closed); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

// freezing is a client's end of a connection: once frozen nothing gets through any more, and nobody is told.
type freezing struct {
	net.Conn
	frozen atomic.Bool
}

func (c *freezing) Write(data []byte) (int, error) {
	if c.frozen.Load() {
		return len(data), nil
	}
	return c.Conn.Write(data)
}

func (c *freezing) Read(data []byte) (int, error) {
	n, err := c.Conn.Read(data)
	for err == nil && c.frozen.Load() {
		n, err = c.Conn.Read(data)
	}
	return n, err
}

func TestFrozenConnection(t *testing.T) { // C6: pings keep a connection that is silent, and end one that is half open
	watched(t, func(w *watcher) {
		listener := newPipes()
		server := &http.Server{Handler: w.api, ErrorLog: log.New(io.Discard, "", 0), TLSConfig: &tls.Config{
			NextProtos: []string{"h2"}, Certificates: []tls.Certificate{w.api.ca.issue(w)}}}
		go server.ServeTLS(listener, "", "")
		defer server.Close()
		k := kubeOf(w.T, w.api, "https://kubernetes.test")
		roots := x509.NewCertPool()
		roots.AddCert(w.api.ca.certificate)
		var connections []*freezing
		k.http.Transport.(*http.Transport).DialTLSContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			connections = append(connections, &freezing{Conn: listener.dial()})
			conn := tls.Client(connections[len(connections)-1], &tls.Config{
				RootCAs: roots, ServerName: "kubernetes.test", NextProtos: []string{"h2"}})
			return conn, conn.HandshakeContext(ctx)
		}
		w.kube = k
		w.follows()
		w.pass(4 * time.Minute)
		if got := w.api.asked("watch"); len(got) != 1 || got[0].proto != 2 || len(connections) != 1 {
			w.Fatalf("%d watches, %d connections", len(got), len(connections))
		}
		w.api.bookmark() // so that the next ping is as late as it can be
		synctest.Wait()
		connections[0].frozen.Store(true)
		w.put("6")
		w.pass(50 * time.Second)
		w.checkLog("WARN", 1)
		w.has("web=6")
		if got := len(w.api.asked("watch")); got != 2 {
			w.Errorf("%d watches", got)
		}
		for _, conn := range connections {
			conn.Close()
		}
		w.end()
		synctest.Wait()
	})
}

func TestDeadlines(t *testing.T) { // C6: no request waits for ever, and a watch that is merely silent is not ended
	watched(t, func(w *watcher) {
		w.api.endless = true // as a server that answers pings, and is stuck
		w.follows()
		w.pass(4*time.Minute + 59*time.Second)
		w.put("5")
		w.has("web=5")
		if got := len(w.api.asked("watch")); got != 1 {
			w.Errorf("watched %d times", got)
		}
		w.pass(10 * time.Minute)
		watches := w.api.asked("watch")
		limit, _ := time.ParseDuration(watches[0].query.Get("timeoutSeconds") + "s")
		if limit += 30 * time.Second; len(watches) < 2 || gaps(watches)[0] < limit || gaps(watches)[0] > limit+2*time.Second {
			w.Errorf("a watch with a deadline of %v was given up after %v", limit, gaps(watches))
		}
	})
	each(t, map[string]string{"the list is not answered": "list", "the watch is not answered": "watch"}, func(w *watcher, verb string) {
		if verb == "list" {
			w.api.freeze()
		}
		w.follows()
		w.api.freeze()
		w.api.drop()
		w.pass(map[string]time.Duration{"list": time.Minute, "watch": 630 * time.Second}[verb] + longestWait)
		if got := len(w.api.asked(verb)); got < 2 {
			w.Errorf("asked %d times", got)
		}
		w.api.thaw()
		w.pass(longestWait)
		w.put("6")
		w.has("web=6")
	})
}

// ---- Configuration and health ----

// environment is what readConfig reads, right but for what is set.
func environment(set map[string]string) func(string) string {
	all := map[string]string{"NODE_NAME": "node-1", "KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
	maps.Copy(all, set)
	return func(name string) string { return all[name] }
}

func TestReadConfig(t *testing.T) { // C1; C6: without a node the pods of none would be selected
	hostname, _ := os.Hostname()
	base := config{nodeName: "node-1", podName: hostname, api: "https://10.96.0.1:443", proc: "/proc", root: "/",
		account: "/var/run/secrets/kubernetes.io/serviceaccount", diskLimit: math.MaxInt64 - 64<<20, diskFree: 15}
	least := 64<<20 + 1_000_000 + 262_144 + 16 // the log, and one file
	for _, test := range []struct {
		name, value string
		change      func(c *config) // nil: it is refused, and the error names it
	}{
		{"", "", func(c *config) {}},
		{"NODE_NAME", "", nil},
		{"KUBERNETES_SERVICE_HOST", "", nil},
		{"KUBERNETES_SERVICE_PORT", "", nil},
		{"POD_NAME", "packetcapture-x", func(c *config) { c.podName = "packetcapture-x" }},
		{"KUBERNETES_SERVICE_HOST", "fd00::1", func(c *config) { c.api = "https://[fd00::1]:443" }},
		{"DISK_LIMIT", "1073741824", func(c *config) { c.diskLimit = 1<<30 - 64<<20 }},
		{"DISK_LIMIT", fmt.Sprint(least), func(c *config) { c.diskLimit = 1_262_160 }},
		{"DISK_LIMIT", fmt.Sprint(least - 1), nil},
		{"DISK_LIMIT", "1Gi", nil},
		{"DISK_LIMIT", "-1", nil},
		{"DISK_FREE", "0", func(c *config) { c.diskFree = 0 }},
		{"DISK_FREE", "99", func(c *config) { c.diskFree = 99 }},
		{"DISK_FREE", "100", nil},
		{"DISK_FREE", "-1", nil},
		{"DISK_FREE", "15%", nil},
		{"HTTPS_PROXY", "http://proxy.test:3128", func(c *config) {}},
	} {
		got, err := readConfig(environment(map[string]string{test.name: test.value}))
		want := base
		if test.change != nil {
			test.change(&want)
		}
		if test.change == nil && (err == nil || !strings.Contains(err.Error(), test.name)) {
			t.Errorf("with %s=%s the error is %v", test.name, test.value, err)
		} else if test.change != nil && (err != nil || got != want) {
			t.Errorf("with %s=%s it is %+v, %v; want %+v", test.name, test.value, got, err, want)
		}
	}
}

// probe checks how a health endpoint answers.
func (w *watcher) probe(path string, want int) {
	w.Helper()
	answer, r := httptest.NewRecorder(), httptest.NewRequest("GET", path, nil)
	if w.health().Handler.ServeHTTP(answer, r); answer.Code != want {
		w.Errorf("%s answers %d, want %d", path, answer.Code, want)
	}
}

func TestHealth(t *testing.T) { // C7
	watched(t, func(w *watcher) {
		w.api.fail("list", fault{code: 500})
		w.follows()
		w.probe("/readyz", 503) // until a list has been applied
		w.probe("/healthz", 200)
		w.probe("/", 404)
		w.api.heal()
		w.pass(5 * time.Second)
		w.probe("/readyz", 200)
		w.api.fail("watch", fault{err: syscall.ECONNREFUSED})
		w.api.push("", breaks)
		w.pass(time.Hour) // a server that is away matters for neither
		w.probe("/readyz", 200)
		w.probe("/healthz", 200)
		w.api.heal()
		w.untilWatching()
		w.start = func(ctx context.Context, stderr io.Writer, network *os.File, arguments ...string) (*child, error) {
			if slices.Contains(arguments, "-d") {
				time.Sleep(time.Minute) // stuck
			}
			return w.kids.start(ctx, stderr, network, arguments...)
		}
		w.put("5", "udp")
		w.pass(29 * time.Second)
		w.probe("/healthz", 200)
		w.pass(2 * time.Second)
		w.probe("/healthz", 503) // a change is not applied
		w.pass(30 * time.Second)
		w.probe("/healthz", 200)
	})
}

func TestHealthTimeouts(t *testing.T) { // C7: connections that do nothing can't pile up
	type test struct {
		send string
		wait time.Duration // before it reads
		most time.Duration // until it is closed
	}
	each(t, map[string]test{
		"half a request":        {"GET /healthz HTTP/1.1\r\nHost: x\r\n", 0, 5 * time.Second},
		"an answer that is not": {"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 6 * time.Second, 6 * time.Second},
		"idle":                  {"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 0, time.Minute},
	}, func(w *watcher, test test) {
		listener, server := newPipes(), w.health()
		go server.Serve(listener)
		defer server.Close()
		conn := listener.dial()
		began := time.Now()
		io.WriteString(conn, test.send)
		time.Sleep(test.wait)
		conn.SetReadDeadline(began.Add(time.Hour))
		io.ReadAll(conn)
		if took := time.Since(began); took > test.most {
			w.Errorf("it was closed after %v, want %v", took, test.most)
		}
	})
}

// ---- Events ----

var webPod = pod{namespace: "shop", name: "web", uid: "uid-web", kubeletUID: "hash", value: "5"}

// posting has Events posted until the story ends.
func posting(t *testing.T, story func(w *watcher)) {
	t.Helper()
	watched(t, func(w *watcher) {
		recorded := make(chan struct{})
		go func() { w.events.record(w.ctx); close(recorded) }()
		story(w)
		w.end()
		<-recorded
	})
}

func TestEventIsPosted(t *testing.T) { // C7: to its pod's namespace, and of the UID that the kubelet uses
	posting(t, func(w *watcher) {
		w.pass(time.Hour)
		w.events.tell(webPod, "Warning", "CaptureFailed", "it broke")
		synctest.Wait()
		type fields = map[string]any
		want := []fields{{
			"apiVersion": "v1", "kind": "Event",
			"metadata":       fields{"namespace": "shop", "generateName": "packetcapture-"},
			"involvedObject": fields{"apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "web", "uid": "hash"},
			"type":           "Warning", "reason": "CaptureFailed", "message": "it broke", "count": 1.0,
			"source":         fields{"component": "packetcapture", "host": "node-1"},
			"firstTimestamp": "2000-01-01T01:00:00Z", "lastTimestamp": "2000-01-01T01:00:00Z",
		}}
		if got := w.api.posted(); !reflect.DeepEqual(got, want) {
			w.Errorf("got  %v\nwant %v", got, want)
		}
		w.checkLog(`level=WARN msg=CaptureFailed namespace=shop pod=web n=5 message="it broke"`, 1)
		w.events.tell(webPod, "Normal", "CaptureStarted", "it runs")
		w.checkLog("level=INFO msg=CaptureStarted", 1)
		synctest.Wait()
		w.api.freeze()
		w.events.tell(webPod, "Normal", "CaptureStopped", "it stopped")
		w.pass(13 * time.Second)
		if got := len(w.api.asked("post")); got != 4 {
			w.Errorf("asked %d times, want twice for an Event that is not answered", got-2)
		}
	})
}

func TestEventIsTriedAgain(t *testing.T) { // C7: while the server is away, and never if it is refused
	type test struct {
		fault
		tries int // until it is taken, or given up
	}
	each(t, map[string]test{
		"503":                  {fault{times: 8, code: 503}, 9},
		"502 of a proxy":       {fault{times: 1, code: 502, body: "<html>"}, 2},
		"504":                  {fault{times: 1, code: 504}, 2},
		"429 with Retry-After": {fault{times: 1, code: 429, retryAfter: "40"}, 2},
		"401":                  {fault{times: 1, code: 401}, 2},
		"refused":              {fault{times: 3, err: syscall.ECONNREFUSED}, 4},
		"lost":                 {fault{times: 1}, 2},
		"400":                  {fault{code: 400}, 1},
		"403":                  {fault{code: 403}, 1}, // of a namespace that is being deleted
		"404":                  {fault{code: 404}, 1},
		"422":                  {fault{code: 422}, 1},
		"500":                  {fault{code: 500}, 1}, // a webhook of this namespace
	}, func(w *watcher, test test) {
		go w.events.record(w.ctx)
		w.api.fail("post", test.fault)
		w.events.tell(webPod, "Warning", "CaptureFailed", "it broke")
		w.pass(10 * time.Minute)
		posts, isTaken := w.api.asked("post"), test.times > 0
		if len(posts) != test.tries || len(w.api.posted()) == 1 != isTaken {
			w.Fatalf("it was tried %d times and taken %d times", len(posts), len(w.api.posted()))
		}
		waits := gaps(posts)
		if test.retryAfter != "" {
			waits[0] -= 40 * time.Second
		}
		checkBackoff(w, waits, test.tries-1, 30*time.Second)
		w.api.heal() // one that is refused holds up no other
		w.events.tell(webPod, "Normal", "CaptureStarted", "it runs")
		synctest.Wait()
		if posted := w.api.posted(); len(posted) == 0 || posted[len(posted)-1]["message"] != "it runs" {
			w.Errorf("the next one was not posted: %v", posted)
		}
		w.checkLog("an Event is refused", map[bool]int{true: 0, false: 1}[isTaken])
	})
}

func TestManyEvents(t *testing.T) { // C6 and C7: they wait together while the server is away, and come in order
	posting(t, func(w *watcher) {
		w.api.fail("post", fault{code: 503})
		for i := range 50 {
			w.events.tell(webPod, "Warning", "CaptureFailed", fmt.Sprint(i))
		}
		w.pass(10 * time.Minute)
		if got := len(w.api.asked("post")); got > 50 { // 0.8, 1.6, 3.2, 6.4, 12.8, 15, 15… s
			w.Errorf("%d requests in 10 minutes", got)
		}
		for i := range 2000 { // more than are kept never delay who tells them
			w.events.tell(webPod, "Warning", "CaptureFailed", fmt.Sprint(50+i))
		}
		w.api.heal()
		w.pass(longestWait)
		for i, e := range w.api.posted() {
			if e["message"] != fmt.Sprint(i) {
				w.Fatalf("Event %d is %v", i, e["message"])
			}
		}
		if got := len(w.api.posted()); got < 1000 {
			w.Errorf("%d Events were posted", got)
		}
	})
}

// C7: a Warning that stays the same is told once within 5 minutes, though when it is tried again differs; another one at once.
func TestRepeatedWarnings(t *testing.T) {
	posting(t, func(w *watcher) {
		w.kids.behave(behaviour{refusal: errors.New("no memory")})
		w.put("5")
		w.follows()
		w.pass(4*time.Minute + 58*time.Second)
		w.failures("no memory", 1)
		w.pass(35 * time.Second)
		w.failures("no memory", 2)
		w.kids.behave(behaviour{refusal: errors.New("no file")})
		w.pass(longestWait)
		w.kids.behave(behaviour{refusal: errors.New("no memory")})
		w.pass(3 * time.Minute)
		w.failures("no memory", 2)
		w.failures("no file", 1)
		w.pass(2*time.Minute + 30*time.Second)
		w.failures("no memory", 3)
	})
}

// failures checks how many CaptureFailed with these words were posted.
func (w *watcher) failures(words string, want int) {
	w.Helper()
	got := 0
	for _, e := range w.api.posted() {
		if e["reason"] == "CaptureFailed" && strings.Contains(e["message"].(string), words) {
			got++
		}
	}
	if got != want {
		w.Errorf("%q was told %d times, want %d", words, got, want)
	}
}

// C5 and C7: what was told before the end of the program is posted within a second more, and never holds up its end.
func TestLastEvents(t *testing.T) {
	type test struct {
		frozen time.Duration // after the end
		posted int
	}
	each(t, map[string]test{
		"at once":                       {0, 2},
		"while the server thinks":       {900 * time.Millisecond, 2},
		"while the server answers none": {time.Hour, 0},
	}, func(w *watcher, test test) {
		w.put("5")
		ctx, end := context.WithCancel(w.ctx)
		ended := make(chan time.Time, 1)
		go func() { w.run(ctx); ended <- time.Now() }()
		w.pass(time.Minute)
		if test.frozen > 0 {
			w.api.freeze()
		}
		before, began := len(w.api.posted()), time.Now()
		w.events.tell(webPod, "Normal", "CaptureStarted", "as the program ends")
		synctest.Wait() // it is being posted
		end()
		time.AfterFunc(test.frozen, w.api.thaw)
		if took := (<-ended).Sub(began); took > flushGrace {
			w.Errorf("the program took %v to end", took)
		}
		posted := w.api.posted()[before:]
		if len(posted) != test.posted || test.posted > 0 && posted[1]["reason"] != "CaptureStopped" {
			w.Errorf("posted were %v", posted)
		}
	})
}
