package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeAPI is what packetcapture needs of an API server: the pods of one node, their changes, and Events. It fails
// the test on any request beside these, and so proves what RBAC must allow (C8). It is an http.Handler for a real
// server (serve), and an http.RoundTripper without any network (kube), which works in a bubble of testing/synctest.
type fakeAPI struct {
	t       testing.TB
	node    string
	account string     // the service account's folder, with a token and a CA that are right
	ca      *authority // that ca.crt names

	// To be set before the first request.
	bookmarkEvery time.Duration // for each watch; 0: only when told to
	endless       bool          // watches ignore their timeoutSeconds
	most          int           // requests; one more fails the test and is not answered; 0: no bound

	mu        sync.Mutex
	token     string // the one that is accepted
	version   int    // of the store
	compacted int    // watches from before are answered 410
	goneIs200 bool   // and that comes as an ERROR event
	pods      map[string]fakePod
	history   []frame
	trimmed   int           // frames that were in history before its first one
	changed   chan struct{} // closed and replaced when history grows
	frozen    chan struct{} // while nothing is answered; closed by thaw
	faults    map[string][]fault
	requests  []fakeRequest
	events    []map[string]any // the bodies that were posted and taken
	open      int              // watches
}

// fakePod is a pod's metadata. A pod that is put again keeps its key, namespace and name; the UID may be another.
type fakePod struct {
	namespace, name, uid string
	annotations          map[string]string
	version              int
}

// frame is a part of all watches' streams.
type frame struct {
	version int // a watch from this version or a later one does not get it
	data    []byte
	isLive  bool   // only for the watches that are open when it is sent
	end     ending // of the stream, behind data
}

type ending int

const (
	goesOn ending = iota
	ends          // as at the time limit
	breaks        // as when the connection is lost
)

// fakeRequest is what was asked for: verb is list, watch or post.
type fakeRequest struct {
	at           time.Time
	verb, accept string
	query        url.Values
	proto        int
}

// fault is what a request meets in place of its answer.
type fault struct {
	times      int // how often; below 1: until heal
	code       int // of the answer, or 0 and
	err        error
	retryAfter string
	body       string // default a Status
}

// broken is what a handler panics with when its connection is lost.
type broken struct{ err error }

func newFakeAPI(t testing.TB) *fakeAPI {
	t.Helper()
	f := &fakeAPI{
		t: t, node: "node-1", account: t.TempDir(), ca: newAuthority(t), token: "token-1", version: 100,
		pods: map[string]fakePod{}, changed: make(chan struct{}), faults: map[string][]fault{},
	}
	f.mount("token", f.token+"\n")
	f.mount("ca.crt", string(f.ca.pem))
	f.mount("namespace", "kube-system")
	return f
}

// mount writes a file of the service account's folder.
func (f *fakeAPI) mount(name, text string) {
	f.t.Helper()
	must(f.t, os.WriteFile(filepath.Join(f.account, name), []byte(text), 0o600))
}

// kube returns a client without network.
func (f *fakeAPI) kube() *kube {
	k := newKube("https://kubernetes.test", f.account)
	k.http.Transport = f
	return k
}

// serve serves over TLS and HTTP/2 with a certificate of ca, at an address of the loopback interface, until Close.
func (f *fakeAPI) serve(address string, ca *authority) *httptest.Server {
	f.t.Helper()
	listener, err := net.Listen("tcp", address)
	must(f.t, err)
	server := httptest.NewUnstartedServer(f)
	server.Listener.Close()
	server.Listener = listener
	server.EnableHTTP2 = true
	server.TLS = &tls.Config{Certificates: []tls.Certificate{ca.issue(f.t)}}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	f.t.Cleanup(server.Close)
	return server
}

// ---- The store ----

// put stores a pod and returns its version.
func (f *fakeAPI) put(p fakePod) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	kind := "ADDED"
	if _, exists := f.pods[p.namespace+"/"+p.name]; exists {
		kind = "MODIFIED"
	}
	f.version++
	p.version = f.version
	f.pods[p.namespace+"/"+p.name] = p
	f.send(frame{version: f.version, data: watchFrame(kind, p.object())})
	return versionName(f.version)
}

// annotate puts a pod of namespace default with this number of files; "" is no annotation.
func (f *fakeAPI) annotate(name, n string) string {
	p := fakePod{namespace: "default", name: name, uid: "uid-" + name}
	if n != "" {
		p.annotations = map[string]string{"tcpdump.antrea.io": n}
	}
	return f.put(p)
}

// remove deletes a pod, if there is one, and returns the version of that.
func (f *fakeAPI) remove(namespace, name string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p, exists := f.pods[namespace+"/"+name]; exists {
		delete(f.pods, namespace+"/"+name)
		f.version++
		p.version = f.version
		f.send(frame{version: f.version, data: watchFrame("DELETED", p.object())})
	}
	return versionName(f.version)
}

// bookmark tells the open watches of a version that came from changes elsewhere.
func (f *fakeAPI) bookmark() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.version++
	f.send(frame{isLive: true, data: bookmarkFrame(f.version)})
	return versionName(f.version)
}

// compact forgets what was: who watches from before now is told 410 Gone, as the answer or as an ERROR event in a
// 200. Open watches go on.
func (f *fakeAPI) compact(goneIs200 bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.version++
	f.compacted, f.goneIs200 = f.version, goneIs200
	f.trimmed += len(f.history)
	f.history = nil
}

// push sends a text to the open watches as it is, and may end them.
func (f *fakeAPI) push(text string, end ending) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.send(frame{isLive: true, data: []byte(text), end: end})
}

// drop ends the open watches, as their time limit does.
func (f *fakeAPI) drop() { f.push("", ends) }

func (f *fakeAPI) send(e frame) {
	f.history = append(f.history, e)
	close(f.changed)
	f.changed = make(chan struct{})
}

// ---- Faults ----

// fail has the next requests of a verb meet a fault, after those that it was told of before.
func (f *fakeAPI) fail(verb string, next fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults[verb] = append(f.faults[verb], next)
}

func (f *fakeAPI) heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.faults)
}

// freeze lets nothing through, on open watches neither, until thaw.
func (f *fakeAPI) freeze() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.frozen == nil {
		f.frozen = make(chan struct{})
	}
}

func (f *fakeAPI) thaw() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.frozen != nil {
		close(f.frozen)
		f.frozen = nil
		close(f.changed)
		f.changed = make(chan struct{})
	}
}

// accept has any token but this one answered 401.
func (f *fakeAPI) accept(token string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.token = token
}

// nextFault takes the fault that a request meets.
func (f *fakeAPI) nextFault(verb string) (next fault, met bool) {
	queue := f.faults[verb]
	if len(queue) == 0 {
		return next, false
	}
	next = queue[0]
	if queue[0].times--; queue[0].times == 0 {
		f.faults[verb] = queue[1:]
	}
	return next, true
}

// ---- What was asked ----

// asked returns the requests of a verb so far, "" for all.
func (f *fakeAPI) asked(verb string) (requests []fakeRequest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.requests {
		if verb == "" || r.verb == verb {
			requests = append(requests, r)
		}
	}
	return requests
}

// posted returns the Events that were taken.
func (f *fakeAPI) posted() []map[string]any {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.events)
}

// watching is the number of open watches.
func (f *fakeAPI) watching() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.open
}

// ---- Answers ----

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	verb := f.check(r)
	if verb == "" {
		writeStatus(w, 403, "the fake does not know this request")
		return
	}
	f.mu.Lock()
	f.requests = append(f.requests, fakeRequest{time.Now(), verb, r.Header.Get("Accept"), r.URL.Query(), r.ProtoMajor})
	met, isMet := f.nextFault(verb)
	isKnown := r.Header.Get("Authorization") == "Bearer "+f.token
	frozen, isStorm := f.frozen, f.most > 0 && len(f.requests) > f.most
	f.mu.Unlock()
	if isStorm {
		f.t.Errorf("more than %d requests", f.most)
		<-r.Context().Done()
		return
	}
	if frozen != nil {
		select {
		case <-frozen:
		case <-r.Context().Done():
			return
		}
	}
	switch {
	case isMet:
		met.serve(w)
	case !isKnown:
		writeStatus(w, 401, "Unauthorized")
	case verb == "list":
		f.list(w, r.URL.Query())
	case verb == "watch":
		f.watch(w, r)
	case verb == "post":
		f.create(w, r)
	}
}

func (met fault) serve(w http.ResponseWriter) {
	if met.code == 0 {
		panic(broken{cmp.Or[error](met.err, io.ErrUnexpectedEOF)})
	}
	if met.retryAfter != "" {
		w.Header().Set("Retry-After", met.retryAfter)
	}
	if met.body == "" && met.code != 200 {
		writeStatus(w, met.code, "so the test wants it")
		return
	}
	w.WriteHeader(met.code)
	io.WriteString(w, met.body)
}

// check returns what a request asks for. It fails the test on what is unknown, and on what is known but wrong.
func (f *fakeAPI) check(r *http.Request) (verb string) {
	query, problem := r.URL.Query(), ""
	isPost := r.Method == "POST" && strings.HasPrefix(r.URL.Path, "/api/v1/namespaces/") &&
		strings.HasSuffix(r.URL.Path, "/events") && strings.Count(r.URL.Path, "/") == 5
	switch {
	case isPost:
		verb = "post"
		problem = keysBeside(query)
	case r.Method != "GET" || r.URL.Path != "/api/v1/pods":
		problem = "it is unknown"
	case query.Has("watch"):
		verb = "watch"
		problem = f.checkWatch(query, r.Header.Get("Accept"))
	default:
		verb = "list"
		problem = f.checkList(query, r.Header.Get("Accept"))
	}
	if !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer ") {
		problem = cmp.Or(problem, "it has no token")
	}
	if problem != "" {
		f.t.Errorf("%s %s: %s", r.Method, r.URL, problem)
	}
	return verb
}

// checkList knows no limit: it would bypass the server's cache.
func (f *fakeAPI) checkList(query url.Values, accept string) string {
	switch {
	case accept != "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1":
		return "it accepts " + accept
	case query.Get("fieldSelector") != "spec.nodeName="+f.node:
		return "it is not about the pods of the node alone"
	}
	return keysBeside(query, "fieldSelector", "resourceVersion")
}

func (f *fakeAPI) checkWatch(query url.Values, accept string) string {
	seconds, _ := strconv.Atoi(query.Get("timeoutSeconds"))
	switch {
	case accept != "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1":
		return "it accepts " + accept
	case query.Get("fieldSelector") != "spec.nodeName="+f.node:
		return "it is not about the pods of the node alone"
	case query.Get("watch") != "true" || query.Get("allowWatchBookmarks") != "true":
		return "watch and allowWatchBookmarks must be true"
	case seconds < 300 || seconds > 600:
		return "timeoutSeconds is not in 300..600"
	case query.Get("resourceVersion") == "" || query.Get("resourceVersion") == "0":
		return "it does not go on from the list"
	}
	return keysBeside(query, "fieldSelector", "watch", "resourceVersion", "allowWatchBookmarks", "timeoutSeconds")
}

// keysBeside complains about the keys of a query that are not known.
func keysBeside(query url.Values, known ...string) string {
	for key := range query {
		if !slices.Contains(known, key) {
			return "it must not set " + key
		}
	}
	return ""
}

func (f *fakeAPI) list(w http.ResponseWriter, query url.Values) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if parseVersion(query.Get("resourceVersion")) > f.version {
		writeStatus(w, 504, "Timeout: Too large resource version")
		return
	}
	var items []any // null when there are none, as the real one says
	for _, key := range slices.Sorted(maps.Keys(f.pods)) {
		items = append(items, f.pods[key].object())
	}
	writeJSON(w, 200, map[string]any{
		"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
		"metadata": map[string]any{"resourceVersion": versionName(f.version)}, "items": items,
	})
}

// watch sends the frames after a version as they come.
func (f *fakeAPI) watch(w http.ResponseWriter, r *http.Request) {
	from := parseVersion(r.URL.Query().Get("resourceVersion"))
	seconds, _ := strconv.Atoi(r.URL.Query().Get("timeoutSeconds"))
	limit := time.NewTimer(time.Duration(seconds) * time.Second)
	defer limit.Stop()
	f.mu.Lock()
	isGone, goneIs200 := from < f.compacted, f.goneIs200
	opened := f.trimmed + len(f.history)
	next := f.trimmed
	f.open++
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.open--
		f.mu.Unlock()
	}()
	if isGone && !goneIs200 {
		writeStatus(w, 410, "too old resource version")
		return
	}
	w.WriteHeader(200)
	w.(http.Flusher).Flush()
	if isGone {
		w.Write(errorFrame(410, "too old resource version"))
		return
	}
	var tick <-chan time.Time
	if f.bookmarkEvery > 0 {
		ticker := time.NewTicker(f.bookmarkEvery)
		defer ticker.Stop()
		tick = ticker.C
	}
	isOver, isMarked := false, false
	for {
		f.mu.Lock()
		changed, version, isFrozen := f.changed, f.version, f.frozen != nil
		var batch []frame
		first := next
		if !isFrozen {
			if next < f.trimmed { // too slow: what it should get next is forgotten
				f.mu.Unlock()
				w.Write(errorFrame(410, "too old resource version"))
				return
			}
			batch = f.history[next-f.trimmed:]
			next += len(batch)
		}
		f.mu.Unlock()
		if isMarked && !isFrozen {
			batch = append(slices.Clip(batch), frame{isLive: true, data: bookmarkFrame(version)})
			isMarked = false
		}
		for i, e := range batch {
			if !e.isLive && e.version <= from || e.isLive && first+i < opened {
				continue
			}
			if _, err := w.Write(e.data); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			if e.end == breaks {
				panic(broken{io.ErrUnexpectedEOF})
			} else if e.end == ends {
				return
			}
		}
		if isOver && !isFrozen && !f.endless {
			return
		}
		select {
		case <-changed:
		case <-tick:
			isMarked = true
		case <-limit.C:
			isOver = true
		case <-r.Context().Done():
			return
		}
	}
}

func (f *fakeAPI) create(w http.ResponseWriter, r *http.Request) {
	var body map[string]any
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil || r.Header.Get("Content-Type") != "application/json" {
		f.t.Errorf("%s is no JSON: %v", r.URL, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events = append(f.events, body)
	writeJSON(w, 201, body)
}

// ---- What is on the wire ----

func (p fakePod) object() map[string]any {
	metadata := map[string]any{
		"namespace": p.namespace, "name": p.name, "uid": p.uid, "resourceVersion": versionName(p.version),
		"creationTimestamp": "2000-01-01T00:00:00Z", "labels": map[string]string{"app": p.name},
	}
	if len(p.annotations) > 0 {
		metadata["annotations"] = p.annotations
	}
	return map[string]any{"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}
}

func watchFrame(kind string, object any) []byte {
	data, _ := json.Marshal(map[string]any{"type": kind, "object": object})
	return append(data, '\n')
}

func bookmarkFrame(version int) []byte {
	return watchFrame("BOOKMARK", map[string]any{
		"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
		"metadata": map[string]any{"resourceVersion": versionName(version), "creationTimestamp": nil},
	})
}

// errorFrame has a resourceVersion that nobody must take for one.
func errorFrame(code int, message string) []byte {
	object := statusObject(code, message)
	object["metadata"] = map[string]any{"resourceVersion": "none"}
	return watchFrame("ERROR", object)
}

func statusObject(code int, message string) map[string]any {
	return map[string]any{
		"kind": "Status", "apiVersion": "v1", "metadata": map[string]any{}, "status": "Failure", "message": message, "code": code,
	}
}

func writeStatus(w http.ResponseWriter, code int, message string) {
	writeJSON(w, code, statusObject(code, message))
}

func writeJSON(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(body)
}

// versionName makes a resourceVersion that is no number: it is opaque.
func versionName(version int) string { return fmt.Sprintf("v%d", version) }

// parseVersion takes "" and "0" for any version.
func parseVersion(name string) int {
	version, _ := strconv.Atoi(strings.TrimPrefix(name, "v"))
	return version
}

// ---- Without network ----

// RoundTrip answers a request in memory: a body is written as it is read.
func (f *fakeAPI) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancel(r.Context())
	reader, writer := io.Pipe()
	w := &memoryWriter{header: http.Header{}, body: writer, began: make(chan int, 1)}
	failed := make(chan error, 1)
	go func() {
		defer cancel()
		defer func() {
			switch reason := recover().(type) {
			case nil:
				w.WriteHeader(200)
				writer.Close()
			case broken:
				failed <- reason.err
				writer.CloseWithError(reason.err)
			default:
				panic(reason)
			}
		}()
		f.ServeHTTP(w, r.Clone(ctx))
	}()
	stop := context.AfterFunc(r.Context(), func() { reader.CloseWithError(r.Context().Err()) })
	var code int
	select {
	case code = <-w.began:
	case err := <-failed:
		if len(w.began) == 0 { // it was lost before the answer began
			stop()
			return nil, err
		}
		code = <-w.began
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	body := &memoryBody{reader, func() { stop(); cancel() }}
	return &http.Response{
		StatusCode: code, Status: http.StatusText(code), Proto: "HTTP/2.0", ProtoMajor: 2, Header: w.header, Body: body,
		ContentLength: -1, Request: r,
	}, nil
}

type memoryWriter struct {
	header  http.Header
	body    *io.PipeWriter
	isBegun bool
	began   chan int // gets the status code
}

func (w *memoryWriter) Header() http.Header { return w.header }

func (w *memoryWriter) WriteHeader(code int) {
	if !w.isBegun {
		w.isBegun = true
		w.began <- code
	}
}

func (w *memoryWriter) Write(data []byte) (int, error) {
	w.WriteHeader(200)
	return w.body.Write(data)
}

func (w *memoryWriter) Flush() { w.WriteHeader(200) }

type memoryBody struct {
	*io.PipeReader
	onClose func()
}

func (b *memoryBody) Close() error {
	b.onClose()
	return b.PipeReader.Close()
}

// ---- Certificates ----

// authority is a CA.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	pem         []byte
}

func newAuthority(t testing.TB) *authority {
	a := &authority{}
	a.certificate, a.key = a.sign(t, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw})
	return a
}

// issue makes a certificate for a server.
func (a *authority) issue(t testing.TB) tls.Certificate {
	certificate, key := a.sign(t, &x509.Certificate{
		DNSNames: []string{"kubernetes.test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	return tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key}
}

// sign makes a certificate. An authority signs its own by itself. The time in a bubble of testing/synctest begins in 2000.
func (a *authority) sign(t testing.TB, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template.SerialNumber, template.Subject = big.NewInt(1), pkix.Name{CommonName: "kubernetes"}
	template.NotBefore, template.NotAfter = time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)
	signer, signing := cmp.Or(a.certificate, template), cmp.Or(a.key, key)
	if !template.IsCA {
		template.SerialNumber = big.NewInt(2)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer, key.Public(), signing)
	must(t, err)
	certificate, err := x509.ParseCertificate(der)
	must(t, err)
	return certificate, key
}

// ---- The log ----

// logged is what was logged from Info up.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// captureLog collects the log until the test ends, so that such a test can't be parallel.
func captureLog(t testing.TB) *logged {
	l := &logged{}
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(l, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	return l
}

func (l *logged) Write(text []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(text)
}

// lines returns the lines that hold a text.
func (l *logged) lines(text string) (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		if strings.Contains(line, text) {
			lines = append(lines, line)
		}
	}
	return lines
}
