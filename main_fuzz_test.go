package main

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// noTcpdump is a starter: a filter that can't be compiled is taken, and the capture tells.
func noTcpdump(context.Context, *os.File, ...string) (*child, error) {
	return nil, errors.New("no tcpdump")
}

// FuzzAnnotations: what is accepted is a plain number, a line of text and a name, and what is refused is said in a bounded
// line (C2, C8, C9, C10). To search for more: go test -fuzz FuzzAnnotations .
func FuzzAnnotations(f *testing.F) {
	for _, text := range []string{"1", "100", "101", "", "0", "-1", "+1", "01", " 1", "5abc", "1e3", "1_0", "٣", strings.Repeat("9", 300),
		"\x00", "\xff", " udp\n", "host é", "a\nb", "\u2028", strings.Repeat("é", 512), strings.Repeat("é", 513),
		"net1.100", "-i", "a/b", "interface-of-15", "interface-of-16c"} {
		f.Add(text)
	}
	w := newPodWatch(&node{disk: &disk{limit: 100}, processes: newProcessesOf(f, newProc(f)), start: noTcpdump})
	number, name := regexp.MustCompile(`^([1-9][0-9]?|100)$`), regexp.MustCompile(`^[\w.][\w.-]{0,14}$`)
	isControl := func(r rune) bool { return !unicode.IsPrint(r) }
	f.Fuzz(func(t *testing.T, text string) {
		accepts := func(want bool, p pod) {
			refusal := w.refusal(t.Context(), p)
			if (refusal == "") != want {
				t.Errorf("%+v is refused: %q", p, refusal)
			}
			if len(refusal) > 1000 || !utf8.ValidString(refusal) || strings.ContainsFunc(refusal, isControl) {
				t.Errorf("%+v is refused with %q", p, refusal)
			}
		}
		n, _ := strconv.Atoi(text)
		accepts(number.MatchString(text), pod{value: text, files: n})
		accepts(name.MatchString(text), pod{value: "5", files: 5, iface: text, hasIface: true})
		accepts(len(text) <= 1024 && !strings.ContainsFunc(text, isControl), pod{value: "5", files: 5, filter: text})
	})
}

// reply is an http.RoundTripper that answers 200 with a body.
type reply string

func (a reply) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(string(a))), Request: r}, nil
}

// answered is a watch of a node without processes, whose requests are all answered that. Its captures end with the test.
func answered(t testing.TB, body string) (w *podWatch, ctx context.Context) {
	n, err := newNode(testConfig(t, newProc(t).dir, t.TempDir()))
	must(t, err)
	n.kube.http.Transport, n.start = reply(body), noTcpdump
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); n.alive.Wait() })
	w = newPodWatch(n)
	w.version = "v1"
	return w, ctx
}

// C6, C8: a list is taken whole and with a version, or not at all. Of a watch the events are taken until the first that makes
// no sense, and its version is that of the last one before. What is followed are annotated pods alone, whose names and UIDs
// can be part of a path.
func TestAnswers(t *testing.T) {
	const web = `{"metadata":{"namespace":"default","name":"web","uid":"u","resourceVersion":"v8","annotations":{"tcpdump.antrea.io":"5"}}}`
	plain, noUID := strings.Replace(web, "tcpdump", "x", 1), strings.Replace(web, `"u"`, `""`, 1)
	up, sub := strings.Replace(web, "web", "../x", 1), strings.Replace(web, "web", "x/y", 1)
	event := func(kind, object string) string { return `{"type":"` + kind + `","object":` + object + "}\n" }
	added, version := event("ADDED", web), `{"metadata":{"resourceVersion":"v9"}`
	for _, test := range []struct{ verb, body, version, followed string }{
		{"list", version + "}", "v9", ""},
		{"list", version + `,"items":[` + web + "]}", "v9", "u"},
		{"list", version + `,"items":[null,{},` + plain + "," + noUID + "," + up + "," + sub + "]}", "v9", ""},
		{"list", version + `,"items":[` + web + ",", "v1", "old"},
		{"list", version + `,"items":{"a":1}}`, "v1", "old"},
		{"list", `{"items":[` + web + "]}", "v1", "old"},
		{"list", "<html>", "v1", "old"},
		{"watch", "", "v1", "old"},
		{"watch", "\n", "v1", "old"},
		{"watch", added, "v8", "old u"},
		{"watch", event("MODIFIED", web) + added + strings.Repeat(" ", 5000) + event("DELETED", web), "v8", "old"},
		{"watch", added + event("MODIFIED", plain), "v8", "old"},
		{"watch", event("ADDED", noUID) + event("ADDED", up) + event("ADDED", sub), "v8", "old"},
		{"watch", event("BOOKMARK", version+"}"), "v9", "old"},
		{"watch", added + event("ERROR", version+"}") + event("DELETED", web), "v8", "old u"},
		{"watch", added + event("DELETED", strings.Replace(web, "v8", "", 1)), "v8", "old u"},
		{"watch", added + event("DELETED", web)[:100], "v8", "old u"},
		{"watch", added + "garbage", "v8", "old u"},
		{"watch", added + event("DELETED", "null"), "v8", "old u"},
		{"watch", added + strings.Repeat("[", 20000), "v8", "old u"},
		{"watch", "\x00\xff", "v1", "old"},
	} {
		w, ctx := answered(t, test.body)
		w.apply(ctx, podNamed("old", "old", "1"))
		if test.verb == "watch" {
			w.watch(ctx)
		} else if err := w.list(ctx); w.ready.Load() != (err == nil) {
			t.Errorf("%.200q: listed is %v, after %v", test.body, w.ready.Load(), err)
		}
		followed := strings.Join(slices.Sorted(maps.Keys(w.captures)), " ")
		if followed != test.followed || w.version != test.version {
			t.Errorf("%.200q: follows %q from %q, want %q from %q", test.body, followed, w.version, test.followed, test.version)
		}
	}
}
