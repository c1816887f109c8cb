package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// The numbers of the rules are those of facts.md, "List and watch". Time is that of a bubble wherever it matters, so
// that an hour costs nothing and two moments can be equal.

func init() {
	// No request of any test may go there. The proxy of the environment is read once in a process, hence not t.Setenv.
	os.Setenv("HTTPS_PROXY", "http://proxy.test:3128")
}

const (
	longestWait = 34 * time.Second // for another try, and a little
	goneText    = "too old resource version"
)

// follower is a controller's podWatch that follows the fake. Nobody is behind it but the test: it is as if the
// controller's loop were busy.
type follower struct {
	*podWatch
	api     *fakeAPI
	changes chan change
	log     *logged
}

// newFollower makes a podWatch as the program does, but without network.
func newFollower(t *testing.T, f *fakeAPI) *follower {
	t.Helper()
	cfg := testConfig(t, newProc(t).dir, t.TempDir())
	cfg.node, cfg.account = f.node, f.account
	c, err := newController(cfg)
	must(t, err)
	c.watch.kube = f.kube()
	f.most = 5000 // so that a loop without waits ends
	return &follower{podWatch: c.watch, api: f, changes: c.changes, log: captureLog(t)}
}

// follow starts a podWatch, which has listed when it returns. The bubble's end stops it.
func follow(t *testing.T, f *fakeAPI) *follower {
	t.Helper()
	w := newFollower(t, f)
	go w.run(t.Context())
	synctest.Wait()
	return w
}

// next takes the next change, which must be there.
func (w *follower) next(t *testing.T) change {
	t.Helper()
	synctest.Wait()
	select {
	case c := <-w.changes:
		return c
	default:
		t.Fatal("no change came")
		return change{}
	}
}

// expect takes the next changes, each written as its kind and its Pods: "ADDED web=5".
func (w *follower) expect(t *testing.T, wanted ...string) {
	t.Helper()
	synctest.Wait()
	var got []string
	for len(w.changes) > 0 {
		c := <-w.changes
		text := c.kind
		for _, p := range c.pods {
			text += " " + p.name
			if p.annotated {
				text += "=" + p.value
			}
		}
		got = append(got, text)
	}
	if !slices.Equal(got, wanted) {
		t.Errorf("the changes are %q, want %q", got, wanted)
	}
}

// watchedFrom checks from which resourceVersions was watched, the first time apart.
func (w *follower) watchedFrom(t *testing.T, wanted ...string) {
	t.Helper()
	synctest.Wait()
	if got := versions(w.api.asked("watch"))[1:]; !slices.Equal(got, wanted) {
		t.Errorf("watched again from %q, want %q", got, wanted)
	}
}

func versions(requests []fakeRequest) (versions []string) {
	for _, r := range requests {
		versions = append(versions, r.query.Get("resourceVersion"))
	}
	return versions
}

func verbs(requests []fakeRequest) (verbs []string) {
	for _, r := range requests {
		verbs = append(verbs, r.verb)
	}
	return verbs
}

// gaps are the times between requests.
func gaps(requests []fakeRequest) (gaps []time.Duration) {
	for i := 1; i < len(requests); i++ {
		gaps = append(gaps, requests[i].at.Sub(requests[i-1].at))
	}
	return gaps
}

// ---- Lists ----

func TestFirstList(t *testing.T) { // C6, rules 1, 2 and 15
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.annotate("web", "5")
		f.annotate("plain", "")
		// A static Pod's two annotations are the kubelet's; one of them alone could be anybody's, with another Pod's UID.
		f.put(fakePod{"kube-system", "etcd-node-1", "uid-etcd", map[string]string{
			"tcpdump.antrea.io": "2", "tcpdump.antrea.io/filter": "tcp port 80",
			"kubernetes.io/config.hash": "abc", "kubernetes.io/config.mirror": "abc"}, 0})
		f.put(fakePod{"shop", "thief", "uid-thief", map[string]string{
			"tcpdump.antrea.io": "1", "kubernetes.io/config.hash": "uid-web"}, 0})
		w := follow(t, f)
		want := change{kind: "LISTED", pods: []pod{
			{namespace: "default", name: "web", uid: "uid-web", kubeletUID: "uid-web", annotated: true, value: "5"},
			{namespace: "kube-system", name: "etcd-node-1", uid: "uid-etcd", kubeletUID: "abc", annotated: true, value: "2", filter: "tcp port 80"},
			{namespace: "shop", name: "thief", uid: "uid-thief", kubeletUID: "uid-thief", annotated: true, value: "1"},
		}}
		if got := w.next(t); !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
		requests := f.asked("")
		if got := verbs(requests); !slices.Equal(got, []string{"list", "watch"}) {
			t.Fatalf("asked for %v", got)
		}
		list, watch := requests[0], requests[1]
		if got := list.query; got.Get("resourceVersion") != "0" || got.Has("limit") || len(got) != 2 {
			t.Errorf("the list asked for %v", got)
		}
		if want := "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"; list.accept != want {
			t.Errorf("the list accepts %s", list.accept)
		}
		if want := "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"; watch.accept != want {
			t.Errorf("the watch accepts %s", watch.accept)
		}
	})
}

func TestWatchFollowsTheList(t *testing.T) { // C6, rules 2 and 4
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.annotate("web", "5")
		f.annotate("db", "3")
		version := f.bookmark() // the list's version is newer than that of any of its Pods
		w := follow(t, f)
		w.expect(t, "LISTED db=3 web=5")
		watch := f.asked("watch")[0]
		if got := watch.query.Get("resourceVersion"); got != version {
			t.Errorf("watched from %s, want the list's %s", got, version)
		}
		f.annotate("web", "6")
		f.annotate("db", "")
		f.remove("default", "web")
		f.annotate("new", "1")
		w.expect(t, "MODIFIED web=6", "MODIFIED db", "DELETED web=6", "ADDED new=1")
	})
}

func TestTimeLimitIsRandom(t *testing.T) { // C6, rule 4: the watches of many nodes spread
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		follow(t, f)
		time.Sleep(6 * time.Hour)
		seen := map[string]bool{}
		for _, r := range f.asked("watch") {
			seen[r.query.Get("timeoutSeconds")] = true // that it is in 300..600 is checked by the fake
		}
		if len(seen) < 20 {
			t.Errorf("6 hours saw only the limits %v", slices.Collect(maps.Keys(seen)))
		}
	})
}

func TestListIsContinued(t *testing.T) { // C6, rule 2
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.pageSize = 2
		var version string
		for i := range 5 {
			version = f.annotate(fmt.Sprintf("web-%d", i), "1")
		}
		w := follow(t, f)
		w.expect(t, "LISTED web-0=1 web-1=1 web-2=1 web-3=1 web-4=1")
		if got := len(f.asked("list")); got != 3 {
			t.Errorf("%d pages were asked for, want 3", got)
		}
		if got := f.asked("watch")[0].query.Get("resourceVersion"); got != version {
			t.Errorf("watched from %s, want %s", got, version)
		}
	})
}

func TestListThatBreaksAppliesNothing(t *testing.T) { // C6, rules 2, 3 and 7: else all captures would be stopped
	page := `{"metadata":{"resourceVersion":"v1"%s},"items":[{"metadata":{"name":"a","uid":"a","resourceVersion":"v1"}}]}`
	for name, met := range map[string]fault{
		"cut":                  {times: 1, code: 200, body: page[:len(page)-4]},
		"no resourceVersion":   {times: 1, code: 200, body: `{"metadata":{},"items":[]}`},
		"garbage":              {times: 1, code: 200, body: "<html>a proxy's page</html>"},
		"nothing":              {times: 1, code: 200},
		"an array":             {times: 1, code: 200, body: `[{"resourceVersion":"v1"}]`},
		"items of no list":     {times: 1, code: 200, body: `{"metadata":{"resourceVersion":"v1"},"items":{}}`},
		"an item of no Pod":    {times: 1, code: 200, body: `{"metadata":{"resourceVersion":"v1"},"items":[7]}`},
		"cut behind the items": {times: 1, code: 200, body: `{"metadata":{"resourceVersion":"v1"},"items":[]`},
		"cut before the items": {times: 1, code: 200, body: `{"metadata":{"resourceVersion":"v1"}`},
		"lost":                 {times: 1, err: io.ErrUnexpectedEOF},
		"continue is refused":  {times: 1, code: 200, body: fmt.Sprintf(page, `,"continue":"v1/x"`)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeAPI(t)
				f.compact(true) // so that it answers a continue of v1 with 410
				f.fail("list", met)
				f.annotate("web", "5")
				w := follow(t, f)
				w.expect(t)
				if got := f.watching(); got != 0 {
					t.Errorf("%d watches began without a list", got)
				}
				time.Sleep(longestWait)
				w.expect(t, "LISTED web=5")
			})
		})
	}
}

func TestRelistDropsTheVersionThatIsRefused(t *testing.T) { // C6, rule 1
	for _, code := range []int{410, 504} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeAPI(t)
				w := follow(t, f)
				last := f.annotate("web", "5")
				synctest.Wait()
				f.compact(true)
				f.fail("list", fault{times: 1, code: 500})
				f.fail("list", fault{times: 1, code: code})
				f.drop()
				time.Sleep(3 * longestWait)
				w.expect(t, "LISTED", "ADDED web=5", "LISTED web=5")
				// 500 says nothing about the version, and the one that is refused is not asked for again.
				if got, want := versions(f.asked("list")), []string{"0", last, last, ""}; !slices.Equal(got, want) {
					t.Errorf("listed from %q, want %q", got, want)
				}
			})
		})
	}
}

func TestRelistOfANewerVersionThanStored(t *testing.T) { // C6, rule 1: the server was restored from a backup
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		w := follow(t, f)
		f.annotate("web", "5")
		w.expect(t, "LISTED", "ADDED web=5")
		f.compact(true)
		f.drop()
		synctest.Wait()
		f.mu.Lock()
		f.version, f.compacted = 50, 50
		f.mu.Unlock()
		time.Sleep(3 * longestWait)
		w.expect(t, "LISTED web=5")
	})
}

// ---- Versions, and 410 ----

func TestGone(t *testing.T) { // C6, rules 1, 3 and 5
	for name, goneIs200 := range map[string]bool{"as the answer": false, "as an event": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeAPI(t)
				f.annotate("web", "5")
				f.annotate("db", "5")
				w := follow(t, f)
				last := f.bookmark()
				w.expect(t, "LISTED db=5 web=5")
				f.fail("watch", fault{times: 1, code: 500}) // a gap in which a Pod goes and one comes
				f.drop()
				synctest.Wait()
				f.remove("default", "db")
				f.annotate("new", "1")
				f.compact(goneIs200)
				time.Sleep(3 * longestWait)
				// One list that has all: what goes on is in it, what is absent is gone.
				w.expect(t, "LISTED new=1 web=5")
				if got, want := versions(f.asked("list")), []string{"0", last}; !slices.Equal(got, want) {
					t.Errorf("listed from %q, want %q", got, want)
				}
				w.watchedFrom(t, last, last, versionName(f.version))
				if got := len(w.log.lines("watched again")); got > 1 {
					t.Errorf("%d lines say that all is well", got)
				}
			})
		})
	}
}

func TestGoneInTheMiddle(t *testing.T) { // C6, rule 5: what came before it counts
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		w := follow(t, f)
		last := f.annotate("web", "5")
		f.push(string(errorFrame(410, goneText)), goesOn)
		time.Sleep(longestWait)
		w.expect(t, "LISTED", "ADDED web=5", "LISTED web=5")
		if got, want := versions(f.asked("list")), []string{"0", last}; !slices.Equal(got, want) {
			t.Errorf("listed from %q, want %q", got, want)
		}
	})
}

func TestVersionIsKept(t *testing.T) { // C6, rules 4 and 5
	for name, happens := range map[string]func(f *fakeAPI) string{
		"ADDED":    func(f *fakeAPI) string { return f.annotate("new", "1") },
		"MODIFIED": func(f *fakeAPI) string { return f.annotate("web", "6") },
		"plain":    func(f *fakeAPI) string { return f.annotate("web", "") },
		"DELETED":  func(f *fakeAPI) string { return f.remove("default", "web") },
		"BOOKMARK": func(f *fakeAPI) string { return f.bookmark() },
		"ERROR": func(f *fakeAPI) string {
			last := f.bookmark()
			f.push(string(errorFrame(500, "etcd has no leader")), goesOn)
			return last
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeAPI(t)
				f.annotate("web", "5")
				w := follow(t, f)
				last := happens(f)
				synctest.Wait()
				f.drop()
				time.Sleep(longestWait)
				w.watchedFrom(t, last)
				if got := len(f.asked("list")); got != 1 {
					t.Errorf("listed %d times", got)
				}
			})
		})
	}
}

// ---- What an end of a watch means ----

func TestCleanEnd(t *testing.T) { // C6, rule 6
	for name, happens := range map[string]func(*fakeAPI){
		"after a while":      func(f *fakeAPI) { time.Sleep(2 * time.Second) },
		"after an event":     func(f *fakeAPI) { f.bookmark() },
		"at the time limit":  func(f *fakeAPI) { time.Sleep(10*time.Minute + time.Second) },
		"after a mere error": func(f *fakeAPI) { f.fail("watch", fault{times: 1, code: 503}); f.drop(); time.Sleep(2 * longestWait) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeAPI(t)
				w := follow(t, f)
				happens(f)
				began, before := time.Now(), len(f.asked("watch"))
				f.drop()
				synctest.Wait()
				if got := f.asked("watch")[before:]; len(got) != 1 || !got[0].at.Equal(began) {
					t.Errorf("it did not watch again at once: %v", got)
				}
				if lines := w.log.lines(""); len(lines) > 0 && name != "after a mere error" {
					t.Errorf("logged %q", lines)
				}
			})
		})
	}
}

func TestTimeLimitIsNoFailure(t *testing.T) { // C6, rule 6
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.bookmarkEvery = time.Minute
		w := follow(t, f)
		time.Sleep(24 * time.Hour)
		w.expect(t, "LISTED")
		watches := f.asked("watch")
		for i, gap := range gaps(watches) {
			limit, _ := time.ParseDuration(watches[i].query.Get("timeoutSeconds") + "s")
			if gap != limit {
				t.Errorf("a watch of %v was followed by another after %v", limit, gap)
			}
		}
		if lines := w.log.lines(""); len(lines) > 0 {
			t.Errorf("logged %q", lines)
		}
	})
}

func TestInstantEnd(t *testing.T) { // C6, rules 6 and 13
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.fail("watch", fault{times: 5, code: 200})
		w := follow(t, f)
		time.Sleep(5 * time.Minute)
		checkBackoff(t, gaps(f.asked("watch")), 5)
		w.expect(t, "LISTED")
		if got := len(f.asked("list")); got != 1 {
			t.Errorf("listed %d times", got)
		}
	})
}

func TestCutEvent(t *testing.T) { // C6, rule 7
	for name, end := range map[string]ending{"by an end": ends, "by a lost connection": breaks} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeAPI(t)
				w := follow(t, f)
				last := f.annotate("web", "5")
				w.expect(t, "LISTED", "ADDED web=5")
				event := watchFrame("DELETED", fakePod{"default", "web", "uid-web", nil, 900}.object())
				f.push(string(event[:len(event)-3]), end) // all of it but the last braces
				w.expect(t)
				if got := len(f.asked("watch")); got != 1 {
					t.Error("it did not wait: this is no end at the time limit")
				}
				time.Sleep(longestWait)
				w.watchedFrom(t, last)
				f.annotate("web", "6")
				w.expect(t, "MODIFIED web=6")
			})
		})
	}
}

func TestGarbage(t *testing.T) { // C6, rule 7
	for name, text := range map[string]string{
		"a page":               "<html>502 Bad Gateway</html>",
		"binary":               "k8s\x00\x00\xff\xfe\x01",
		"a string":             `"ADDED"`,
		"null":                 "null",
		"an empty object":      "{}",
		"a list":               "[]",
		"no object":            `{"type":"DELETED"}`,
		"another object":       `{"type":"DELETED","object":42}`,
		"null for an object":   `{"type":"DELETED","object":null}`,
		"no resourceVersion":   `{"type":"DELETED","object":{"metadata":{"namespace":"default","name":"web","uid":"uid-web"}}}`,
		"BOOKMARK of nothing":  `{"type":"BOOKMARK","object":{"metadata":{}}}`,
		"ERROR without object": `{"type":"ERROR"}`,
		"ERROR of nothing":     `{"type":"ERROR","object":{}}`,
		"wrong types":          `{"type":"DELETED","object":{"metadata":{"resourceVersion":"v900","annotations":[]}}}`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeAPI(t)
				f.annotate("web", "5")
				w := follow(t, f)
				w.expect(t, "LISTED web=5")
				last := f.bookmark()
				f.push(text+"\n", goesOn)
				w.expect(t)
				time.Sleep(longestWait)
				w.watchedFrom(t, last)
				w.expect(t)
				f.annotate("web", "6")
				w.expect(t, "MODIFIED web=6")
			})
		})
	}
}

func TestLargeEvent(t *testing.T) { // C6, rule 7
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		w := follow(t, f)
		w.expect(t, "LISTED")
		f.put(fakePod{"default", "web", "uid-web", map[string]string{
			"tcpdump.antrea.io": "5", "note": strings.Repeat("x", 1_500_000)}, 0})
		f.annotate("web", "6")
		w.expect(t, "ADDED web=5", "MODIFIED web=6")
		if got := len(f.asked("watch")); got != 1 {
			t.Errorf("watched %d times", got)
		}
	})
}

// C6: a list of 10 MB is read Pod by Pod, and an event takes no memory but for its own metadata.
func TestMemoryIsBounded(t *testing.T) {
	var items []string
	for i := range 500 {
		items = append(items, podJSON(fmt.Sprintf("web-%d", i), 20_000, `"note":"x"`))
	}
	list := `{"metadata":{"resourceVersion":"1"},"items":[` + strings.Join(items, ",") + "]}"
	events := strings.Repeat(`{"type":"MODIFIED","object":`+podJSON("web", 20_000, "")+"}\n", 500)
	dir := account(t)
	reader := func(body string) *podWatch {
		k := &kube{api: "https://kubernetes.test", account: dir}
		k.http.Transport = reply(body)
		return &podWatch{kube: k, node: "node-1", changes: make(chan change, 1), version: "1", known: map[string]pod{}}
	}
	for what, read := range map[string]func() error{
		"a list": func() error { return reader(list).list(t.Context()) },
		"500 events": func() error {
			w := reader(events)
			if w.watch(t.Context()); w.version != "12345" {
				return fmt.Errorf("watched up to %q", w.version)
			}
			return nil
		},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		must(t, read())
		runtime.ReadMemStats(&after)
		if got := int(after.TotalAlloc - before.TotalAlloc); got > 1_000_000 {
			t.Errorf("%s of %d bytes allocates %d", what, len(list), got)
		}
	}
}

func TestEventsShareNothing(t *testing.T) { // C6, rule 7: a variable that is used again keeps what the next one lacks
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		w := follow(t, f)
		w.next(t)
		f.put(fakePod{"default", "a", "uid-a", map[string]string{"tcpdump.antrea.io": "5", "tcpdump.antrea.io/filter": "udp",
			"kubernetes.io/config.hash": "abc", "kubernetes.io/config.mirror": "abc"}, 0})
		f.annotate("b", "6")
		f.annotate("b", "")
		w.next(t)
		for _, want := range []pod{
			{namespace: "default", name: "b", uid: "uid-b", kubeletUID: "uid-b", annotated: true, value: "6"},
			{namespace: "default", name: "b", uid: "uid-b", kubeletUID: "uid-b"},
		} {
			if got := w.next(t); !slices.Equal(got.pods, []pod{want}) {
				t.Errorf("got %+v, want %+v", got.pods, want)
			}
		}
	})
}

// C6: what is about no capture wakes nobody, and what is about one is never held back.
func TestOnlyCapturesAreNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.annotate("web", "5")
		f.annotate("db", "")
		w := follow(t, f)
		w.expect(t, "LISTED web=5")
		f.annotate("web", "5") // the same again: its version is another one
		f.annotate("db", "")
		f.annotate("new", "")
		f.remove("default", "new")
		w.expect(t)
		f.put(fakePod{"default", "web", "uid-web", map[string]string{annotation: "5", filterAnnotation: "udp"}, 0})
		f.put(fakePod{"default", "web", "uid-web-2", map[string]string{annotation: "5", filterAnnotation: "udp"}, 0})
		f.put(fakePod{"other", "web", "uid-web-3", map[string]string{annotation: "5", filterAnnotation: "udp"}, 0})
		w.expect(t, "MODIFIED web=5", "MODIFIED web=5", "ADDED web=5")
		f.annotate("web", "")
		f.annotate("web", "") // no longer known
		f.annotate("db", "7")
		f.remove("default", "db")
		f.remove("default", "web")
		w.expect(t, "MODIFIED web", "MODIFIED db=7", "DELETED db=7")
		f.push(string(errorFrame(410, goneText)), goesOn) // a list says all again, and the next change is compared with it
		time.Sleep(longestWait)
		w.expect(t, "LISTED web=5")
		f.put(fakePod{"other", "web", "uid-web-3", map[string]string{annotation: "5", filterAnnotation: "udp"}, 0})
		f.remove("other", "web")
		w.expect(t, "DELETED web=5")
		f.put(fakePod{"default", "web", "uid-web-5", map[string]string{annotation: "5"}, 0})
		f.push(string(watchFrame("DELETED", fakePod{"default", "web", "uid-web-4", map[string]string{annotation: "5"}, 9}.object())), goesOn)
		f.put(fakePod{"default", "web", "uid-web-5", nil, 0}) // what is late about its predecessor makes nobody forget it
		w.expect(t, "ADDED web=5", "DELETED web=5", "MODIFIED web")
	})
}

func TestReaderNeverBlocks(t *testing.T) { // C6, rule 8
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		w := follow(t, f)
		var last string
		for range 1000 {
			last = f.annotate("web", "5")
		}
		synctest.Wait()
		if w.version != last {
			t.Errorf("the server could only send up to %s of %s", w.version, last)
		}
	})
}

func TestListIsNotLost(t *testing.T) { // C6, rule 8: the loop was busy for longer than a list may take
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.annotate("web", "5")
		w := newFollower(t, f)
		changes := make(chan change)
		w.podWatch.changes = changes
		go w.run(t.Context())
		time.Sleep(5 * time.Minute)
		select {
		case got := <-changes:
			if got.kind != "LISTED" || len(got.pods) != 1 {
				t.Errorf("the first change is %+v, want the list", got)
			}
		case <-time.After(2 * time.Minute):
			t.Error("no list came, and none will")
		}
	})
}

// ---- Trouble ----

func TestTroubleIsWaitedOut(t *testing.T) { // C6, rules 5, 11 and 12
	lost := &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
	for name, test := range map[string]struct {
		fault
		least time.Duration
	}{
		"401":                     {fault{times: 1, code: 401}, 800 * time.Millisecond},
		"403":                     {fault{times: 1, code: 403}, 30 * time.Second},
		"429":                     {fault{times: 1, code: 429}, 800 * time.Millisecond},
		"429 with Retry-After":    {fault{times: 1, code: 429, retryAfter: "40"}, 40 * time.Second},
		"500":                     {fault{times: 1, code: 500}, 800 * time.Millisecond},
		"502 of a proxy":          {fault{times: 1, code: 502, body: "<html>"}, 800 * time.Millisecond},
		"503 with Retry-After":    {fault{times: 1, code: 503, retryAfter: "7"}, 7 * time.Second},
		"504":                     {fault{times: 1, code: 504}, 800 * time.Millisecond},
		"Retry-After is too late": {fault{times: 1, code: 503, retryAfter: "soon"}, 800 * time.Millisecond},
		"lost":                    {fault{times: 1, err: lost}, 800 * time.Millisecond},
	} {
		for _, verb := range []string{"list", "watch"} {
			t.Run(name+"/"+verb, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					f := newFakeAPI(t)
					f.annotate("web", "5")
					f.fail(verb, test.fault)
					w := follow(t, f)
					time.Sleep(test.least + longestWait)
					// What was listed stays, and nothing is listed twice.
					w.expect(t, "LISTED web=5")
					want := map[string][]string{"list": {"list", "list", "watch"}, "watch": {"list", "watch", "watch"}}[verb]
					if got := verbs(f.asked("")); !slices.Equal(got, want) {
						t.Fatalf("asked for %v, want %v", got, want)
					}
					requests := f.asked(verb)
					if gap := gaps(requests)[0]; gap < test.least || gap > test.least+longestWait {
						t.Errorf("it waited %v, want %v and a little", gap, test.least)
					}
					if test.code != 504 && requests[0].query.Get("resourceVersion") != requests[1].query.Get("resourceVersion") {
						t.Error("the resourceVersion was not kept")
					}
				})
			})
		}
	}
}

func TestErrorEventIsWaitedOut(t *testing.T) { // C6, rule 5
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.fail("watch", fault{times: 5, code: 200, body: string(errorFrame(500, "etcd has no leader"))})
		w := follow(t, f)
		time.Sleep(5 * time.Minute)
		checkBackoff(t, gaps(f.asked("watch")), 5)
		w.expect(t, "LISTED")
		if got := w.log.lines("etcd has no leader"); len(got) != 1 {
			t.Errorf("logged %q", got)
		}
	})
}

// checkBackoff checks the waits after the first failures: 0.8 s to 30 s, and near the end of that soon.
func checkBackoff(t *testing.T, waits []time.Duration, failures int) { // C6, rule 13
	t.Helper()
	if len(waits) < failures {
		t.Fatalf("%d tries again, want %d", len(waits), failures)
	}
	for i, wait := range waits[:failures] {
		if wait < 800*time.Millisecond || wait > 30*time.Second || i >= 5 && wait < 15*time.Second {
			t.Errorf("wait %d is %v", i, wait)
		}
	}
}

func TestBackoff(t *testing.T) { // C6, rule 13
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.fail("watch", fault{code: 500})
		w := newFollower(t, f)
		for range 1000 {
			fresh := w.retry
			checkBackoff(t, []time.Duration{fresh.next(nil)}, 1)
		}
		go w.run(t.Context())
		time.Sleep(time.Hour)
		waits := gaps(f.asked("watch"))
		checkBackoff(t, waits, 120)
		if late := waits[10:]; slices.Max(late)-slices.Min(late) < 2*time.Second {
			t.Errorf("the waits have no jitter: %v", late)
		}
	})
}

func TestBackoffIsReset(t *testing.T) { // C6, rule 13
	for name, test := range map[string]struct {
		happens func(f *fakeAPI)
		resets  bool
	}{
		"by an event":      {func(f *fakeAPI) { f.bookmark(); synctest.Wait(); f.push("", breaks) }, true},
		"by a long watch":  {func(f *fakeAPI) { time.Sleep(2 * time.Second); f.push("", breaks) }, true},
		"not by a 200":     {func(f *fakeAPI) { f.drop() }, false},
		"not by an ERROR":  {func(f *fakeAPI) { f.push(string(errorFrame(500, "")), ends) }, false},
		"not by half of 1": {func(f *fakeAPI) { f.push(`{"type":"BOOKMARK"`, ends) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeAPI(t)
				follow(t, f)
				// A wait of less than 15 s is one of the first ones. One that is drawn may be longer; 30 are not.
				first := 0
				for range 30 {
					f.fail("watch", fault{times: 6, code: 500})
					f.drop()
					untilWatching(t, f)
					test.happens(f)
					synctest.Wait()
					ended := time.Now()
					untilWatching(t, f)
					if time.Since(ended) < 14*time.Second {
						first++
					}
				}
				if test.resets != (first > 0) {
					t.Errorf("%d of 30 waits were short", first)
				}
			})
		})
	}
}

// untilWatching returns at the moment, on 100 ms, at which a watch begins.
func untilWatching(t *testing.T, f *fakeAPI) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Minute)
	for synctest.Wait(); f.watching() == 0; synctest.Wait() {
		if time.Sleep(100 * time.Millisecond); time.Now().After(deadline) {
			t.Fatal("it watches no more")
		}
	}
}

func TestPermanentTroubleIsAskedRarely(t *testing.T) { // C6, rules 1, 5, 6, 12 and 13
	for name, test := range map[string]struct {
		verb string
		fault
		perTry int // requests
	}{
		"410 as the answer":     {"watch", fault{code: 410}, 2},
		"410 as an event":       {"watch", fault{code: 200, body: string(errorFrame(410, ""))}, 2},
		"410 of the list":       {"list", fault{code: 410}, 1},
		"200, then closed":      {"watch", fault{code: 200}, 1},
		"200 with garbage":      {"watch", fault{code: 200, body: "no"}, 1},
		"200 with half a list":  {"list", fault{code: 200, body: `{"items":[`}, 1},
		"401":                   {"watch", fault{code: 401}, 1},
		"403":                   {"list", fault{code: 403}, 1},
		"429":                   {"watch", fault{code: 429}, 1},
		"500":                   {"watch", fault{code: 500}, 1},
		"504":                   {"list", fault{code: 504}, 1},
		"refused":               {"watch", fault{err: syscall.ECONNREFUSED}, 1},
		"Retry-After of 1 s":    {"watch", fault{code: 429, retryAfter: "1"}, 1},
		"Retry-After of 0 s":    {"watch", fault{code: 429, retryAfter: "0"}, 1},
		"Retry-After before":    {"watch", fault{code: 429, retryAfter: "-100"}, 1},
		"an event of no object": {"watch", fault{code: 200, body: `{"type":"ADDED"}`}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeAPI(t)
				f.annotate("web", "5")
				f.fail(test.verb, test.fault)
				w := follow(t, f)
				time.Sleep(time.Hour)
				// The waits are at least 0.8, 1.6, 3.2, 6.4, 12.8, 15, 15… and at most 33 s.
				most, least := (1+5+(3600-25)/15+1)*test.perTry, 3600/33*test.perTry
				if got := len(f.asked("")); got > most+1 || got < least {
					t.Errorf("%d requests in an hour, want %d to %d", got, least, most)
				}
				if got := w.log.lines("WARN"); len(got) != 1 {
					t.Errorf("logged %d times: %q", len(got), got[:min(3, len(got))])
				}
			})
		})
	}
}

func TestNothingIsLoggedTwice(t *testing.T) { // C6 and C7
	for name, fails := range map[string]func(f *fakeAPI, i int) error{
		"refused": func(f *fakeAPI, i int) error {
			return &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{IP: net.IPv4(10, 96, 0, 1), Port: 443}, Err: syscall.ECONNREFUSED}
		},
		"reset, each time from another port": func(f *fakeAPI, i int) error {
			return &net.OpError{Op: "read", Net: "tcp", Source: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 9), Port: 40000 + i},
				Addr: &net.TCPAddr{IP: net.IPv4(10, 96, 0, 1), Port: 443}, Err: syscall.ECONNRESET}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeAPI(t)
				w := follow(t, f)
				for range 2 { // it is said again when it was well in between
					before := len(w.log.lines("WARN"))
					for i := range 50 {
						f.fail("watch", fault{times: 1, err: fails(f, i)})
					}
					f.push("", breaks)
					time.Sleep(time.Hour)
					// The first is that the watch broke, the second that it can't begin again.
					if got := w.log.lines("WARN")[before:]; len(got) < 1 || len(got) > 2 {
						t.Fatalf("logged %d times: %q", len(got), got[:min(3, len(got))])
					}
					recovered := len(w.log.lines("watched again"))
					for range 3 {
						f.bookmark()
						synctest.Wait()
					}
					if got := len(w.log.lines("watched again")); got != recovered+1 {
						t.Errorf("logged %d times that all is well", got-recovered)
					}
				}
			})
		})
	}
}

func TestForbidden(t *testing.T) { // C6, rule 12
	synctest.Test(t, func(t *testing.T) {
		const message = `pods is forbidden: User "x" cannot watch resource "pods" in API group "" at the cluster scope`
		f := newFakeAPI(t)
		f.annotate("web", "5")
		w := follow(t, f)
		last := f.bookmark()
		synctest.Wait()
		body := fmt.Sprintf(`{"kind":"Status","message":%q,"code":403}`, message)
		f.fail("watch", fault{code: 403, body: body})
		f.drop()
		time.Sleep(10 * time.Minute)
		if got := len(f.asked("watch")); got < 15 || got > 23 {
			t.Errorf("%d watches in 10 minutes", got)
		}
		if got := w.log.lines("cannot watch resource"); len(got) != 1 {
			t.Errorf("logged %q", got)
		}
		f.heal()
		time.Sleep(longestWait)
		f.annotate("web", "6")
		w.expect(t, "LISTED web=5", "MODIFIED web=6")
		if watches := versions(f.asked("watch")); watches[len(watches)-1] != last {
			t.Errorf("watched from %s, want %s", watches[len(watches)-1], last)
		}
	})
}

// ---- The token and the connection ----

func TestTokenIsReadAgain(t *testing.T) { // C6, rule 11
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.annotate("web", "5")
		w := follow(t, f)
		last := f.bookmark()
		synctest.Wait()
		f.accept("token-2")
		f.drop() // 401 until the kubelet has written the new one
		time.Sleep(10 * time.Second)
		if err := os.Remove(filepath.Join(f.account, "token")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Second)
		f.mount("token", "token-2\n")
		time.Sleep(longestWait)
		f.annotate("web", "6")
		w.expect(t, "LISTED web=5", "MODIFIED web=6")
		for _, version := range versions(f.asked("watch"))[1:] {
			if version != last {
				t.Errorf("watched from %s, want %s", version, last)
			}
		}
	})
}

func TestTokenRotates(t *testing.T) { // C6, rule 11: with the file ahead of the server's mind nobody sees a 401
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		w := follow(t, f)
		time.Sleep(time.Second / 2) // watches end at whole seconds: the two files are never between
		for i := range 5 {
			time.Sleep(time.Hour)
			token := fmt.Sprintf("token-of-hour-%d", i)
			f.mount("token", token)
			f.accept(token)
		}
		if lines := w.log.lines("WARN"); len(lines) > 0 {
			t.Errorf("logged %q", lines)
		}
	})
}

func TestNewKube(t *testing.T) { // C6, rule 11: what is not mounted is named
	for name, test := range map[string]struct{ file, text, want string }{
		"no token":    {"token", "", "token"},
		"no CA":       {"ca.crt", "", "ca.crt"},
		"an empty CA": {"ca.crt", "\n", "ca.crt"},
		"a CA of noise": {"ca.crt", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
			"ca.crt"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakeAPI(t)
			if f.mount(test.file, test.text); test.text == "" {
				os.Remove(filepath.Join(f.account, test.file))
			}
			if _, err := newKube("https://kubernetes.test", f.account); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the error is %v, it must name %s", err, test.want)
			}
		})
	}
}

// ask lists over a real connection.
func ask(t *testing.T, k *kube) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	changes := make(chan change, 1)
	return (&podWatch{kube: k, node: "node-1", changes: changes, version: "0"}).list(ctx)
}

func newKubeOf(t *testing.T, f *fakeAPI, api string) *kube {
	t.Helper()
	k, err := newKube(api, f.account)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.http.CloseIdleConnections)
	return k
}

func TestHTTP2(t *testing.T) { // C6, rule 9: without it there are no pings
	f := newFakeAPI(t)
	server := f.serve("127.0.0.1:0", f.ca)
	if err := ask(t, newKubeOf(t, f, server.URL)); err != nil {
		t.Fatal(err)
	}
	if got := f.asked("list")[0].proto; got != 2 {
		t.Errorf("it speaks HTTP/%d", got)
	}
}

func TestServerIsChecked(t *testing.T) { // C6, rule 11
	f := newFakeAPI(t)
	server := f.serve("127.0.0.1:0", newAuthority(t))
	if err := ask(t, newKubeOf(t, f, server.URL)); err == nil || len(f.asked("")) > 0 {
		t.Errorf("a server of another CA was given the token: %v", err)
	}
}

func TestCARotates(t *testing.T) { // C6, rule 11
	captureLog(t)
	f := newFakeAPI(t)
	server := f.serve("127.0.0.1:0", f.ca)
	address := server.Listener.Addr().String()
	k := newKubeOf(t, f, server.URL)
	if err := ask(t, k); err != nil {
		t.Fatal(err)
	}
	next := newAuthority(t)
	server.Close()
	server = f.serve(address, next)
	if err := ask(t, k); err == nil {
		t.Fatal("the new CA is trusted before it is mounted")
	}
	f.mount("ca.crt", string(next.pem))
	if err := ask(t, k); err != nil {
		t.Errorf("with the new CA: %v", err)
	}
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

func TestUnreadableCAIsLoggedOnce(t *testing.T) { // C7
	log := captureLog(t)
	f := newFakeAPI(t)
	server := f.serve("127.0.0.1:0", f.ca)
	k := newKubeOf(t, f, server.URL)
	f.mount("ca.crt", "")
	for range 5 {
		if err := ask(t, k); err != nil {
			t.Error(err)
		}
		server.CloseClientConnections()
		k.http.CloseIdleConnections()
	}
	if got := log.lines("CA"); len(got) != 1 {
		t.Errorf("logged %d times: %q", len(got), got)
	}
}

func TestIPv6(t *testing.T) { // C6, rule 10
	environment := map[string]string{"NODE_NAME": "node-1", "KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
	cfg, err := readConfig(func(name string) string { return environment[name] })
	if err != nil || cfg.api != "https://[fd00::1]:443" {
		t.Errorf("the API server is at %s, %v", cfg.api, err)
	}
	if listener, err := net.Listen("tcp", "[::1]:0"); err != nil {
		t.Skip("this machine has no IPv6: ", err)
	} else {
		listener.Close()
	}
	f := newFakeAPI(t)
	server := f.serve("[::1]:0", f.ca)
	environment["KUBERNETES_SERVICE_HOST"], environment["KUBERNETES_SERVICE_PORT"], err = net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if cfg, err = readConfig(func(name string) string { return environment[name] }); err != nil {
		t.Fatal(err)
	}
	if err := ask(t, newKubeOf(t, f, cfg.api)); err != nil {
		t.Error(err)
	}
}

func TestProxyIsIgnored(t *testing.T) { // C6, rule 10: init has set HTTPS_PROXY
	f := newFakeAPI(t)
	k := newKubeOf(t, f, "https://10.96.0.1:443") // a proxy is never asked for a loopback address
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

func TestFrozenConnection(t *testing.T) { // C6, rule 9
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.annotate("web", "5")
		listener := &pipes{make(chan net.Conn), make(chan struct{})}
		server := &http.Server{Handler: f, ErrorLog: log.New(io.Discard, "", 0), TLSConfig: &tls.Config{
			NextProtos: []string{"h2"}, Certificates: []tls.Certificate{f.ca.issue(t)}}}
		go server.ServeTLS(listener, "", "")
		defer server.Close()

		w := follow(t, f)
		k := newKubeOf(t, f, "https://kubernetes.test")
		var connections []*freezing
		k.http.Transport.(*http.Transport).DialTLSContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			listener.accepted <- theirs
			connections = append(connections, &freezing{Conn: ours})
			conn := tls.Client(connections[len(connections)-1], &tls.Config{
				RootCAs: k.roots.Load(), ServerName: "kubernetes.test", NextProtos: []string{"h2"}})
			return conn, conn.HandshakeContext(ctx)
		}
		w.kube = k // the next watch goes over it
		f.drop()
		time.Sleep(4 * time.Minute) // pings keep a connection that is merely silent
		if got := f.asked("watch"); len(got) != 2 || got[1].proto != 2 || len(connections) != 1 {
			t.Fatalf("%d watches, %d connections", len(got), len(connections))
		}
		f.bookmark() // so that the next ping is as late as it can be
		synctest.Wait()
		connections[0].frozen.Store(true)
		f.annotate("web", "6")
		before := len(w.log.lines("WARN"))
		time.Sleep(50 * time.Second)
		if got := w.log.lines("WARN"); len(got) == before {
			t.Error("it was not noticed")
		}
		time.Sleep(longestWait)
		w.expect(t, "LISTED web=5", "MODIFIED web=6")
		if got := len(f.asked("watch")); got != 3 {
			t.Errorf("%d watches", got)
		}
		connections[0].Close()
	})
}

func TestSilentWatchStays(t *testing.T) { // C6, rule 9: http.Client.Timeout would end it
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		w := follow(t, f)
		time.Sleep(4*time.Minute + 59*time.Second)
		f.annotate("web", "5")
		w.expect(t, "LISTED", "ADDED web=5")
		if got := len(f.asked("watch")); got != 1 {
			t.Errorf("watched %d times", got)
		}
	})
}

func TestWatchHasADeadline(t *testing.T) { // C6, rule 9: a server that answers pings may still be stuck
	synctest.Test(t, func(t *testing.T) {
		f := newFakeAPI(t)
		f.endless = true
		follow(t, f)
		time.Sleep(630*time.Second + longestWait)
		watches := f.asked("watch")
		if len(watches) < 2 {
			t.Fatal("the watch has no end")
		}
		limit, _ := time.ParseDuration(watches[0].query.Get("timeoutSeconds") + "s")
		if gap := gaps(watches)[0]; gap < limit+30*time.Second || gap > limit+30*time.Second+longestWait {
			t.Errorf("a watch of %v was given up after %v", limit, gap)
		}
	})
}

func TestStuckAnswer(t *testing.T) { // C6, rule 9: no request waits for ever
	for verb, most := range map[string]time.Duration{"list": time.Minute, "watch": 630 * time.Second} {
		t.Run(verb, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeAPI(t)
				f.annotate("web", "5")
				if verb == "list" {
					f.freeze()
				}
				w := follow(t, f)
				f.freeze()
				f.drop()
				time.Sleep(most + longestWait)
				if got := len(f.asked(verb)); got < 2 {
					t.Errorf("asked %d times", got)
				}
				f.thaw()
				time.Sleep(longestWait)
				f.annotate("web", "6")
				w.expect(t, "LISTED web=5", "MODIFIED web=6")
			})
		})
	}
}

// ---- The configuration ----

func TestReadConfig(t *testing.T) { // C6, rules 10 and 14
	hostname, _ := os.Hostname()
	account := "/var/run/secrets/kubernetes.io/serviceaccount"
	base := config{node: "node-1", pod: hostname, api: "https://10.96.0.1:443", health: ":8080", account: account, proc: "/proc",
		root: "/", limit: math.MaxInt64}
	for name, test := range map[string]struct {
		set    map[string]string
		change func(c *config)
		err    string // what the error names
	}{
		"defaults":            {},
		"no node":             {set: map[string]string{"NODE_NAME": ""}, err: "NODE_NAME"},
		"no host":             {set: map[string]string{"KUBERNETES_SERVICE_HOST": ""}, err: "KUBERNETES_SERVICE_HOST"},
		"no port":             {set: map[string]string{"KUBERNETES_SERVICE_PORT": ""}, err: "KUBERNETES_SERVICE_PORT"},
		"the Pod's name":      {set: map[string]string{"POD_NAME": "packetcapture-x"}, change: func(c *config) { c.pod = "packetcapture-x" }},
		"IPv6":                {set: map[string]string{"KUBERNETES_SERVICE_HOST": "fd00::1"}, change: func(c *config) { c.api = "https://[fd00::1]:443" }},
		"health":              {set: map[string]string{"HEALTH_ADDR": "127.0.0.1:9"}, change: func(c *config) { c.health = "127.0.0.1:9" }},
		"disk":                {set: map[string]string{"DISK_LIMIT": "1073741824"}, change: func(c *config) { c.limit = 1<<30 - 64<<20 }},
		"disk with a unit":    {set: map[string]string{"DISK_LIMIT": "1Gi"}, err: "DISK_LIMIT"},
		"disk below the log":  {set: map[string]string{"DISK_LIMIT": "67108864"}, err: "DISK_LIMIT"},
		"a negative disk":     {set: map[string]string{"DISK_LIMIT": "-1"}, err: "DISK_LIMIT"},
		"log level":           {set: map[string]string{"LOG_LEVEL": "debug"}, change: func(c *config) { c.logLevel = -4 }},
		"an unknown level":    {set: map[string]string{"LOG_LEVEL": "chatty"}, err: "LOG_LEVEL"},
		"a proxy is no topic": {set: map[string]string{"HTTPS_PROXY": "http://proxy.test:3128"}},
	} {
		t.Run(name, func(t *testing.T) {
			environment := map[string]string{"NODE_NAME": "node-1", "KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
			maps.Copy(environment, test.set)
			got, err := readConfig(func(name string) string { return environment[name] })
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("the error is %v, it must name %s", err, test.err)
				}
				return
			}
			want := base
			if test.change != nil {
				test.change(&want)
			}
			if err != nil || got != want {
				t.Errorf("got %+v, %v\nwant %+v", got, err, want)
			}
		})
	}
}

// ---- Events ----

// record starts a recorder in a bubble, whose end stops it.
func record(t *testing.T, f *fakeAPI) *recorder {
	t.Helper()
	r := newRecorder(f.kube(), f.node)
	go r.run(t.Context())
	return r
}

func newEvent(message string) event {
	return event{namespace: "shop", name: "web", uid: "uid-web", kind: "Warning", reason: "CaptureFailed", message: message}
}

func TestEventIsPosted(t *testing.T) { // C7, C6 rule 16
	synctest.Test(t, func(t *testing.T) {
		captureLog(t)
		f := newFakeAPI(t)
		r := record(t, f)
		time.Sleep(time.Hour)
		r.news <- newEvent("it broke")
		synctest.Wait()
		type fields = map[string]any
		want := []fields{{
			"apiVersion": "v1", "kind": "Event",
			"metadata":       fields{"namespace": "shop", "generateName": "packetcapture-"},
			"involvedObject": fields{"apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "web", "uid": "uid-web"},
			"type":           "Warning", "reason": "CaptureFailed", "message": "it broke", "count": 1.0,
			"source":         fields{"component": "packetcapture", "host": "node-1"},
			"firstTimestamp": "2000-01-01T01:00:00Z", "lastTimestamp": "2000-01-01T01:00:00Z",
		}}
		if got := f.posted(); !reflect.DeepEqual(got, want) {
			t.Errorf("got  %v\nwant %v", got, want)
		}
	})
}

func TestEventIsTriedAgain(t *testing.T) { // C7, C6 rules 5 and 16
	for name, test := range map[string]struct {
		fault
		tries int // until it is taken, or given up
		taken bool
		least time.Duration
	}{
		"500":                  {fault{times: 5, code: 500}, 6, true, 800 * time.Millisecond},
		"503 of a proxy":       {fault{times: 1, code: 503, body: "<html>"}, 2, true, 800 * time.Millisecond},
		"429 with Retry-After": {fault{times: 1, code: 429, retryAfter: "40"}, 2, true, 40 * time.Second},
		"401":                  {fault{times: 1, code: 401}, 2, true, 800 * time.Millisecond},
		"refused":              {fault{times: 3, err: syscall.ECONNREFUSED}, 4, true, 800 * time.Millisecond},
		"lost":                 {fault{times: 1}, 2, true, 800 * time.Millisecond},
		"400":                  {fault{code: 400}, 1, false, 0},
		"403":                  {fault{code: 403}, 1, false, 0},
		"404":                  {fault{code: 404}, 1, false, 0},
		"422":                  {fault{code: 422}, 1, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				captureLog(t)
				f := newFakeAPI(t)
				f.fail("post", test.fault)
				r := record(t, f)
				r.news <- newEvent("it broke")
				time.Sleep(10 * time.Minute)
				posts := f.asked("post")
				if len(posts) != test.tries || len(f.posted()) == 1 != test.taken {
					t.Fatalf("it was tried %d times and taken %d times", len(posts), len(f.posted()))
				}
				if test.retryAfter != "" {
					if gap := gaps(posts)[0]; gap < test.least {
						t.Errorf("it waited %v, want %v", gap, test.least)
					}
					return
				}
				checkBackoff(t, gaps(posts), test.tries-1)
			})
		})
	}
}

func TestEventIsRefusedAlone(t *testing.T) { // C7: one that the server never takes holds up no other
	for _, code := range []int{403, 500} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				captureLog(t)
				f := newFakeAPI(t)
				k := f.kube()
				k.http.Transport = roundTripper(func(r *http.Request) (*http.Response, error) {
					if strings.Contains(r.URL.Path, "/ending/") {
						f.fail("post", fault{times: 1, code: code})
					}
					return f.RoundTrip(r)
				})
				r := newRecorder(k, f.node)
				go r.run(t.Context())
				bad := newEvent("a webhook of this namespace fails")
				bad.namespace = "ending"
				r.news <- bad
				time.Sleep(100 * time.Millisecond)
				r.news <- newEvent("it broke")
				time.Sleep(5 * time.Minute)
				if got := f.posted(); len(got) != 1 {
					t.Errorf("%d other Events were posted", len(got))
				}
			})
		})
	}
}

func TestManyEventsAreNoStorm(t *testing.T) { // C6 rule 13, and C7: they wait together while the server fails
	synctest.Test(t, func(t *testing.T) {
		captureLog(t)
		f := newFakeAPI(t)
		f.fail("post", fault{code: 500})
		r := record(t, f)
		for i := range 50 {
			r.news <- newEvent(fmt.Sprintf("capture %d broke", i))
		}
		time.Sleep(10 * time.Minute)
		// One after the other, with the waits of a single one: 0.8, 1.6, 3.2, 6.4, 12.8, 15, 15… s.
		if got := len(f.asked("post")); got > 50 {
			t.Errorf("%d requests in 10 minutes", got)
		}
		f.heal()
		time.Sleep(10 * time.Minute)
		if got := len(f.posted()); got != 50 {
			t.Errorf("%d of 50 Events were posted in the end", got)
		}
	})
}

type roundTripper func(r *http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestRepeatedEventsAreCounted(t *testing.T) { // C7
	synctest.Test(t, func(t *testing.T) {
		captureLog(t)
		f := newFakeAPI(t)
		r := record(t, f)
		for range 3600 {
			r.news <- newEvent("it broke")
			time.Sleep(time.Second)
		}
		other := newEvent("something else")
		r.news <- other
		time.Sleep(10 * time.Minute)
		counts := map[any]float64{}
		for _, body := range f.posted() {
			counts[body["message"]] += body["count"].(float64)
		}
		if want := map[any]float64{"it broke": 3600, "something else": 1}; !maps.Equal(counts, want) {
			t.Errorf("counted %v, want %v", counts, want)
		}
		if got := len(f.posted()); got > 30 {
			t.Errorf("%d Events in an hour", got)
		}
		if posts := f.asked("post"); !posts[0].at.Equal(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)) {
			t.Errorf("the first was posted at %v", posts[0].at)
		}
	})
}

func TestEventsAreNotForgotten(t *testing.T) { // C7: those of the end of the program
	synctest.Test(t, func(t *testing.T) {
		captureLog(t)
		f := newFakeAPI(t)
		r := newRecorder(f.kube(), f.node)
		ctx, cancel := context.WithCancel(t.Context())
		for i := range 10 {
			r.news <- newEvent(fmt.Sprintf("capture %d ended", i))
		}
		cancel()
		r.run(ctx)
		if got := len(f.posted()); got != 10 {
			t.Errorf("%d of 10 Events were posted", got)
		}
	})
}

func TestEventsEndWithTheProgram(t *testing.T) { // C5 and C7: they never hold up its end
	synctest.Test(t, func(t *testing.T) {
		captureLog(t)
		f := newFakeAPI(t)
		r := newRecorder(f.kube(), f.node)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { r.run(ctx); close(ended) }()
		f.freeze()
		for i := range 10 {
			r.news <- newEvent(fmt.Sprintf("capture %d ended", i))
		}
		synctest.Wait()
		began := time.Now()
		cancel()
		<-ended
		if took := time.Since(began); took > 1500*time.Millisecond {
			t.Errorf("it took %v", took)
		}
	})
}
