package main

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeAPI is what packetcapture needs of an API server: the pods of node-1, their changes, and Events. It fails the test
// on any request beside these, and so proves what RBAC must allow (C8). It is an http.RoundTripper without any network,
// which works in a bubble of testing/synctest. A real server can stand before it (serve).
type fakeAPI struct {
	t             testing.TB
	account       string        // the service account's folder, with a token and a CA that are right
	bookmarkEvery time.Duration // for each watch; 0: only when told to. To be set before the first request

	mu        sync.Mutex
	token     string // the one that is accepted
	version   int    // of the store
	compacted int    // watches from before are answered 410
	goneIs200 bool   // and that comes as an ERROR event
	pods      map[string]fakePod
	history   []frame
	isFrozen  bool          // nothing is answered
	changed   chan struct{} // closed and replaced when history grows, and by thaw
	faults    map[string][]fault
	requests  []fakeRequest
	events    []map[string]any // the bodies that were posted and taken
	open      int              // watches
}

// storm is how many requests no test needs: then one loops without waiting, and in a bubble would never end.
const storm = 20_000

// fakePod is a pod's metadata. A pod that is put again keeps its key, namespace and name; the UID may be another.
type fakePod struct {
	namespace, name, uid string
	annotations          map[string]string
	version              int
}

// frame is a part of all watches' streams.
type frame struct {
	version int // watches from before get it when they begin; 0: only those that are open when it is sent
	data    []byte
	end     ending // of the stream, behind data
}

type ending int

const (
	goesOn ending = iota
	ends          // as at the time limit
	breaks        // as when the connection is lost
)

// fakeRequest is what was asked for: verb is list, watch or post, "" of an unknown one.
type fakeRequest struct {
	at    time.Time
	verb  string
	query url.Values
	proto int
}

// fault is what a request meets in place of its answer.
type fault struct {
	times      int // how often; below 1: until heal
	code       int // of the answer, or 0 and
	err        error
	retryAfter string
	body       string // default a Status
}

func newFakeAPI(t testing.TB) *fakeAPI {
	t.Helper()
	f := &fakeAPI{
		t: t, account: t.TempDir(), token: "token-1", version: 100,
		pods: map[string]fakePod{}, changed: make(chan struct{}), faults: map[string][]fault{},
	}
	f.mount("token", f.token+"\n")
	f.mount("ca.crt", string(someCA))
	f.mount("namespace", "kube-system")
	return f
}

// mount writes a file of the service account's folder.
func (f *fakeAPI) mount(name, text string) {
	f.t.Helper()
	must(f.t, os.WriteFile(filepath.Join(f.account, name), []byte(text), 0o600))
}

// serve serves over TLS and HTTP/2 until the test ends, with a certificate of someCA or another one.
func (f *fakeAPI) serve(listener net.Listener, certificates ...tls.Certificate) *httptest.Server {
	asIs := func(*httputil.ProxyRequest) {}
	server := httptest.NewUnstartedServer(&httputil.ReverseProxy{Transport: f, Rewrite: asIs, FlushInterval: -1})
	server.Listener.Close()
	server.Listener, server.EnableHTTP2 = listener, true
	server.TLS = &tls.Config{Certificates: certificates}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	f.t.Cleanup(server.Close)
	return server
}

// newCertificate makes a server's certificate that is its own CA.
func newCertificate(t testing.TB) (certificate tls.Certificate, ca string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(text)
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
	return f.change(kind, p)
}

// remove deletes a pod, if there is one, and returns the version of that.
func (f *fakeAPI) remove(namespace, name string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, exists := f.pods[namespace+"/"+name]
	if !exists {
		return versionName(f.version)
	}
	return f.change("DELETED", p)
}

func (f *fakeAPI) change(kind string, p fakePod) string {
	f.version++
	p.version = f.version
	f.pods[p.namespace+"/"+p.name] = p
	if kind == "DELETED" {
		delete(f.pods, p.namespace+"/"+p.name)
	}
	f.send(frame{version: f.version, data: watchFrame(kind, p.object())})
	return versionName(f.version)
}

// bookmark tells the open watches of a version that came from changes elsewhere.
func (f *fakeAPI) bookmark() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.version++
	f.send(frame{data: bookmarkFrame(f.version)})
	return versionName(f.version)
}

// compact forgets what was: who begins to watch from before now is told 410 Gone, as the answer or as an ERROR event in a
// 200. Open watches go on.
func (f *fakeAPI) compact(goneIs200 bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.version++
	f.compacted, f.goneIs200 = f.version, goneIs200
}

// push sends a text to the open watches as it is, and may end them.
func (f *fakeAPI) push(text string, end ending) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.send(frame{data: []byte(text), end: end})
}

// drop ends the open watches, as their time limit does.
func (f *fakeAPI) drop() { f.push("", ends) }

func (f *fakeAPI) send(e frame) {
	f.history = append(f.history, e)
	f.wake()
}

func (f *fakeAPI) wake() {
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
	f.isFrozen = true
}

func (f *fakeAPI) thaw() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.isFrozen = false
	f.wake()
}

// untilThawed waits, but not longer than ctx.
func (f *fakeAPI) untilThawed(ctx context.Context) error {
	for {
		f.mu.Lock()
		isFrozen, changed := f.isFrozen, f.changed
		f.mu.Unlock()
		if !isFrozen {
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// accept has any token but this one answered 401.
func (f *fakeAPI) accept(token string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.token = token
}

// nextFault takes the fault that a request meets, if any.
func (f *fakeAPI) nextFault(verb string) *fault {
	queue := f.faults[verb]
	if len(queue) == 0 {
		return nil
	}
	next := queue[0]
	if queue[0].times--; queue[0].times == 0 {
		f.faults[verb] = queue[1:]
	}
	return &next
}

// ---- What was asked ----

// asked returns the requests of some verbs so far.
func (f *fakeAPI) asked(verbs ...string) (requests []fakeRequest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.requests {
		if slices.Contains(verbs, r.verb) {
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

var isPost = regexp.MustCompile(`^POST /api/v1/namespaces/[^/]+/events\?$`)

// check returns the verb of a request. It fails the test on what is unknown: any other path, parameter or format. A list
// has no limit: that would bypass the server's cache.
func (f *fakeAPI) check(r *http.Request) (verb string) {
	query, accept := r.URL.Query(), r.Header.Get("Accept")
	version, limit := query.Get("resourceVersion"), query.Get("timeoutSeconds")
	query.Del("resourceVersion")
	query.Del("timeoutSeconds")
	seconds, _ := strconv.Atoi(limit)
	switch line := r.Method + " " + r.URL.Path + "?" + query.Encode(); {
	case !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer "):
	case isPost.MatchString(line) && r.Header.Get("Content-Type") == "application/json":
		return "post"
	case line == "GET /api/v1/pods?fieldSelector=spec.nodeName%3Dnode-1" && limit == "" &&
		accept == "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1":
		return "list"
	case line == "GET /api/v1/pods?allowWatchBookmarks=true&fieldSelector=spec.nodeName%3Dnode-1&watch=true" &&
		version != "" && version != "0" && seconds >= 300 && seconds <= 600 &&
		accept == "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1":
		return "watch"
	}
	f.t.Errorf("the fake does not know this request: %s %s %v", r.Method, r.URL, r.Header)
	return ""
}

func (f *fakeAPI) RoundTrip(r *http.Request) (*http.Response, error) {
	verb := f.check(r)
	f.mu.Lock()
	f.requests = append(f.requests, fakeRequest{time.Now(), verb, r.URL.Query(), r.ProtoMajor})
	met, isStorm := f.nextFault(verb), len(f.requests) > storm
	isKnown := r.Header.Get("Authorization") == "Bearer "+f.token
	f.mu.Unlock()
	if isStorm {
		f.t.Errorf("more than %d requests", storm)
		<-r.Context().Done()
	}
	if err := f.untilThawed(r.Context()); err != nil {
		return nil, err
	}
	switch {
	case met != nil:
		return met.answer()
	case !isKnown || verb == "":
		return refusal(401, "Unauthorized"), nil
	case verb == "list":
		return f.list(), nil
	case verb == "watch":
		return f.watch(r), nil
	}
	return f.create(r), nil
}

func answer(code int, body []byte) *http.Response {
	return &http.Response{StatusCode: code, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(string(body)))}
}

func refusal(code int, message string) *http.Response {
	return answer(code, toJSON(status(code, message)))
}

func (met fault) answer() (*http.Response, error) {
	if met.code == 0 {
		return nil, cmp.Or[error](met.err, io.ErrUnexpectedEOF)
	}
	response := answer(met.code, []byte(met.body))
	if met.body == "" && met.code != 200 {
		response = refusal(met.code, "so the test wants it")
	}
	response.Header.Set("Retry-After", met.retryAfter)
	return response, nil
}

func (f *fakeAPI) list() *http.Response {
	f.mu.Lock()
	defer f.mu.Unlock()
	var items []any // null when there are none, as the real one says
	for _, key := range slices.Sorted(maps.Keys(f.pods)) {
		items = append(items, f.pods[key].object())
	}
	return answer(200, toJSON(map[string]any{
		"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
		"metadata": map[string]any{"resourceVersion": versionName(f.version)}, "items": items,
	}))
}

func (f *fakeAPI) watch(r *http.Request) *http.Response {
	f.mu.Lock()
	defer f.mu.Unlock()
	from, _ := strconv.Atoi(strings.TrimPrefix(r.URL.Query().Get("resourceVersion"), "v"))
	switch {
	case from < f.compacted && f.goneIs200:
		return answer(200, errorFrame(410, "too old resource version"))
	case from < f.compacted:
		return refusal(410, "too old resource version")
	}
	var missed []frame
	for _, e := range f.history {
		if e.version > from {
			missed = append(missed, e)
		}
	}
	reader, writer := io.Pipe()
	f.open++
	go func(opened int) {
		writer.CloseWithError(f.stream(r, writer, missed, opened))
		f.mu.Lock()
		defer f.mu.Unlock()
		f.open--
	}(len(f.history))
	return &http.Response{StatusCode: 200, Header: http.Header{}, Body: reader}
}

// stream writes some frames, and those from number next of the history on as they come. It returns how the stream ends.
func (f *fakeAPI) stream(r *http.Request, w io.Writer, frames []frame, next int) error {
	seconds, _ := time.ParseDuration(r.URL.Query().Get("timeoutSeconds") + "s")
	limit, tick := time.After(seconds), (<-chan time.Time)(nil)
	if f.bookmarkEvery > 0 {
		tick = time.Tick(f.bookmarkEvery)
	}
	for {
		if err := f.untilThawed(r.Context()); err != nil {
			return err
		}
		f.mu.Lock()
		frames = append(frames, f.history[next:]...)
		next = len(f.history)
		changed := f.changed
		f.mu.Unlock()
		for _, e := range frames {
			if _, err := w.Write(e.data); err != nil || e.end == ends {
				return err
			}
			if e.end == breaks {
				return io.ErrUnexpectedEOF
			}
		}
		frames = nil
		select {
		case <-changed:
		case <-tick:
			f.bookmark()
		case <-limit:
			return f.untilThawed(r.Context())
		case <-r.Context().Done():
		}
	}
}

func (f *fakeAPI) create(r *http.Request) *http.Response {
	var body map[string]any
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		f.t.Errorf("%s is no JSON: %v", r.URL, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events = append(f.events, body)
	return answer(201, toJSON(body))
}

// ---- What is on the wire ----

// object is a pod, or with nothing but a version what a BOOKMARK has.
func (p fakePod) object() map[string]any {
	return map[string]any{"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": map[string]any{
		"namespace": p.namespace, "name": p.name, "uid": p.uid, "resourceVersion": versionName(p.version), "annotations": p.annotations,
	}}
}

func watchFrame(kind string, object any) []byte {
	return toJSON(map[string]any{"type": kind, "object": object})
}

func bookmarkFrame(version int) []byte {
	return watchFrame("BOOKMARK", fakePod{version: version}.object())
}

func errorFrame(code int, message string) []byte { return watchFrame("ERROR", status(code, message)) }

// status has a resourceVersion that nobody must take for one.
func status(code int, message string) map[string]any {
	return map[string]any{"kind": "Status", "apiVersion": "v1", "metadata": map[string]any{"resourceVersion": "none"},
		"status": "Failure", "message": message, "code": code}
}

func toJSON(body any) []byte {
	data, _ := json.Marshal(body)
	return append(data, '\n')
}

// versionName makes a resourceVersion that is no number: it is opaque.
func versionName(version int) string { return fmt.Sprintf("v%d", version) }

// someCA is any certificate. It is made here because a bubble of time must have no server.
var someCA = func() []byte {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
}()
