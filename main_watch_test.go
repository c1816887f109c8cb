package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// List and watch, the configuration, health, and the posting of Events. The program runs in a bubble of time against the
// fake API server: an hour costs nothing, and two moments can be equal.

func init() {
	// No request of any test may go there. The proxy of the environment is read once in a process, hence not t.Setenv.
	os.Setenv("HTTPS_PROXY", "http://proxy.test:3128")
}

const longestWait = 34 * time.Second // for another try, and a little

// uids are those of the pods that have a network.
var uids = map[string]string{"web": "0eb", "db": "0db", "new": "0ef"}

// watcher is a world whose program talks to the fake API server.
type watcher struct {
	*world
	api     *fakeAPI
	log     *bytes.Buffer
	program sync.WaitGroup
}

// watched tells a story of a watcher. The story calls follows.
func watched(t *testing.T, story func(w *watcher)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &watcher{world: newWorld(t, 0), api: newFakeAPI(t), log: &bytes.Buffer{}}
		w.kube.http.Transport, w.api.account = w.api, w.account
		w.api.mount("token", w.api.token)
		before := slog.Default()
		slog.SetDefault(slog.New(slog.NewTextHandler(w.log, nil)))
		defer slog.SetDefault(before)
		w.proc.pod(50, uids["web"])
		w.proc.pod(51, uids["db"])
		w.proc.pod(52, uids["new"])
		story(w)
		w.finish(5 * time.Second)
		w.program.Wait()
		w.runs()
		w.logged("level=ERROR", 0)
	})
}

// each tells a story for each case of a table.
func each[T any](t *testing.T, cases map[string]T, story func(w *watcher, test T)) {
	for name, test := range cases {
		t.Run(name, func(t *testing.T) { watched(t, func(w *watcher) { story(w, test) }) })
	}
}

// follows starts the program, which has listed when this returns, if it can.
func (w *watcher) follows() {
	w.program.Go(func() { w.run(w.ctx) })
	synctest.Wait()
}

// annotate puts a pod of namespace default with a number of files, a filter, an interface and a note: as many as are
// given, and none that is empty.
func (w *watcher) annotate(name string, values ...string) string {
	p := fakePod{"default", name, uids[name], map[string]string{}, 0}
	for i, value := range values {
		if value != "" {
			p.annotations[[]string{annotation, filterAnnotation, interfaceAnnotation, "note"}[i]] = value
		}
	}
	return w.api.put(p)
}

// captures checks what is captured, each by "<pod>=<N>".
func (w *watcher) captures(want ...string) {
	w.Helper()
	synctest.Wait()
	for i, text := range want {
		name, n, _ := strings.Cut(text, "=")
		want[i] = fmt.Sprintf("capture-%s.pcap %s", name, n)
	}
	w.runs(want...)
}

func (w *watcher) equal(what string, got, want any) {
	w.Helper()
	if !reflect.DeepEqual(got, want) {
		w.Errorf("%s: %v, want %v", what, got, want)
	}
}

// askedFrom checks the resourceVersions of all requests of a verb.
func (w *watcher) askedFrom(verb string, want ...string) {
	w.Helper()
	synctest.Wait()
	var got []string
	for _, r := range w.api.asked(verb) {
		got = append(got, r.query.Get("resourceVersion"))
	}
	w.equal(verb+" from", got, want)
}

// marked has the watch get a bookmark.
func (w *watcher) marked() string {
	version := w.api.bookmark()
	synctest.Wait()
	return version
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

// logged checks how often a text is in the log.
func (w *watcher) logged(text string, want int) {
	w.Helper()
	synctest.Wait()
	if got := strings.Count(w.log.String(), text); got != want {
		w.Errorf("%q is logged %d times, want %d:\n%.1000s", text, got, want, w.log)
	}
}

// gone tells the watch that its version is too old.
func (w *watcher) gone() { w.api.push(string(errorFrame(410, "too old")), goesOn) }

// gaps are the times between requests that do not come at once.
func gaps(requests []fakeRequest) (gaps []time.Duration) {
	for i := 1; i < len(requests); i++ {
		if gap := requests[i].at.Sub(requests[i-1].at); gap > 0 {
			gaps = append(gaps, gap)
		}
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

// ---- Lists and versions ----

func TestFirstList(t *testing.T) { // C6: any version, as the server's cache has it; C3: whose UID a static pod has
	watched(t, func(w *watcher) {
		w.annotate("web", "5")
		w.annotate("new")
		w.proc.pod(60, "abc")
		w.api.put(fakePod{"kube-system", "etcd", "0e7c", map[string]string{annotation: "2", filterAnnotation: "tcp port 80",
			interfaceAnnotation: "lo", hashAnnotation: "abc", mirrorAnnotation: "abc"}, 0})
		// One of the two alone could be anybody's, with another pod's UID.
		w.api.put(fakePod{"shop", "thief", "0bad", map[string]string{annotation: "1", hashAnnotation: uids["db"]}, 0})
		version := w.api.bookmark() // the list's version is newer than that of any of its pods
		w.follows()
		w.captures("etcd=2", "web=5")
		w.askedFrom("list", "0") // that it sets nothing else is checked by the fake
		w.askedFrom("watch", version)
		w.logged("the interface is lo; the filter is", 1)
	})
}

func TestEvents(t *testing.T) { // C2 and C6: what they say is applied, and they leave nothing to the next
	watched(t, func(w *watcher) {
		w.annotate("web", "5")
		w.annotate("db", "3")
		w.follows()
		w.captures("db=3", "web=5")
		w.annotate("web", "5") // the same again: its version is another one
		w.annotate("db", "4", "udp", "lo")
		w.annotate("new", "1", "", "", strings.Repeat("x", 1_500_000)) // bufio.Scanner would end at 64 KB
		w.captures("db=4", "new=1", "web=5")
		w.api.push(string(watchFrame("DELETED", fakePod{"default", "web", "01d", nil, 9000}.object())), goesOn)
		w.captures("db=4", "new=1", "web=5") // what is late about its predecessor stops nothing
		w.equal("children", w.kids.started(), 4)
		w.logged("the filter is", 1) // that of db
		w.logged("the interface is", 1)
		w.annotate("web", "5", "udp")
		w.captures("db=4", "new=1", "web=5")
		w.equal("children", w.kids.started(), 5)
		w.annotate("db")
		w.api.remove("default", "new")
		w.captures("web=5")
		w.annotate("web")
		w.captures()
		w.equal("watches", len(w.api.asked("watch")), 1)
	})
}

// C6: nothing of a broken list is applied, or all captures would be stopped, and no watch goes on without a list. A list asks
// for what is no older than the last version, until the server can't serve that.
func TestBrokenList(t *testing.T) {
	type test struct {
		fault
		keeps bool // the next list asks for the last version again
	}
	each(t, map[string]test{
		"cut in a pod":         {fault{code: 200, body: `{"metadata":{"resourceVersion":"v1"},"items":[{"metadata":{"name":"a",`}, true},
		"cut behind the items": {fault{code: 200, body: `{"metadata":{"resourceVersion":"v1"},"items":[]`}, true},
		"no resourceVersion":   {fault{code: 200, body: `{"metadata":{},"items":[]}`}, true},
		"a page":               {fault{code: 200, body: "<html>a proxy's page</html>"}, true},
		"items of no list":     {fault{code: 200, body: `{"metadata":{"resourceVersion":"v1"},"items":{}}`}, true},
		"lost":                 {fault{err: io.ErrUnexpectedEOF}, true},
		"500":                  {fault{code: 500}, true},
		"410":                  {fault{code: 410}, false},
		"504":                  {fault{code: 504}, false}, // as if the server was restored from a backup
	}, func(w *watcher, test test) {
		w.annotate("web", "5")
		w.follows()
		last := w.marked()
		test.times = 1
		w.api.fail("list", test.fault)
		w.gone()
		w.annotate("db", "3")
		w.captures("web=5")
		w.equal("watches without a list", w.api.watching(), 0)
		w.pass(2 * time.Second)
		w.captures("db=3", "web=5")
		w.equal("children", w.kids.started(), 2)
		w.askedFrom("list", "0", last, map[bool]string{true: last}[test.keeps])
	})
}

// C6: after a 410 a list has all: what goes on goes on, what is absent is stopped. It comes at once.
func TestGone(t *testing.T) {
	each(t, map[string]bool{"as the answer": false, "as an event": true}, func(w *watcher, goneIs200 bool) {
		w.annotate("web", "5")
		w.annotate("db", "5")
		w.follows()
		last := w.marked()
		w.api.fail("watch", fault{times: 1, code: 500}) // a gap in which a pod goes and one comes
		w.api.drop()
		synctest.Wait()
		w.api.remove("default", "db")
		w.annotate("new", "1")
		w.api.compact(goneIs200)
		w.pass(2 * time.Second)
		w.captures("new=1", "web=5")
		w.askedFrom("list", "0", last)
		w.equal("children", w.kids.started(), 3)
		watches, lists := w.api.asked("watch"), w.api.asked("list")
		if len(watches) != 4 || len(lists) != 2 || lists[1].at != watches[2].at {
			w.Errorf("it did not list at once: %v, %v", watches, lists)
		}
	})
}

// ---- What an end of a watch means ----

func TestTimeLimit(t *testing.T) { // C6: its end is no failure, and the watches of many nodes spread
	watched(t, func(w *watcher) {
		w.follows()
		w.pass(24 * time.Hour)
		watches, seen := w.api.asked("watch"), map[string]bool{}
		for i, gap := range gaps(watches) {
			seconds := watches[i].query.Get("timeoutSeconds") // that it is in 300..600 is checked by the fake
			if seen[seconds] = true; fmt.Sprint(gap.Seconds()) != seconds {
				w.Fatalf("a watch of %s s was followed by another after %v", seconds, gap)
			}
		}
		if len(seen) < 60 {
			w.Errorf("a day saw only %d limits", len(seen))
		}
		w.askedFrom("list", "0")
		w.equal("the log", w.log.String(), "")
	})
}

// C6: an event that is cut, or is none, applies nothing. Whatever ends a watch, the next one goes on without a list, from the
// version of the last event that was one, and not that of an ERROR. It waits unless the server ended the watch in time, and
// then begins the backoff anew if the watch has shown that it works.
func TestEndOfWatch(t *testing.T) {
	const least, after6 = 800 * time.Millisecond, 15 * time.Second
	frame := func(kind string) string {
		return string(watchFrame(kind, fakePod{"default", "web", "01d", nil, 9}.object()))
	}
	mark := string(bookmarkFrame(9))
	deleted := string(watchFrame("DELETED", fakePod{"default", "web", uids["web"], nil, 10}.object()))
	type test struct {
		silent time.Duration
		text   string
		end    ending
		wait   time.Duration // up to twice that
		from   string
	}
	each(t, map[string]test{
		"in time, after ADDED":    {0, frame("ADDED"), ends, 0, "v9"},
		"in time, after MODIFIED": {0, frame("MODIFIED"), ends, 0, "v9"},
		"in time, after DELETED":  {0, frame("DELETED"), ends, 0, "v9"},
		"in time, after BOOKMARK": {0, mark, ends, 0, "v9"},
		"in time, after a while":  {2 * time.Second, "", ends, 0, "v102"},
		"lost after an event":     {0, mark, breaks, least, "v9"},
		"lost after a while":      {2 * time.Second, "", breaks, least, "v102"},
		"a 200 alone":             {0, "", ends, after6, "v102"},
		"an ERROR":                {0, string(errorFrame(500, "")), goesOn, after6, "v102"},
		"half an event":           {0, mark[:20], ends, after6, "v102"},
		"cut":                     {0, mark + deleted[:len(deleted)-3], ends, least, "v9"}, // all of it but the last braces
		"cut by a lost one":       {0, mark + deleted[:len(deleted)-3], breaks, least, "v9"},
		"a page":                  {0, mark + "<html>", goesOn, least, "v9"},
		"a string":                {0, mark + `"ADDED" `, goesOn, least, "v9"},
		"null":                    {0, mark + "null ", goesOn, least, "v9"},
		"another object":          {0, mark + `{"type":"DELETED","object":42}`, goesOn, least, "v9"},
		"no resourceVersion":      {0, mark + `{"type":"DELETED","object":{"metadata":{"uid":"0eb"}}}`, goesOn, least, "v9"},
		"BOOKMARK of nothing":     {0, mark + `{"type":"BOOKMARK","object":{"metadata":{}}}`, goesOn, least, "v9"},
		"ERROR without object":    {0, mark + `{"type":"ERROR"}`, goesOn, least, "v9"},
		"wrong types":             {0, mark + `{"object":{"metadata":{"uid":7,"resourceVersion":"v8"}}}`, goesOn, least, "v9"},
	}, func(w *watcher, test test) {
		w.annotate("web", "5")
		w.follows()
		w.marked()
		w.api.fail("watch", fault{times: 6, code: 500})
		w.api.drop()
		w.untilWatching()
		w.pass(test.silent)
		before, ended := len(w.api.asked("watch")), time.Now()
		w.api.push(test.text, test.end)
		w.captures("web=5")
		w.pass(longestWait)
		watches := w.api.asked("watch")[before:]
		if len(watches) == 0 {
			w.Fatal("it watches no more")
		}
		if wait := watches[0].at.Sub(ended); wait < test.wait || wait > 2*test.wait {
			w.Errorf("it waited %v, want from %v to twice that", wait, test.wait)
		}
		w.equal("it watches from", watches[0].query.Get("resourceVersion"), test.from)
		w.askedFrom("list", "0")
		w.captures("web=5")
		w.annotate("web", "6")
		w.captures("web=6")
	})
}

// ---- Trouble ----

// C5, C6 and C7: whatever the trouble, the server is asked again after the waits of the backoff, on top of what it asks for;
// the log tells once when it begins and when it ends, the second time too; the version is kept, and the capture goes on.
func TestTrouble(t *testing.T) {
	reset := &net.OpError{Op: "read", Net: "tcp", Source: &ports{}, Addr: &net.TCPAddr{}, Err: syscall.ECONNRESET}
	type test struct {
		verb string
		fault
		says  string
		burst int // requests at once
	}
	each(t, map[string]test{
		"410 as the answer":     {"watch", fault{code: 410}, "410 Gone", 4},
		"410 as an event":       {"watch", fault{code: 200, body: string(errorFrame(410, ""))}, "410 Gone", 4},
		"410 of the list":       {"list", fault{code: 410}, "410 Gone", 2},
		"200, then closed":      {"watch", fault{code: 200}, "EOF", 1},
		"200 with garbage":      {"watch", fault{code: 200, body: "no"}, "invalid character", 1},
		"an ERROR":              {"watch", fault{code: 200, body: string(errorFrame(500, "no leader"))}, "no leader", 1},
		"401":                   {"watch", fault{code: 401}, "401 Unauthorized", 1},
		"403":                   {"list", fault{code: 403}, "403 Forbidden: so the test wants it", 1},
		"429 of the list":       {"list", fault{code: 429, retryAfter: "40"}, "429 Too Many Requests", 1},
		"502 of a proxy":        {"watch", fault{code: 502, body: "<html>"}, "502 Bad Gateway", 1},
		"504":                   {"watch", fault{code: 504}, "504 Gateway Timeout", 1},
		"504 of the list":       {"list", fault{code: 504}, "504 Gateway Timeout", 1},
		"refused":               {"watch", fault{err: syscall.ECONNREFUSED}, "connection refused", 1},
		"lost":                  {"watch", fault{err: reset}, "connection reset", 1},
		"Retry-After of a word": {"watch", fault{code: 503, retryAfter: "soon"}, "503 Service", 1},
		"Retry-After below 0":   {"watch", fault{code: 429, retryAfter: "-100"}, "429 Too", 1},
		"Retry-After of years":  {"watch", fault{code: 429, retryAfter: "99999999999"}, "429 Too", 1},
	}, func(w *watcher, test test) {
		seconds, _ := strconv.Atoi(test.retryAfter)
		w.annotate("web", "5")
		w.follows()
		for outage := range 2 {
			last, before := w.marked(), len(w.api.asked("list", "watch"))
			w.api.fail(test.verb, test.fault)
			if test.verb == "list" {
				w.gone()
			}
			w.api.drop()
			w.pass(15 * time.Minute)
			requests := w.api.asked("list", "watch")[before:]
			waits := gaps(requests)
			for i := range waits {
				waits[i] -= time.Duration(min(max(seconds, 0), 60)) * time.Second
			}
			checkBackoff(w, waits, 10, 30*time.Second)
			if most := test.burst * (len(waits) + 1); len(requests) > most {
				w.Errorf("%d requests, want %d", len(requests), most)
			}
			w.logged("WARN", outage+1)
			w.logged(test.says, outage+1)
			w.logged("watched again", outage)
			w.api.heal()
			w.untilWatching()
			watches := w.api.asked("watch")
			w.equal("it watches from", watches[len(watches)-1].query.Get("resourceVersion"), last)
			if test.verb == "watch" && test.code == 200 { // then another 200 says nothing
				w.logged("watched again", outage)
				w.marked()
			}
			w.logged("watched again", outage+1)
		}
		if test.verb == "watch" && test.burst == 1 {
			w.askedFrom("list", "0")
		}
		w.annotate("db", "1")
		w.captures("db=1", "web=5")
		w.equal("children", w.kids.started(), 2)
	})
}

// ports is the address of a client whose port differs each time.
type ports struct {
	net.Addr
	last int
}

func (p *ports) String() string {
	p.last++
	return fmt.Sprint("10.0.0.9:", p.last)
}

// C5 and C6: no request waits for ever, though the server may answer pings; a watch that is merely silent is not ended.
// Captures hang on neither a list nor a watch.
func TestDeadlines(t *testing.T) {
	watched(t, func(w *watcher) {
		w.annotate("web", "5")
		w.api.freeze()
		w.follows()
		w.pass(time.Minute + longestWait)
		w.equal("lists", len(w.api.asked("list")), 2)
		w.api.thaw()
		w.pass(5*time.Minute - longestWait)
		w.annotate("db", "1")
		w.captures("db=1", "web=5")
		w.equal("watches", len(w.api.asked("watch")), 1)
		w.api.freeze()
		w.pass(22 * time.Minute) // one is open, the next is not answered
		watches := w.api.asked("watch")
		for i, gap := range gaps(watches) {
			limit, _ := time.ParseDuration(watches[i].query.Get("timeoutSeconds") + "s")
			if limit += 30 * time.Second; gap < limit || gap > limit+longestWait {
				w.Errorf("a watch with a deadline of %v was given up after %v", limit, gap)
			}
		}
		w.equal("there is a third watch", len(watches) > 2, true)
		w.api.thaw()
		w.pass(longestWait)
		w.captures("db=1", "web=5")
		w.equal("children", w.kids.started(), 2)
	})
}

// ---- The token and the connection ----

func TestToken(t *testing.T) { // C6: it is read for each request; a 401, or none to read, is waited out
	watched(t, func(w *watcher) {
		first := w.annotate("web", "5")
		w.follows()
		w.pass(time.Second / 2) // watches end at whole seconds: never between the two files
		for _, token := range []string{"token-2", "token-3"} {
			w.pass(time.Hour)
			w.api.mount("token", token+"\n")
			w.api.accept(token)
		}
		w.logged("WARN", 0)
		w.api.accept("token-4")
		w.api.drop()
		w.pass(10 * time.Second)
		must(w, os.Remove(filepath.Join(w.account, "token")))
		w.pass(30 * time.Second)
		w.logged("401 Unauthorized", 1)
		w.logged("account's token", 1)
		w.api.mount("token", "token-4")
		w.pass(longestWait)
		w.annotate("web", "6")
		w.captures("web=6")
		w.equal("children", w.kids.started(), 2)
		for _, r := range w.api.asked("watch") {
			w.equal("a watch from", r.query.Get("resourceVersion"), first)
		}
	})
}

// lister lists over a real connection.
func lister(t *testing.T, f *fakeAPI, api string) func() error {
	k := newKube(api, f.account)
	w := newPodWatch(&node{config: config{nodeName: "node-1"}, kube: k})
	return func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		defer k.http.CloseIdleConnections()
		return w.list(ctx)
	}
}

// C6: HTTP/2, without which there are no pings; an IPv6 address. Only a server of the CA is given the token; the CA may be
// replaced, and one that can't be read leaves the last.
func TestConnection(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			t.Logf("this machine has no %s: %v", address, err)
			continue
		}
		f := newFakeAPI(t)
		server := f.serve(listener)
		host, port, _ := net.SplitHostPort(listener.Addr().String())
		cfg, err := readConfig(environment("KUBERNETES_SERVICE_HOST="+host, "KUBERNETES_SERVICE_PORT="+port))
		list := lister(t, f, cfg.api)
		must(t, err, list())
		if got := f.asked("list")[0].proto; got != 2 {
			t.Errorf("it speaks HTTP/%d", got)
		}
		server.Close()
		listener, err = net.Listen("tcp", listener.Addr().String())
		must(t, err)
		certificate, ca := newCertificate(t)
		f.serve(listener, certificate)
		if err := list(); err == nil || len(f.asked("list")) > 1 {
			t.Fatalf("the new CA is trusted before it is mounted: %v", err)
		}
		f.mount("ca.crt", ca)
		must(t, list())
		for _, text := range []string{ca[:100], "", "missing"} {
			if f.mount("ca.crt", text); text == "missing" {
				must(t, os.Remove(filepath.Join(f.account, "ca.crt")))
			}
			if err := list(); err != nil {
				t.Errorf("with the CA %q the last one must stay: %v", text, err)
			}
			if err := lister(t, f, cfg.api)(); err == nil || !strings.Contains(err.Error(), "ca.crt") {
				t.Errorf("with the CA %q from the beginning: %v", text, err)
			}
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

// C6: pings keep a connection that is silent, and end one that is half open. No proxy is asked: init has set HTTPS_PROXY.
func TestFrozenConnection(t *testing.T) {
	watched(t, func(w *watcher) {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		dialed := make(chan net.Conn)
		defer close(dialed)
		w.api.serve(pipes{listener, dialed})
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(someCA)
		var connections []*freezing
		transport := newKube("https://kubernetes.test", w.account).http.Transport.(*http.Transport)
		transport.DialTLSContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			dialed <- theirs
			connections = append(connections, &freezing{Conn: ours})
			conn := tls.Client(connections[len(connections)-1], &tls.Config{
				RootCAs: roots, ServerName: "example.com", NextProtos: []string{"h2"}})
			return conn, conn.HandshakeContext(ctx)
		}
		w.kube.api, w.kube.http.Transport = "https://kubernetes.test", transport
		w.follows()
		w.pass(4 * time.Minute)
		if got := w.api.asked("watch"); len(got) != 1 || got[0].proto != 2 || len(connections) != 1 {
			w.Fatalf("%d watches, %d connections", len(got), len(connections))
		}
		w.marked() // so that the next ping is as late as it can be
		connections[0].frozen.Store(true)
		w.annotate("web", "6")
		w.pass(50 * time.Second)
		w.logged("the pods can't be watched", 1)
		w.captures("web=6")
		w.equal("watches", len(w.api.asked("watch")), 2)
		w.end()
		w.program.Wait()
		transport.CloseIdleConnections()
	})
}

// ---- Configuration and health ----

// environment is what readConfig reads, right but for some "<name>=<value>".
func environment(set ...string) func(string) string {
	all := map[string]string{"NODE_NAME": "node-1", "KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
	for _, text := range set {
		name, value, _ := strings.Cut(text, "=")
		all[name] = value
	}
	return func(name string) string { return all[name] }
}

func TestReadConfig(t *testing.T) { // C1; C6: without a node the pods of none would be selected
	hostname, _ := os.Hostname()
	least := 64<<20 + 1_000_000 + 262_144 + 16 // the log, and one file
	for set, change := range map[string]func(c *config){
		"none":                              func(c *config) {},
		"KUBERNETES_SERVICE_HOST=fd00::1":   func(c *config) { c.api = "https://[fd00::1]:443" },
		"DISK_LIMIT=1073741824":             func(c *config) { c.diskLimit = 1<<30 - 64<<20 },
		fmt.Sprintf("DISK_LIMIT=%d", least): func(c *config) { c.diskLimit = 1_262_160 },
		"DISK_FREE=0":                       func(c *config) { c.diskFree = 0 },
		"DISK_FREE=99":                      func(c *config) { c.diskFree = 99 },
	} {
		want := config{nodeName: "node-1", podName: hostname, api: "https://10.96.0.1:443", proc: "/proc", root: "/",
			account: "/var/run/secrets/kubernetes.io/serviceaccount", diskLimit: math.MaxInt64 - 64<<20, diskFree: 15}
		change(&want)
		if got, err := readConfig(environment(set)); err != nil || got != want {
			t.Errorf("with %s it is %+v, %v; want %+v", set, got, err, want)
		}
	}
	for _, set := range []string{"NODE_NAME=", "KUBERNETES_SERVICE_HOST=", "KUBERNETES_SERVICE_PORT=", "DISK_FREE=100", "DISK_FREE=-1",
		"DISK_FREE=15%", "DISK_LIMIT=1Gi", fmt.Sprintf("DISK_LIMIT=%d", least-1)} {
		name, _, _ := strings.Cut(set, "=")
		if _, err := readConfig(environment(set)); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("with %s the error is %v", set, err)
		}
	}
}

// C6: until the first watch it waits 3 s at most. C7: until a list has been applied it is not ready, and only what is stuck
// is not healthy.
func TestHealth(t *testing.T) {
	watched(t, func(w *watcher) {
		probe := func(path string, want int) {
			t.Helper()
			answer := httptest.NewRecorder()
			w.ServeHTTP(answer, httptest.NewRequest("GET", path, nil))
			w.equal(path, answer.Code, want)
		}
		w.api.fail("list", fault{times: 10, code: 500})
		w.api.fail("watch", fault{code: 500})
		w.follows()
		probe("/readyz", 503)
		probe("/healthz", 200)
		w.pass(time.Hour) // a server that is away matters for neither
		probe("/readyz", 200)
		probe("/healthz", 200)
		checkBackoff(w, gaps(w.api.asked("list", "watch")), 1000, 3*time.Second)
		w.api.heal()
		w.untilWatching()
		w.start = func(ctx context.Context, network *os.File, arguments ...string) (*child, error) {
			if network == nil { // it compiles a filter
				time.Sleep(time.Minute)
			}
			return w.kids.start(ctx, network, arguments...)
		}
		w.annotate("web", "5", "udp")
		w.pass(29 * time.Second)
		probe("/healthz", 200)
		w.pass(2 * time.Second)
		probe("/healthz", 503)
		w.pass(30 * time.Second)
		probe("/healthz", 200)
		// Connections that do nothing can't pile up.
		server := w.health()
		w.equal("timeouts", []time.Duration{server.ReadTimeout, server.WriteTimeout, server.IdleTimeout},
			[]time.Duration{5 * time.Second, 5 * time.Second, time.Minute})
	})
}

// ---- Events ----

func TestEventIsPosted(t *testing.T) { // C7: to its pod's namespace, and of the UID that the kubelet uses
	watched(t, func(w *watcher) {
		w.follows()
		w.pass(time.Hour)
		w.api.put(fakePod{"shop", "web", "05", map[string]string{annotation: "x", hashAnnotation: "hash", mirrorAnnotation: "hash"}, 0})
		synctest.Wait()
		posted := w.api.posted()
		if len(posted) != 1 {
			w.Fatalf("posted %v", posted)
		}
		type fields = map[string]any
		w.equal("Event", posted[0], fields{
			"apiVersion": "v1", "kind": "Event",
			"metadata":       fields{"namespace": "shop", "generateName": fmt.Sprintf("packetcapture-%x-", time.Date(2000, 1, 1, 1, 0, 0, 0, time.UTC).UnixNano())},
			"involvedObject": fields{"apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "web", "uid": "hash"},
			"type":           "Warning", "reason": "CaptureInvalid", "message": posted[0]["message"], "count": 1.0,
			"source":         fields{"component": "packetcapture", "host": "node-1"},
			"firstTimestamp": "2000-01-01T01:00:00Z", "lastTimestamp": "2000-01-01T01:00:00Z",
		})
		w.logged(fmt.Sprintf("level=WARN msg=CaptureInvalid namespace=shop pod=web n=x message=%q", posted[0]["message"]), 1)
		w.annotate("web", "5")
		w.logged("level=INFO msg=CaptureStarted", 1)
		w.api.freeze()
		w.kids.last().exit("", errKilled)
		w.pass(13 * time.Second)
		w.equal("posts, two of an Event that is not answered", len(w.api.asked("post")), 4)
		w.api.thaw()
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
		"400":                  {fault{code: 400}, 1},
		"403":                  {fault{code: 403}, 1}, // of a namespace that is being deleted
		"404":                  {fault{code: 404}, 1},
		"422":                  {fault{code: 422}, 1},
		"500":                  {fault{code: 500}, 1}, // a webhook of this namespace
	}, func(w *watcher, test test) {
		taken := min(test.times, 1)
		w.follows()
		w.api.fail("post", test.fault)
		w.annotate("web", "x")
		w.pass(10 * time.Minute)
		posts := w.api.asked("post")
		w.equal("tries", len(posts), test.tries)
		w.equal("taken", len(w.api.posted()), taken)
		waits := gaps(posts)
		if test.retryAfter != "" && len(waits) > 0 {
			waits[0] -= 40 * time.Second
		}
		checkBackoff(w, waits, test.tries-1, 30*time.Second)
		w.api.heal() // one that is refused holds up no other
		w.annotate("web", "y")
		synctest.Wait()
		w.equal("taken", len(w.api.posted()), taken+1)
		w.logged("an Event is not posted", 1-taken)
	})
}

// C6 and C7: the reader never waits for a start, a stop or an Event: the server would close the watch. Here no child ends
// soon, and the Events wait together while the server takes none; then they come in order.
func TestFlood(t *testing.T) {
	watched(t, func(w *watcher) {
		w.kids.behave(behaviour{startup: time.Hour, shutdown: time.Second})
		w.api.fail("post", fault{code: 503})
		first := w.annotate("web", "5")
		w.follows()
		last := ""
		for i := range 2000 {
			w.annotate("web", fmt.Sprint("x", i))
			last = w.annotate("web", fmt.Sprint(i%7+1))
		}
		synctest.Wait()
		w.api.drop()
		w.askedFrom("watch", first, last) // all was read in no time
		w.pass(5 * time.Second)
		w.captures("web=5")
		w.pass(10 * time.Minute)
		if got := len(w.api.asked("post")); got > 50 { // 0.8, 1.6, 3.2, 6.4, 12.8, 15, 15… s
			w.Errorf("%d posts in 10 minutes", got)
		}
		w.api.heal()
		w.pass(longestWait)
		posted := w.api.posted()
		for i, e := range posted {
			if !strings.Contains(fmt.Sprint(e["message"]), fmt.Sprintf(`"x%d"`, i)) {
				w.Fatalf("Event %d is %v", i, e["message"])
			}
		}
		if len(posted) < 1000 { // more than are kept are lost
			w.Errorf("%d Events were posted", len(posted))
		}
	})
}

// C7: a Warning that stays the same is not told again within 5 minutes. One that came in between is at once, and what it is after that.
func TestRepeatedWarnings(t *testing.T) {
	watched(t, func(w *watcher) {
		w.annotate("web", "5")
		w.kids.behave(behaviour{refusal: errors.New("no memory")})
		w.follows()
		for _, why := range []string{"no memory", "no file", "no memory"} {
			w.kids.behave(behaviour{refusal: errors.New(why)})
			w.pass(longestWait)
		}
		w.equal("Events", len(w.api.posted()), 3)
		w.pass(5*time.Minute + longestWait)
		w.equal("Events", len(w.api.posted()), 4)
	})
}

// C5 and C7: what was told before the end of the program is posted, and holds up its end for exitGrace at most.
func TestLastEvents(t *testing.T) {
	type test struct {
		frozen time.Duration // after the end
		posted int
	}
	each(t, map[string]test{
		"at once":                       {0, 2},
		"while the server thinks":       {4 * time.Second, 2},
		"while the server answers none": {time.Hour, 0},
	}, func(w *watcher, test test) {
		w.annotate("web", "5")
		w.follows()
		w.pass(time.Minute)
		before := len(w.api.posted())
		if test.frozen > 0 {
			w.api.freeze()
		}
		w.kids.last().exit("", errKilled)
		synctest.Wait() // that is being posted
		began := time.Now()
		time.AfterFunc(test.frozen, w.api.thaw)
		w.end()
		w.program.Wait()
		if took := time.Since(began); took > min(test.frozen, exitGrace) {
			w.Errorf("the program took %v to end", took)
		}
		posted := w.api.posted()[before:]
		if len(posted) != test.posted || test.posted > 0 && posted[1]["reason"] != "CaptureStopped" {
			w.Errorf("posted were %v", posted)
		}
	})
}
