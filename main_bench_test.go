package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// podJSON is the metadata of a pod as the API server sends it, grown to a size by managedFields.
func podJSON(number, size int, annotations string) string {
	const form = `{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"web-%d","namespace":"default",` +
		`"uid":"1b2c3d4e-0000-4000-8000-%012d","resourceVersion":"12345","generation":1,"creationTimestamp":"2026-01-01T00:00:00Z",` +
		`"labels":{"app":"web"},"annotations":{%s},"managedFields":[{"manager":"kubelet","operation":"Update","apiVersion":"v1",` +
		`"time":"2026-01-01T00:00:00Z","fieldsType":"FieldsV1","fieldsV1":{"f:type":{}%s}}]}}`
	return fmt.Sprintf(form, number, number, annotations, strings.Repeat(`,"f:field-1":{".":{},"f:type":{}}`, (size-len(form))/33))
}

const podBytes = 10_000

// BenchmarkEvent is all that happens for a change that needs nothing done: TLS, HTTP/2, decoding, comparing. (C6)
func BenchmarkEvent(b *testing.B) {
	frame := []byte(`{"type":"MODIFIED","object":` + podJSON(1, podBytes, "") + "}\n")
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for range b.N {
			w.Write(frame)
			w.(http.Flusher).Flush()
		}
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	w, ctx := answered(b, "")
	w.kube.api, w.kube.http.Transport = server.URL, server.Client().Transport
	b.SetBytes(int64(len(frame)))
	b.ReportAllocs()
	b.ResetTimer()
	w.watch(ctx)
	if w.version != "12345" || len(w.captures) > 0 {
		b.Fatalf("watched up to %q, with %d captures", w.version, len(w.captures))
	}
}

// BenchmarkList is a list of 500 pods, of which every tenth is annotated: the same as before. (C6)
func BenchmarkList(b *testing.B) {
	items := make([]string, 500)
	for i := range items {
		annotations := map[bool]string{true: `"tcpdump.antrea.io":"0"`}[i%10 == 0] // invalid: nothing starts
		items[i] = podJSON(i, podBytes, annotations)
	}
	body := `{"metadata":{"resourceVersion":"12345"},"items":[` + strings.Join(items, ",") + "]}"
	w, ctx := answered(b, body)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if err := w.list(ctx); err != nil || len(w.captures) != 50 {
			b.Fatalf("%v, %d annotated pods", err, len(w.captures))
		}
	}
}

// BenchmarkFind looks for a pod among 2,000 processes: when each is read, when they are known but not the pod's, and when
// the pod's is known. (C3)
func BenchmarkFind(b *testing.B) {
	proc := newProc(b)
	uid := func(i int) string { return fmt.Sprintf("1b2c3d4e-0000-4000-8000-%012d", i) }
	for pid := 2; pid <= 2000; pid++ {
		proc.add(fakeProcess{pid: pid, cgroup: cgroupOf(uid(pid / 20)), net: "pod", root: "pod", born: pid})
	}
	for kind, number := range map[string]int{"new": 50, "absent": 200, "known": 50} {
		b.Run(kind, func(b *testing.B) {
			ps, err := newProcesses(config{proc: proc.dir})
			must(b, err)
			p := podNamed("web", uid(number), "1")
			ps.find(p)
			b.ReportAllocs()
			for b.Loop() {
				if kind == "new" {
					clear(ps.known)
				}
				if kind != "known" {
					ps.looked = ps.looked.Add(-birthPoll)
				}
				if s, ok := ps.find(p); ok != (kind != "absent") || ok && s.dir != ps.proc+"/1000" {
					b.Fatalf("found %+v", s)
				}
			}
		})
	}
}
