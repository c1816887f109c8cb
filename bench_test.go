package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
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

// BenchmarkWatchEvent is all that happens for a change that needs nothing done: TLS, HTTP/2, decoding, reconcile. (C6)
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
			changes := make(chan change, 1024)
			k := &kube{api: server.URL, account: b.TempDir()}
			os.WriteFile(filepath.Join(k.account, "token"), []byte("t"), 0o600)
			k.http.Transport = server.Client().Transport
			c := &controller{captures: map[string]*capture{}, config: config{root: b.TempDir()}}
			w := &podWatch{kube: k, node: "n", changes: changes, version: "1", fresh: true, retry: requestBackoff}
			b.SetBytes(int64(len(frame)))
			b.ReportAllocs()
			b.ResetTimer()
			go w.watch(context.Background())
			for range b.N {
				c.apply(<-changes)
				c.reconcile(time.Now())
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
			changes := make(chan change, 1)
			w := &podWatch{changes: changes}
			b.SetBytes(int64(len(frame)))
			b.ReportAllocs()
			for b.Loop() {
				var e watchEvent
				if err := decoder.Decode(&e); err != nil {
					b.Fatal(err)
				}
				if err := w.heed(context.Background(), e); err != nil {
					b.Fatal(err)
				}
				<-changes
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
