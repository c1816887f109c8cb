package main

import (
	"context"
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
	var memory syscall.Statfs_t
	if err := syscall.Statfs("/dev/shm", &memory); err == nil && int64(memory.Bavail)*memory.Bsize > 2000*fileBytes {
		t.Setenv("TMPDIR", "/dev/shm") // in memory it takes a fourth of the time
	}
	if *soakSeed != 0 {
		walk(t, *soakSeed, walkSteps)
		return
	}
	for seed, left := uint64(time.Now().UnixNano()), *soakSteps; left > 0 && !t.Failed(); seed++ {
		walk(t, seed, min(left, walkSteps))
		left -= walkSteps
	}
}

type walker struct {
	*testing.T
	r     *rand.Rand
	story []string

	api    *fakeAPI
	proc   *fakeProc
	kids   *children
	root   string
	limit  int        // files that the node may have
	pods   []*walkPod // all that there ever were; the first is none, since process 1 is the host's
	token  string     // the one that the API server takes
	quiets int

	end  context.CancelFunc // of the program; nil while it is down
	done chan struct{}
}

// walkPod is what the test knows of a pod.
// request is what valid annotations ask for.
type request struct {
	n             int
	filter, iface string
}

type walkPod struct {
	fakePod
	number             int
	isDeleted, isAlive bool
	pid                int      // of its process, the last one: number times 100, and a bit
	interfaces         []string // of its network, and any

	right map[string]string // its last valid annotations
	asked []request         // what was validly asked for, the last one counts; zero: nothing
	child *fakeChild        // at the last quiet point, if nothing has happened since that may end it
	kept  []string          // the files that it must have without a network
}

func (p *walkPod) String() string {
	return fmt.Sprintf("%s/%s %.8s (alive: %v, process %d)", p.namespace, p.name, p.uid, p.isAlive, p.pid)
}

func (p *walkPod) want() request { return p.asked[len(p.asked)-1] }

// requestOf is what a child was started for, by its arguments.
func requestOf(c *fakeChild) request {
	r := request{n: c.n, iface: c.option("-i")}
	if count := len(c.arguments); c.arguments[count-2] == "--" {
		r.filter = c.arguments[count-1]
	}
	return r
}

// walk takes the steps of a seed in a bubble of time of their own.
func walk(t *testing.T, seed uint64, steps int) {
	w := &walker{r: rand.New(rand.NewPCG(seed, 1)), pods: []*walkPod{{isDeleted: true}}}
	isDone := false
	defer func() {
		if !isDone || t.Failed() {
			t.Logf("%s\ngo test -race -run TestSoak -soak.seed=%d", strings.Join(w.story, "\n"), seed)
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		w.T, w.api, w.proc, w.root = t, newFakeAPI(t), newProc(t), t.TempDir()
		w.kids = &children{TB: t, proc: w.proc}
		w.limit = pick(w, []int{12, 30, 1000})
		w.note("room for %d files", w.limit)
		w.api.bookmarkEvery = pick(w, []time.Duration{0, 20 * time.Second})
		w.token = w.api.token
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

func (w *walker) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// ---- The program ----

// boot starts the program, as run does, where an earlier one was killed.
func (w *walker) boot() {
	if w.end != nil {
		return
	}
	must(w, os.WriteFile(filepath.Join(w.root, "capture-gone.pcap17"), nil, 0o644))
	w.api.mount("token", w.token) // it needs one to start at all
	cfg := testConfig(w, w.proc.dir, w.root)
	cfg.api, cfg.account, cfg.diskLimit = "https://kubernetes.test", w.api.account, int64(w.limit)*fileBytes
	n, err := newNode(cfg)
	must(w, err)
	n.kube.http.Transport, n.start = w.api, w.start
	ctx, end := context.WithCancel(context.Background())
	w.end, w.done = end, make(chan struct{})
	go func() {
		defer close(w.done)
		n.run(ctx)
	}()
}

// halt ends the program as SIGTERM does: within 5 s, and nothing is left (C5).
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
	if living, left := w.living(), namesIn(w, w.root); len(living) > 0 || !slices.Equal(left, strangers) {
		w.Errorf("the program leaves children %v and files %q", living, left)
	}
	for _, p := range w.pods {
		p.child, p.kept = nil, nil
	}
	w.end = nil
}

// start is a starter that looks at what must hold at any time.
func (w *walker) start(ctx context.Context, network *os.File, arguments ...string) (*child, error) {
	defer w.living()
	return w.kids.start(ctx, network, arguments...)
}

// living are the children that live, by their pods' numbers. A pod has one at most, and all of them have room (C4, C5).
func (w *walker) living() map[int]*fakeChild {
	w.kids.mu.Lock()
	defer w.kids.mu.Unlock()
	living, files := map[int]*fakeChild{}, 0
	for _, c := range w.kids.all {
		if !c.lives() {
			continue
		}
		number := c.process / 100
		if other := living[number]; other != nil {
			w.Errorf("child %d into %s and child %d into %s are of one pod", other.pid, other.stem, c.pid, c.stem)
		}
		living[number] = c
		files += c.n
	}
	if files > w.limit {
		w.Errorf("the children have %d files, of %d that there may be", files, w.limit)
	}
	return living
}

// exit ends children as SIGKILL does.
func (w *walker) exit(which func(*fakeChild) bool) {
	for number, c := range w.living() {
		if which(c) {
			w.pods[number].child = nil
			c.exit("", errKilled)
		}
	}
}

// ---- The steps ----

const hostPod = "node" // the name of pods that have the host's network

var (
	strangers    = []string{"capture-notes.txt", "web.pcap0"} // no files of captures: nobody may touch them
	walkNames    = []string{"web", "web-2", "web.pcap0", "web.pcap", hostPod}
	walkValues   = []string{"1", "1", "2", "3", "4", "5", "9", "10", "11", "20", "100"} // some are more than there is room for
	wrongValues  = []string{"0", "01", " 1", "5abc", "99999999999999999999"}
	walkFilters  = []string{"tcp port 80", "udp", " udp\n"}
	wrongFilters = []string{"refused", "bell\a"}
	walkIfaces   = []string{"lo", "any", "net1"}
	wrongIfaces  = []string{"", "-i", "a/b"}
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
		name   string
		take   func(p *walkPod)
	}{
		{23, "annotate", w.annotate},
		{2, "touch", func(p *walkPod) { w.api.put(p.fakePod) }},
		{6, "unannotate", func(p *walkPod) { w.set(p, nil, request{}, true) }},
		{9, "delete", w.remove},
		{8, "end the process of", func(p *walkPod) { w.vanish(p, w.chance(3)) }},
		{8, "start a process of", w.bear},
		{4, "kill the child of", func(p *walkPod) { w.exit(func(c *fakeChild) bool { return c.process/100 == p.number }) }},
		{6, "have children behave", w.behave},
		{14, "disturb", w.disturb},
		{4, "restart", w.restart},
		{12, "advance", w.advance},
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

// some picks a pod, which may be a new one.
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
	interfaces := []string{"any", "lo", "eth0", "net1"}[:3+w.r.IntN(2)]
	if name == hostPod {
		interfaces = []string{"any", "lo", "ens3"}
	}
	p := &walkPod{number: number, pid: 100 * number, interfaces: interfaces, asked: []request{{}}}
	p.fakePod = fakePod{namespace: namespace, name: name, uid: fmt.Sprintf("%08x-0a1b-4c2d-8e3f-%012x", number, number)}
	w.pods = append(w.pods, p)
	if !w.chance(3) {
		w.bear(p)
	}
	return p
}

func (w *walker) annotate(p *walkPod) {
	annotations, isRight := map[string]string{}, true
	choose := func(key string, right, wrong []string) string {
		annotations[key] = pick(w, right)
		if w.chance(8) {
			annotations[key], isRight = pick(w, wrong), false
		}
		return annotations[key]
	}
	asked := request{iface: map[bool]string{false: "eth0", true: "any"}[p.name == hostPod]}
	asked.n, _ = strconv.Atoi(choose(annotation, walkValues, wrongValues))
	if w.chance(3) {
		asked.filter = strings.TrimSpace(choose(filterAnnotation, walkFilters, wrongFilters))
	}
	if w.chance(4) {
		asked.iface = choose(interfaceAnnotation, walkIfaces, wrongIfaces)
	}
	w.set(p, annotations, asked, isRight && asked.n <= w.limit)
}

// set changes the annotations of a pod. What is invalid changes nothing (C2).
func (w *walker) set(p *walkPod, annotations map[string]string, asked request, isRight bool) {
	w.note("  %q, valid: %v", annotations, isRight)
	p.annotations = annotations
	if isRight && !maps.Equal(annotations, p.right) {
		p.right, p.asked, p.child, p.kept = annotations, append(p.asked, asked), nil, nil
	}
	w.api.put(p.fakePod)
}

// remove deletes a pod. Its process ends before, or at the next quiet point. Another pod may take its place at once.
func (w *walker) remove(p *walkPod) {
	p.isDeleted = true
	if w.chance(2) {
		w.vanish(p, false)
	}
	w.api.remove(p.namespace, p.name)
	if w.chance(2) {
		w.set(w.create(p.namespace, p.name), p.right, p.want(), true)
	}
}

// bear starts a pod's process, which holds its network.
func (w *walker) bear(p *walkPod) {
	if p.isAlive {
		return
	}
	p.pid++
	p.isAlive, p.kept = true, nil
	net := strconv.Itoa(p.pid)
	if p.name == hostPod {
		net = host
	}
	w.proc.interfaces(net, p.interfaces[1:]...)
	w.proc.add(fakeProcess{pid: p.pid, cgroup: cgroupOf(p.uid), net: net, root: p.uid, born: p.pid})
}

// vanish ends a pod's process, and with its network, if that is not left, tcpdump. The files stay (C5). The host's network is
// always left: of a pod that has it only the deletion tells.
func (w *walker) vanish(p *walkPod, isLeft bool) {
	if !p.isAlive || p.name == hostPod && !p.isDeleted {
		return
	}
	synctest.Wait() // a child that is just being started is known by the process whose network it has
	w.proc.end(p.pid)
	if p.child != nil && !isLeft {
		p.kept = p.child.files
	}
	p.isAlive, p.child = false, nil
	if isLeft || p.name == hostPod {
		return
	}
	w.proc.interfaces(strconv.Itoa(p.pid), "lo")
	if c := w.living()[p.number]; c != nil && c.process == p.pid && c.option("-i") == "eth0" {
		c.exit("tcpdump: The interface disappeared\n"+closing, errStatus)
	}
}

// behave says how the children are that are started from now on.
func (w *walker) behave(*walkPod) {
	b := pick(w, []behaviour{
		{}, {refusal: syscall.EAGAIN}, {deaf: true}, {deaf: true, immortal: true}, {deaf: true, immortal: true},
		{startup: w.millis(2000)}, {startup: w.millis(2000), deaf: true}, {startup: w.millis(500), words: "tcpdump: so it is\n"},
		{shutdown: w.millis(4000)}, {compile: w.millis(3000)}, {warning: "Warning: so it is\n"},
	})
	w.note("  %+v", b)
	w.kids.behave(b)
}

// disturb troubles the watch, the list, the Events or the token. The watches get a text that is none of theirs, and end.
func (w *walker) disturb(p *walkPod) {
	never := watchFrame("MODIFIED", fakePod{p.namespace, p.name, p.uid, map[string]string{annotation: "7"}, 1 << 30}.object())
	text := pick(w, []string{"", "", "", string(never[:w.r.IntN(len(never)-2)]), "<html>", "{}\n", "\x00\xff", `{"type":"ADDED","object":7}`,
		string(errorFrame(410, "too old")), string(errorFrame(500, "no"))})
	end := pick(w, []ending{ends, breaks})
	verb := pick(w, []string{"watch", "watch", "list", "post"})
	met := pick(w, []fault{
		{code: 410}, {code: 429, retryAfter: strconv.Itoa(1 + w.r.IntN(5))}, {err: io.ErrUnexpectedEOF}, {err: syscall.ECONNREFUSED},
		{code: pick(w, []int{500, 502, 503, 504, 401, 403}), body: pick(w, []string{"", "<html>"})},
		{code: 200, body: pick(w, []string{" ", "{}", `{"metadata":{`, "<html>", `{"items":[]}`, string(errorFrame(410, "too old"))})},
	})
	met.times = 1 + w.r.IntN(4)
	trouble := w.r.IntN(10)
	w.note("  trouble %d; %s: %+v; the watches get %q and end by %d", trouble, verb, met, text, end)
	switch trouble {
	case 0:
		w.api.freeze()
	case 1:
		w.api.thaw()
	case 2:
		w.api.compact(w.chance(2))
	case 3: // it will be mounted
		w.token += "x"
		w.api.accept(w.token)
	case 4:
		os.Remove(filepath.Join(w.api.account, "token"))
	default:
		w.api.fail(verb, met)
	}
	w.api.push(text, end)
}

// restart has the program end. It starts again now or some steps later.
func (w *walker) restart(*walkPod) {
	w.halt()
	if w.chance(2) {
		w.boot()
	}
}

func (w *walker) advance(*walkPod) {
	d := w.millis(pick(w, []int{30, 300, 300, 2000, 2000, 5000}))
	if w.chance(60) {
		d = w.millis(600_000)
	}
	time.Sleep(d)
}

// ---- The quiet points ----

// quiet ends all faults, mends all mistakes, waits until everything is right, and looks once more after a while.
func (w *walker) quiet() {
	w.api.heal()
	w.api.thaw()
	w.api.mount("token", w.token)
	w.kids.behave(behaviour{})
	w.boot()
	w.exit(func(c *fakeChild) bool { return c.immortal })
	for _, p := range w.pods {
		if p.isDeleted {
			w.vanish(p, false)
			continue
		}
		if w.chance(8) {
			w.vanish(p, false)
		}
		isCertain := p.kept != nil || p.pid == 100*p.number // which files it has without a network
		if !isCertain || w.chance(2) {
			w.bear(p)
		}
		if !maps.Equal(p.annotations, p.right) {
			w.set(p, p.right, p.want(), true)
		}
	}
	// The last change is of a pod that never runs. Once its filter is compiled all changes before have come.
	w.quiets++
	filter := fmt.Sprintf("udp port %d", w.quiets)
	w.api.put(fakePod{"z", "last", "z", map[string]string{annotation: "1", filterAnnotation: filter}, 0})
	hasCome := func() bool {
		w.kids.mu.Lock()
		defer w.kids.mu.Unlock()
		return slices.Contains(w.kids.compiled, filter)
	}
	began := time.Now()
	for w.pass(0); !hasCome() && time.Since(began) < quietLimit; {
		w.pass(200 * time.Millisecond)
	}
	w.pass(termGrace + 100*time.Millisecond) // what is to be stopped has ended
	for w.verdict() != nil && time.Since(began) < quietLimit {
		w.pass(200 * time.Millisecond)
	}
	w.api.remove("z", "last") // it would be looked for all the time
	w.pass(w.millis(3000))
	if err := w.verdict(); err != nil || !hasCome() {
		w.Errorf("step %d: not right %v after the last fault; the last change has come: %v; %v", len(w.story), time.Since(began), hasCome(), err)
	}
	noneOpen(w.T, w.proc.dir)
	for number, c := range w.living() {
		w.pods[number].child = c
	}
	for _, c := range w.kids.all {
		if p := w.pods[c.process/100]; !slices.Contains(p.asked, requestOf(c)) {
			w.Errorf("child %d of %s has %v, asked for were %v", c.pid, p, requestOf(c), p.asked)
		}
	}
}

// verdict is on what runs, and what is in the folder, by what the annotations say.
func (w *walker) verdict() error {
	living, there, taken := w.living(), namesIn(w, w.root), 0
	files := slices.Clone(strangers)
	var idle []*walkPod
	for _, p := range w.there() {
		c, want := living[p.number], p.want()
		delete(living, p.number)
		switch {
		case p.child != nil && c != p.child:
			return fmt.Errorf("%s was disturbed: its child was %d", p, p.child.pid)
		case c != nil:
			stem := strings.TrimPrefix(filepath.Base(c.stem), "capture-"+p.name)
			isOwn := stem == ".pcap" || stem == fmt.Sprintf("_%.8s.pcap", p.uid)
			if !p.isAlive || requestOf(c) != want || c.process != p.pid || !isOwn {
				return fmt.Errorf("%s asks for %v, and has %v by process %d into %s", p, want, requestOf(c), c.process, c.stem)
			}
			files = append(files, c.files...)
			taken += c.n
		case p.kept != nil:
			files = append(files, p.kept...)
			taken += want.n
		case p.isAlive && want.n > 0 && slices.Contains(p.interfaces, want.iface):
			idle = append(idle, p)
		}
	}
	if slices.Sort(files); len(living) > 0 || taken > w.limit || !slices.Equal(there, files) {
		return fmt.Errorf("there are %q, not %q; %d of %d may be taken; pods that are gone have %v", there, files, taken, w.limit, living)
	}
	for _, p := range idle {
		if p.want().n <= w.limit-taken {
			return fmt.Errorf("%s has no child and asks for %v; %d of %d files are taken", p, p.want(), taken, w.limit)
		}
	}
	return nil
}
