package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
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
func lock(mu *sync.Mutex) (unlock func()) {
	mu.Lock()
	return mu.Unlock
}

func is[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

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

func readLink(path string) string {
	target, _ := os.Readlink(path)
	return target
}

// ---- /proc and the cgroups ----

const host = "host" // the name of the host's network and root

// fakeProc is a folder that looks like /proc. The root of its process 1 has the tree of cgroups.
type fakeProc struct {
	testing.TB
	dir       string
	hierarchy string // "" is cgroup v2, "/systemd" one of v1's
}

type fakeProcess struct {
	pid       int
	cgroup    string // "" is none; else as cgroupOf names it
	net, root string // names: those of the same name are the same
	born      int
}

// newProc is a node with cgroup v2 that systemd makes, as most nodes are.
func newProc(t testing.TB) *fakeProc {
	p := &fakeProc{TB: t, dir: t.TempDir()}
	p.interfaces(host, "lo", "ens3")
	p.make("/kubepods.slice/kubepods-burstable.slice")
	p.add(fakeProcess{pid: 1, net: host, root: host, born: 1})
	return p
}

// tree is where a cgroup's folder is. make makes it, and those above. regrow begins another, empty tree.
func (p *fakeProc) tree(cgroup string) string {
	return filepath.Join(p.dir, "root-"+host, "sys/fs/cgroup", p.hierarchy, cgroup)
}

func (p *fakeProc) make(cgroup string) { must(p, os.MkdirAll(p.tree(cgroup), 0o755)) }

func (p *fakeProc) regrow(hierarchy string) {
	must(p, os.RemoveAll(filepath.Dir(p.tree(""))))
	p.hierarchy = hierarchy
}

// write writes a file at once, like the kernel.
func (p *fakeProc) write(path, text string) {
	must(p, os.WriteFile(path+".new", []byte(text), 0o644), os.Rename(path+".new", path))
}

// interfaces sets what a network has. One that nobody has set has lo and eth0.
func (p *fakeProc) interfaces(net string, names ...string) {
	folder, text := filepath.Join(p.dir, "net-"+net), "Inter-|   Receive\n face |bytes    packets\n"
	for _, name := range names {
		text += fmt.Sprintf("%6s: 1296 16 0 0 1296 16 0 0\n", name)
	}
	must(p, os.MkdirAll(folder, 0o755), os.WriteFile(folder+"/ns", nil, 0o644))
	p.write(folder+"/dev", text)
}

// add starts a process, or changes one. Field 22 of its stat is when it started.
func (p *fakeProc) add(ps fakeProcess) {
	p.end(ps.pid)
	pid := strconv.Itoa(ps.pid)
	dir, net, root := filepath.Join(p.dir, pid), p.dir+"/net-"+ps.net, p.dir+"/root-"+ps.root
	if _, err := os.Stat(net); err != nil {
		p.interfaces(ps.net, "lo", "eth0")
	}
	stat := fmt.Sprintf("%s (a (b) c) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 %d 10 20\n", pid, ps.born)
	must(p, os.MkdirAll(dir+"/ns", 0o755), os.MkdirAll(root, 0o755), os.Symlink(net+"/ns", dir+"/ns/net"),
		os.Symlink(net, dir+"/net"), os.Symlink(root, dir+"/root"), os.WriteFile(dir+"/stat", []byte(stat), 0o644))
	if ps.cgroup != "" {
		p.make(ps.cgroup)
		must(p, os.Symlink(p.tree(ps.cgroup), dir+"/cgroup"))
		p.write(dir+"/cgroup/cgroup.procs", readFile(dir+"/cgroup/cgroup.procs")+pid+"\n")
	}
}

// joins starts a process of a pod in a network. pod starts the one that holds the pod's own network.
func (p *fakeProc) joins(pid int, uid, net string) {
	p.add(fakeProcess{pid: pid, cgroup: cgroupOf(uid), net: net, root: uid, born: pid})
}

func (p *fakeProc) pod(pid int, uid string) { p.joins(pid, uid, uid) }

// end ends a process. Its cgroup stays until gone, as that of a pod does until the kubelet removes it.
func (p *fakeProc) end(pid int) {
	dir := filepath.Join(p.dir, strconv.Itoa(pid))
	if cgroup := readLink(dir + "/cgroup"); cgroup != "" {
		others := strings.ReplaceAll("\n"+readFile(cgroup+"/cgroup.procs"), fmt.Sprintf("\n%d\n", pid), "\n")
		p.write(cgroup+"/cgroup.procs", others[1:])
	}
	must(p, os.RemoveAll(dir))
}

// gone removes the cgroup of a pod, and ends what is in it.
func (p *fakeProc) gone(uid string) {
	folder := p.tree(filepath.Dir(cgroupOf(uid)))
	for _, cgroup := range cgroupsIn(folder) {
		for pid := range strings.FieldsSeq(readFile(cgroup + "/cgroup.procs")) {
			must(p, os.RemoveAll(filepath.Join(p.dir, pid)))
		}
	}
	must(p, os.RemoveAll(folder))
}

// cgroupOf is the cgroup of a container of a burstable pod. The one above it is the pod's.
func cgroupOf(uid string) string {
	return "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" +
		strings.ReplaceAll(uid, "-", "_") + ".slice/cri-containerd-cafe.scope"
}

// ---- Children ----

// behaviour is how children act. The zero one listens, and ends at once when it is told to.
type behaviour struct {
	refusal        error         // why none can be started
	startup        time.Duration // until it listens
	warning        string        // what it says just before
	words          string        // what it says instead, and exits with status 1
	shutdown       time.Duration // from SIGTERM to its end
	compile        time.Duration // how long tcpdump -d takes for a filter; it refuses "refused"
	deaf, immortal bool          // it ignores SIGTERM, and SIGKILL
}

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
	arguments []string // tcpdump's
	network   string   // the folder of the network that it found at descriptor 3
	files     []string // their names
	ends      sync.Once
	quit      chan struct{} // is closed when it ends
	said      string        // at its end
	status    error
	gone      atomic.Bool
}

const closing = "7 packets captured\n9 packets received by filter\n2 packets dropped by kernel\n"

var (
	errKilled = exec.Command("sh", "-c", "kill -KILL $$").Run()
	errStatus = exec.Command("sh", "-c", "exit 1").Run()
)

func (k *children) start(ctx context.Context, network *os.File, arguments ...string) *process {
	defer lock(&k.mu)()
	if network == nil {
		return k.compiler(ctx, arguments)
	}
	k.attempts = append(k.attempts, fakeRequest{at: time.Now()})
	if k.next.refusal != nil {
		refusal := k.next.refusal
		return &process{stderr: strings.NewReader(""), wait: func() error { return refusal }}
	}
	c := &fakeChild{behaviour: k.next, pid: 100_000 + len(k.all), arguments: arguments,
		network: filepath.Dir(readLink(network.Name())), quit: make(chan struct{})}
	c.process, _ = strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(network.Name()))))
	c.stem = c.option("-w")
	c.n, _ = strconv.Atoi(c.option("-W"))
	for i := range min(c.n, 3) {
		digits := fmt.Sprintf("%0*d", len(strconv.Itoa(c.n-1)), i)
		if c.n == 1 {
			digits = ""
		}
		c.files = append(c.files, filepath.Base(c.stem+digits))
		must(k, os.WriteFile(c.stem+digits, make([]byte, 100), 0o644))
	}
	net := strings.TrimPrefix(filepath.Base(c.network), "net-")
	k.proc.add(fakeProcess{pid: c.pid, net: net, root: "packetcapture"})
	k.all = append(k.all, c)
	return begin(c.pid, func(stderr io.Writer) error { return k.live(ctx, c, stderr) })
}

// compiler is tcpdump -y <link type> -d -- <filter>.
func (k *children) compiler(ctx context.Context, arguments []string) *process {
	takes, filter := k.next.compile, arguments[len(arguments)-1]
	k.compiled, k.links = append(k.compiled, filter), append(k.links, arguments[1])
	return begin(1, func(stderr io.Writer) error {
		if sleep(ctx, takes); filter != "refused" {
			return ctx.Err()
		}
		io.WriteString(stderr, "tcpdump: can't parse filter expression: syntax error\n")
		return errStatus
	})
}

// begin has a child live. Its stderr ends when it does.
func begin(pid int, life func(stderr io.Writer) error) *process {
	stderr, its := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- life(its)
		its.Close()
	}()
	return &process{strconv.Itoa(pid), stderr, func() error { return <-ended }}
}

// live is a child's life. Like os/exec it sends SIGTERM when ctx ends, and SIGKILL after termGrace.
func (k *children) live(ctx context.Context, c *fakeChild, stderr io.Writer) error {
	defer c.gone.Store(true)
	defer k.proc.end(c.pid)
	context.AfterFunc(ctx, func() {
		if !c.deaf {
			time.AfterFunc(c.shutdown, func() { c.exit(closing, nil) })
		}
		if !c.immortal {
			time.AfterFunc(termGrace, func() { c.exit("", errKilled) })
		}
	})
	select {
	case <-c.quit:
	case <-time.After(c.startup):
		if c.words != "" {
			c.exit(c.words, errStatus)
		} else {
			io.WriteString(stderr, c.warning+
				"tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n")
		}
	}
	<-c.quit
	io.WriteString(stderr, c.said)
	return c.status
}

func (k *children) behave(b behaviour)         { defer lock(&k.mu)(); k.next = b }
func (k *children) started() int               { defer lock(&k.mu)(); return len(k.all) }
func (k *children) last() *fakeChild           { defer lock(&k.mu)(); return k.all[len(k.all)-1] }
func (c *fakeChild) lives() bool               { return !c.gone.Load() }
func (c *fakeChild) option(name string) string { return c.arguments[slices.Index(c.arguments, name)+1] }

// exit ends a child, by itself or by a signal; the first counts.
func (c *fakeChild) exit(words string, err error) {
	c.ends.Do(func() {
		c.said, c.status = words, err
		close(c.quit)
	})
}

// ---- The API server ----

// fakeAPI is what packetcapture needs of an API server: a watch of node-1's pods, and Events. It works in a
// bubble, without any network. Any other request fails the test, which proves what RBAC must allow.
type fakeAPI struct {
	t             testing.TB
	account       string        // the service account's folder, with a token that is right
	bookmarkEvery time.Duration // for each watch; 0: only when told to

	mu        sync.Mutex
	token     string // the one that is accepted
	version   int    // of the store
	compacted int    // watches from before are answered 410,
	goneIs200 bool   // which comes as an ERROR event
	pods      map[string]fakePod
	history   map[int][]byte // what a watch got at each version that a change of a pod made
	open      []*stream      // the watches, but for those that push has ended
	isFrozen  atomic.Bool
	changed   *sync.Cond // wakes what waits for any of these
	faults    []fault
	requests  []fakeRequest
	events    []map[string]any // that were posted and taken
}

// fakePod is a pod's metadata. A pod that is put again keeps its namespace and name; the UID may be another.
type fakePod struct {
	namespace, name, uid string
	annotations          map[string]string
	version              int
}

type ending = error // of the open watches, which go on if it is nil

var ends, breaks ending = io.EOF, io.ErrUnexpectedEOF // as at the time limit; as when the connection is lost

// fakeRequest is what was asked for. A watch begins from a version, and has a time limit in seconds.
type fakeRequest struct {
	at                time.Time
	verb, from, limit string // verb is "watch" or "post <namespace>"
}

// fault is what a request meets in place of its answer.
type fault struct {
	verb       string
	times      int           // how often; below 1: until heal
	hangs      time.Duration // before that. With neither code nor err the right answer comes then
	code       int           // of the answer, or 0 and
	err        error
	retryAfter string
	body       string // default a Status
}

func newFakeAPI(t testing.TB) *fakeAPI {
	f := &fakeAPI{t: t, account: t.TempDir(), token: "token-1", version: 100, pods: map[string]fakePod{},
		history: map[int][]byte{}}
	f.changed = sync.NewCond(&f.mu)
	f.mount("token", f.token+"\n")
	f.mount("namespace", "kube-system")
	return f
}

func (f *fakeAPI) mount(name, text string) {
	must(f.t, os.WriteFile(filepath.Join(f.account, name), []byte(text), 0o600))
}

func (f *fakeAPI) put(p fakePod) string {
	defer lock(&f.mu)()
	_, exists := f.pods[p.namespace+"/"+p.name]
	return f.change(map[bool]string{false: "ADDED", true: "MODIFIED"}[exists], p)
}

func (f *fakeAPI) remove(namespace, name string) {
	defer lock(&f.mu)()
	if p, exists := f.pods[namespace+"/"+name]; exists {
		f.change("DELETED", p)
	}
}

func (f *fakeAPI) change(kind string, p fakePod) string {
	f.version++
	p.version = f.version
	if f.pods[p.namespace+"/"+p.name] = p; kind == "DELETED" {
		delete(f.pods, p.namespace+"/"+p.name)
	}
	f.history[f.version] = watchFrame(kind, p.object())
	f.send(f.history[f.version], nil)
	return versionName(f.version)
}

// bookmark tells the open watches of a version that came from changes elsewhere.
func (f *fakeAPI) bookmark() string {
	defer lock(&f.mu)()
	f.version++
	f.send(bookmarkFrame(f.version), nil)
	return versionName(f.version)
}

// compact forgets what was: a watch from before is told 410 Gone, by the answer or an event. Open ones go on.
func (f *fakeAPI) compact(goneIs200 bool) {
	defer lock(&f.mu)()
	f.version++
	f.compacted, f.goneIs200 = f.version, goneIs200
}

// push sends a text to the open watches as it is, and may end them.
func (f *fakeAPI) push(text string, end ending) {
	defer lock(&f.mu)()
	f.send([]byte(text), end)
}

func (f *fakeAPI) send(data []byte, end ending) {
	for _, s := range f.open {
		s.data, s.end = append(s.data, data...), end
	}
	if end != nil {
		f.open = nil
	}
	f.changed.Broadcast()
}

// fail has the next requests of a verb, or of "post <namespace>", meet a fault, after earlier faults.
func (f *fakeAPI) fail(verb string, next fault) {
	defer lock(&f.mu)()
	next.verb = verb
	f.faults = append(f.faults, next)
}

// accept has any token but this one answered 401. posted are the Events that were taken. watching counts the
// open watches, until one reaches its time limit. freeze lets nothing through, on these neither, until thaw.
func (f *fakeAPI) accept(token string)      { defer lock(&f.mu)(); f.token = token }
func (f *fakeAPI) heal()                    { defer lock(&f.mu)(); f.faults = nil }
func (f *fakeAPI) posted() []map[string]any { defer lock(&f.mu)(); return slices.Clone(f.events) }
func (f *fakeAPI) watching() int            { defer lock(&f.mu)(); return len(f.open) }
func (f *fakeAPI) wake()                    { defer lock(&f.mu)(); f.changed.Broadcast() }
func (f *fakeAPI) freeze()                  { f.isFrozen.Store(true) }
func (f *fakeAPI) thaw()                    { f.isFrozen.Store(false); f.wake() }

// meets takes down a request, and returns the fault that it meets, if any.
func (f *fakeAPI) meets(asked fakeRequest) (met fault) {
	defer lock(&f.mu)()
	if f.requests = append(f.requests, asked); len(f.requests) > 20_000 {
		panic("more than 20,000 requests") // in a bubble a loop that does not wait would never end
	}
	i := slices.IndexFunc(f.faults, func(next fault) bool { return strings.HasPrefix(asked.verb, next.verb) })
	if i >= 0 {
		met = f.faults[i]
		if f.faults[i].times--; f.faults[i].times == 0 {
			f.faults = slices.Delete(f.faults, i, i+1)
		}
	}
	return met
}

func (f *fakeAPI) asked(verb string) []fakeRequest {
	defer lock(&f.mu)()
	isOther := func(r fakeRequest) bool { return !strings.HasPrefix(r.verb, verb) }
	return slices.DeleteFunc(slices.Clone(f.requests), isOther)
}

// The two requests that there are, each as a line.
var (
	isPost = regexp.MustCompile(
		`^POST /api/v1/namespaces/([^/]+)/events\? \[application/json\] \[application/json\]$`)
	isWatch = regexp.MustCompile(`^GET /api/v1/pods\?allowWatchBookmarks=true&` +
		`fieldSelector=spec.nodeName%3Dnode-1&resourceVersion=(\w+)&timeoutSeconds=([345]\d\d|600)&watch=true ` +
		`\[application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1\]`)
)

// check returns what a request asks for. Any other path, parameter or format fails the test.
func (f *fakeAPI) check(r *http.Request) fakeRequest {
	line := fmt.Sprintf("%s %s?%s %s %s", r.Method, r.URL.Path, r.URL.Query().Encode(),
		r.Header["Accept"], r.Header["Content-Type"])
	if post := isPost.FindStringSubmatch(line); post != nil {
		return fakeRequest{at: time.Now(), verb: "post " + post[1]}
	} else if watch := isWatch.FindStringSubmatch(line); watch != nil {
		return fakeRequest{time.Now(), "watch", watch[1], watch[2]}
	}
	f.t.Errorf("the fake does not know this request: %s", line)
	return fakeRequest{}
}

func (f *fakeAPI) RoundTrip(r *http.Request) (*http.Response, error) {
	asked := f.check(r)
	met := f.meets(asked)
	context.AfterFunc(r.Context(), f.wake)
	sleep(r.Context(), met.hangs)
	defer lock(&f.mu)()
	for f.isFrozen.Load() && r.Context().Err() == nil {
		f.changed.Wait()
	}
	switch {
	case r.Context().Err() != nil:
		return nil, r.Context().Err()
	case met.err != nil:
		return nil, met.err
	case met.code != 0:
		response := answer(met.code, []byte(met.body))
		if met.body == "" && met.code != 200 {
			// Its digits differ each time, as those of a port do.
			response = refusal(met.code, "so the test wants it, after "+asked.limit)
		}
		response.Header.Set("Retry-After", met.retryAfter)
		return response, nil
	case asked.verb == "" || r.Header.Get("Authorization") != "Bearer "+f.token:
		return refusal(401, "Unauthorized"), nil
	case asked.verb == "watch":
		return f.watch(r.Context(), asked), nil
	}
	event := fields{}
	must(f.t, json.NewDecoder(r.Body).Decode(&event))
	f.events = append(f.events, event)
	return answer(201, nil), nil
}

func answer(code int, body []byte) *http.Response {
	return &http.Response{StatusCode: code, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body))}
}

func refusal(code int, why string) *http.Response { return answer(code, toJSON(status(code, why))) }

// watch begins with what has changed since a version, or with all pods as ADDED, in no order of versions.
func (f *fakeAPI) watch(ctx context.Context, asked fakeRequest) *http.Response {
	from := 0
	fmt.Sscanf(asked.from, "v%d", &from)
	limit, _ := time.ParseDuration(asked.limit + "s")
	s := &stream{fakeAPI: f, ctx: ctx, until: time.Now().Add(limit)}
	switch {
	case asked.from == anyVersion:
		for _, key := range slices.Sorted(maps.Keys(f.pods)) {
			s.data = append(s.data, watchFrame("ADDED", f.pods[key].object())...)
		}
	case from < f.compacted && f.goneIs200:
		return answer(200, errorFrame(410, "too old resource version"))
	case from < f.compacted:
		return refusal(410, "too old resource version")
	default:
		for version := from + 1; version <= f.version; version++ {
			s.data = append(s.data, f.history[version]...)
		}
	}
	f.open = append(f.open, s)
	time.AfterFunc(limit, f.wake)
	if f.bookmarkEvery > 0 {
		go s.tick()
	}
	return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(s)}
}

// stream is the body of an open watch: what is still to be read, and how it ends then.
type stream struct {
	*fakeAPI
	ctx   context.Context
	until time.Time // its time limit
	data  []byte
	end   error
}

func (s *stream) Read(data []byte) (n int, err error) {
	defer lock(&s.mu)()
	isIdle := func() bool { return len(s.data) == 0 && s.end == nil && time.Now().Before(s.until) }
	for s.ctx.Err() == nil && (s.isFrozen.Load() || isIdle()) {
		s.changed.Wait()
	}
	if s.ctx.Err() != nil {
		return 0, s.ctx.Err()
	}
	if n = copy(data, s.data); n == 0 {
		err = cmp.Or(s.end, io.EOF)
	}
	s.data = s.data[n:]
	return n, err
}

func (s *stream) tick() {
	for sleep(s.ctx, s.bookmarkEvery); s.ctx.Err() == nil; sleep(s.ctx, s.bookmarkEvery) {
		s.bookmark()
	}
}

type fields = map[string]any

// object is a pod, or with nothing but a version what a BOOKMARK has.
func (p fakePod) object() fields {
	return fields{"metadata": fields{"namespace": p.namespace, "name": p.name, "uid": p.uid,
		"resourceVersion": versionName(p.version), "annotations": p.annotations}}
}

// status has a resourceVersion that nobody must take for one.
func status(code int, message string) fields {
	return fields{"metadata": fields{"resourceVersion": "none"}, "message": message, "code": code}
}

func toJSON(body any) []byte {
	data, _ := json.Marshal(body)
	return append(data, '\n')
}

func watchFrame(kind string, of fields) []byte { return toJSON(fields{"type": kind, "object": of}) }
func bookmarkFrame(v int) []byte               { return watchFrame("BOOKMARK", fakePod{version: v}.object()) }
func errorFrame(code int, why string) []byte   { return watchFrame("ERROR", status(code, why)) }

// versionName makes a resourceVersion that is no number: it is opaque.
func versionName(version int) string { return fmt.Sprintf("v%d", version) }

// ---- The whole ----

// world is a node in a bubble of time, on which the program runs.
type world struct {
	*testing.T
	*agent
	api       *fakeAPI
	kids      *children
	proc      *fakeProc
	root      string
	log       bytes.Buffer
	delivered atomic.Int32 // how often the watch said that it delivers
	looked    int          // Events that were looked at
	program   sync.WaitGroup
	end       context.CancelFunc // of the program
}

// simulate tells a story in a world whose captures may take the given number of files, 0 for no bound. The
// program has begun to watch. At last it is told to end: that takes less than 5 s, and nothing is left.
func simulate(t *testing.T, limit int, story func(w *world)) {
	synctest.Test(t, func(t *testing.T) {
		api, proc, root := newFakeAPI(t), newProc(t), t.TempDir()
		a := testAgent(t, proc.dir, root)
		a.account, a.limit = api.account, cmp.Or(limit, a.limit)
		ctx, end := context.WithCancel(t.Context())
		w := &world{T: t, agent: a, api: api, proc: proc, root: root, end: end}
		w.kids = &children{TB: t, proc: proc}
		a.api, a.start, a.ready = api, w.kids.start, func() { w.delivered.Add(1) }
		defer slog.SetDefault(slog.Default())
		slog.SetDefault(slog.New(slog.NewTextHandler(&w.log, nil)))
		w.program.Go(func() { is(t, "the program's error", a.run(ctx), nil) })
		synctest.Wait()
		story(w)

		began := time.Now()
		w.end()
		w.program.Wait()
		is(t, "the program ends within 5 s", time.Since(began) < 5*time.Second, true)
		w.runs(nil)
		is(t, "links in /captures", namesIn(t, w.root+"/captures"), nil)
		w.alive.Wait() // for Events that are still tried: in a container its end ends that
		is(t, "queues that are left", len(w.queues), 0)
		w.logged("level=ERROR", 0)
	})
}

// newPodWatch makes what run makes, for a test that takes the watch's place.
func newPodWatch(t testing.TB, a *agent) *podWatch {
	var err error
	a.cgroups, err = newCgroups(a.proc)
	must(t, err, os.Mkdir(a.root+"/captures", 0o755))
	return &podWatch{agent: a, captures: map[string]*capture{}, version: anyVersion}
}

// testAgent is the program on node-1, with a service account that can be read.
func testAgent(t testing.TB, proc, root string) *agent {
	environment := map[string]string{"NODE_NAME": "node-1", "DISK_FREE": "0",
		"KUBERNETES_SERVICE_HOST": "kubernetes.test", "KUBERNETES_SERVICE_PORT": "443"}
	a, err := newAgent(func(name string) string { return environment[name] })
	must(t, err)
	a.account, a.proc, a.root, a.limit = t.TempDir(), proc, root, 1<<30
	must(t, os.WriteFile(a.account+"/token", []byte("token"), 0o600))
	return a
}

type annotated struct {
	pod
	spec
}

// podNamed is a pod of the namespace default whose annotation is value.
func podNamed(name, uid, value string) annotated {
	files, _ := strconv.Atoi(value)
	return annotated{pod{"default", name, uid, uid}, spec{annotated: true, value: value, files: files}}
}

// stored is a pod as the API server has it. An annotation that is "" is not there.
func (p annotated) stored() fakePod {
	all := map[string]string{annotation: p.value, filterKey: p.filter, interfaceKey: p.iface}
	if p.kubeletUID != p.uid {
		all["kubernetes.io/config.mirror"] = p.kubeletUID
	}
	maps.DeleteFunc(all, func(_, value string) bool { return value == "" })
	return fakePod{p.namespace, p.name, p.uid, all, 0}
}

// see has a pod be there or change, and lose has it be deleted. marked has the watch get a bookmark, and pass
// lets time pass. All wait until that has had its effect.
func (w *world) see(p annotated) string { defer synctest.Wait(); return w.api.put(p.stored()) }
func (w *world) marked() string         { defer synctest.Wait(); return w.api.bookmark() }
func (w *world) pass(d time.Duration)   { time.Sleep(d); synctest.Wait() }

func (w *world) lose(p annotated) {
	defer synctest.Wait()
	defer lock(&w.api.mu)()
	w.api.change("DELETED", p.stored())
}

// told checks the Events since the last call, each by "<kind> <reason>: <words in its message>".
func (w *world) told(want ...string) {
	w.Helper()
	synctest.Wait()
	news := w.api.posted()[w.looked:]
	w.looked += len(news)
	isIt := func(e fields, want string) bool {
		what, words, _ := strings.Cut(want, ": ")
		return fmt.Sprint(e["type"], " ", e["reason"]) == what && strings.Contains(e["message"].(string), words)
	}
	if !slices.EqualFunc(news, want, isIt) {
		w.Errorf("Events:\n%v\nwant:\n%s", news, strings.Join(want, "\n"))
	}
}

// files are how many a tcpdump writes, by the Pod name in their path.
type files map[string]int

// runs checks which tcpdumps run, and that there are no files but theirs.
func (w *world) runs(want files) {
	w.Helper()
	synctest.Wait()
	defer lock(&w.kids.mu)()
	running, names := files{}, []string(nil)
	for _, c := range w.kids.all {
		if c.lives() {
			name := strings.TrimPrefix(filepath.Base(c.stem), "capture-")
			running[strings.TrimSuffix(name, ".pcap")] = c.n
			names = append(names, c.files...)
		}
	}
	slices.Sort(names)
	is(w, "tcpdumps", fmt.Sprint(running), fmt.Sprint(want))
	is(w, "files", namesIn(w, w.root), names)
}

// after lets time pass, and checks what runs then, and which Events came since the last check.
func (w *world) after(wait time.Duration, running files, events ...string) {
	w.Helper()
	w.pass(wait)
	w.runs(running)
	w.told(events...)
}

func (w *world) logged(text string, want int) {
	w.Helper()
	synctest.Wait()
	log := w.log.String()
	is(w, fmt.Sprintf("%q is logged in\n%.1000s", text, log), strings.Count(log, text), want)
}
