package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"
)

var (
	soakSteps = flag.Int("soak.steps", 800, "steps of the random walks")
	soakSeed  = flag.Uint64("soak.seed", 0, "repeat the walk of this seed")
)

// walkSteps is the length of a walk, short enough to be read.
const walkSteps = 400

// TestSoak walks at random through what happens to the program and around it, in a bubble of time. Now and
// then the faults end. Soon the children, the files, the links and the Events must be what the annotations
// ask for.
func TestSoak(t *testing.T) {
	var memory syscall.Statfs_t
	if err := syscall.Statfs("/dev/shm", &memory); err == nil && int64(memory.Bavail)*memory.Bsize > 2000*fileBytes {
		t.Setenv("TMPDIR", "/dev/shm") // in memory it takes a fourth of the time
	}
	seed, left := uint64(time.Now().UnixNano()), *soakSteps
	if *soakSeed != 0 {
		seed, left = *soakSeed, walkSteps
	}
	for ; left > 0 && !t.Failed(); seed, left = seed+1, left-walkSteps {
		walk(t, seed, min(left, walkSteps))
	}
}

type walker struct {
	*testing.T
	r     *rand.Rand
	story []string
	api   *fakeAPI
	proc  *fakeProc
	kids  *children
	root  string
	end   context.CancelFunc // of the program; nil while it is down
	done  chan struct{}

	limit    int           // files that the node may have
	pods     []*walkPod    // all that there ever were; the first is none, since process 1 is the host's
	token    string        // the one that the API server takes
	hanging  string        // the namespace whose Events hang
	patience time.Duration // from the end of all faults until everything must be right
	quiets   int

	mu   sync.Mutex
	told map[string]string // by UID: the reason of the last Event that this run of the program posted
}

// walkPod is what the test knows of a pod. Of what may have happened since the last quiet point, child,
// ifRefused, hasFiles and room hold only what is certain.
type walkPod struct {
	fakePod
	number             int
	isDeleted, isAlive bool
	pid                int    // of its process, the last one: number times 100, and a bit
	net                string // the name of its network, which it keeps when it crashes
	hasNet1            bool   // a second interface

	right     map[string]string // its last valid annotations
	asked     []request         // what was validly asked for; the last counts
	since     int               // the first that may have been seen since the last quiet point
	isLarger  bool              // the last may be refused: it asks for more files than one before
	child     *fakeChild        // runs undisturbed
	ifRefused *fakeChild        // runs undisturbed if the last is refused
	hasFiles  bool              // also without a child
	room      int               // files that it has room for
	isTold    bool              // of a capture an Event has told, and then nothing but a removal has come
}

// request is what annotations ask for. Without files it is nothing.
type request struct {
	n             int
	filter, iface string
	annotations   map[string]string
}

func (r request) equals(other request) bool {
	return r.n == other.n && r.filter == other.filter && r.iface == other.iface
}

// requestOf is what a child was started for, by its arguments.
func requestOf(c *fakeChild) request {
	r := request{n: c.n, iface: c.option("-i")}
	if count := len(c.arguments); c.arguments[count-2] == "--" {
		r.filter = c.arguments[count-1]
	}
	return r
}

func (p *walkPod) String() string {
	return fmt.Sprintf("%s/%s %.8s (alive: %v, process %d)", p.namespace, p.name, p.uid, p.isAlive, p.pid)
}

func (p *walkPod) want() request { return p.asked[len(p.asked)-1] }

// may are the requests that the program may go by: the last, or one before if the last may be refused.
func (p *walkPod) may() []request {
	if p.isLarger {
		return p.asked[p.since:]
	}
	return p.asked[len(p.asked)-1:]
}

// most is the most files that it may have room for.
func (p *walkPod) most() (n int) {
	for _, r := range p.may() {
		n = max(n, r.n)
	}
	return n
}

func (p *walkPod) has(iface string) bool {
	return iface == "any" || slices.Contains(p.interfaces(), iface)
}

func (p *walkPod) interfaces() []string {
	names := map[bool][]string{false: {"lo", podInterface}, true: {"lo", "ens3"}}[p.net == host]
	return append(names, map[bool][]string{true: {"net1"}}[p.hasNet1]...)
}

// mayLack reports whether the pod may have no interface of the name that the annotations ask for.
func (p *walkPod) mayLack() bool {
	return slices.ContainsFunc(p.may(), func(r request) bool { return r.n > 0 && !p.has(r.iface) })
}

// walk takes the steps of a seed in a bubble of time of their own.
func walk(t *testing.T, seed uint64, steps int) {
	w := &walker{r: rand.New(rand.NewPCG(seed, 1)), pods: []*walkPod{{isDeleted: true}}, patience: quietLimit}
	isDone := false
	defer func() {
		if !isDone || t.Failed() {
			t.Logf("%s\ngo test -race -run TestSoak -soak.seed=%d", strings.Join(w.story, "\n"), seed)
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		w.T, w.api, w.proc, w.root = t, newFakeAPI(t), newProc(t), t.TempDir()
		w.kids, w.token = &children{TB: t, proc: w.proc}, w.api.token
		w.limit = pick(w, []int{6, 12, 30, noLimit})
		w.api.bookmarkEvery = pick(w, []time.Duration{0, 20 * time.Second})
		w.note("room for %d files, bookmarks every %v", w.limit, w.api.bookmarkEvery)
		w.api.put(fakePod{namespace: "z", name: "last", uid: "f"})
		for _, name := range strangers {
			must(w, os.WriteFile(filepath.Join(w.root, name), nil, 0o644))
		}
		w.boot()
		for i := 0; i < steps && !w.Failed(); i++ {
			w.step()
		}
		if !w.Failed() {
			w.quiet()
		}
		w.halt()
		w.api.thaw()
	})
	isDone = true
}

func (w *walker) note(format string, arguments ...any) {
	w.story = append(w.story, fmt.Sprintf("%4d %s", len(w.story), fmt.Sprintf(format, arguments...)))
}

// ---- The program ----

// boot starts the program, in a container without files.
func (w *walker) boot() {
	if w.end != nil {
		return
	}
	cfg := testConfig(w, w.proc.dir, w.root)
	cfg.account, cfg.diskLimit = w.api.account, int64(w.limit)*fileBytes
	a, err := newAgent(cfg)
	must(w, err)
	a.api.http.Transport, a.start, a.ready = w, w.start, func() {}
	ctx, end := context.WithCancel(context.Background())
	w.end, w.done, w.told = end, make(chan struct{}), map[string]string{}
	go func() {
		defer close(w.done)
		a.run(ctx)
	}()
}

// halt ends the program as SIGTERM does: within 5 s, and nothing is left.
func (w *walker) halt() {
	if w.end == nil {
		return
	}
	began := time.Now()
	w.end()
	<-w.done
	if took := time.Since(began); took > 5*time.Second {
		w.Errorf("the program took %v to end", took)
	}
	w.exit(func(c *fakeChild) bool { return c.immortal }) // with the container
	synctest.Wait()
	if living, left := w.living(), w.files(); len(living)+len(w.links()) > 0 || !slices.Equal(left, strangers) {
		w.Errorf("the program leaves children %v, files %q and links %q", living, left, w.links())
	}
	must(w, os.RemoveAll(filepath.Join(w.root, "captures")))
	for _, p := range w.pods[1:] { // the next program does not know what ran before
		p.since, p.isLarger, p.child, p.ifRefused, p.hasFiles, p.room = len(p.asked)-1, false, nil, nil, false, 0
		p.isTold = false
	}
	w.end = nil
}

// RoundTrip takes down what Events tell.
func (w *walker) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method == "POST" {
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		var e struct {
			Reason         string
			InvolvedObject struct{ UID string }
		}
		json.Unmarshal(body, &e)
		w.mu.Lock()
		w.told[e.InvolvedObject.UID] = e.Reason
		w.mu.Unlock()
	}
	return w.api.RoundTrip(r)
}

// start stands in for the function of that name, and looks at what must hold at any time.
func (w *walker) start(ctx context.Context, network *os.File, arguments ...string) (*process, error) {
	defer w.living()
	return w.kids.start(ctx, network, arguments...)
}

// living are the children that live, by their pods' numbers. A pod has one at most, each has a link, and there
// is room for all of them.
func (w *walker) living() map[int]*fakeChild {
	w.kids.mu.Lock()
	defer w.kids.mu.Unlock()
	living, files := map[int]*fakeChild{}, 0
	linked := slices.Collect(maps.Values(w.links()))
	for _, c := range w.kids.all {
		number := c.process / 100
		switch other := living[number]; {
		case !c.lives():
			continue
		case other != nil:
			w.Errorf("child %d into %s and child %d into %s are of one pod", other.pid, other.stem, c.pid, c.stem)
		case !slices.Contains(linked, c.stem):
			w.Errorf("child %d into %s has no link, of %q", c.pid, c.stem, linked)
		}
		living[number], files = c, files+c.n
	}
	if files > w.limit {
		w.Errorf("the children have %d files, of %d that there may be", files, w.limit)
	}
	return living
}

func (w *walker) files() []string {
	return slices.DeleteFunc(namesIn(w, w.root), func(name string) bool { return name == "captures" })
}

// links are the links of captured pods, and what they point to.
func (w *walker) links() map[string]string {
	links := map[string]string{}
	paths, _ := filepath.Glob(filepath.Join(w.root, "captures/*"))
	for _, path := range paths {
		links[filepath.Base(path)] = readLink(path)
	}
	return links
}

func (w *walker) podOf(c *fakeChild) *walkPod { return w.pods[c.process/100] }

// exit ends children as SIGKILL does.
func (w *walker) exit(which func(*fakeChild) bool) {
	for _, c := range w.living() {
		if p := w.podOf(c); which(c) {
			p.hasFiles = p.hasFiles || p.child != nil
			p.child, p.ifRefused = nil, nil
			c.exit("", errKilled)
		}
	}
}

// ---- The steps ----

const (
	hostPod = "node"  // the name of pods that have the host's network
	noLimit = 1 << 20 // of files: nothing is refused for want of room
)

var (
	strangers    = []string{"capture-notes.txt", "web.pcap0"} // no files of captures: nobody may touch them
	walkNames    = []string{"web", "web-2", "web.pcap0", "web.pcap", hostPod}
	walkValues   = []string{"1", "1", "2", "2", "3", "4", "5", "6", "9", "10", "11", "20", "100"}
	wrongValues  = []string{"0", "01", " 1", "5abc", "99999999999999999999"}
	walkFilters  = []string{"", "tcp port 80", "udp", " udp\n"}
	wrongFilters = []string{"refused", "bell\a"}
	walkIfaces   = []string{"", "lo", "net1", "any"} // a pod with the host's network has any anyway
	wrongIfaces  = []string{"-i", "a/b"}
)

func pick[T any](w *walker, from []T) T { return from[w.r.IntN(len(from))] }

func (w *walker) chance(oneOf int) bool { return w.r.IntN(oneOf) == 0 }

func (w *walker) millis(most int) time.Duration {
	return time.Duration(w.r.IntN(most)) * time.Millisecond
}

// step takes one step. What it does depends on the seed and the test's own book alone, so that a seed repeats
// its walk.
func (w *walker) step() {
	steps := []struct {
		weight int
		name   string
		take   func(p *walkPod)
	}{
		{23, "annotate", w.annotate},
		{2, "touch", func(p *walkPod) { w.api.put(p.fakePod) }},
		{4, "unannotate", func(p *walkPod) { w.set(p, nil) }},
		{7, "delete", w.remove},
		{9, "end the process of", func(p *walkPod) { w.vanish(p, pick(w, []loss{crashes, crashes, moves, finishes})) }},
		{9, "start a process of", w.bear},
		{3, "plug", w.plug},
		{4, "kill the child of", func(p *walkPod) { w.exit(func(c *fakeChild) bool { return w.podOf(c) == p }) }},
		{5, "have children behave", w.behave},
		{13, "disturb", w.disturb},
		{3, "end the program", func(*walkPod) { w.halt() }},
		{3, "start the program", func(*walkPod) { w.boot() }},
		{11, "advance", func(*walkPod) { time.Sleep(w.millis(pick(w, []int{30, 300, 2000, 5000}))) }},
		{4, "quiet", func(*walkPod) { w.quiet() }},
	}
	n, p := w.r.IntN(100), w.some()
	for _, s := range steps {
		if n -= s.weight; n < 0 {
			w.note("%s %s", s.name, p)
			s.take(p)
			break
		}
	}
	if w.chance(2) {
		synctest.Wait()
	}
}

// there are the pods that the API server has.
func (w *walker) there() []*walkPod {
	return slices.DeleteFunc(slices.Clone(w.pods), func(p *walkPod) bool { return p.isDeleted })
}

// some picks a pod, which may be a new one. Pods of two namespaces have the same names.
func (w *walker) some() *walkPod {
	namespace, name := pick(w, []string{"default", "other"}), pick(w, walkNames)
	for _, p := range w.there() {
		if p.namespace == namespace && p.name == name {
			return p
		}
	}
	return w.create(namespace, name)
}

// create makes a pod that may or may not have a process yet, without annotations.
func (w *walker) create(namespace, name string) *walkPod {
	number := len(w.pods)
	p := &walkPod{number: number, pid: 100 * number, asked: []request{{}}, hasNet1: name != hostPod && w.chance(2)}
	p.namespace, p.name = namespace, name
	p.uid = fmt.Sprintf("%08x-0a1b-4c2d-8e3f-%012x", number, number)
	w.pods = append(w.pods, p)
	if !w.chance(3) {
		w.bear(p)
	}
	return p
}

// annotate changes one annotation of a pod.
func (w *walker) annotate(p *walkPod) {
	annotations := map[string]string{annotation: "1"}
	maps.Copy(annotations, p.right)
	change := func(key string, right, wrong []string) {
		if annotations[key] = pick(w, right); w.chance(8) {
			annotations[key] = pick(w, wrong)
		}
	}
	switch what := w.r.IntN(4); {
	case what == 0:
		change(filterAnnotation, walkFilters, wrongFilters)
	case what == 1:
		change(interfaceAnnotation, walkIfaces[:map[bool]int{false: 4, true: 3}[p.name == hostPod]], wrongIfaces)
	default:
		change(annotation, walkValues, wrongValues)
	}
	w.set(p, annotations)
}

func (w *walker) set(p *walkPod, annotations map[string]string) {
	w.book(p, annotations)
	w.api.put(p.fakePod)
}

// book takes down that a pod's annotations change. What is invalid changes nothing.
func (w *walker) book(p *walkPod, annotations map[string]string) {
	value, filter, iface := annotations[annotation], annotations[filterAnnotation], annotations[interfaceAnnotation]
	isValid := !slices.Contains(wrongValues, value) && !slices.Contains(wrongFilters, filter) &&
		!slices.Contains(wrongIfaces, iface)
	asked := request{filter: strings.TrimSpace(filter), annotations: annotations}
	asked.iface = cmp.Or(iface, map[bool]string{false: podInterface, true: "any"}[p.name == hostPod])
	asked.n, _ = strconv.Atoi(value)
	w.note("  %s: %q, valid: %v", p, annotations, isValid)
	p.annotations, p.isTold = annotations, p.isTold && value == ""
	if !isValid || asked.n > w.limit || maps.Equal(annotations, p.right) {
		return
	}
	before := p.asked[p.since:]
	isLess := func(r request) bool { return r.n > 0 && r.n < asked.n }
	p.isLarger = w.limit < noLimit && slices.ContainsFunc(before, isLess)
	if p.ifRefused = nil; p.isLarger && len(before) == 1 {
		p.ifRefused = p.child
	}
	if p.room = min(p.room, asked.n); !p.isAlive {
		p.room = 0
	}
	p.right, p.asked, p.child, p.hasFiles = annotations, append(p.asked, asked), nil, false
}

// remove deletes a pod. Its process ends before, or at the next quiet point. Another pod may take its place
// at once.
func (w *walker) remove(p *walkPod) {
	p.isDeleted = true
	if w.chance(2) {
		w.vanish(p, finishes)
	}
	w.api.remove(p.namespace, p.name)
	if w.chance(2) {
		w.set(w.create(p.namespace, p.name), p.right)
	}
}

// bear starts a pod's process: in the network that it had, if it has crashed, or in another one.
func (w *walker) bear(p *walkPod) {
	if p.isAlive {
		return
	}
	if p.pid++; p.name == hostPod {
		p.net = host
	} else if p.net == "" || w.chance(3) {
		p.hasFiles = p.hasFiles || p.child != nil
		p.net, p.child, p.ifRefused = strconv.Itoa(p.pid), nil, nil
		w.proc.interfaces(p.net, p.interfaces()...)
	}
	p.isAlive = true
	w.proc.add(fakeProcess{pid: p.pid, cgroup: cgroupOf(p.uid), net: p.net, root: p.uid, born: p.pid})
}

// loss is how a pod loses its process.
type loss int

const (
	crashes  loss = iota // its network and its cgroup stay: a crash loop without a pause process
	moves                // its network goes: it will be in another one
	finishes             // its cgroup goes
)

// vanish ends a pod's process. Its files stay. The host's network can't go.
func (w *walker) vanish(p *walkPod, how loss) {
	synctest.Wait() // a child that is just being started is known by the process whose network it has
	if p.child == nil && !p.hasFiles {
		p.room = 0
	}
	if p.isAlive {
		w.proc.end(p.pid)
	}
	if p.isAlive = false; how == crashes || how == moves && p.net == host {
		return
	}
	if how == finishes {
		w.proc.gone(p.uid)
	}
	net, isHeld := p.net, how == finishes && w.chance(3)
	p.hasFiles = p.hasFiles || p.child != nil
	if p.child, p.ifRefused, p.net = nil, nil, ""; net == "" || net == host || isHeld {
		return
	}
	w.proc.interfaces(net, "lo")
	c, lost := w.living()[p.number], []string{podInterface, "net1"}
	if c != nil && filepath.Base(c.network) == "net-"+net && slices.Contains(lost, c.option("-i")) {
		c.exit("tcpdump: The interface disappeared\n"+closing, errStatus)
	}
}

// plug gives a pod a second interface.
func (w *walker) plug(p *walkPod) {
	if p.net != "" && p.net != host {
		p.hasNet1 = true
		w.proc.interfaces(p.net, p.interfaces()...)
	}
}

// behave says how the children are that are started from now on.
func (w *walker) behave(*walkPod) {
	b := pick(w, []behaviour{
		{}, {refusal: syscall.EAGAIN}, {deaf: true}, {deaf: true, immortal: true}, {deaf: true, immortal: true},
		{startup: w.millis(2000)}, {startup: w.millis(2000), deaf: true},
		{startup: w.millis(500), words: "tcpdump: so it is\n"}, {shutdown: w.millis(4000)},
		{compile: w.millis(3000)}, {warning: "Warning: so it is\n"},
	})
	w.note("  %+v", b)
	w.kids.behave(b)
}

// disturb troubles the watch, the Events or the token. The watches get a text that is none of theirs, and end.
func (w *walker) disturb(p *walkPod) {
	changed := fakePod{p.namespace, p.name, p.uid, map[string]string{annotation: "7"}, 1 << 30}
	never := watchFrame("MODIFIED", changed.object())
	text := pick(w, []string{"", "", "", string(never[:w.r.IntN(len(never)-2)]), "<html>", "{}\n", "\x00\xff",
		`{"type":"ADDED","object":7}`, string(errorFrame(410, "too old")), string(errorFrame(500, "no"))})
	verb, end := pick(w, []string{"watch", "watch", "post", "post other"}), pick(w, []ending{ends, breaks})
	met := pick(w, []fault{
		{code: 410}, {code: 429, retryAfter: strconv.Itoa(1 + w.r.IntN(5))}, {err: io.ErrUnexpectedEOF},
		{err: syscall.ECONNREFUSED}, {hangs: w.millis(60_000)}, {code: pick(w, []int{500, 503, 401, 403}), body: "<html>"},
		{code: 200, body: pick(w, []string{" ", "{}", `{"metadata":{`, string(errorFrame(410, "too old"))})},
	})
	met.times = 1 + w.r.IntN(4)
	trouble := w.r.IntN(40)
	w.note("  trouble %d; %s: %+v; the watches get %q and end by %d", trouble, verb, met, text, end)
	switch {
	case trouble < 4:
		w.api.freeze()
	case trouble < 8:
		w.api.thaw()
	case trouble < 12:
		w.api.compact(w.chance(2))
	case trouble < 16: // a pod is deleted while nobody watches, and the server forgets that
		w.api.push("", breaks)
		synctest.Wait()
		w.remove(p)
		w.api.compact(w.chance(2))
	case trouble < 20: // it will be mounted
		w.token += "x"
		w.api.accept(w.token)
	case trouble < 23:
		os.Remove(filepath.Join(w.api.account, "token"))
	case trouble < 26:
		w.hanging = pick(w, []string{"default", "other"})
		w.api.fail("post "+w.hanging, fault{hangs: time.Hour})
	case trouble < 27:
		w.restore()
	case trouble < 28:
		time.Sleep(w.millis(600_000))
	default:
		w.api.fail(verb, met)
	}
	w.api.push(text, end)
}

// restore takes some steps, and then the API server is restored from a backup that was made before them. A
// watch from later versions gets nothing; it learns of that when it ends, after 10 minutes at most.
func (w *walker) restore() {
	if w.patience == restoreLimit {
		return // a watch may have versions already that the server does not have
	}
	backup, version := map[*walkPod]map[string]string{}, w.api.put(fakePod{namespace: "z", name: "backup", uid: "e"})
	for _, p := range w.there() {
		backup[p] = p.annotations
	}
	w.api.mu.Lock()
	w.api.version += 10_000 // which are never reached again
	w.api.mu.Unlock()
	for range 1 + w.r.IntN(12) {
		w.step()
	}
	w.note("  %s is restored", version)
	w.api.restore(version)
	w.patience = restoreLimit
	for _, p := range w.pods[1:] {
		annotations, isThere := backup[p]
		if p.isDeleted = !isThere; isThere {
			p.child, p.ifRefused, p.hasFiles, p.room = nil, nil, false, 0
			w.book(p, annotations)
		}
	}
}

// ---- The quiet points ----

// From the end of all faults until everything must be right: tcpdump waits up to 5 minutes if it has failed
// often, and a watch that is ahead of a restored server ends after 10.
const (
	quietLimit   = 7 * time.Minute
	restoreLimit = quietLimit + 11*time.Minute
)

// quiet ends all faults, mends all mistakes, waits until everything is right, and looks once more after a
// while. The Events of a namespace may go on to hang.
func (w *walker) quiet() {
	w.api.heal()
	w.api.thaw()
	if w.chance(2) {
		w.hanging = ""
	} else if w.hanging != "" {
		w.api.fail("post "+w.hanging, fault{hangs: time.Hour})
	}
	w.api.mount("token", w.token)
	w.kids.behave(behaviour{})
	w.boot()
	w.exit(func(c *fakeChild) bool { return c.immortal })
	for _, p := range w.pods[1:] {
		if p.isDeleted || w.chance(8) {
			w.vanish(p, finishes)
		}
		if !p.isDeleted && w.chance(2) {
			w.bear(p)
		}
		if !p.isDeleted && !maps.Equal(p.annotations, p.right) {
			w.set(p, p.right)
		}
	}
	// The last change is of a pod that never runs. Once its filter is compiled all changes before have come.
	w.quiets++
	filter, began := fmt.Sprintf("udp port %d", w.quiets), time.Now()
	last := map[string]string{annotation: "1", filterAnnotation: filter}
	w.api.put(fakePod{namespace: "z", name: "last", uid: "f", annotations: last})
	w.await(began, func() bool {
		w.kids.mu.Lock()
		defer w.kids.mu.Unlock()
		return slices.Contains(w.kids.compiled, filter)
	})
	w.api.put(fakePod{namespace: "z", name: "last", uid: "f"}) // it would be looked for all the time
	time.Sleep(termGrace + 100*time.Millisecond)               // what is to be stopped has ended
	w.await(began, func() bool { return w.verdict() == nil })
	time.Sleep(w.millis(3000))
	synctest.Wait()
	if err := w.verdict(); err != nil {
		w.Errorf("step %d: not right %v after the last fault: %v", len(w.story), time.Since(began), err)
	}
	w.settle()
}

// await waits until something is so, but no longer than everything may take.
func (w *walker) await(began time.Time, isSo func() bool) {
	for synctest.Wait(); !isSo() && time.Since(began) < w.patience; synctest.Wait() {
		time.Sleep(200*time.Millisecond + time.Since(began)/20)
	}
}

// settle takes down what is right at a quiet point.
func (w *walker) settle() {
	living := w.living()
	for _, c := range w.kids.all {
		if p := w.podOf(c); !slices.ContainsFunc(p.asked, requestOf(c).equals) {
			w.Errorf("child %d of %s has %v, asked for were %v", c.pid, p, requestOf(c), p.asked)
		}
	}
	for _, p := range w.pods[1:] {
		c := living[p.number]
		if p.isDeleted {
			p.asked, p.right, p.isLarger = append(p.asked, request{}), nil, false
		}
		for _, r := range slices.Backward(p.asked[p.since:]) {
			if c != nil && r.equals(requestOf(c)) {
				p.asked, p.right, p.isLarger = append(p.asked, r), r.annotations, false
				break
			}
		}
		if !p.isLarger {
			p.since = len(p.asked) - 1
		}
		if p.child, p.ifRefused, p.room = c, nil, 0; c != nil || p.hasFiles {
			p.room = p.want().n
		}
		p.isTold = p.want().n > 0
	}
	w.patience = quietLimit
}

// verdict is on what runs, what is in the folders and what was told, by what the annotations say.
func (w *walker) verdict() error {
	living, links, taken := w.living(), w.links(), 0
	files, idle := slices.Clone(strangers), map[*walkPod]bool{}
	for _, p := range w.there() {
		c, name := living[p.number], p.namespace+"_"+p.name
		link := links[name]
		if err := w.judge(p, c, link); err != nil {
			return err
		}
		own, _ := findFiles(link)
		switch {
		case c != nil:
			files, taken = append(files, c.files...), taken+c.n
		case p.isAlive && p.want().n > 0 && !p.mayLack():
			idle[p] = p.room > 0 || link != ""
		case len(own) > 0 && p.want().n > 0 || link != "" && p.mayLack() && !p.hasFiles:
			taken += p.most()
			for _, path := range own {
				files = append(files, filepath.Base(path))
			}
		case link != "" || p.hasFiles:
			return fmt.Errorf("%s asks for %v, and has %q in %q; it should have files: %v",
				p, p.want(), own, link, p.hasFiles)
		}
		delete(living, p.number)
		delete(links, name)
	}
	if slices.Sort(files); len(living)+len(links) > 0 || !slices.Equal(w.files(), files) {
		return fmt.Errorf("there are %q, not %q; pods that are gone have %v and %v", w.files(), files, living, links)
	}
	for p, hadRoom := range idle {
		if hadRoom || p.most() <= w.limit-taken {
			return fmt.Errorf("%s has no child, asks for %v and had room (%v); %d of %d files are taken",
				p, p.want(), hadRoom, taken, w.limit)
		}
	}
	return nil
}

// judge looks at a pod's child, its link and its last Event.
func (w *walker) judge(p *walkPod, c *fakeChild, link string) error {
	w.mu.Lock()
	last := w.told[p.uid]
	w.mu.Unlock()
	may := "CaptureWaiting CaptureContinued CaptureStopped"
	switch {
	case p.child != nil && c != p.child:
		return fmt.Errorf("%s was disturbed: its child was %d", p, p.child.pid)
	case c != nil:
		have, stem := requestOf(c), strings.TrimPrefix(filepath.Base(c.stem), "capture-"+p.name)
		isAsked := slices.ContainsFunc(p.may(), have.equals)
		isOwn := stem == ".pcap" || stem == fmt.Sprintf("_%.8s.pcap", p.uid)
		if !isAsked || !p.has(have.iface) || filepath.Base(c.network) != "net-"+p.net || !isOwn || c.stem != link {
			return fmt.Errorf("%s in %q asks for %v, and has %v in %s into %s, linked is %s",
				p, p.net, p.want(), have, c.network, c.stem, link)
		}
		if old := p.ifRefused; old != nil && c != old && have.equals(requestOf(old)) {
			return fmt.Errorf("%s was disturbed by what was refused: its child was %d", p, old.pid)
		}
		may = "CaptureStarted CaptureContinued"
		if !p.want().equals(have) {
			may = "CaptureInvalid CaptureStarted" // it goes on as it was
		}
	case p.want().n == 0:
		if may = "CaptureStopped"; !p.isTold {
			may = " CaptureStopped CaptureInvalid CaptureFailed CaptureWaiting CaptureContinued"
		}
	case p.isLarger:
		may += " CaptureInvalid"
	case p.hasFiles:
		may = "CaptureStopped CaptureContinued"
	}
	if p.namespace != w.hanging && !slices.Contains(strings.Split(may, " "), last) {
		return fmt.Errorf("%s asks for %v, the last Event is %q, child: %v", p, p.want(), last, c != nil)
	}
	return nil
}

// ---- Fuzz targets: go test -fuzz FuzzAnnotations . ----

// sameAnswer is an http.RoundTripper that answers all requests with 200 and a body, but not without end.
type sameAnswer struct {
	body  string
	count atomic.Int32
	end   func()
}

func (a *sameAnswer) RoundTrip(r *http.Request) (*http.Response, error) {
	if a.count.Add(1) > 1000 {
		a.end()
	}
	return answer(200, []byte(a.body)), nil
}

// fuzzed is a node without pods, on which tcpdump does nothing.
func fuzzed(t testing.TB, transport http.RoundTripper) *podWatch {
	cfg := testConfig(t, newProc(t).dir, t.TempDir())
	cfg.diskLimit = 100 * fileBytes
	a, err := newAgent(cfg)
	must(t, err)
	a.api.http.Transport, a.ready = transport, func() {}
	a.start = func(context.Context, *os.File, ...string) (*process, error) {
		return &process{stderr: strings.NewReader(""), wait: func() error { return nil }}, nil
	}
	return newPodWatch(a)
}

// FuzzAnnotations: what is accepted is a plain number, a line of text and a name. What is refused is told in a
// bounded line of text.
func FuzzAnnotations(f *testing.F) {
	for _, text := range []string{"1", "100", "101", "", "0", "-1", "+1", "01", " 1", "5abc", "1e3", "1_0", "٣", "\x00",
		"\xff", " udp\n", "host é", "a\nb", "\u2028", strings.Repeat("é", 512), strings.Repeat("é", 513),
		strings.Repeat("9", 300), "net1.100", "-i", "a/b", "interface-of-15", "interface-of-16c"} {
		f.Add(text)
	}
	w := fuzzed(f, nil)
	number, name := regexp.MustCompile(`^([1-9][0-9]?|100)$`), regexp.MustCompile(`^$|^[\w.][\w.-]{0,14}$`)
	isControl := func(r rune) bool { return !unicode.IsPrint(r) }
	f.Fuzz(func(t *testing.T, text string) {
		filter := strings.TrimSpace(text)
		for _, test := range []struct {
			isValid     bool
			annotations map[string]string
		}{
			{number.MatchString(text), map[string]string{annotation: text}},
			{name.MatchString(text), map[string]string{annotation: "5", interfaceAnnotation: text}},
			{len(filter) <= 1024 && !strings.ContainsFunc(filter, isControl),
				map[string]string{annotation: "5", filterAnnotation: text}},
		} {
			var o object
			o.Metadata.Annotations = test.annotations
			refusal := w.refusal(t.Context(), &capture{agent: w.agent, pod: o.pod()})
			isText := len(refusal) <= 1000 && utf8.ValidString(refusal) && !strings.ContainsFunc(refusal, isControl)
			if (refusal == "") != test.isValid || !isText {
				t.Errorf("%q are valid: %v; refused with %q", test.annotations, test.isValid, refusal)
			}
		}
	})
}

// FuzzWatch: whatever a watch sends, no capture of another pod stops, and the server is not asked without end.
func FuzzWatch(f *testing.F) {
	web := string(watchFrame("ADDED", fakePod{"default", "web", "a", map[string]string{annotation: "5"}, 8}.object()))
	for _, text := range []string{"", web, web + web[:100], strings.Replace(web, "ADDED", "DELETED", 1), "{}",
		string(bookmarkFrame(9)), string(errorFrame(410, "too old")), web + string(errorFrame(500, "no")), "\xff"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		synctest.Test(t, func(t *testing.T) {
			ctx, end := context.WithCancel(t.Context())
			server := &sameAnswer{body: text, end: end}
			w := fuzzed(t, server)
			const uid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
			w.apply(ctx, podNamed("old", uid, "1"))
			w.version = "v1"
			w.watch(ctx)
			if w.captures[uid] == nil && !strings.Contains(text, uid) {
				t.Errorf("%q stops the capture of a pod that is not in it", text)
			}
			time.AfterFunc(time.Minute, end)
			w.follow(ctx)
			if server.count.Load() > 160 {
				t.Errorf("%q: %d requests in a minute", text, server.count.Load())
			}
			w.agent.alive.Wait()
			w.agent.events.stop()
			w.agent.events.posting.Wait()
		})
	})
}

// FuzzCat: whatever is in a capture's files, what cat writes has whole packets alone, as many as it says.
func FuzzCat(f *testing.F) {
	header, packet := strings.Repeat("h", pcapHeader), strings.Repeat("\x05\x00\x00\x00", packetHeader/4)+"hello"
	for _, text := range []string{"", header[:5], header, header + packet, header + packet + packet[:20]} {
		f.Add(header+packet, text)
		f.Add(text, header+packet)
	}
	f.Fuzz(func(t *testing.T, first, second string) {
		root := t.TempDir()
		stem := filepath.Join(root, "capture-web.pcap")
		must(t, os.Mkdir(root+"/captures", 0o755), os.Symlink(stem, root+"/captures/default_web"),
			os.WriteFile(stem+"0", []byte(first), 0o644), os.WriteFile(stem+"1", []byte(second), 0o644))
		var stdout, stderr bytes.Buffer
		must(t, cat(root, "default/web", &stdout, &stderr))
		packets, rest := 0, stdout.Bytes()[min(stdout.Len(), pcapHeader):]
		for ; len(rest) >= packetHeader; packets++ {
			size := packetHeader + int(binary.NativeEndian.Uint32(rest[8:]))
			rest = rest[min(size, len(rest)+1):] // a packet that is cut panics
		}
		isSaid := strings.Contains(stderr.String(), fmt.Sprintf("%d packet", packets))
		if len(rest) > 0 || !isSaid || !strings.HasSuffix(stderr.String(), fmt.Sprintf(", %d bytes\n", stdout.Len())) {
			t.Errorf("%q and %q: %d packets, and %d bytes that are none; said is %q", first, second, packets, len(rest), &stderr)
		}
	})
}
