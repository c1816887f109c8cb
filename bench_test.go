package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// podJSON is the metadata of a Pod as the API server sends it, grown to a size by managedFields.
func podJSON(name string, size int, annotations string) string {
	const form = `{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":%q,"namespace":"default",` +
		`"uid":"1b2c3d4e-0000-4000-8000-%012x","resourceVersion":"12345","generation":1,"creationTimestamp":"2026-01-01T00:00:00Z",` +
		`"labels":{"app":"web"},"annotations":{%s},"managedFields":[{"manager":"kubelet","operation":"Update","apiVersion":"v1",` +
		`"time":"2026-01-01T00:00:00Z","fieldsType":"FieldsV1","fieldsV1":{%s}}]}}`
	bare := fmt.Sprintf(form, name, len(name), annotations, "")
	var fields strings.Builder
	for i := 0; fields.Len() < size-len(bare); i++ {
		fmt.Fprintf(&fields, `%s"f:field-%d":{".":{},"f:type":{}}`, map[bool]string{true: ","}[i > 0], i)
	}
	return fmt.Sprintf(form, name, len(name), annotations, fields.String())
}

// quiet keeps the log out of a benchmark.
func quiet(tb testing.TB) {
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(io.Discard, nil)))
	tb.Cleanup(func() { slog.SetDefault(before) })
}

// BenchmarkWatchEvent is all that happens for a change that needs nothing done: TLS, HTTP/2, decoding, comparing. (C6)
func BenchmarkWatchEvent(b *testing.B) {
	for _, size := range []int{3_000, 20_000} {
		b.Run(fmt.Sprintf("%dB", size), func(b *testing.B) {
			quiet(b)
			frame := []byte(`{"type":"MODIFIED","object":` + podJSON("web", size, "") + "}\n")
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for range b.N {
					w.Write(frame)
					w.(http.Flusher).Flush()
				}
			}))
			server.EnableHTTP2 = true
			server.StartTLS()
			defer server.Close()
			k := &kube{api: server.URL, account: b.TempDir()}
			must(b, os.WriteFile(filepath.Join(k.account, "token"), []byte("t"), 0o600))
			k.http.Transport = server.Client().Transport
			changes := make(chan change, 1)
			w := &podWatch{kube: k, node: "n", changes: changes, version: "1", fresh: true, known: map[string]pod{}}
			b.SetBytes(int64(len(frame)))
			b.ReportAllocs()
			b.ResetTimer()
			w.watch(b.Context())
			if w.version != "12345" || len(changes) > 0 {
				b.Fatalf("watched up to %q, with %d changes", w.version, len(changes))
			}
		})
	}
}

// BenchmarkDecodeEvent is the decoding alone. (C6)
func BenchmarkDecodeEvent(b *testing.B) {
	for _, size := range []int{3_000, 20_000} {
		b.Run(fmt.Sprintf("%dB", size), func(b *testing.B) {
			frame := `{"type":"MODIFIED","object":` + podJSON("web", size, "") + "}\n"
			decoder := json.NewDecoder(&endless{text: frame})
			b.SetBytes(int64(len(frame)))
			b.ReportAllocs()
			for b.Loop() {
				var e watchEvent
				if err := decoder.Decode(&e); err != nil || e.Object.pod().name != "web" {
					b.Fatalf("%v: %+v", err, e)
				}
			}
		})
	}
}

// BenchmarkList is a list of 500 Pods, of which every tenth is annotated. (C6)
func BenchmarkList(b *testing.B) {
	for _, size := range []int{3_000, 20_000} {
		b.Run(fmt.Sprintf("500x%dB", size), func(b *testing.B) {
			quiet(b)
			var items []string
			for i := range 500 {
				text := ""
				if i%10 == 0 {
					text = `"` + annotation + `":"5"`
				}
				items = append(items, podJSON(fmt.Sprintf("web-%d", i), size, text))
			}
			body := `{"metadata":{"resourceVersion":"12345"},"items":[` + strings.Join(items, ",") + "]}"
			k := &kube{api: "https://kubernetes.test", account: b.TempDir()}
			must(b, os.WriteFile(filepath.Join(k.account, "token"), []byte("t"), 0o600))
			k.http.Transport = reply(body)
			changes := make(chan change, 1)
			w := &podWatch{kube: k, node: "n", changes: changes}
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if err := w.list(b.Context()); err != nil {
					b.Fatal(err)
				}
				if got := <-changes; len(got.pods) != 50 {
					b.Fatalf("%d annotated Pods", len(got.pods))
				}
			}
		})
	}
}

// BenchmarkReconcile is a look at captures that all are as they should be. (C5)
func BenchmarkReconcile(b *testing.B) {
	for _, many := range []int{1, 100} {
		b.Run(fmt.Sprintf("%dcaptures", many), func(b *testing.B) {
			quiet(b)
			c := &controller{captures: map[string]*capture{}, config: config{root: b.TempDir(), limit: math.MaxInt64}}
			for i := range many {
				uid, want := strconv.Itoa(i), request{n: 5}
				c.captures[uid] = &capture{pod: pod{namespace: "default", name: "web-" + uid, uid: uid, annotated: true, value: "5"},
					want: want, cmd: &exec.Cmd{}, grant: grant{have: want, started: true}}
			}
			b.ReportAllocs()
			for b.Loop() {
				if wait := c.reconcile(time.Now()); wait != slowPoll {
					b.Fatalf("again in %s", wait)
				}
			}
		})
	}
}

// BenchmarkFindSandbox looks for a Pod among 2,000 processes: when every one is looked at, and when it is known. (C3)
func BenchmarkFindSandbox(b *testing.B) {
	proc := newProc(b)
	for pid := 2; pid <= 2000; pid++ {
		uid := fmt.Sprintf("1b2c3d4e-0000-4000-8000-%012d", pid/20)
		proc.add(process{pid: pid, cgroup: cgroupOf(uid), net: uid, root: uid, born: pid})
	}
	const uid = "1b2c3d4e-0000-4000-8000-000000000050"
	for _, known := range []bool{false, true} {
		b.Run(map[bool]string{true: "known", false: "sweep"}[known], func(b *testing.B) {
			s, err := newSandboxes(proc.dir)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if !known {
					s.pids, s.swept = nil, time.Time{}
				}
				found := s.find(map[string]bool{uid: true}, time.Now())[uid]
				if found == nil || found.born != 1000 {
					b.Fatalf("found %+v", found)
				}
				found.network.Close()
			}
		})
	}
}

// endless is a text that comes again and again.
type endless struct {
	text string
	at   int
}

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, e.text[e.at:])
	e.at = (e.at + n) % len(e.text)
	return n, nil
}
