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

const (
	// walkSteps is the length of a walk, short enough to be read.
	walkSteps = 400
	// quietLimit is the time from the end of all faults until everything must be right: tcpdump waits up to
	// 5 minutes if it has failed often.
	quietLimit = 7 * time.Minute
	// noLimit is a number of files that refuses nothing for want of room.
	noLimit = 1 << 20
)

// TestSoak walks at random through what happens to the program and around it. Whenever the faults end, soon
// the tcpdumps, the files, the links and the Events are what the annotations ask for.
func TestSoak(t *testing.T) {
	// In memory it takes a fourth of the time.
	if _, err := os.Stat("/dev/shm"); err == nil {
		t.Setenv("TMPDIR", "/dev/shm")
	}
	seed, left := uint64(time.Now().UnixNano()), *soakSteps
	if *soakSeed != 0 {
		seed, left = *soakSeed, walkSteps
	}
	for ; left > 0 && !t.Failed(); seed, left = seed+1, left-walkSteps {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { walk(t, seed, min(left, walkSteps)) })
	}
}

type walker struct {
	*testing.T
	random *rand.Rand
	story  []string
	api    *fakeAPI
	proc   *fakeProc
	kids   *children
	root   string

	// end ends the program, and is nil while that is down.
	end func()
	// limit is the number of files that the node may have.
	limit int
	// pods are all that there ever were. The first is none, since process 1 is the host's.
	pods []*walkPod
	// told has by UID the reason of the last Event that this run of the program has tried to post.
	told sync.Map
	// token is the one that the API server takes, and hanging the namespace whose Events hang.
	token, hanging string
}

// walkPod is what the test knows of a pod.
type walkPod struct {
	fakePod
	isDeleted, isAlive bool
	// pid is that of its last process: 100 times its index in walker.pods, and a bit. net is its network.
	pid int
	net string

	// asked are the valid requests that the program may have seen since the last quiet point.
	asked []request
	certain
}

// certain is what a pod must have, whatever of the last steps the program has seen.
type certain struct {
	// child runs undisturbed. Without one, hasFiles says that files of it have stayed.
	child             *fakeChild
	hasFiles, hasRoom bool
}

// request is what annotations ask for. The zero one asks for nothing.
type request struct {
	n             int
	filter, iface string
}

func (r request) annotations() map[string]string {
	if r.n == 0 {
		return nil
	}
	files := strconv.Itoa(r.n)
	return map[string]string{annotation: files, filterAnnotation: r.filter, interfaceAnnotation: r.iface}
}

// requestOf is what a child was started for, by its arguments.
func requestOf(c *fakeChild) request {
	r := request{n: c.n, iface: strings.TrimPrefix(c.option("-i"), podInterface)}
	if count := len(c.arguments); c.arguments[count-2] == "--" {
		r.filter = c.arguments[count-1]
	}
	return r
}

func (p *walkPod) String() string {
	return fmt.Sprintf("%s/%s %.8s (alive: %v, process %d)", p.namespace, p.name, p.uid, p.isAlive, p.pid)
}

func (p *walkPod) want() request { return p.asked[len(p.asked)-1] }

// disturb takes down that the pod's child may have ended. The files of one that ran stay.
func (p *walkPod) disturb() {
	p.hasFiles = p.hasFiles || p.child != nil
	p.child = nil
}

// may are the requests that the program may go by: the last one, or all if the last may be refused because
// it asks for more files than one before.
func (w *walker) may(p *walkPod) []request {
	isLess := func(r request) bool { return r.n > 0 && r.n < p.want().n }
	if w.limit < noLimit && slices.ContainsFunc(p.asked, isLess) {
		return p.asked
	}
	return p.asked[len(p.asked)-1:]
}

// most is the most files that a pod may have room for.
func (w *walker) most(p *walkPod) int {
	return slices.MaxFunc(w.may(p), func(a, b request) int { return cmp.Compare(a.n, b.n) }).n
}

// walk takes the steps of a seed in a bubble of time of their own.
func walk(t *testing.T, seed uint64, steps int) {
	w := &walker{random: rand.New(rand.NewPCG(seed, 1)), pods: []*walkPod{{isDeleted: true}}}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s\ngo test -race -run TestSoak -soak.seed=%d", strings.Join(w.story, "\n"), seed)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		w.T, w.api, w.proc, w.root = t, newFakeAPI(t), newProc(t), t.TempDir()
		w.kids, w.token = &children{TB: t, proc: w.proc}, w.api.token
		w.limit = pick(w, []int{6, 12, 30, noLimit})
		w.api.bookmarkEvery = pick(w, []time.Duration{0, 20 * time.Second})
		w.note("room for %d files, bookmarks every %v", w.limit, w.api.bookmarkEvery)
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
	cfg.account, cfg.limit = w.api.account, w.limit
	a, err := newAgent(cfg)
	must(w, err)
	a.api.http.Transport, a.start, a.ready = w, w.start, func() {}
	w.told.Clear()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { a.run(ctx) })
	w.end = func() {
		cancel()
		running.Wait()
	}
}

// halt ends the program as SIGTERM does: within 5 s, and nothing is left.
func (w *walker) halt() {
	if w.end == nil {
		return
	}
	began := time.Now()
	w.end()
	if took := time.Since(began); took > 5*time.Second {
		w.Errorf("the program took %v to end", took)
	}
	// What survives SIGKILL ends with the container.
	w.exit(func(c *fakeChild) bool { return c.immortal })
	synctest.Wait()
	living, files, links := w.living(), namesIn(w, w.root), namesIn(w, w.root+"/captures")
	if len(living)+len(files)+len(links) > 0 {
		w.Errorf("the program leaves children %v, files %q and links %q", living, files, links)
	}
	must(w, os.RemoveAll(w.root+"/captures"))
	for _, p := range w.pods[1:] {
		// The next program does not know what ran before.
		p.asked, p.certain = p.asked[len(p.asked)-1:], certain{}
	}
	w.end = nil
}

// RoundTrip takes down what Events tell, also of those that are lost.
func (w *walker) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method == "POST" {
		var e struct {
			Reason         string
			InvolvedObject struct{ UID string }
		}
		body, _ := r.GetBody()
		json.NewDecoder(body).Decode(&e)
		w.told.Store(e.InvolvedObject.UID, e.Reason)
	}
	return w.api.RoundTrip(r)
}

// start stands in for the function of that name, and looks at what must hold at any time.
func (w *walker) start(ctx context.Context, network *os.File, arguments ...string) (*process, error) {
	defer w.living()
	return w.kids.start(ctx, network, arguments...)
}

// living are the children that live, by their pods' numbers. A pod has one at most, and all have room.
func (w *walker) living() map[int]*fakeChild {
	w.kids.mu.Lock()
	defer w.kids.mu.Unlock()
	living, files := map[int]*fakeChild{}, 0
	for _, c := range w.kids.all {
		number := c.process / 100
		if !c.lives() {
			continue
		}
		if other := living[number]; other != nil {
			w.Errorf("child %d into %s and child %d into %s are of one pod", other.pid, other.stem, c.pid, c.stem)
		}
		living[number], files = c, files+c.n
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
			w.pods[number].disturb()
			c.exit("", errKilled)
		}
	}
}

// ---- The steps ----

func pick[T any](w *walker, from []T) T { return from[w.random.IntN(len(from))] }

func (w *walker) chance(oneOf int) bool { return w.random.IntN(oneOf) == 0 }

func (w *walker) millis(most int) time.Duration {
	return time.Duration(w.random.IntN(most)) * time.Millisecond
}

// step takes one step. What it does depends on the seed and the test's own book alone, so that a seed repeats
// its walk.
func (w *walker) step() {
	losses := []string{"crashes", "crashes", "moves", "finishes"}
	steps := []struct {
		weight int
		name   string
		take   func(p *walkPod)
	}{
		{24, "annotate", w.annotate},
		{4, "unannotate", func(p *walkPod) { w.ask(p, request{}) }},
		{6, "delete", w.remove},
		{8, "end the process of", func(p *walkPod) { w.vanish(p, pick(w, losses)) }},
		{9, "start a process of", w.bear},
		{4, "kill the child of", func(p *walkPod) {
			w.exit(func(c *fakeChild) bool { return w.pods[c.process/100] == p })
		}},
		{6, "have children behave", w.behave},
		{3, "end the program", func(*walkPod) { w.halt() }},
		{3, "start the program", func(*walkPod) { w.boot() }},
		{9, "advance", func(*walkPod) { time.Sleep(w.millis(pick(w, []int{30, 300, 2000, 5000}))) }},
		{1, "advance much", func(*walkPod) { time.Sleep(w.millis(300_000)) }},
		{4, "quiet", func(*walkPod) { w.quiet() }},
		{6, "break the watches", w.breakWatches},
		{6, "fail", w.fail},
		{1, "freeze", func(*walkPod) { w.api.freeze() }},
		{1, "thaw", func(*walkPod) { w.api.thaw() }},
		{1, "compact", func(*walkPod) { w.api.compact(w.chance(2)) }},
		{2, "delete while nobody watches", w.removeUnseen},
		{1, "replace the token", w.replaceToken},
		{1, "hang Events", w.hang},
	}
	n, p := w.random.IntN(100), w.some()
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

// some picks a pod, which may be a new one. Pods of two namespaces have the same names.
func (w *walker) some() *walkPod {
	namespace := pick(w, []string{"default", "other"})
	name := pick(w, []string{"web", "web-2", "web.pcap0", "web.pcap"})
	for _, p := range w.pods {
		if !p.isDeleted && p.namespace == namespace && p.name == name {
			return p
		}
	}
	return w.create(namespace, name)
}

// create makes a pod that may or may not have a process yet, without annotations.
func (w *walker) create(namespace, name string) *walkPod {
	number := len(w.pods)
	p := &walkPod{pid: 100 * number, asked: []request{{}}}
	p.namespace, p.name = namespace, name
	p.uid = fmt.Sprintf("%08x-0a1b-4c2d-8e3f-%012x", number, number)
	w.pods = append(w.pods, p)
	if !w.chance(3) {
		w.bear(p)
	}
	return p
}

// annotate annotates a pod as before but for one annotation at most. Now and then that is a mistake, and
// changes nothing.
func (w *walker) annotate(p *walkPod) {
	r := pick(w, p.asked)
	switch w.random.IntN(6) {
	case 0:
		r.filter = pick(w, []string{"", "tcp port 80", "udp"})
	case 1:
		r.iface = pick(w, []string{"", "lo", "any"})
	case 2, 3, 4:
		r.n = pick(w, []int{1, 1, 2, 2, 3, 4, 5, 6, 9, 10, 11, 20, 100})
	}
	r.n = max(r.n, 1)
	if !w.chance(8) {
		w.ask(p, r)
		return
	}
	mistake := pick(w, [][2]string{{annotation, "0"}, {annotation, "5abc"}, {filterAnnotation, "refused"},
		{filterAnnotation, "bell\a"}, {interfaceAnnotation, "a/b"}})
	p.annotations = r.annotations()
	p.annotations[mistake[0]] = mistake[1]
	w.note("  %q by mistake", p.annotations)
	w.api.put(p.fakePod)
}

// ask annotates a pod. To ask for more files than the node may have is a mistake.
func (w *walker) ask(p *walkPod, r request) {
	w.note("  %s asks for %v", p, r)
	p.annotations = r.annotations()
	if r.n <= w.limit && r != p.want() {
		p.asked, p.certain = append(p.asked, r), certain{hasRoom: p.hasRoom && p.isAlive && r.n > 0}
	}
	w.api.put(p.fakePod)
}

// remove deletes a pod. Its process ends before, or at the next quiet point. Another pod may take its place
// at once.
func (w *walker) remove(p *walkPod) {
	p.isDeleted = true
	if w.chance(2) {
		w.vanish(p, "finishes")
	}
	w.api.remove(p.namespace, p.name)
	if w.chance(2) {
		w.ask(w.create(p.namespace, p.name), p.want())
	}
}

// bear starts a pod's process: in the network that it had, if it has crashed, or in another one.
func (w *walker) bear(p *walkPod) {
	if p.isAlive {
		return
	}
	if p.pid++; p.net == "" || w.chance(3) {
		p.disturb()
		p.net = strconv.Itoa(p.pid)
	}
	p.isAlive = true
	w.proc.add(fakeProcess{pid: p.pid, cgroup: cgroupOf(p.uid), net: p.net, root: p.uid, born: p.pid})
}

// vanish ends a pod's process. A pod that crashes keeps its network and its cgroup, one that moves keeps its
// cgroup, and one that finishes keeps neither. Its files stay.
func (w *walker) vanish(p *walkPod, how string) {
	// A child that is just being started is known by the process whose network it has.
	synctest.Wait()
	p.hasRoom = p.hasRoom && (p.child != nil || p.hasFiles)
	if p.isAlive {
		w.proc.end(p.pid)
	}
	if p.isAlive = false; how == "crashes" {
		return
	}
	if how == "finishes" {
		w.proc.gone(p.uid)
	}
	p.disturb()
	net := p.net
	// Now and then something holds the network: then tcpdump goes on until the program ends it.
	if p.net = ""; net == "" || how == "finishes" && w.chance(3) {
		return
	}
	w.proc.interfaces(net, "lo")
	c := w.living()[p.pid/100]
	if c != nil && filepath.Base(c.network) == "net-"+net && requestOf(c).iface == "" {
		c.exit("tcpdump: The interface disappeared\n"+closing, errStatus)
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

// breakWatches sends the open watches a text that is none of theirs, and ends them.
func (w *walker) breakWatches(p *walkPod) {
	changed := fakePod{p.namespace, p.name, p.uid, map[string]string{annotation: "7"}, 1 << 30}
	half := watchFrame("MODIFIED", changed.object())
	half = half[:w.random.IntN(len(half)-2)]
	text := pick(w, []string{"", "", "", string(half), "<html>", "{}\n", "\x00\xff",
		`{"type":"ADDED","object":7}`, string(errorFrame(410, "too old")), string(errorFrame(500, "no"))})
	w.api.push(text, pick(w, []ending{ends, breaks}))
}

// fail has the next watches or Events fail.
func (w *walker) fail(*walkPod) {
	verb := pick(w, []string{"watch", "watch", "post", "post other"})
	met := pick(w, []fault{
		{code: 410}, {code: 429, retryAfter: "3"}, {code: pick(w, []int{401, 403, 500, 503}), body: "<html>"},
		{err: io.ErrUnexpectedEOF}, {err: syscall.ECONNREFUSED}, {hangs: w.millis(60_000)},
		{code: 200, body: pick(w, []string{" ", "{}", `{"metadata":{`, string(errorFrame(410, "too old"))})},
	})
	met.times = 1 + w.random.IntN(4)
	w.note("  %s: %+v", verb, met)
	w.api.fail(verb, met)
}

// removeUnseen deletes a pod while nobody watches, and the server forgets that.
func (w *walker) removeUnseen(p *walkPod) {
	w.api.push("", breaks)
	synctest.Wait()
	w.remove(p)
	w.api.compact(w.chance(2))
}

// replaceToken takes the token away. The next quiet point mounts the new one.
func (w *walker) replaceToken(*walkPod) {
	w.token += "x"
	w.api.accept(w.token)
	os.Remove(filepath.Join(w.api.account, "token"))
}

// hang has the Events of a namespace hang, until after the next quiet point.
func (w *walker) hang(*walkPod) {
	w.hanging = pick(w, []string{"default", "other"})
	w.api.fail("post "+w.hanging, fault{hangs: time.Hour})
}

// ---- The quiet points ----

// quiet ends all faults, mends all mistakes, waits until everything is right, and looks once more after a
// while. Events that hang do so until then.
func (w *walker) quiet() {
	w.note("  quiet")
	w.api.heal()
	w.api.thaw()
	w.api.mount("token", w.token)
	if w.hanging != "" {
		w.api.fail("post "+w.hanging, fault{hangs: time.Hour})
	}
	// While a child takes its time to end, others wait for its room.
	w.kids.behave(behaviour{shutdown: w.millis(2000)})
	w.boot()
	w.exit(func(c *fakeChild) bool { return c.immortal })
	for _, p := range w.pods[1:] {
		if p.isDeleted || w.chance(8) {
			w.vanish(p, "finishes")
		}
		if !p.isDeleted && w.chance(2) {
			w.bear(p)
		}
		if !p.isDeleted && !maps.Equal(p.annotations, p.want().annotations()) {
			w.ask(p, p.want())
		}
	}
	// The last new pod never runs. Once its filter is compiled all changes before have come.
	filter, began := fmt.Sprintf("udp port %d", len(w.story)), time.Now()
	last := request{n: 1, filter: filter}
	w.api.put(fakePod{namespace: "z", name: "last", uid: "f", annotations: last.annotations()})
	w.await(began, func() bool {
		w.kids.mu.Lock()
		defer w.kids.mu.Unlock()
		return slices.Contains(w.kids.compiled, filter)
	})
	w.api.remove("z", "last")
	// What is to be stopped has ended then.
	time.Sleep(termGrace + 100*time.Millisecond)
	w.await(began, func() bool { return w.verdict() == nil })
	time.Sleep(w.millis(3000))
	synctest.Wait()
	if err := w.verdict(); err != nil {
		w.Errorf("step %d: not right %v after the last fault: %v", len(w.story), time.Since(began), err)
	}
	w.settle()
	w.api.heal()
	w.hanging = ""
}

// await waits until something is so, but no longer than everything may take.
func (w *walker) await(began time.Time, isSo func() bool) {
	for synctest.Wait(); !isSo() && time.Since(began) < quietLimit; synctest.Wait() {
		time.Sleep(200*time.Millisecond + time.Since(began)/20)
	}
}

// settle takes down what is right at a quiet point.
func (w *walker) settle() {
	living := w.living()
	for _, p := range w.pods[1:] {
		c := living[p.pid/100]
		switch {
		case p.isDeleted:
			p.asked = []request{{}}
		case c != nil:
			p.asked = []request{requestOf(c)}
		default:
			p.asked = slices.Clone(w.may(p))
		}
		p.child, p.hasRoom = c, c != nil || p.hasFiles
	}
}

// verdict is on what runs, what is in the folders and what was told, by what the annotations say.
func (w *walker) verdict() error {
	living, taken := w.living(), 0
	var files, links []string
	var idle []*walkPod
	for _, p := range w.pods {
		if p.isDeleted {
			continue
		}
		c, name := living[p.pid/100], p.namespace+"_"+p.name
		link := readLink(w.root + "/captures/" + name)
		if link != "" {
			links = append(links, name)
		}
		own, _ := findFiles(link)
		last, _ := w.told.Load(p.uid)
		isAsked, isRight, has := p.want().n > 0, p.child == nil || c == p.child, "no child"
		switch {
		case c != nil:
			has = fmt.Sprintf("child %d for %v in %s", c.pid, requestOf(c), c.network)
			hasNetwork := filepath.Base(c.network) == "net-"+p.net
			isRight = isRight && link == c.stem && hasNetwork && slices.Contains(w.may(p), requestOf(c))
			files, taken = append(files, c.files...), taken+c.n
		case isAsked && p.isAlive:
			isRight = isRight && link == "" && !p.hasRoom
			idle = append(idle, p)
		case isAsked && len(own) > 0:
			taken += w.most(p)
			for _, path := range own {
				files = append(files, filepath.Base(path))
			}
		default:
			isRight = isRight && link == "" && !p.hasFiles
		}
		if !isRight || p.namespace != w.hanging && !w.isTrue(p, c, last) {
			return fmt.Errorf("%s in %q may have %v, and has %s and %q in %q; certain is %+v; the last Event is %v",
				p, p.net, w.may(p), has, own, link, p.certain, last)
		}
		delete(living, p.pid/100)
	}
	slices.Sort(files)
	allFiles, allLinks := namesIn(w, w.root), namesIn(w, w.root+"/captures")
	if len(living) > 0 || len(allLinks) > len(links) || !slices.Equal(allFiles, files) {
		return fmt.Errorf("there are %q and %q, not %q and %q; pods that are gone have %v",
			allFiles, allLinks, files, links, living)
	}
	for _, p := range idle {
		if w.most(p) <= w.limit-taken {
			return fmt.Errorf("%s has no child, asks for %v; %d of %d files are taken", p, p.want(), taken, w.limit)
		}
	}
	return nil
}

// isTrue reports whether the reason of a pod's last Event is true of its child. Nobody need have told that
// nothing is captured if nothing was asked for.
func (w *walker) isTrue(p *walkPod, c *fakeChild, reason any) bool {
	switch {
	case reason == "CaptureInvalid":
		return p.want().n == 0 || len(w.may(p)) > 1
	case c != nil:
		return reason == "CaptureStarted" || reason == "CaptureContinued"
	case p.want().n == 0:
		return reason == "CaptureStopped" || reason == nil
	}
	return slices.Contains([]any{"CaptureStopped", "CaptureContinued", "CaptureWaiting"}, reason)
}

// ---- Fuzz targets: go test -fuzz FuzzAnnotations . ----

// transport is a function that answers requests.
type transport func(*http.Request) (*http.Response, error)

func (answers transport) RoundTrip(r *http.Request) (*http.Response, error) { return answers(r) }

// fuzzed is a node without pods, on which tcpdump does nothing.
func fuzzed(t testing.TB, server transport) *podWatch {
	cfg := testConfig(t, newProc(t).dir, t.TempDir())
	cfg.limit = 100
	a, err := newAgent(cfg)
	must(t, err)
	a.api.http.Transport, a.ready = server, func() {}
	a.start = func(context.Context, *os.File, ...string) (*process, error) {
		return &process{stderr: strings.NewReader(""), wait: func() error { return nil }}, nil
	}
	return newPodWatch(a)
}

// FuzzAnnotations: what is accepted is a plain number, a line of text and a name. What is refused is told in
// a bounded line of text.
func FuzzAnnotations(f *testing.F) {
	for _, text := range []string{"1", "100", "101", "", "0", "-1", "+1", "01", " 1", "5abc", "1e3", "1_0", "٣",
		"\x00", "\xff", " udp\n", "host é", "a\nb", "\u2028", strings.Repeat("é", 512), strings.Repeat("é", 513),
		strings.Repeat("9", 300), "net1.100", "-i", "a/b", "interface-of-15", "interface-of-16c"} {
		f.Add(text)
	}
	w := fuzzed(f, nil)
	number, name := regexp.MustCompile(`^([1-9][0-9]?|100)$`), regexp.MustCompile(`^$|^[\w.][\w.-]{0,14}$`)
	isControl := func(r rune) bool { return !unicode.IsPrint(r) }
	f.Fuzz(func(t *testing.T, text string) {
		filter := strings.TrimSpace(text)
		isFilter := len(filter) <= 1024 && !strings.ContainsFunc(filter, isControl)
		for _, test := range []struct {
			annotations map[string]string
			isValid     bool
		}{
			{map[string]string{annotation: text}, number.MatchString(text)},
			{map[string]string{annotation: "5", interfaceAnnotation: text}, name.MatchString(text)},
			{map[string]string{annotation: "5", filterAnnotation: text}, isFilter},
		} {
			var o object
			o.Metadata.Annotations = test.annotations
			p, asked := o.pod()
			refusal := w.refusal(t.Context(), &capture{agent: w.agent, pod: p}, asked)
			isText := len(refusal) <= 1000 && utf8.ValidString(refusal) && !strings.ContainsFunc(refusal, isControl)
			if (refusal == "") != test.isValid || !isText {
				t.Errorf("%q are valid: %v; refused with %q", test.annotations, test.isValid, refusal)
			}
		}
	})
}

// FuzzWatch: whatever a watch sends, no capture of another pod stops, and the server is not asked without
// end.
func FuzzWatch(f *testing.F) {
	pod := fakePod{"default", "web", "a", map[string]string{annotation: "5"}, 8}
	web := string(watchFrame("ADDED", pod.object()))
	for _, text := range []string{"", web, web + web[:100], strings.Replace(web, "ADDED", "DELETED", 1), "{}",
		string(bookmarkFrame(9)), string(errorFrame(410, "too old")), web + string(errorFrame(500, "no")), "\xff"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		synctest.Test(t, func(t *testing.T) {
			ctx, end := context.WithCancel(t.Context())
			watches := 0
			w := fuzzed(t, func(r *http.Request) (*http.Response, error) {
				if r.Method == "POST" {
					return answer(201, nil), nil
				}
				if watches++; watches > 160 {
					end()
				}
				return answer(200, []byte(text)), nil
			})
			const uid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
			old := podNamed("old", uid, "1")
			w.apply(ctx, old.pod, old.spec)
			w.version = "v1"
			w.watch(ctx)
			if w.captures[uid] == nil && !strings.Contains(text, uid) {
				t.Errorf("%q stops the capture of a pod that is not in it", text)
			}
			time.AfterFunc(time.Minute, end)
			w.follow(ctx)
			if watches > 160 {
				t.Errorf("%q: more than 160 watches in a minute", text)
			}
			w.agent.endPosts()
			w.agent.alive.Wait()
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
			// A packet that is cut panics.
			rest = rest[min(size, len(rest)+1):]
		}
		said := strings.Replace(stderr.String(), "packets", "packet", 1)
		if len(rest) > 0 || !strings.HasSuffix(said, fmt.Sprintf("%d packet, %d bytes\n", packets, stdout.Len())) {
			t.Errorf("%q and %q: %d packets, %d bytes too many, said is %q", first, second, packets, len(rest), said)
		}
	})
}
