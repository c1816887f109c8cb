package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

var (
	soakSteps = flag.Int("soak.steps", 800, "steps of the random walks")
	soakSeed  = flag.Uint64("soak.seed", 0, "repeat the walk of this seed")
)

const (
	walkSteps = 400 // of one seed; short enough to be read
	// From the end of all faults until everything must be right: a request may have been told to wait 33 s and its
	// Retry-After, and then a child that can't be started 30 s.
	quietLimit = 100 * time.Second
)

// TestSoak walks at random through what happens to the program and around it: the real (*node).run in a bubble of time.
// Now and then the faults end, and soon the children and the files must be exactly what the annotations ask for
// (C2, C3, C4, C5, C6, C9, C10).
func TestSoak(t *testing.T) {
	if free, total := space("/dev/shm"); total > 0 && free > 2000*fileBytes {
		t.Setenv("TMPDIR", "/dev/shm") // in memory it takes a fourth of the time
	}
	if *soakSeed != 0 {
		walk(t, *soakSeed, walkSteps)
		return
	}
	began, steps := time.Now(), 0
	for seed := uint64(began.UnixNano()); steps < *soakSteps && !t.Failed(); seed++ {
		n := min(walkSteps, *soakSteps-steps)
		walk(t, seed, n)
		steps += n
	}
	t.Logf("%d steps took %v", steps, time.Since(began).Round(time.Millisecond))
}

// walk takes the steps of a seed in a bubble of time of their own.
func walk(t *testing.T, seed uint64, steps int) {
	w := &walker{r: rand.New(rand.NewPCG(seed, 1)), pods: map[string]*walkPod{}, known: map[string]*walkPod{}, lastPID: 10}
	isDone := false
	defer func() {
		if !isDone || t.Failed() {
			t.Logf("%s\ngo test -race -run TestSoak -soak.seed=%d", strings.Join(w.story, "\n"), seed)
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		w.T, w.api, w.proc, w.root = t, newFakeAPI(t), newProc(t), t.TempDir()
		w.kids = &children{TB: t, proc: w.proc}
		w.run(steps)
	})
	isDone = true
}

type walker struct {
	*testing.T
	r     *rand.Rand
	story []string

	api     *fakeAPI
	proc    *fakeProc
	kids    *children
	root    string
	limit   int                 // files that the node may have
	pods    map[string]*walkPod // by namespace/name: those that the API server has
	known   map[string]*walkPod // by UID: all that there ever were
	orphans []*walkPod          // deleted, and their processes live on for a while
	hostPod atomic.Value        // UID of the last pod with the host's network
	lastPID int
	tokens  int
	token   string // the one that the API server takes
	quiets  int
	fds     int // at the first quiet point
	events  int // that were looked at

	node *node // nil while the program is down
	end  context.CancelFunc
	done chan struct{}
	life int // children before it started
}

// walkPod is what the test knows of a pod.
type walkPod struct {
	fakePod
	state  string // unborn, running or finished
	isHost bool   // it has the host's network
	pid    int    // of the first of its processes
	net    string
	has    []string  // its network's interfaces
	isLeft bool      // a network that it had stays although its processes have ended
	ended  time.Time // when they did

	maybe      []request  // what its capture may be for, zero: none; more than one if that has changed since the last quiet point
	hit        bool       // a fault met its child since then
	child      *fakeChild // at the last quiet point
	isKept     bool       // it is finished, and which files it has is known:
	kept       []string
	wasInvalid bool
}

func (w *walker) note(format string, arguments ...any) {
	w.story = append(w.story, fmt.Sprintf("%4d %s", len(w.story), fmt.Sprintf(format, arguments...)))
}

func (w *walker) run(steps int) {
	w.limit = pick(w, []int{12, 30, 1000})
	w.note("room for %d files", w.limit)
	w.api.bookmarkEvery = pick(w, []time.Duration{0, 20 * time.Second})
	w.token = w.api.token
	for _, name := range strangers { // no files of captures: nobody may touch them
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
}

// ---- The program ----

// boot starts the program, as run does.
func (w *walker) boot() {
	if w.node != nil {
		return
	}
	w.api.mount("token", w.token) // it needs one to start at all
	n, err := newNode(config{nodeName: "node-1", podName: "packetcapture-x", api: "https://kubernetes.test", account: w.api.account,
		proc: w.proc.dir, root: w.root, diskLimit: int64(w.limit) * fileBytes})
	must(w, err)
	n.kube.http.Transport, n.start = w.api, w.start
	w.node, w.done, w.life = n, make(chan struct{}), w.kids.started()
	ctx, end := context.WithCancel(context.Background())
	w.end = end
	go func() {
		defer close(w.done)
		n.run(ctx)
	}()
	for _, p := range w.pods {
		p.child, p.isKept, p.kept, p.maybe = nil, p.state == "finished", nil, []request{{}}
		if asked, ok := w.wish(p); ok {
			p.maybe = append(p.maybe, asked)
		}
	}
}

// halt ends the program as SIGTERM does.
func (w *walker) halt() {
	if w.node == nil {
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
	for uid, c := range w.living() {
		w.Errorf("child %d of %s outlives the program", c.pid, uid)
	}
	if files, _ := findFiles(w.root, isCapture); len(files) > 0 {
		w.Errorf("the program leaves files: %v", files)
	}
	w.node = nil
}

// kill ends the program as SIGKILL does, and the runtime then the rest of its container. Goroutines can't be killed, so
// what they clean up is brought back.
func (w *walker) kill() {
	if w.node == nil {
		return
	}
	files, _ := findFiles(w.root, isCapture)
	w.exit(func(*fakeChild) bool { return true })
	w.end()
	<-w.done
	synctest.Wait()
	w.node = nil
	for _, path := range append(files, filepath.Join(w.root, "capture-gone.pcap17")) {
		must(w, os.WriteFile(path, nil, 0o644))
	}
}

// start is a starter. It knows one more filter that tcpdump refuses.
func (w *walker) start(ctx context.Context, stderr io.Writer, network *os.File, arguments ...string) (*child, error) {
	if slices.Contains(arguments, "-d") && arguments[len(arguments)-1] == "refused" {
		refuse := func() error {
			io.WriteString(stderr, "tcpdump: can't parse filter expression: syntax error\n")
			return errStatus
		}
		return &child{1, refuse, func() error { return nil }}, nil
	}
	c, err := w.kids.start(ctx, stderr, network, arguments...)
	w.living() // no pod may have two
	return c, err
}

// living are the children that run, by the UIDs of the pods in whose network they are.
func (w *walker) living() map[string]*fakeChild {
	children := map[string]*fakeChild{}
	for _, c := range w.captured() {
		uid := w.uidOf(c)
		if !c.lives() {
			continue
		}
		if other := children[uid]; other != nil {
			w.Errorf("%s has child %d into %s and child %d into %s", uid, other.pid, other.stem, c.pid, c.stem)
		}
		children[uid] = c
	}
	return children
}

// captured are the children of this life of the program, the oldest first.
func (w *walker) captured() []*fakeChild {
	w.kids.mu.Lock()
	defer w.kids.mu.Unlock()
	return slices.Clone(w.kids.all[w.life:])
}

func (w *walker) uidOf(c *fakeChild) string {
	net := strings.TrimPrefix(filepath.Base(c.network), "net-")
	if net == host {
		return w.hostPod.Load().(string)
	}
	uid, _, _ := strings.Cut(net, "_")
	return uid
}

// exit ends children as SIGKILL does.
func (w *walker) exit(which func(*fakeChild) bool) {
	for uid, c := range w.living() {
		if which(c) {
			w.known[uid].hit = true
			c.exit("", errKilled)
		}
	}
}

// ---- The steps ----

var (
	strangers    = []string{"capture-notes.txt", "web.pcap0"}
	walkNames    = []string{"web", "web-2", "web.pcap0", "web.pcap", "w", "node"}
	walkValues   = []string{"1", "1", "2", "3", "4", "5", "9", "10", "11", "20", "100"} // some are more than there is room for
	wrongValues  = []string{"0", "-1", "+1", "01", " 1", "1M", "", "5abc", "1e3", "99999999999999999999", "٣"}
	walkFilters  = []string{"tcp port 80", "udp", " udp\n"}
	wrongFilters = []string{"refused", "bell\a", strings.Repeat("x", maxFilter+1)}
	walkIfaces   = []string{"lo", "any", "net1"}
	wrongIfaces  = []string{"", "-i", "a/b", "interface-of-16c"}
)

func pick[T any](w *walker, from []T) T { return from[w.r.IntN(len(from))] }

func (w *walker) chance(oneOf int) bool { return w.r.IntN(oneOf) == 0 }

func (w *walker) millis(most int) time.Duration {
	return time.Duration(w.r.IntN(most)) * time.Millisecond
}

// step takes one step. What it does depends on the seed and the test's own book alone, so that a seed repeats its walk.
func (w *walker) step() {
	steps := []struct {
		weight int
		take   func()
	}{
		{24, w.annotate}, {4, w.touch}, {6, w.unannotate}, {5, func() { w.remove() }}, {4, w.recreate}, {4, w.finish}, {4, func() { w.bear(w.some()) }}, {3, w.newSandbox},
		{4, w.killChild}, {4, w.behave}, {12, w.disturb}, {3, w.rotate}, {2, w.restart}, {17, w.advance}, {4, w.quiet},
	}
	n := w.r.IntN(100)
	for _, s := range steps {
		if n -= s.weight; n < 0 {
			s.take()
			break
		}
	}
	if w.chance(2) {
		synctest.Wait()
	}
}

// some picks a pod that the API server has.
func (w *walker) some() *walkPod {
	if len(w.pods) == 0 {
		return w.create(w.slot())
	}
	return w.pods[pick(w, slices.Sorted(maps.Keys(w.pods)))]
}

// slot picks a namespace and name. Only one pod has the host's network: its child can't be told from another's.
func (w *walker) slot() (namespace, name string) {
	if name = pick(w, walkNames); name == "node" {
		return "default", name
	}
	return pick(w, []string{"default", "other"}), name
}

// create makes a pod that may or may not have processes yet, without annotations.
func (w *walker) create(namespace, name string) *walkPod {
	p := &walkPod{state: "unborn", isHost: name == "node", maybe: []request{{}}}
	serial := len(w.known) + 1
	p.fakePod = fakePod{namespace: namespace, name: name, uid: fmt.Sprintf("%08x-0a1b-4c2d-8e3f-%012x", serial, serial)}
	w.pods[namespace+"/"+name], w.known[p.uid] = p, p
	if p.isHost {
		w.hostPod.Store(p.uid)
	}
	w.note("create %s", p)
	if !w.chance(3) {
		w.bear(p)
	}
	return p
}

func (p *walkPod) String() string { return fmt.Sprintf("%s/%s %.8s", p.namespace, p.name, p.uid) }

// annotate sets annotations of a pod, which may be new.
func (w *walker) annotate() {
	namespace, name := w.slot()
	p := w.pods[namespace+"/"+name]
	if p == nil {
		p = w.create(namespace, name)
	}
	choose := func(right, wrong []string) string {
		if w.chance(8) {
			return pick(w, wrong)
		}
		return pick(w, right)
	}
	annotations := map[string]string{annotation: choose(walkValues, wrongValues)}
	if w.chance(3) {
		annotations[filterAnnotation] = choose(walkFilters, wrongFilters)
	}
	if w.chance(4) {
		annotations[interfaceAnnotation] = choose(walkIfaces, wrongIfaces)
	}
	w.set(p, annotations)
}

// set changes the annotations of a pod. What is invalid changes nothing (C2).
func (w *walker) set(p *walkPod, annotations map[string]string) {
	w.note("annotate %s %.200q", p, annotations)
	p.annotations = annotations
	asked, ok := w.wish(p)
	if ok && !slices.Equal(p.maybe, []request{asked}) {
		p.maybe, p.isKept = append(p.maybe, asked), false
	}
	p.wasInvalid = p.wasInvalid || !ok
	w.api.put(p.fakePod)
}

// wish is what a pod's annotations ask for, zero if nothing, and whether it is valid.
func (w *walker) wish(p *walkPod) (asked request, ok bool) {
	value, has := p.annotations[annotation]
	if !has {
		return asked, true
	}
	filter, iface := p.annotations[filterAnnotation], p.annotations[interfaceAnnotation]
	_, hasIface := p.annotations[interfaceAnnotation]
	n, _ := strconv.Atoi(value)
	if !slices.Contains(walkValues, value) || n > w.limit || slices.Contains(wrongFilters, filter) || hasIface && slices.Contains(wrongIfaces, iface) {
		return asked, false
	}
	return request{n, strings.TrimSpace(filter), iface}, true
}

// touch changes what does not matter.
func (w *walker) touch() { p := w.some(); w.set(p, p.annotations) }

func (w *walker) unannotate() { w.set(w.some(), nil) }

// remove deletes a pod. Its processes end before, or some time after.
func (w *walker) remove() *walkPod {
	p, isClean := w.some(), w.chance(2)
	w.note("delete %s, its processes end first: %v", p, isClean)
	delete(w.pods, p.namespace+"/"+p.name)
	if isClean {
		w.reap(p, false)
	} else {
		w.orphans = append(w.orphans, p)
	}
	w.api.remove(p.namespace, p.name)
	return p
}

// recreate replaces a pod by another one of its name.
func (w *walker) recreate() {
	old := w.remove()
	if p := w.create(old.namespace, old.name); !w.chance(4) {
		w.set(p, old.annotations)
	} else {
		w.set(p, nil)
	}
}

// finish has a pod's processes end. It stays in the API. Some CNIs leave the network as it was.
func (w *walker) finish() {
	if p := w.some(); p.state == "running" {
		isLeft := w.chance(4)
		w.note("finish %s, its network stays: %v", p, isLeft)
		w.reap(p, isLeft)
	}
}

// bear starts a pod's processes: a sandbox's helper without a network, what holds its network, and a container which has
// a network of its own that is not the pod's.
func (w *walker) bear(p *walkPod) {
	if p.state != "unborn" {
		return
	}
	p.state, p.pid = "running", w.lastPID+1
	w.lastPID += 3
	p.net, p.has = fmt.Sprintf("%s_%d", p.uid, p.pid), []string{"lo", "eth0"}
	if w.chance(2) {
		p.has = append(p.has, "net1")
	}
	if p.isHost {
		p.net, p.has = host, []string{"lo", "ens3"}
	} else {
		w.proc.interfaces(p.net, p.has...)
	}
	w.note("birth of %s, process %d, interfaces %v", p, p.pid, p.has)
	cgroup := cgroupOf(p.uid)
	if p.pid%2 == 0 {
		cgroup = "11:memory:/kubepods/besteffort/pod" + p.uid + "/cafe\n"
	}
	w.proc.interfaces("none", "lo")
	for i, net := range []string{"none", p.net, p.uid + "_inner"} {
		w.proc.add(fakeProcess{pid: p.pid + i, cgroup: cgroup, net: net, root: p.uid, born: p.pid + i})
	}
}

// reap ends a pod's processes. With its network goes tcpdump.
func (w *walker) reap(p *walkPod, isLeft bool) {
	if p.state != "running" {
		return
	}
	p.isKept, p.kept = false, nil
	if p.child != nil && len(p.maybe) == 1 { // it captured: its files stay
		p.isKept, p.kept = true, baseNames(p.child.files)
	}
	p.state, p.ended = "finished", time.Now()
	w.vanish(p, isLeft || p.isHost)
}

// vanish ends what is in a pod's network, which goes as well if it is not left.
func (w *walker) vanish(p *walkPod, isLeft bool) {
	synctest.Wait()                    // a child that is just being started is known by the process whose network it has
	for _, i := range []int{2, 0, 1} { // the containers end before what holds the network
		w.proc.end(p.pid + i)
	}
	p.hit = true
	if isLeft {
		p.isLeft = true
		return
	}
	w.proc.interfaces(p.net, "lo")
	if c := w.living()[p.uid]; c != nil && strings.HasSuffix(c.network, p.net) && strings.HasPrefix(c.option("-i"), "e") {
		c.exit("tcpdump: The interface disappeared\n"+closing, errStatus)
	}
}

// newSandbox has a pod get another network, as after its sandbox has crashed.
func (w *walker) newSandbox() {
	p := w.some()
	if p.state != "running" {
		return
	}
	isLeft := p.isHost || w.chance(3)
	w.note("a new sandbox for %s, the old one's network stays: %v", p, isLeft)
	w.vanish(p, isLeft)
	p.state = "unborn"
	w.bear(p)
}

func (w *walker) killChild() {
	p := w.some()
	w.note("kill -9 the child of %s", p)
	w.exit(func(c *fakeChild) bool { return w.uidOf(c) == p.uid })
}

// behave says how the children are that are started from now on.
func (w *walker) behave() {
	b := pick(w, []behaviour{
		{}, {refusal: syscall.EAGAIN}, {deaf: true}, {deaf: true, immortal: true}, {startup: w.millis(2000)}, {shutdown: w.millis(4000)},
		{startup: w.millis(2000), deaf: true}, {startup: w.millis(500), words: "tcpdump: so it is\n"}, {compile: w.millis(3000)},
	})
	w.note("children: %+v", b)
	w.kids.behave(b)
}

// disturb troubles the watch, the list and the Events.
func (w *walker) disturb() {
	text, end := "", ends
	switch w.r.IntN(8) {
	case 0, 1:
		w.fault()
		return
	case 2:
		isFrozen := w.chance(2)
		w.note("freeze: %v", isFrozen)
		w.api.thaw()
		if isFrozen {
			w.api.freeze()
		}
		return
	case 3:
		p := w.some()
		whole := watchFrame("MODIFIED", fakePod{p.namespace, p.name, p.uid, map[string]string{annotation: "7"}, 1 << 30}.object())
		text, end = string(whole[:1+w.r.IntN(len(whole)-3)]), pick(w, []ending{ends, breaks}) // what never was
	case 4:
		text = pick(w, []string{"<html>", "{}\n", "\x00\xff", "[1,2]\n", `{"type":"ADDED"}` + "\n", `{"type":"ADDED","object":7}` + "\n"})
		end = pick(w, []ending{goesOn, ends, breaks})
	case 5:
		text = string(errorFrame(pick(w, []int{410, 500, 403, 429}), "so the test wants it"))
	case 6:
		isIn200 := w.chance(2)
		w.note("compact, told in a 200: %v", isIn200)
		w.api.compact(isIn200)
		end = breaks
	case 7:
		w.api.bookmark()
		end = breaks
	}
	w.note("the watches get %q and end by %d", text, end)
	w.api.push(text, end)
}

// fault has the next requests of a kind fail.
func (w *walker) fault() {
	verb := pick(w, []string{"watch", "watch", "list", "post"})
	f := pick(w, []fault{
		{code: 410}, {code: 429, retryAfter: strconv.Itoa(1 + w.r.IntN(5))}, {err: io.ErrUnexpectedEOF}, {err: syscall.ECONNREFUSED},
		{code: pick(w, []int{500, 502, 503, 504, 401, 403}), body: pick(w, []string{"", "<html>"})},
		{code: 200, body: pick(w, []string{" ", "{}", `{"metadata":{`, "<html>", `{"items":[]}`, string(errorFrame(410, "too old"))})},
	})
	f.times = 1 + w.r.IntN(4)
	w.note("%s: %+v; the watches end: ", verb, f)
	w.api.fail(verb, f)
	w.api.push("", ends)
}

// rotate replaces the token, maybe before it is mounted, or unmounts it.
func (w *walker) rotate() {
	w.tokens++
	kind := w.r.IntN(3)
	w.note("token %d: 0 rotate, 1 not mounted yet, 2 can't be read: %d", w.tokens, kind)
	if kind == 2 {
		os.Remove(filepath.Join(w.api.account, "token"))
	} else {
		w.token = fmt.Sprintf("token-of-walk-%d", w.tokens)
		w.api.accept(w.token)
	}
	if kind == 0 {
		w.api.mount("token", w.token)
	} else {
		w.api.push("", ends)
	}
}

// restart has the program end, by SIGTERM or SIGKILL. It starts again now or some steps later.
func (w *walker) restart() {
	isHard, isSoon := w.chance(2), w.chance(2)
	w.note("the program, up: %v, is ended, by SIGKILL: %v, starts again at once: %v", w.node != nil, isHard, isSoon)
	if isHard {
		w.kill()
	} else {
		w.halt()
	}
	if isSoon {
		w.boot()
	}
}

func (w *walker) advance() {
	d := w.millis(pick(w, []int{30, 300, 300, 2000, 2000, 5000}))
	if w.chance(400) {
		d = w.millis(900_000)
	}
	w.note("advance %v", d)
	time.Sleep(d)
}

// ---- The quiet points ----

// quiet ends all faults, waits until everything is right, and looks once more after a while.
func (w *walker) quiet() {
	w.note("quiet")
	w.api.heal()
	w.api.thaw()
	w.api.mount("token", w.token)
	w.kids.behave(behaviour{})
	w.boot()
	w.exit(func(c *fakeChild) bool { return c.immortal })
	for _, p := range w.orphans {
		w.reap(p, false)
	}
	w.orphans = nil
	for _, key := range slices.Sorted(maps.Keys(w.pods)) {
		if p := w.pods[key]; p.state == "unborn" && !w.chance(8) {
			w.bear(p)
		}
	}
	// The last change is of a pod without a network. Once its filter is compiled all changes before have come.
	w.quiets++
	filter := fmt.Sprintf("udp port %d", w.quiets)
	canary := fakePod{namespace: "z", name: "canary", uid: "c0", annotations: map[string]string{annotation: "1", filterAnnotation: filter}}
	w.known[canary.uid] = &walkPod{fakePod: canary}
	w.api.put(canary)
	since, heard := time.Now(), false
	for err := errors.New("the last change has had no effect"); err != nil; {
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		if !heard && w.hasCompiled(filter) {
			heard = true
			time.Sleep(termGrace + 100*time.Millisecond) // what is to be stopped has ended
			synctest.Wait()
		}
		if heard {
			err = w.check()
		}
		if err != nil && time.Since(since) > quietLimit {
			w.Errorf("step %d: not right %v after the last fault: %v", len(w.story), quietLimit, err)
			return
		}
	}
	w.api.remove(canary.namespace, canary.name) // it would be looked for all the time
	time.Sleep(w.millis(3000))
	synctest.Wait()
	if err := w.check(); err != nil {
		w.Errorf("step %d: right %v after the last fault, and not any more: %v", len(w.story), time.Since(since), err)
		return
	}
	w.settle()
}

func (w *walker) hasCompiled(filter string) bool {
	w.kids.mu.Lock()
	defer w.kids.mu.Unlock()
	return slices.Contains(w.kids.compiled, filter)
}

// check is the oracle: what runs, and what is in the folder, by what the annotations say.
func (w *walker) check() error {
	living, there, taken := w.living(), namesIn(w, w.root), 0
	files := slices.Clone(strangers)
	var idle []*walkPod
	for _, p := range w.pods {
		c := living[p.uid]
		delete(living, p.uid)
		if c != nil {
			if err := w.checkChild(p, c); err != nil {
				return fmt.Errorf("%s, %s: %w", p, p.state, err)
			}
			files = append(files, baseNames(c.files)...)
			taken += c.n
			continue
		}
		kept := w.keeps(p, there)
		if files = append(files, kept...); len(kept) > 0 {
			taken += w.last(p).n
		} else if p.state == "running" {
			idle = append(idle, p)
		}
	}
	for _, p := range idle {
		mayIdle := func(r request) bool {
			return r.n == 0 || r.n > w.limit-taken || !slices.Contains(append(p.has, "any"), p.resolve(r).iface)
		}
		if wants := w.wants(p); !slices.ContainsFunc(wants, mayIdle) {
			return fmt.Errorf("%s has no child and asks for %v; %d of %d files are taken", p, wants, taken, w.limit)
		}
	}
	for uid, c := range living {
		return fmt.Errorf("child %d of %s, which is gone, runs", c.pid, uid)
	}
	if slices.Sort(files); !slices.Equal(there, files) {
		return fmt.Errorf("the files are %q, not %q", there, files)
	}
	if taken > w.limit {
		return fmt.Errorf("%d files of %d are taken", taken, w.limit)
	}
	return nil
}

// checkChild looks at a pod that has a child.
func (w *walker) checkChild(p *walkPod, c *fakeChild) error {
	stem := strings.TrimPrefix(filepath.Base(c.stem), "capture-"+p.name)
	asks := func(r request) bool { return p.resolve(r) == askedOf(c) }
	switch {
	case p.state == "unborn", p.state == "finished" && (!p.isLeft || time.Since(p.ended) > emptyTime+5*time.Second):
		return fmt.Errorf("it has child %d", c.pid)
	case !slices.ContainsFunc(w.wants(p), asks):
		return fmt.Errorf("child %d has %v, asked for is %v", c.pid, askedOf(c), w.wants(p))
	case p.state == "running" && filepath.Base(c.network) != "net-"+p.net:
		return fmt.Errorf("child %d is in %s, not in %s", c.pid, c.network, p.net)
	case stem != ".pcap" && stem != fmt.Sprintf("_%.8s.pcap", p.uid):
		return fmt.Errorf("it is captured into %s", c.stem)
	case p.child != nil && len(p.maybe) == 1 && !p.hit && p.child != c:
		return fmt.Errorf("it was disturbed: its child was %d and is %d", p.child.pid, c.pid)
	}
	return nil
}

// wants are the requests of which a pod's capture must have one.
func (w *walker) wants(p *walkPod) []request {
	if asked, ok := w.wish(p); ok {
		return []request{asked}
	}
	return p.maybe
}

// keeps are the files of a pod without a child: those that are known to be kept, or the ones that are there of what was
// captured last, if nobody else has taken the name since, and the pod still asks for it.
func (w *walker) keeps(p *walkPod, there []string) []string {
	if p.isKept && p.state == "finished" {
		return p.kept
	}
	last := w.last(p)
	asks := func(r request) bool { return last != nil && p.resolve(r) == askedOf(last) }
	if !slices.ContainsFunc(w.wants(p), asks) {
		return nil
	}
	return slices.DeleteFunc(baseNames(last.files), func(name string) bool { return !slices.Contains(there, name) })
}

// last is the last child of a pod in this life of the program, nil if another pod has had its name since.
func (w *walker) last(p *walkPod) (last *fakeChild) {
	for _, c := range w.captured() {
		if w.uidOf(c) == p.uid {
			last = c
		} else if last != nil && last.stem == c.stem {
			last = nil
		}
	}
	return last
}

// resolve names the interface.
func (p *walkPod) resolve(r request) request {
	standard := "eth0"
	if p.isHost {
		standard = "any"
	}
	r.iface = cmp.Or(r.iface, standard)
	return r
}

// askedOf is what a child was started for, by its arguments.
func askedOf(c *fakeChild) request {
	asked := request{n: c.n, iface: c.option("-i")}
	if count := len(c.arguments); c.arguments[count-2] == "--" {
		asked.filter = c.arguments[count-1]
	}
	return asked
}

func baseNames(paths []string) (names []string) {
	for _, path := range paths {
		names = append(names, filepath.Base(path))
	}
	return names
}

// settle takes note of what is right now.
func (w *walker) settle() {
	living, there := w.living(), namesIn(w, w.root)
	for _, p := range w.pods {
		c := living[p.uid]
		p.maybe = slices.Compact(slices.DeleteFunc(slices.Clone(w.wants(p)), func(r request) bool {
			return c != nil && p.resolve(r) != askedOf(c)
		}))
		if p.child, p.hit = c, false; len(p.maybe) > 1 { // it depends on what the watch has seen
			p.child = nil
		} else if p.state == "finished" && !p.isKept {
			p.isKept, p.kept = true, w.keeps(p, there)
		}
	}
	fds := namesIn(w, "/proc/self/fd")
	if w.fds = cmp.Or(w.fds, len(fds)); len(fds) > w.fds {
		w.Errorf("%d file descriptors are open, %d were at first", len(fds), w.fds)
	}
	posted := w.api.posted()
	for _, e := range posted[w.events:] {
		object := e["involvedObject"].(map[string]any)
		p := w.known[object["uid"].(string)]
		if p == nil || object["name"] != p.name || object["namespace"] != p.namespace || e["reason"] == "CaptureInvalid" && !p.wasInvalid {
			w.Errorf("an Event that is not true: %v", e)
		}
	}
	w.events = len(posted)
}
