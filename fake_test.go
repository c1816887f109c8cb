package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The world around the program: a folder that looks like /proc, with the host's tree of cgroups in it;
// children that stand in for tcpdump; and an API server. Time is that of testing/synctest: a minute takes
// no time, and a goroutine that is left over fails the test.

func init() { slog.SetDefault(slog.New(slog.DiscardHandler)) }

// lock locks mu, and returns what unlocks it: defer lock(&mu)().
func lock(mu *sync.Mutex) (unlock func()) { mu.Lock(); return mu.Unlock }

// is checks a value.
func is[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// must ends the test on any error.
func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// namesIn are the names in a folder, but for captures.
func namesIn(t testing.TB, folder string) (names []string) {
	entries, err := os.ReadDir(folder)
	must(t, err)
	for _, entry := range entries {
		if name := entry.Name(); name != "captures" {
			names = append(names, name)
		}
	}
	return names
}

// ---- /proc and the cgroups ----

const host = "host" // the name of the host's network and root

// fakeProc is a folder that looks like /proc. The root of its process 1 has the tree of cgroups.
type fakeProc struct {
	testing.TB
	dir string

	mu        sync.Mutex
	hierarchy string         // "" is cgroup v2, "/systemd" one of v1's
	cgroups   map[int]string // of the processes
}

type fakeProcess struct {
	pid       int
	cgroup    string // "" is none; else as cgroupOf names it
	net, root string // names: those of the same name are the same
	born      int
}

// newProc is a node with cgroup v2 that systemd makes, as most nodes are.
func newProc(t testing.TB) *fakeProc {
	p := &fakeProc{TB: t, dir: t.TempDir(), cgroups: map[int]string{}}
	p.interfaces(host, "lo", "ens3")
	p.grow("", "/kubepods.slice/kubepods-burstable.slice", "/system.slice")
	p.add(fakeProcess{pid: 1, net: host, root: host, born: 1})
	return p
}

// grow makes the tree of cgroups anew, with some cgroups and no process. Of cgroup v1 a hierarchy is named.
func (p *fakeProc) grow(hierarchy string, cgroups ...string) {
	p.hierarchy = hierarchy
	clear(p.cgroups)
	must(p, os.RemoveAll(filepath.Dir(p.tree(""))), os.MkdirAll(p.tree(""), 0o755))
	for _, cgroup := range cgroups {
		p.make(cgroup)
	}
}

// tree is where a cgroup's folder is.
func (p *fakeProc) tree(cgroup string) string {
	return filepath.Join(p.dir, "root-"+host, "sys/fs/cgroup", p.hierarchy, cgroup)
}

// make makes a cgroup, and those above it.
func (p *fakeProc) make(cgroup string) {
	must(p, os.MkdirAll(p.tree(cgroup), 0o755))
	p.list(cgroup)
}

// list writes a cgroup.procs, at once like the kernel.
func (p *fakeProc) list(cgroup string) {
	pids := ""
	for _, pid := range slices.Sorted(maps.Keys(p.cgroups)) {
		if p.cgroups[pid] == cgroup {
			pids += fmt.Sprintln(pid)
		}
	}
	p.write(p.tree(cgroup+"/cgroup.procs"), pids)
}

func (p *fakeProc) write(path, text string) {
	must(p, os.WriteFile(path+".new", []byte(text), 0o644), os.Rename(path+".new", path))
}

func (p *fakeProc) path(pid int, file string) string {
	return filepath.Join(p.dir, strconv.Itoa(pid), file)
}

// interfaces sets what a network has. One that nobody has set has lo and eth0.
func (p *fakeProc) interfaces(net string, names ...string) {
	folder, text := filepath.Join(p.dir, "net-"+net), "Inter-|   Receive\n face |bytes    packets\n"
	for _, name := range names {
		text += fmt.Sprintf("%6s: 1296 16 0 0 1296 16 0 0\n", name)
	}
	must(p, os.MkdirAll(folder, 0o755))
	p.write(filepath.Join(folder, "dev"), text)
}

// add starts a process, or changes one. Field 22 of its stat is when it started.
func (p *fakeProc) add(ps fakeProcess) {
	p.Helper()
	net, root := filepath.Join(p.dir, "net-"+ps.net), filepath.Join(p.dir, "root-"+ps.root)
	p.end(ps.pid)
	if _, err := os.Stat(net); err != nil {
		p.interfaces(ps.net, "lo", "eth0")
	}
	stat := fmt.Sprintf("%d (a (b) c) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 %d 1000 2000 3 4\n", ps.pid, ps.born)
	must(p, os.MkdirAll(p.path(ps.pid, "ns"), 0o755), os.MkdirAll(root, 0o755), os.WriteFile(net+"/ns", nil, 0o644),
		os.Symlink(net+"/ns", p.path(ps.pid, "ns/net")), os.Symlink(root, p.path(ps.pid, "root")),
		os.Symlink(net, p.path(ps.pid, "net")), os.WriteFile(p.path(ps.pid, "stat"), []byte(stat), 0o644))
	defer lock(&p.mu)()
	if ps.cgroup != "" {
		p.cgroups[ps.pid] = ps.cgroup
		p.make(ps.cgroup)
	}
}

// pod starts the process that holds a pod's network, in a container's cgroup below the pod's.
func (p *fakeProc) pod(pid int, uid string) {
	p.add(fakeProcess{pid: pid, cgroup: cgroupOf(uid), net: uid, root: uid, born: pid})
}

// end ends a process. Its cgroup stays until gone, as that of a pod does until the kubelet removes it.
func (p *fakeProc) end(pid int) {
	must(p, os.RemoveAll(p.path(pid, "")))
	defer lock(&p.mu)()
	if cgroup := p.cgroups[pid]; cgroup != "" {
		delete(p.cgroups, pid)
		p.list(cgroup)
	}
}

// gone removes the cgroup of a pod, and ends what is in it.
func (p *fakeProc) gone(uid string) {
	defer lock(&p.mu)()
	for pid, cgroup := range p.cgroups {
		if strings.HasPrefix(cgroup, filepath.Dir(cgroupOf(uid))) {
			must(p, os.RemoveAll(p.path(pid, "")))
			delete(p.cgroups, pid)
		}
	}
	must(p, os.RemoveAll(p.tree(filepath.Dir(cgroupOf(uid)))))
}

// cgroupOf is the cgroup of a container of a burstable pod. The one above it is the pod's.
func cgroupOf(uid string) string {
	return "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") +
		".slice/cri-containerd-cafe.scope"
}

// ---- Children ----

// behaviour is how children act. The zero one listens, and ends at once when it is told to.
type behaviour struct {
	refusal  error         // why none can be started
	startup  time.Duration // until it listens
	warning  string        // what it says just before
	words    string        // what it says instead, and exits with status 1
	shutdown time.Duration // from SIGTERM to its end
	deaf     bool          // it ignores SIGTERM
	immortal bool          // and SIGKILL
	syntax   string        // what tcpdump -d says of a filter; it always refuses "refused"
	compile  time.Duration // how long it takes for that
}

// children stand in for tcpdump, and watch over what must hold at any time.
type children struct {
	testing.TB
	proc *fakeProc

	mu       sync.Mutex
	next     behaviour
	all      []*fakeChild
	attempts []fakeRequest // to start one
	compiled []string      // the filters that tcpdump -d was given
	links    []string      // and the link types
}

type fakeChild struct {
	behaviour
	pid, n    int
	process   int      // by which its network was found
	stem      string   // its -w
	arguments []string // nsenter's
	network   string   // the folder of the network that it found at descriptor 3
	files     []string // their names
	signals   []string
	quit      chan func() (words string, err error) // how it ends
	gone      atomic.Bool
}

const closing = "7 packets captured\n9 packets received by filter\n2 packets dropped by kernel\n"

var (
	errKilled = exec.Command("sh", "-c", "kill -KILL $$").Run()
	errStatus = exec.Command("sh", "-c", "exit 1").Run()
)

// start stands in for the function of that name.
func (k *children) start(ctx context.Context, network *os.File, arguments ...string) (*process, error) {
	defer lock(&k.mu)()
	if network == nil {
		return k.compiler(ctx, arguments)
	}
	k.attempts = append(k.attempts, fakeRequest{at: time.Now()})
	if k.next.refusal != nil {
		return nil, k.next.refusal
	}
	c := &fakeChild{behaviour: k.next, pid: 100_000 + len(k.all), arguments: arguments[1:],
		quit: make(chan func() (string, error), 10)}
	if _, err := network.Stat(); err != nil {
		k.Errorf("the network's file is closed before the child has it: %v", err)
	}
	target, err := os.Readlink(network.Name())
	must(k, err)
	c.network = filepath.Dir(target)
	c.process, _ = strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(network.Name()))))
	k.proc.add(fakeProcess{pid: c.pid, net: strings.TrimPrefix(filepath.Base(c.network), "net-"), root: "packetcapture"})
	c.stem = c.option("-w")
	c.n, _ = strconv.Atoi(c.option("-W"))
	for _, other := range k.all {
		if other.stem == c.stem && other.lives() {
			k.Errorf("two children write %s", c.stem)
		}
	}
	for i := range min(c.n, 3) {
		file := c.stem
		if c.n > 1 {
			file += fmt.Sprintf("%0*d", len(strconv.Itoa(c.n-1)), i)
		}
		c.files = append(c.files, filepath.Base(file))
		must(k, os.WriteFile(file, make([]byte, 100), 0o644))
	}
	k.all = append(k.all, c)
	return begin(c.pid, func(stderr io.Writer) error { return k.live(ctx, c, stderr) }), nil
}

// compiler is tcpdump -d.
func (k *children) compiler(ctx context.Context, arguments []string) (*process, error) {
	b, filter := k.next, arguments[len(arguments)-1]
	if arguments[0] != "tcpdump" || arguments[1] != "-y" || !slices.Equal(arguments[3:5], []string{"-d", "--"}) {
		k.Errorf("a filter is compiled with %q", arguments)
	}
	if filter == "refused" {
		b.syntax = "tcpdump: can't parse filter expression: syntax error\n"
	}
	k.compiled, k.links = append(k.compiled, filter), append(k.links, arguments[2])
	return begin(1, func(stderr io.Writer) error {
		if sleep(ctx, b.compile); ctx.Err() != nil {
			return errKilled
		}
		if b.syntax != "" {
			io.WriteString(stderr, b.syntax)
			return errStatus
		}
		return nil
	}), nil
}

// begin has a child live. Its stderr ends when it does.
func begin(pid int, life func(stderr io.Writer) error) *process {
	stderr, its := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := life(its)
		its.Close()
		ended <- err
	}()
	return &process{pid, stderr, func() error { return <-ended }}
}

// live is a child's life. Like os/exec it sends SIGTERM when ctx ends, and SIGKILL after termGrace.
func (k *children) live(ctx context.Context, c *fakeChild, stderr io.Writer) error {
	defer c.gone.Store(true)
	defer k.proc.end(c.pid)
	startup, told, kill := time.After(c.startup), ctx.Done(), (<-chan time.Time)(nil)
	for {
		select {
		case <-startup:
			if c.words == "" {
				io.WriteString(stderr, c.warning+
					"tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n")
			} else {
				c.exit(c.words, errStatus)
			}
		case <-told:
			told, kill = nil, time.After(termGrace)
			c.signals = append(c.signals, "terminated")
			if !c.deaf {
				time.AfterFunc(c.shutdown, func() { c.exit(closing, nil) })
			}
		case <-kill:
			c.signals = append(c.signals, "killed")
			if !c.immortal {
				c.exit("", errKilled)
			}
		case end := <-c.quit:
			for _, file := range c.files {
				if _, err := os.Stat(filepath.Join(filepath.Dir(c.stem), file)); err != nil {
					k.Errorf("a file is gone before its child: %v", err)
				}
			}
			words, err := end()
			io.WriteString(stderr, words)
			return err
		}
	}
}

func (k *children) behave(b behaviour)         { defer lock(&k.mu)(); k.next = b }
func (k *children) started() int               { defer lock(&k.mu)(); return len(k.all) }
func (k *children) last() *fakeChild           { defer lock(&k.mu)(); return k.all[len(k.all)-1] }
func (c *fakeChild) lives() bool               { return !c.gone.Load() }
func (c *fakeChild) option(name string) string { return c.arguments[slices.Index(c.arguments, name)+1] }

// exit ends a child, by itself or by a signal; the first counts.
func (c *fakeChild) exit(words string, err error) {
	select {
	case c.quit <- func() (string, error) { return words, err }:
	default:
	}
}

// ---- The API server ----

// fakeAPI is what packetcapture needs of an API server: a watch of node-1's pods, and Events. Any other request
// fails the test, which proves what RBAC must allow. It is an http.RoundTripper without any network, which
// works in a bubble of testing/synctest. A real server can stand before it (serve).
type fakeAPI struct {
	t             testing.TB
	account       string        // the service account's folder, with a token and a CA that are right
	bookmarkEvery time.Duration // for each watch; 0: only when told to

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
	events    []map[string]any     // the bodies that were posted and taken
	names     map[string]time.Time // when they were taken
	open      int                  // watches
}

// fakePod is a pod's metadata. A pod that is put again keeps its namespace and name; the UID may be another.
type fakePod struct {
	namespace, name, uid string
	annotations          map[string]string
	version              int
}

// frame is a part of all watches' streams.
type frame struct {
	version int // watches from before get it when they begin; 0: only those that are open when it is sent
	kind    string
	pod     fakePod
	data    []byte
	end     ending // of the stream, behind data
}

type ending int

const (
	goesOn ending = iota
	ends          // as at the time limit
	breaks        // as when the connection is lost
)

// fakeRequest is what was asked for: verb is watch or post, "" of an unknown one.
type fakeRequest struct {
	at              time.Time
	verb, namespace string
	query           url.Values
	proto           int
}

// fault is what a request meets in place of its answer.
type fault struct {
	times      int           // how often; below 1: until heal
	hangs      time.Duration // before that. With neither code nor err the right answer comes then
	isDone     bool          // what was asked for is done nevertheless
	code       int           // of the answer, or 0 and
	err        error
	retryAfter string
	body       string // default a Status
}

func newFakeAPI(t testing.TB) *fakeAPI {
	t.Helper()
	f := &fakeAPI{t: t, account: t.TempDir(), token: "token-1", version: 100, pods: map[string]fakePod{},
		changed: make(chan struct{}), faults: map[string][]fault{}, names: map[string]time.Time{}}
	f.mount("token", f.token+"\n")
	f.mount("ca.crt", string(someCA))
	return f
}

// mount writes a file of the service account's folder.
func (f *fakeAPI) mount(name, text string) {
	f.t.Helper()
	must(f.t, os.WriteFile(filepath.Join(f.account, name), []byte(text), 0o600))
}

// serve serves over TLS and HTTP/2 until the test ends, with a certificate of someCA.
func (f *fakeAPI) serve(listener net.Listener) {
	asIs := func(*httputil.ProxyRequest) {}
	server := httptest.NewUnstartedServer(&httputil.ReverseProxy{Transport: f, Rewrite: asIs, FlushInterval: -1})
	server.Listener.Close()
	server.Listener, server.EnableHTTP2 = listener, true
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	f.t.Cleanup(server.Close)
}

// put stores a pod and returns its version.
func (f *fakeAPI) put(p fakePod) string {
	defer lock(&f.mu)()
	kind := "ADDED"
	if _, exists := f.pods[p.namespace+"/"+p.name]; exists {
		kind = "MODIFIED"
	}
	return f.change(kind, p)
}

// remove deletes a pod, if there is one.
func (f *fakeAPI) remove(namespace, name string) {
	defer lock(&f.mu)()
	if p, exists := f.pods[namespace+"/"+name]; exists {
		f.change("DELETED", p)
	}
}

func (f *fakeAPI) change(kind string, p fakePod) string {
	f.version++
	p.version = f.version
	f.store(kind, p)
	f.send(frame{f.version, kind, p, watchFrame(kind, p.object()), goesOn})
	return versionName(f.version)
}

func (f *fakeAPI) store(kind string, p fakePod) {
	f.pods[p.namespace+"/"+p.name] = p
	if kind == "DELETED" {
		delete(f.pods, p.namespace+"/"+p.name)
	}
}

// restore brings back the store as it was at a version, as from a backup of etcd, and breaks the open
// watches. A watch from a later version is accepted, and gets nothing at all.
func (f *fakeAPI) restore(version string) {
	defer lock(&f.mu)()
	f.version = versionNumber(version)
	clear(f.pods)
	for i, e := range f.history {
		if e.version > f.version {
			f.history[i].version = 0
		} else if e.version > 0 {
			f.store(e.kind, e.pod)
		}
	}
	f.send(frame{end: breaks})
}

// bookmark tells the open watches of a version that came from changes elsewhere.
func (f *fakeAPI) bookmark() string {
	defer lock(&f.mu)()
	f.version++
	f.send(frame{data: bookmarkFrame(f.version)})
	return versionName(f.version)
}

// compact forgets what was: who begins to watch from before now is told 410 Gone, as the answer or as an
// ERROR event in a 200. Open watches go on, and one from 0 gets the pods that there are.
func (f *fakeAPI) compact(goneIs200 bool) {
	defer lock(&f.mu)()
	f.version++
	f.compacted, f.goneIs200 = f.version, goneIs200
}

// push sends a text to the open watches as it is, and may end them.
func (f *fakeAPI) push(text string, end ending) {
	defer lock(&f.mu)()
	f.send(frame{data: []byte(text), end: end})
}

func (f *fakeAPI) send(e frame) { f.history = append(f.history, e); f.wake() }
func (f *fakeAPI) wake()        { close(f.changed); f.changed = make(chan struct{}) }

// fail has the next requests of a verb meet a fault, after those that it was told of before. Verb is
// "watch", "post", or "post <namespace>", which counts before "post".
func (f *fakeAPI) fail(verb string, next fault) {
	defer lock(&f.mu)()
	f.faults[verb] = append(f.faults[verb], next)
}

// accept has any token but this one answered 401. freeze lets nothing through, on open watches neither, until
// thaw. posted are the Events that were taken, and watching is the number of open watches.
func (f *fakeAPI) accept(token string)      { defer lock(&f.mu)(); f.token = token }
func (f *fakeAPI) heal()                    { defer lock(&f.mu)(); clear(f.faults) }
func (f *fakeAPI) freeze()                  { defer lock(&f.mu)(); f.isFrozen = true }
func (f *fakeAPI) thaw()                    { defer lock(&f.mu)(); f.isFrozen = false; f.wake() }
func (f *fakeAPI) posted() []map[string]any { defer lock(&f.mu)(); return slices.Clone(f.events) }
func (f *fakeAPI) watching() int            { defer lock(&f.mu)(); return f.open }

// untilThawed waits, but not longer than ctx.
func (f *fakeAPI) untilThawed(ctx context.Context) error {
	for {
		f.mu.Lock()
		isFrozen, changed := f.isFrozen, f.changed
		f.mu.Unlock()
		if !isFrozen || ctx.Err() != nil {
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// nextFault takes the fault that a request meets, if any.
func (f *fakeAPI) nextFault(verbs ...string) (next fault) {
	for _, verb := range verbs {
		if queue := f.faults[verb]; len(queue) > 0 {
			next = queue[0]
			if queue[0].times--; queue[0].times == 0 {
				f.faults[verb] = queue[1:]
			}
			break
		}
	}
	return next
}

// asked returns the requests of a verb so far.
func (f *fakeAPI) asked(verb string) []fakeRequest {
	defer lock(&f.mu)()
	return slices.DeleteFunc(slices.Clone(f.requests), func(r fakeRequest) bool { return r.verb != verb })
}

var isPost = regexp.MustCompile(`^POST /api/v1/namespaces/([^/]+)/events\? application/json$`)

// check returns what a request asks for. Any other path, parameter or format fails the test.
func (f *fakeAPI) check(r *http.Request) (verb, namespace string) {
	query, isJSON := r.URL.Query(), r.Header.Get("Content-Type") == "application/json"
	version, limit := query.Get("resourceVersion"), query.Get("timeoutSeconds")
	query.Del("resourceVersion")
	query.Del("timeoutSeconds")
	seconds, _ := strconv.Atoi(limit)
	line := r.Method + " " + r.URL.Path + "?" + query.Encode() + " " + r.Header.Get("Accept")
	const watch = "GET /api/v1/pods?allowWatchBookmarks=true&fieldSelector=spec.nodeName%3Dnode-1&watch=true " +
		"application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
	switch post := isPost.FindStringSubmatch(line); {
	case !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer "):
	case post != nil && isJSON:
		return "post", post[1]
	case line == watch && version != "" && seconds >= 300 && seconds <= 600:
		return "watch", ""
	}
	f.t.Errorf("the fake does not know this request: %s %s %v", r.Method, r.URL, r.Header)
	return "", ""
}

func (f *fakeAPI) RoundTrip(r *http.Request) (*http.Response, error) {
	verb, namespace := f.check(r)
	f.mu.Lock()
	f.requests = append(f.requests, fakeRequest{time.Now(), verb, namespace, r.URL.Query(), r.ProtoMajor})
	met, isStorm := f.nextFault(verb+" "+namespace, verb), len(f.requests) > 20_000
	isKnown := r.Header.Get("Authorization") == "Bearer "+f.token
	f.mu.Unlock()
	if isStorm { // in a bubble a loop that does not wait would never end
		f.t.Errorf("more than 20,000 requests")
		<-r.Context().Done()
	}
	if sleep(r.Context(), met.hangs); f.untilThawed(r.Context()) != nil {
		return nil, r.Context().Err()
	}
	if met.isDone {
		f.create(r, namespace)
	}
	switch {
	case met.code != 0:
		return met.answer(), nil
	case met.err != nil:
		return nil, met.err
	case !isKnown || verb == "":
		return refusal(401, "Unauthorized"), nil
	case verb == "watch":
		return f.watch(r), nil
	}
	return f.create(r, namespace), nil
}

func answer(code int, body []byte) *http.Response {
	return &http.Response{StatusCode: code, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body))}
}

func refusal(code int, why string) *http.Response { return answer(code, toJSON(status(code, why))) }

func (met fault) answer() *http.Response {
	response := answer(met.code, []byte(met.body))
	if met.body == "" && met.code != 200 {
		response = refusal(met.code, "so the test wants it")
	}
	response.Header.Set("Retry-After", met.retryAfter)
	return response
}

// watch begins with what has changed since a version, or from 0 with all pods as ADDED: by their names, so
// that their versions come in no order.
func (f *fakeAPI) watch(r *http.Request) *http.Response {
	defer lock(&f.mu)()
	version := r.URL.Query().Get("resourceVersion")
	from := versionNumber(version)
	begin := slices.DeleteFunc(slices.Clone(f.history), func(e frame) bool { return e.version <= from })
	switch {
	case version == anyVersion:
		begin = nil
		for _, key := range slices.Sorted(maps.Keys(f.pods)) {
			begin = append(begin, frame{data: watchFrame("ADDED", f.pods[key].object())})
		}
	case from < f.compacted && f.goneIs200:
		return answer(200, errorFrame(410, "too old resource version"))
	case from < f.compacted:
		return refusal(410, "too old resource version")
	}
	reader, writer := io.Pipe()
	f.open++
	go func(opened int, isBehind bool) {
		writer.CloseWithError(f.stream(r, writer, begin, opened, isBehind))
		defer lock(&f.mu)()
		f.open--
	}(len(f.history), from > f.version)
	return &http.Response{StatusCode: 200, Header: http.Header{}, Body: reader}
}

// stream writes some frames, and those from number next of the history on as they come; or nothing at all if
// the store is behind the watch. It returns how the stream ends.
func (f *fakeAPI) stream(r *http.Request, w io.Writer, frames []frame, next int, isBehind bool) error {
	seconds, _ := time.ParseDuration(r.URL.Query().Get("timeoutSeconds") + "s")
	limit, tick := time.After(seconds), (<-chan time.Time)(nil)
	if f.bookmarkEvery > 0 && !isBehind {
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
			if isBehind {
				e.data = nil
			}
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

// create takes an Event. One whose name is taken is answered 409. But the clock, by which they are named, stands
// still in a bubble: Events of the same moment are different ones, and another try comes later.
func (f *fakeAPI) create(r *http.Request, namespace string) *http.Response {
	var body map[string]any
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		f.t.Errorf("%s is no JSON: %v", r.URL, err)
	}
	metadata, _ := body["metadata"].(map[string]any)
	if metadata["namespace"] != namespace || cmp.Or(metadata["name"], any("")) == "" {
		f.t.Errorf("an Event in %s has the metadata %v", namespace, metadata)
	}
	defer lock(&f.mu)()
	name := fmt.Sprint(metadata)
	if taken, isTaken := f.names[name]; isTaken && !taken.Equal(time.Now()) {
		return refusal(409, "there is an Event of this name")
	}
	f.names[name] = time.Now()
	f.events = append(f.events, body)
	return answer(201, toJSON(body))
}

// object is a pod, or with nothing but a version what a BOOKMARK has.
func (p fakePod) object() map[string]any {
	return map[string]any{"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": map[string]any{
		"namespace": p.namespace, "name": p.name, "uid": p.uid, "resourceVersion": versionName(p.version),
		"annotations": p.annotations,
	}}
}

func watchFrame(kind string, object any) []byte {
	return toJSON(map[string]any{"type": kind, "object": object})
}
func bookmarkFrame(version int) []byte {
	return watchFrame("BOOKMARK", fakePod{version: version}.object())
}
func errorFrame(code int, why string) []byte { return watchFrame("ERROR", status(code, why)) }

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
func versionName(version int) string          { return fmt.Sprintf("v%d", version) }
func versionNumber(name string) (version int) { fmt.Sscanf(name, "v%d", &version); return version }

// someCA is any certificate. It is made here because a bubble of time must have no server.
var someCA = func() []byte {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
}()

// ---- The whole ----

// world is a node in a bubble of time. Either the program runs and watches (follows), or the test stands where
// the watch is, and applies pods as that would (see and lose).
type world struct {
	*testing.T
	*agent
	*podWatch // the test's
	api       *fakeAPI
	kids      *children
	proc      *fakeProc
	root      string
	log       *bytes.Buffer
	delivered atomic.Int32 // how often the watch said that it delivers
	looked    int          // Events that were looked at
	program   sync.WaitGroup
	ctx       context.Context // the program's
	end       context.CancelFunc
}

// simulate tells a story in a world whose captures may take the given number of files, 0 for no bound. Then
// the program is told to end: that takes less than 5 s, and nothing is left.
func simulate(t *testing.T, limit int64, story func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, limit)
		story(w)
		began := time.Now()
		w.end()
		w.program.Wait()
		w.alive.Wait()
		is(t, "the program ends within 5 s", time.Since(began) < 5*time.Second, true)
		synctest.Wait()
		w.events.stop()
		w.events.posting.Wait()
		w.runs(nil)
		is(t, "links in /captures", namesIn(t, w.root+"/captures"), nil)
		w.logged("level=ERROR", 0)
	})
}

func newWorld(t *testing.T, limit int64) *world {
	t.Helper()
	w := &world{T: t, api: newFakeAPI(t), proc: newProc(t), root: t.TempDir(), log: &bytes.Buffer{}}
	w.kids = &children{TB: t, proc: w.proc}
	cfg := testConfig(t, w.proc.dir, w.root)
	cfg.account = w.api.account
	if limit > 0 {
		cfg.diskLimit = limit * fileBytes
	}
	var err error
	w.agent, err = newAgent(cfg)
	must(t, err)
	w.agent.start, w.agent.ready, w.agent.api.http.Transport = w.kids.start, func() { w.delivered.Add(1) }, w.api
	w.podWatch = newPodWatch(w.agent)
	w.ctx, w.end = context.WithCancel(t.Context())
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(w.log, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	return w
}

// testConfig is a node with a service account that can be read.
func testConfig(t testing.TB, proc, root string) config {
	t.Helper()
	cfg := config{nodeName: "node-1", podName: "packetcapture-x", podNamespace: "kube-system",
		url: "https://kubernetes.test", account: t.TempDir(), proc: proc, root: root, diskLimit: 1 << 62}
	must(t, os.WriteFile(cfg.account+"/token", []byte("token"), 0o600))
	return cfg
}

// podNamed is a pod of the namespace default whose annotation is value.
func podNamed(name, uid, value string) pod {
	files, _ := strconv.Atoi(value)
	return pod{namespace: "default", name: name, uid: uid, kubeletUID: uid, annotated: true, value: value, files: files}
}

// follows starts the program, which has begun to watch when this returns, if it can.
func (w *world) follows() {
	w.program.Go(func() { w.agent.run(w.ctx) })
	synctest.Wait()
}

// see has the watch say that a pod is there or has changed, and lose that it is deleted. pass lets time pass. All
// wait until that has had its effect.
func (w *world) see(p pod)            { w.apply(w.ctx, p); synctest.Wait() }
func (w *world) lose(p pod)           { w.forget(p.uid); synctest.Wait() }
func (w *world) pass(d time.Duration) { time.Sleep(d); synctest.Wait() }

// news are the Events that were posted since the last call.
func (w *world) news() (events []event) {
	synctest.Wait()
	for _, body := range w.api.posted()[w.looked:] {
		text := func(name string) string { return body[name].(string) }
		events = append(events, event{kind: text("type"), reason: text("reason"), message: text("message")})
	}
	w.looked += len(events)
	return events
}

// told checks the Events since the last call, each by "<kind> <reason>: <words in its message>".
func (w *world) told(want ...string) {
	w.Helper()
	var got []string
	for _, e := range w.news() {
		got = append(got, e.kind+" "+e.reason+": "+e.message)
	}
	isIt := func(got, want string) bool {
		what, words, _ := strings.Cut(want, ": ")
		return strings.HasPrefix(got, what+": ") && strings.Contains(got, words)
	}
	if !slices.EqualFunc(got, want, isIt) {
		w.Errorf("Events:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// files are how many a tcpdump writes, by the Pod name in their path.
type files map[string]int

// runs checks which tcpdumps run, that there are no files but theirs, and that /captures has a link to each.
func (w *world) runs(want files) {
	w.Helper()
	synctest.Wait()
	var links, names []string
	for _, name := range namesIn(w, w.root+"/captures") {
		links = append(links, readLink(w.root+"/captures/"+name))
	}
	running := files{}
	w.kids.mu.Lock()
	for _, c := range w.kids.all {
		if name, _ := strings.CutPrefix(filepath.Base(c.stem), "capture-"); c.lives() {
			running[strings.TrimSuffix(name, ".pcap")] = c.n
			names = append(names, c.files...)
			is(w, "there is a link to "+c.stem, slices.Contains(links, c.stem), true)
		}
	}
	w.kids.mu.Unlock()
	slices.Sort(names)
	if !maps.Equal(running, want) {
		w.Errorf("tcpdumps %v, want %v", running, want)
	}
	is(w, "files", namesIn(w, w.root), names)
}

// expect checks what runs, and which Events came since the last check.
func (w *world) expect(running files, events ...string) {
	w.Helper()
	w.runs(running)
	w.told(events...)
}

func readLink(path string) string { target, _ := os.Readlink(path); return target }

// logged checks how often a text is in the log.
func (w *world) logged(text string, want int) {
	w.Helper()
	synctest.Wait()
	if got := strings.Count(w.log.String(), text); got != want {
		w.Errorf("%q is logged %d times, want %d:\n%.1000s", text, got, want, w.log)
	}
}
