package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

var (
	soakSteps    = flag.Int("soak.steps", 800, "steps of the random walks")
	soakSeed     = flag.Uint64("soak.seed", 0, "repeat the walk of this seed")
	soakDuration = flag.Duration("soak.duration", 0, "walk for this long, whatever soak.steps says")
)

const (
	walkSteps  = 400               // of one seed; short enough to be read
	quietLimit = 100 * time.Second // from the end of all faults until everything must be right: a request may have been
	// told to wait 30 s and Retry-After, then a child that can't be started 30 s
)

// TestSoak walks at random through what happens to the program and around it: the real watch, recorder and loop, in
// a bubble of time, with an API server, children and a /proc that are not real. Now and then the faults end, and soon
// the children and the files must be exactly what the annotations ask for (C2, C4, C5, C6).
func TestSoak(t *testing.T) {
	if *soakSeed != 0 {
		walk(t, *soakSeed, walkSteps)
		return
	}
	began, seed := time.Now(), uint64(time.Now().UnixNano())
	steps, walks := 0, 0
	for ; !t.Failed(); walks++ {
		if *soakDuration > 0 && time.Since(began) >= *soakDuration || *soakDuration == 0 && steps >= *soakSteps {
			break
		}
		n := walkSteps
		if *soakDuration == 0 {
			n = min(n, *soakSteps-steps)
		}
		walk(t, seed, n)
		steps += n
		seed++
	}
	t.Logf("%d steps in %d walks took %v", steps, walks, time.Since(began).Round(time.Millisecond))
}

// walk takes the steps of a seed in a bubble of time of their own.
func walk(t *testing.T, seed uint64, steps int) {
	w := &walker{seed: seed, r: rand.New(rand.NewPCG(seed, 1)), pods: map[string]*walkPod{}}
	isDone := false
	defer func() {
		if !isDone || t.Failed() {
			t.Logf("%s\ngo test -race -run TestSoak -soak.seed=%d", w.story(), seed)
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		w.T = t
		w.run(steps)
	})
	isDone = true
}

type walker struct {
	*testing.T
	seed  uint64
	r     *rand.Rand
	steps []string

	api     *fakeAPI
	proc    *fakeProc
	kids    *walkKids
	root    string
	pods    map[string]*walkPod // by namespace/name: those that the API server has
	canary  *walkPod            // changed last at each quiet point: when it is right, all changes before have come
	orphans []*walkPod          // whose processes live on for a while
	serial  int                 // of UIDs
	lastPID int
	tokens  int
	quiets  int
	fds     int // at the first quiet point

	c    *controller // nil while the program is down
	life int         // how often the program was started
	end  context.CancelFunc
	done sync.WaitGroup // its goroutines
}

// walkPod is what the test knows of a Pod; the rest is in the API's store.
type walkPod struct {
	fakePod
	state string // unborn, running or finished
	pid   int    // of its processes, the other one is the next
	host  bool   // it has the host's network

	maybe   []request  // what may be asked for if the annotation is invalid now: the last one that was not
	touched bool       // what is asked for has changed since the last quiet point
	hit     bool       // a fault met its child since then
	child   *walkChild // at the last quiet point
	isKept  bool       // it is finished, and its files are known to be
	kept    []string   // these
}

func (w *walker) story() string {
	return fmt.Sprintf("The walk of seed %d:\n%s", w.seed, strings.Join(w.steps, "\n"))
}

func (w *walker) note(format string, arguments ...any) {
	w.steps = append(w.steps, fmt.Sprintf("%4d %s", len(w.steps), fmt.Sprintf(format, arguments...)))
}

func (w *walker) run(steps int) {
	w.api, w.proc, w.root = newFakeAPI(w.T), newProc(w.T), w.TempDir()
	w.api.pageSize = []int{0, 0, 3}[w.r.IntN(3)]
	w.api.bookmarkEvery = []time.Duration{0, 20 * time.Second}[w.r.IntN(2)]
	w.kids = &walkKids{walker: w, byUID: map[string]*walkRecord{}, byStem: map[string]string{}, byInode: map[uint64]string{}}
	w.lastPID = 10
	must(w, os.WriteFile(filepath.Join(w.root, "capture-notes.txt"), nil, 0o644),
		os.WriteFile(filepath.Join(w.root, "web.pcap0"), nil, 0o644))
	w.canary = w.create("default", "canary")
	delete(w.pods, "default/canary")
	w.bear(w.canary)
	w.boot()
	for range steps {
		w.step()
		if w.Failed() {
			break
		}
	}
	if !w.Failed() {
		w.quiet()
	}
	w.halt()
	w.api.heal()
}

// ---- The program ----

// boot starts the program, as run does.
func (w *walker) boot() {
	if w.c != nil {
		return
	}
	cfg := config{node: "node-1", pod: "packetcapture-x", api: "https://kubernetes.test", account: w.api.account,
		proc: w.proc.dir, root: w.root, limit: 1 << 62}
	c, err := newController(cfg)
	must(w, err)
	c.watch.kube.http.Transport = w.api
	c.start, c.wait, c.signal = w.kids.start, w.kids.wait, w.kids.signal
	ctx, cancel := context.WithCancel(context.Background())
	w.c, w.end = c, cancel
	w.life++
	for _, p := range w.pods {
		p.child = nil
		if _, valid, has := wish(p.annotations); has && !valid {
			p.maybe = []request{{}}
		} else {
			p.maybe = append(p.maybe, request{})
		}
		p.isKept, p.kept = p.state == "finished", nil
	}
	recording, stopRecording := context.WithCancel(context.Background())
	w.done.Go(func() { c.watch.run(ctx) })
	w.done.Go(func() { c.recorder.run(recording) })
	w.done.Go(func() {
		defer stopRecording()
		defer cancel()
		c.loop(ctx)
	})
}

// halt ends the program as SIGTERM does.
func (w *walker) halt() {
	if w.c == nil {
		return
	}
	began := time.Now()
	w.end()
	w.done.Wait()
	if took := time.Since(began); took > 5*time.Second {
		w.Errorf("the program took %v to end", took)
	}
	w.c = nil
	for _, c := range w.kids.living() {
		w.Errorf("child %d of %s outlives the program", c.pid, c.uid)
	}
	if files, _ := findFiles(w.root, isCapture); len(files) > 0 {
		w.Errorf("the program leaves files: %v", files)
	}
}

// kill ends the program as SIGKILL does, and the runtime then the rest of its container.
func (w *walker) kill() {
	if w.c == nil {
		return
	}
	w.c.inbox <- runtime.Goexit
	w.end()
	for _, c := range w.kids.living() {
		c.exit("", errKilled)
		<-c.gone
	}
	w.done.Wait()
	w.c = nil
}

// ---- The steps ----

var (
	walkNames   = []string{"web", "web-2", "web.pcap0", "web.pcap", "w", "node"}
	walkValues  = []string{"1", "1", "2", "3", "4", "5", "9", "10", "11", "20"}
	walkInvalid = []string{"0", "-1", "+1", "01", " 1", "1M", "", "5abc", "1e3", "99999999999999999999", "٣"}
	walkFilters = []string{"", "", "", "tcp port 80", "udp", "refused", "bell\a"}
)

func pick[T any](w *walker, from []T) T { return from[w.r.IntN(len(from))] }

// step takes one step. What it does depends on the seed and the API's store alone, so that a seed repeats its walk.
func (w *walker) step() {
	switch n := w.r.IntN(100); {
	case n < 24:
		w.annotate()
	case n < 28:
		w.touch()
	case n < 34:
		w.unannotate()
	case n < 39:
		w.remove(w.r.IntN(2) == 0)
	case n < 43:
		w.recreate()
	case n < 46:
		w.finish()
	case n < 49:
		w.birth()
	case n < 53:
		w.killChild()
	case n < 56:
		w.behave()
	case n < 68:
		w.disturb()
	case n < 72:
		w.rotate()
	case n < 74:
		w.restart()
	case n < 95:
		w.advance()
	default:
		w.quiet()
	}
	if w.r.IntN(2) == 0 {
		synctest.Wait()
	}
}

// some picks a Pod that the API server has.
func (w *walker) some() *walkPod {
	keys := make([]string, 0, len(w.pods))
	for key := range w.pods {
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return w.create(w.slot())
	}
	slices.Sort(keys)
	return w.pods[pick(w, keys)]
}

// slot picks a namespace and name. Only one Pod has the host's network: its children can't be told apart by that.
func (w *walker) slot() (namespace, name string) {
	namespace, name = pick(w, []string{"default", "other"}), pick(w, walkNames)
	if name == "node" {
		namespace = "default"
	}
	return namespace, name
}

// create makes a Pod that may or may not have processes yet, without annotations.
func (w *walker) create(namespace, name string) *walkPod {
	w.serial++
	p := &walkPod{state: "unborn", host: name == "node", maybe: []request{{}}, touched: true}
	p.fakePod = fakePod{namespace: namespace, name: name, uid: fmt.Sprintf("%08x-0a1b-4c2d-8e3f-%012x", w.serial, w.serial)}
	w.pods[namespace+"/"+name] = p
	w.note("create %s/%s as %.8s", namespace, name, p.uid)
	if w.r.IntN(3) > 0 {
		w.bear(p)
	}
	return p
}

// annotate sets annotations of a Pod, which may be new.
func (w *walker) annotate() {
	namespace, name := w.slot()
	p := w.pods[namespace+"/"+name]
	if p == nil {
		p = w.create(namespace, name)
	}
	annotations := map[string]string{annotation: pick(w, walkValues)}
	if w.r.IntN(6) == 0 {
		annotations[annotation] = pick(w, walkInvalid)
	}
	if filter := pick(w, walkFilters); filter != "" {
		annotations[filterAnnotation] = filter
	}
	w.set(p, annotations)
	w.note("annotate %s/%s %.8s %q", namespace, name, p.uid, annotations)
	w.api.put(p.fakePod)
}

// set changes the annotations of a Pod in the test's own book.
func (w *walker) set(p *walkPod, annotations map[string]string) {
	before, wasValid, had := wish(p.annotations)
	after, isValid, has := wish(annotations)
	if before != after || wasValid != isValid || had != has {
		stays := had && wasValid && has && !isValid // the capture goes on with what it had
		p.touched = p.touched || !stays
		if !stays {
			p.isKept = false
		}
	}
	if isValid || !has {
		p.maybe = append(p.maybe, after)
	}
	p.annotations = annotations
}

// touch changes what does not matter.
func (w *walker) touch() {
	p := w.some()
	w.note("touch %s/%s", p.namespace, p.name)
	w.api.put(p.fakePod)
}

func (w *walker) unannotate() {
	p := w.some()
	w.set(p, nil)
	w.note("no annotation %s/%s", p.namespace, p.name)
	w.api.put(p.fakePod)
}

// remove deletes a Pod. Its processes end before, or some time after.
func (w *walker) remove(isClean bool) {
	p := w.some()
	w.note("delete %s/%s %.8s, processes end first: %v", p.namespace, p.name, p.uid, isClean)
	w.forget(p, isClean)
	w.api.remove(p.namespace, p.name)
}

func (w *walker) forget(p *walkPod, isClean bool) {
	delete(w.pods, p.namespace+"/"+p.name)
	if isClean {
		w.reap(p)
	} else {
		w.orphans = append(w.orphans, p)
	}
}

// recreate replaces a Pod by another one of its name. The watch sees both changes, or one that has another UID.
func (w *walker) recreate() {
	old := w.some()
	isOne := w.r.IntN(3) == 0
	w.note("recreate %s/%s %.8s, in one MODIFIED: %v", old.namespace, old.name, old.uid, isOne)
	w.forget(old, w.r.IntN(2) == 0)
	p := w.create(old.namespace, old.name)
	if w.r.IntN(4) > 0 {
		w.set(p, old.annotations)
	}
	if !isOne {
		w.api.remove(old.namespace, old.name)
	}
	w.api.put(p.fakePod)
}

// finish has a Pod's processes end. It stays in the API.
func (w *walker) finish() {
	p := w.some()
	if p.state == "running" {
		w.note("finish %s/%s %.8s", p.namespace, p.name, p.uid)
		w.reap(p)
	}
}

// birth gives a Pod its processes.
func (w *walker) birth() {
	if p := w.some(); p.state == "unborn" {
		w.bear(p)
	}
}

func (w *walker) bear(p *walkPod) {
	if p.state != "unborn" {
		return
	}
	p.state, p.pid = "running", w.lastPID+1
	w.lastPID += 2
	if w.lastPID > 30_000 { // PIDs are given out again
		w.lastPID = 10
	}
	w.note("birth %s/%s %.8s", p.namespace, p.name, p.uid)
	network := p.uid
	if p.host {
		network = host
	}
	cgroup := cgroupOf(p.uid)
	if w.serial%2 == 0 {
		cgroup = "11:memory:/kubepods/besteffort/pod" + p.uid + "/cafe\n"
	}
	w.kids.know(p)
	// Its second process has a network of its own, which is not the Pod's.
	w.proc.add(process{pid: p.pid, cgroup: cgroup, net: network, root: p.uid, born: p.pid})
	w.proc.add(process{pid: p.pid + 1, cgroup: cgroup, net: p.uid + "-inner", root: p.uid, born: p.pid + 1})
	w.proc.newest(w.lastPID)
}

// reap ends a Pod's processes. With its network go its interface and so tcpdump.
func (w *walker) reap(p *walkPod) {
	if p.state != "running" {
		return
	}
	p.isKept, p.kept = false, nil
	if p.child != nil && !p.touched { // it captured undisturbed: its files stay
		p.isKept, p.kept = true, p.child.names()
	}
	p.state, p.hit = "finished", true
	w.proc.end(p.pid + 1) // the containers end before what holds the sandbox
	w.proc.end(p.pid)
	for _, name := range []string{"net-" + p.uid, "net-" + p.uid + "-inner", "root-" + p.uid} {
		os.RemoveAll(filepath.Join(w.proc.dir, name))
	}
	if !p.host {
		for _, c := range w.kids.living() {
			if c.uid == p.uid {
				c.exit("tcpdump: The interface disappeared\n"+closing, errStatus)
			}
		}
	}
}

func (w *walker) killChild() {
	p := w.some()
	p.hit = true
	w.note("kill -9 the child of %s/%s", p.namespace, p.name)
	for _, c := range w.kids.living() {
		if c.uid == p.uid {
			c.exit("", errKilled)
		}
	}
}

// behave says what the children are like that are started from now on.
func (w *walker) behave() {
	b := behaviour{}
	switch w.r.IntN(6) {
	case 0:
		b.refusal = syscall.EAGAIN
	case 1:
		b.deaf = true
	case 2:
		b.startup = time.Duration(w.r.IntN(8000)) * time.Millisecond
	case 3:
		b.shutdown = time.Duration(w.r.IntN(4000)) * time.Millisecond
	case 4:
		b.startup, b.deaf = time.Duration(w.r.IntN(3000))*time.Millisecond, true
	}
	w.note("children: %+v", b)
	w.kids.behave(b)
}

// disturb troubles the watch.
func (w *walker) disturb() {
	verb := pick(w, []string{"watch", "watch", "watch", "list", "list", "post"})
	times := 1 + w.r.IntN(4)
	switch n := w.r.IntN(14); n {
	case 0, 1:
		w.note("drop the watches")
		w.api.drop()
	case 2:
		w.note("break the watches")
		w.api.push("", breaks)
	case 3:
		p := w.some()
		whole := watchFrame("MODIFIED", fakePod{p.namespace, p.name, p.uid, map[string]string{annotation: "7"}, 1 << 30}.object())
		cut := 1 + w.r.IntN(len(whole)-3)
		w.note("an event that never was, about %s/%s, cut at byte %d", p.namespace, p.name, cut)
		w.api.push(string(whole[:cut]), pick(w, []ending{ends, breaks}))
	case 4:
		text := pick(w, []string{"<html>", "{}\n", "\x00\xff", "[1,2]\n", `{"type":"ADDED"}` + "\n", `{"type":"ADDED","object":7}` + "\n"})
		w.note("garbage on the watches: %q", text)
		w.api.push(text, pick(w, []ending{goesOn, ends, breaks}))
	case 5:
		code := pick(w, []int{410, 500, 403, 429})
		w.note("an ERROR event of %d", code)
		w.api.push(string(errorFrame(code, "so the test wants it")), ends)
	case 6, 7:
		is200 := w.r.IntN(2) == 0
		w.note("compact, told in a 200: %v, and break the watches", is200)
		w.api.compact(is200)
		w.api.push("", breaks)
	case 8:
		w.note("bookmark")
		w.api.bookmark()
	case 9:
		w.note("%s: 410, %d times", verb, times)
		f := fault{times: times, code: 410}
		if verb == "watch" && w.r.IntN(2) == 0 {
			f = fault{times: times, code: 200, body: string(errorFrame(410, "too old"))}
		}
		w.api.fail(verb, f)
	case 10:
		w.note("%s: 429 with Retry-After, %d times", verb, times)
		w.api.fail(verb, fault{times: times, code: 429, retryAfter: strconv.Itoa(1 + w.r.IntN(5))})
	case 11:
		f := fault{times: times, code: pick(w, []int{500, 502, 503, 504, 401, 403}), body: pick(w, []string{"", "<html>"})}
		w.note("%s: %+v", verb, f)
		w.api.fail(verb, f)
	case 12:
		w.note("%s: lost, %d times", verb, times)
		w.api.fail(verb, fault{times: times, err: pick(w, []error{io.ErrUnexpectedEOF, syscall.ECONNREFUSED})})
	case 13:
		w.note("%s: garbage, %d times", verb, times)
		w.api.fail(verb, fault{times: times, code: 200, body: pick(w, []string{" ", "{}", `{"metadata":{`, "<html>", `{"items":[]}`})})
	}
	if w.r.IntN(3) == 0 {
		w.note("and drop the watches")
		w.api.drop()
	}
}

// rotate replaces the token, maybe before it is mounted; or unmounts it; or replaces the CA.
func (w *walker) rotate() {
	w.tokens++
	token := fmt.Sprintf("token-of-walk-%d", w.tokens)
	switch w.r.IntN(4) {
	case 0:
		w.note("rotate the token")
		w.api.mount("token", token)
		w.api.accept(token)
	case 1:
		w.note("rotate the token, not mounted yet; drop the watches")
		w.api.accept(token)
		w.api.drop()
	case 2:
		if w.c != nil {
			w.note("the token can't be read; drop the watches")
			os.Remove(filepath.Join(w.api.account, "token"))
			w.api.drop()
		}
	case 3:
		w.note("rotate the CA")
		w.api.mount("ca.crt", string(someCA))
	}
}

// restart has the program end, by SIGTERM or SIGKILL. It starts again now or some steps later.
func (w *walker) restart() {
	w.mount() // it needs a token to start at all
	if isHard := w.r.IntN(2) == 0; isHard {
		w.note("kill -9 the program, up: %v", w.c != nil)
		w.kill()
		must(w, os.WriteFile(filepath.Join(w.root, "capture-gone.pcap17"), nil, 0o644))
	} else {
		w.note("end the program, up: %v", w.c != nil)
		w.halt()
	}
	if w.r.IntN(2) == 0 {
		w.note("start the program")
		w.boot()
	}
}

func (w *walker) mount() {
	w.api.mu.Lock()
	token := w.api.token
	w.api.mu.Unlock()
	w.api.mount("token", token)
}

func (w *walker) advance() {
	d := time.Duration(w.r.IntN(300)) * time.Millisecond
	switch n := w.r.IntN(100); {
	case n == 0:
		d = time.Duration(w.r.IntN(600_000)) * time.Millisecond
	case n < 15:
		d = time.Duration(w.r.IntN(10_000)) * time.Millisecond
	case n < 50:
		d = time.Duration(w.r.IntN(2000)) * time.Millisecond
	}
	w.note("advance %v", d)
	time.Sleep(d)
}

// ---- The quiet points ----

// quiet ends all faults and waits until everything is right, and then a while.
func (w *walker) quiet() {
	w.note("quiet")
	w.api.heal()
	w.mount()
	w.kids.behave(behaviour{})
	for _, p := range w.orphans {
		w.reap(p)
	}
	w.orphans = nil
	for _, key := range w.sorted() {
		if p := w.pods[key]; p.state == "unborn" && w.r.IntN(8) > 0 {
			w.bear(p)
		}
	}
	w.boot()
	w.quiets++
	w.canary.annotations = map[string]string{annotation: strconv.Itoa(1 + w.quiets%5)}
	w.api.put(w.canary.fakePod)
	since, heard := time.Now(), false
	for {
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		var err error
		if !heard {
			if heard = w.isHeard(); heard {
				time.Sleep(termGrace + 100*time.Millisecond) // what is to be stopped has ended
				synctest.Wait()
			}
			err = errors.New("the last change has had no effect")
		}
		if heard {
			err = w.check()
		}
		if err == nil {
			break
		}
		if time.Since(since) > quietLimit {
			w.Errorf("step %d: not right %v after the last fault: %v", len(w.steps), quietLimit, err)
			return
		}
	}
	time.Sleep(time.Duration(w.r.IntN(4000)) * time.Millisecond)
	synctest.Wait()
	if err := w.check(); err != nil {
		w.Errorf("step %d: right %v after the last fault, and not any more: %v", len(w.steps), time.Since(since), err)
		return
	}
	w.settle()
}

func (w *walker) sorted() (keys []string) {
	for key := range w.pods {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// isHeard reports whether the last change has had its effect.
func (w *walker) isHeard() bool {
	want, _, _ := wish(w.canary.annotations)
	return slices.ContainsFunc(w.kids.living(), func(c *walkChild) bool { return c.uid == w.canary.uid && c.request == want })
}

// check is the oracle: what runs, and what is in the folder, by what the annotations in the API's store say.
func (w *walker) check() error {
	running := map[string]*walkChild{}
	for _, c := range w.kids.living() {
		if running[c.uid] != nil {
			return fmt.Errorf("two children for %s", c.uid)
		}
		running[c.uid] = c
	}
	files := []string{"capture-notes.txt", "web.pcap0"}
	stems := map[string]bool{}
	w.api.mu.Lock()
	store := make(map[string]fakePod, len(w.api.pods))
	for key, p := range w.api.pods {
		store[key] = p
	}
	w.api.mu.Unlock()
	there := w.files()
	for key, stored := range store {
		p := cmp.Or(w.pods[key], w.canary)
		c := running[p.uid]
		delete(running, p.uid)
		wants := []request{{}}
		if r, isValid, has := wish(stored.annotations); has && isValid {
			wants = []request{r}
		} else if has {
			wants = p.maybe
		}
		switch {
		case p.state != "running" && c != nil:
			return fmt.Errorf("%s is %s and has child %d", key, p.state, c.pid)
		case p.state == "finished" && p.isKept:
			files = append(files, p.kept...)
		case p.state == "finished": // by when its last change came
			if old := w.kids.record(p.uid); slices.Contains(wants, old.request) {
				files = append(files, both(old.files, there)...)
			}
		case p.state == "unborn":
		case c == nil:
			idle := func(r request) bool { return r == (request{}) || r.filter == "refused" }
			if !slices.ContainsFunc(wants, idle) {
				return fmt.Errorf("%s has no child and asks for %v", key, wants)
			}
		case !slices.Contains(wants, c.request):
			return fmt.Errorf("%s has a child for %v and asks for %v", key, c.request, wants)
		case !c.listens():
			return fmt.Errorf("the child of %s is not there yet", key)
		default:
			plain := "capture-" + p.name + ".pcap"
			if c.stem != plain && c.stem != fmt.Sprintf("capture-%s_%.8s.pcap", p.name, p.uid) || stems[c.stem] {
				return fmt.Errorf("%s is captured into %s", key, c.stem)
			}
			stems[c.stem] = true
			files = append(files, c.names()...)
			if p.child != nil && !p.touched && !p.hit && p.child != c {
				return fmt.Errorf("%s was disturbed: its child was %d and is %d", key, p.child.pid, c.pid)
			}
		}
	}
	for uid, c := range running {
		return fmt.Errorf("child %d of %s, which is gone, runs", c.pid, uid)
	}
	slices.Sort(files)
	if !slices.Equal(there, files) {
		return fmt.Errorf("the files are %q, not %q", there, files)
	}
	return nil
}

// settle takes note of what is right now.
func (w *walker) settle() {
	there := w.files()
	running := map[string]*walkChild{}
	for _, c := range w.kids.living() {
		running[c.uid] = c
	}
	for _, p := range w.pods {
		if r, isValid, has := wish(p.annotations); isValid || !has {
			p.maybe = []request{r}
		}
		p.maybe = slices.Compact(p.maybe)
		if len(p.maybe) > 1 { // it depends on what the watch has seen of it, and a child may still be tried
			p.child, p.touched = nil, true
			continue
		}
		p.child, p.touched, p.hit = running[p.uid], false, false
		if p.state == "finished" && !p.isKept {
			p.isKept, p.kept = true, both(w.kids.record(p.uid).files, there)
		}
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if must(w, err); w.fds == 0 {
		w.fds = len(fds)
	}
	if len(fds) > w.fds {
		w.Errorf("%d file descriptors are open, %d were at first", len(fds), w.fds)
	}
	w.api.mu.Lock()
	w.api.requests, w.api.events = nil, nil
	w.api.mu.Unlock()
}

// both are the names that are in a and in b.
func both(a, b []string) (names []string) {
	for _, name := range a {
		if slices.Contains(b, name) {
			names = append(names, name)
		}
	}
	return names
}

func (w *walker) files() (names []string) {
	dir, err := os.Open(w.root)
	must(w, err)
	defer dir.Close()
	names, err = dir.Readdirnames(-1)
	must(w, err)
	slices.Sort(names)
	return names
}

var walkNumber = regexp.MustCompile(`^[1-9][0-9]*$`)

// wish is what annotations ask for, whether that is valid, and whether they ask at all.
func wish(annotations map[string]string) (r request, isValid, has bool) {
	value, has := annotations[annotation]
	n, err := strconv.Atoi(value)
	filter := annotations[filterAnnotation]
	if !walkNumber.MatchString(value) || err != nil || n > 1<<31-1 || strings.Contains(filter, "\a") {
		return r, false, has
	}
	return request{n, filter}, true, true
}

// ---- Children ----

// walkKids are children of the walk: cheap, and known by the UID of the Pod whose network they have.
type walkKids struct {
	*walker
	mu      sync.Mutex
	next    behaviour
	pid     int
	alive   []*walkChild
	byCmd   sync.Map               // *exec.Cmd to *walkChild
	byUID   map[string]*walkRecord // what was captured last of a Pod
	byStem  map[string]string      // UIDs by the name of their files, of the last one that had it
	byInode map[uint64]string      // UIDs by the network's file
	hostUID string
}

type walkRecord struct {
	request
	stem  string
	life  int
	files []string
}

type walkChild struct {
	behaviour
	kids *walkKids
	request
	pid   int
	life  int
	uid   string
	stem  string // without the folder
	ready bool   // it listens, and has files
	quit  chan end
	gone  chan struct{}
	err   error
}

func (k *walkKids) behave(b behaviour) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.next = b
}

// know makes a Pod's network and takes note of it, before a process has it.
func (k *walkKids) know(p *walkPod) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if p.host {
		k.hostUID = p.uid
		return
	}
	network := filepath.Join(k.proc.dir, "net-"+p.uid)
	must(k, os.WriteFile(network, nil, 0o644))
	info, err := os.Stat(network)
	must(k, err)
	k.byInode[info.Sys().(*syscall.Stat_t).Ino] = p.uid
}

// record is what was captured last of a Pod in this life of the program, while no other Pod has the name.
func (k *walkKids) record(uid string) walkRecord {
	k.mu.Lock()
	defer k.mu.Unlock()
	if old := k.byUID[uid]; old != nil && old.life == k.life && k.byStem[old.stem] == uid {
		return *old
	}
	return walkRecord{}
}

func (k *walkKids) living() []*walkChild {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.alive)
}

func (k *walkKids) start(cmd *exec.Cmd) (io.Reader, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.next.refusal != nil {
		return nil, k.next.refusal
	}
	info, err := cmd.ExtraFiles[0].Stat()
	if err != nil {
		k.Errorf("the network's file is closed before the child has it: %v", err)
		return nil, err
	}
	option := func(name string) string { return cmd.Args[slices.Index(cmd.Args, name)+1] }
	k.pid++
	c := &walkChild{behaviour: k.next, kids: k, pid: k.pid, life: k.life, stem: filepath.Base(option("-w")),
		quit: make(chan end, 10), gone: make(chan struct{})}
	c.n, _ = strconv.Atoi(option("-W"))
	if before, last := cmd.Args[len(cmd.Args)-2], cmd.Args[len(cmd.Args)-1]; before == "--" {
		c.filter = last
	}
	c.uid = k.byInode[info.Sys().(*syscall.Stat_t).Ino]
	if option("-i") == "any" {
		c.uid = k.hostUID
	}
	for _, other := range k.alive {
		if other.stem == c.stem || other.uid == c.uid {
			k.Errorf("child %d of %s into %s is started while %d of %s into %s runs", c.pid, c.uid, c.stem, other.pid,
				other.uid, other.stem)
		}
	}
	if c.uid == "" || filepath.Dir(option("-w")) != k.root {
		k.Errorf("a child in no Pod's network, or into %s", option("-w"))
	}
	if c.filter == "refused" {
		c.words = "tcpdump: can't parse filter expression: syntax error\n"
	}
	cmd.Process = &os.Process{Pid: c.pid}
	k.byCmd.Store(cmd, c)
	k.alive = append(k.alive, c)
	if old := k.byUID[c.uid]; old == nil || old.request != c.request || old.life != c.life || old.stem != c.stem {
		k.byUID[c.uid] = &walkRecord{request: c.request, stem: c.stem, life: c.life}
	}
	k.byStem[c.stem] = c.uid
	stderr, words := io.Pipe()
	go c.live(words)
	return stderr, nil
}

func (c *walkChild) live(stderr *io.PipeWriter) {
	defer close(c.gone)
	defer stderr.Close()
	startup := time.After(c.startup)
	for {
		select {
		case <-startup:
			if c.words != "" {
				c.exit(c.words, errStatus)
				continue
			}
			if len(c.quit) > 0 {
				continue
			}
			c.kids.mu.Lock()
			c.ready = true
			for _, name := range c.names() {
				must(c.kids, os.WriteFile(filepath.Join(c.kids.root, name), nil, 0o644))
			}
			c.kids.byUID[c.uid].files = c.names()
			c.kids.mu.Unlock()
			io.WriteString(stderr, "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n")
		case e := <-c.quit:
			for _, name := range c.names() {
				if _, err := os.Stat(filepath.Join(c.kids.root, name)); c.ready && err != nil {
					c.kids.Errorf("file %s is gone before its child %d", name, c.pid)
				}
			}
			io.WriteString(stderr, e.words)
			c.err = e.err
			c.kids.mu.Lock()
			c.kids.alive = slices.DeleteFunc(c.kids.alive, func(other *walkChild) bool { return other == c })
			c.kids.mu.Unlock()
			return
		}
	}
}

// names are the files that it has written: the first ones, as it has just begun.
func (c *walkChild) names() (names []string) {
	for i := range min(c.n, 3) {
		names = append(names, fileName(c.stem, c.n, i))
	}
	return names
}

func (c *walkChild) listens() bool {
	c.kids.mu.Lock()
	defer c.kids.mu.Unlock()
	return c.ready
}

// exit ends a child; the first time counts.
func (c *walkChild) exit(words string, err error) {
	select {
	case c.quit <- end{words, err}:
	default:
	}
}

func (k *walkKids) of(cmd *exec.Cmd) *walkChild {
	c, _ := k.byCmd.Load(cmd)
	return c.(*walkChild)
}

func (k *walkKids) wait(cmd *exec.Cmd) error {
	c := k.of(cmd)
	<-c.gone
	k.byCmd.Delete(cmd)
	return c.err
}

func (k *walkKids) signal(cmd *exec.Cmd, s os.Signal) error {
	value, ok := k.byCmd.Load(cmd)
	if !ok {
		return os.ErrProcessDone
	}
	c := value.(*walkChild)
	switch {
	case s == syscall.SIGTERM && !c.deaf && c.shutdown > 0:
		time.AfterFunc(c.shutdown, func() { c.exit(closing, nil) })
	case s == syscall.SIGTERM && !c.deaf:
		c.exit(closing, nil)
	case s == syscall.SIGKILL:
		c.exit("", errKilled)
	}
	return nil
}
