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
	soakSeed  = flag.Uint64("soak.seed", 0, "begin with the walk of this seed")
)

const (
	// walkSteps is the length of a walk, short enough to be read.
	walkSteps = 400
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
	seed := cmp.Or(*soakSeed, uint64(time.Now().UnixNano()))
	for left := *soakSteps; left > 0 && !t.Failed(); seed, left = seed+1, left-walkSteps {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { walk(t, seed, min(left, walkSteps)) })
		})
	}
}

// walker is a world whose program ends and begins again: end is nil while it is down.
type walker struct {
	world
	random *rand.Rand
	pods   []*walkPod // all that there ever were
	limit  int        // the number of files that the node may have
	// told has by UID the reason of the last Event that this run of the program has tried to post.
	told sync.Map
	// token is the one that the API server takes, and hanging the namespace whose Events hang.
	token, hanging string
}

// walkPod is what the test knows of a pod: among others what its annotations are, which may be a mistake.
type walkPod struct {
	annotated
	isDeleted, isAlive bool
	// number is its place in walker.pods, from 1. pid is that of its last process, 100 times that and a bit,
	// and net the network of that, which isNew since the last quiet point, in place of another.
	number, pid int
	net         string
	isNew       bool
	// asked are the valid requests that the program may have seen since the last quiet point.
	asked []spec

	// The rest is certain, whatever of the last steps the program has seen: child runs undisturbed, files of
	// one have stayed, and the program keeps the room that one had.
	child             *fakeChild
	hasFiles, hasRoom bool
}

// requestOf is what a child was started for, by its arguments.
func requestOf(c *fakeChild) spec {
	r := podNamed("", "", c.option("-W")).spec
	r.iface = strings.TrimPrefix(c.option("-i"), podInterface)
	if count := len(c.arguments); c.arguments[count-2] == "--" {
		r.filter = c.arguments[count-1]
	}
	return r
}

func (p *walkPod) String() string { return fmt.Sprintf("%s/%s %.8s", p.namespace, p.name, p.uid) }
func (p *walkPod) want() spec     { return p.asked[len(p.asked)-1] }

// disturb takes down that the pod's child may have ended. The files of one that ran stay.
func (p *walkPod) disturb() {
	p.hasFiles = p.hasFiles || p.child != nil
	p.child = nil
}

// may are the requests that the program may go by: the last one, or all if the last may be refused because
// it asks for more files than one before.
func (w *walker) may(p *walkPod) []spec {
	isLess := func(r spec) bool { return r.annotated && r.files < p.want().files }
	if w.limit < noLimit && slices.ContainsFunc(p.asked, isLess) {
		return p.asked
	}
	return p.asked[len(p.asked)-1:]
}

// walk takes the steps of a seed. The log tells of all of them.
func walk(t *testing.T, seed uint64, steps int) {
	w := &walker{random: rand.New(rand.NewPCG(seed, 1))}
	w.T, w.api, w.proc, w.root = t, newFakeAPI(t), newProc(t), t.TempDir()
	w.kids, w.token = &children{TB: t, proc: w.proc}, w.api.token
	w.limit = pick(w, []int{6, 12, 30, noLimit})
	w.api.bookmarkEvery = pick(w, []time.Duration{0, 20 * time.Second})
	w.Logf("-soak.seed=%d: room for %d files, bookmarks every %v", seed, w.limit, w.api.bookmarkEvery)
	w.boot()
	for i := 0; i < steps && !w.Failed(); i++ {
		w.step()
	}
	w.quiet()
	w.halt()
	time.Sleep(time.Hour) // until no Event is tried any more
}

// ---- The program ----

// boot starts the program, in a container without files.
func (w *walker) boot() {
	if w.end != nil {
		return
	}
	a := testAgent(w, w.proc.dir, w.root)
	a.account, a.limit, w.agent = w.api.account, w.limit, a
	var hasEnded atomic.Bool
	a.api = transport(func(r *http.Request) (*http.Response, error) {
		if hasEnded.Load() {
			return refusal(403, "the end of the process ends what is still tried"), nil
		}
		return w.RoundTrip(r)
	})
	a.start, a.ready = w.start, func() {}
	w.told.Clear()
	ctx, end := context.WithCancel(context.Background())
	w.end = end
	w.program.Go(func() {
		is(w, "the program's error", a.run(ctx), nil)
		hasEnded.Store(true)
	})
}

// halt ends the program as SIGTERM does: within 5 s, and nothing is left.
func (w *walker) halt() {
	if w.end == nil {
		return
	}
	began := time.Now()
	w.end()
	w.program.Wait()
	is(w, "the program ends within 5 s", time.Since(began) <= 5*time.Second, true)
	// What survives SIGKILL ends with the container.
	w.exit(func(c *fakeChild) bool { return c.immortal })
	w.runs(nil)
	is(w, "links that are left", namesIn(w, w.root+"/captures"), nil)
	must(w, os.RemoveAll(w.root+"/captures"))
	for _, p := range w.pods {
		// The next program does not know what ran before.
		p.asked, p.child, p.hasFiles, p.hasRoom = p.asked[len(p.asked)-1:], nil, false, false
	}
	w.end = nil
}

// RoundTrip takes down what Events tell, also of those that are lost.
func (w *walker) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method == "POST" {
		event := fields{}
		body, _ := r.GetBody()
		must(w, json.NewDecoder(body).Decode(&event))
		w.told.Store(event["involvedObject"].(fields)["uid"], event["reason"])
	}
	return w.api.RoundTrip(r)
}

// start stands in for the function of that name, and looks at what must hold at any time.
func (w *walker) start(ctx context.Context, network *os.File, arguments ...string) *process {
	defer w.living()
	return w.kids.start(ctx, network, arguments...)
}

// living are the children that live, by their pods' numbers. A pod has one at most, and all have room.
func (w *walker) living() map[int]*fakeChild {
	defer lock(&w.kids.mu)()
	living, files := map[int]*fakeChild{}, 0
	for _, c := range w.kids.all {
		if number := c.process / 100; c.lives() {
			is(w, fmt.Sprintf("pod %d has two children", number), living[number] != nil, false)
			living[number], files = c, files+c.n
		}
	}
	is(w, "files too many", max(files-w.limit, 0), 0)
	return living
}

// exit ends children as SIGKILL does.
func (w *walker) exit(which func(*fakeChild) bool) {
	living := w.living()
	for _, p := range w.pods {
		if c := living[p.number]; c != nil && which(c) {
			p.disturb()
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

// step takes one step. It goes by the seed and the test's own book alone, so that a seed repeats its walk.
func (w *walker) step() {
	losses := []string{"crashes", "crashes", "moves", "finishes"}
	steps := []struct {
		weight int
		name   string
		take   func(p *walkPod)
	}{
		{24, "annotate", w.annotate},
		{4, "unannotate", func(p *walkPod) { w.ask(p, spec{}) }},
		{6, "delete", w.remove},
		{8, "end the process of", func(p *walkPod) { w.vanish(p, pick(w, losses)) }},
		{9, "start a process of", w.bear},
		{4, "kill the child of", func(p *walkPod) {
			w.exit(func(c *fakeChild) bool { return c.process/100 == p.number })
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
		{2, "delete while nobody watches", func(p *walkPod) {
			w.api.push("", breaks)
			synctest.Wait()
			w.remove(p)
			w.api.compact(w.chance(2))
		}},
		{1, "take away the token until the next quiet point", func(*walkPod) {
			w.token += "x"
			w.api.accept(w.token)
			must(w, os.RemoveAll(w.api.account+"/token"))
		}},
		{1, "hang Events until after the next quiet point", func(*walkPod) {
			w.hanging = pick(w, []string{"default", "other"})
			w.api.fail("post "+w.hanging, fault{hangs: time.Hour})
		}},
	}
	// Pods of two namespaces have the same names.
	p := w.named(pick(w, []string{"default", "other"}), pick(w, []string{"web", "web-2", "web.pcap0", "web.pcap"}))
	n := w.random.IntN(100)
	for _, s := range steps {
		if n -= s.weight; n < 0 {
			w.Logf("%s %s", s.name, p)
			s.take(p)
			break
		}
	}
	if w.chance(2) {
		synctest.Wait()
	}
}

// named is the pod of a name. If there is none it makes one, without annotations, which may run at once.
func (w *walker) named(namespace, name string) *walkPod {
	for _, p := range w.pods {
		if !p.isDeleted && p.namespace == namespace && p.name == name {
			return p
		}
	}
	number := len(w.pods) + 1
	uid := fmt.Sprintf("%08x-0a1b-4c2d-8e3f-%012x", number, number)
	p := &walkPod{number: number, pid: 100 * number, asked: []spec{{}}}
	p.pod = pod{namespace, name, uid, uid}
	w.pods = append(w.pods, p)
	if !w.chance(3) {
		w.bear(p)
	}
	return p
}

// annotate changes one annotation of a pod at most. Now and then that is a mistake, and changes nothing.
func (w *walker) annotate(p *walkPod) {
	r := pick(w, p.asked)
	switch w.random.IntN(6) {
	case 0:
		r.filter = pick(w, []string{"", "tcp port 80", "udp"})
	case 1:
		r.iface = pick(w, []string{"", "lo", "any"})
	case 2, 3, 4:
		r.files = pick(w, []int{1, 1, 2, 2, 3, 4, 5, 6, 9, 10, 11, 20, 100})
	}
	r.files = max(r.files, 1)
	r.annotated, r.value = true, strconv.Itoa(r.files)
	if !w.chance(8) {
		w.ask(p, r)
		return
	}
	p.spec = r
	p.annotated = pick(w, []annotated{
		p.of("0"), p.of("5abc"), p.filtered("refused"), p.filtered("bell\a"), p.on("a/b")})
	w.Logf("  %+q by mistake", p.stored().annotations)
	w.api.put(p.stored())
}

// ask annotates a pod. To ask for more files than the node may have is a mistake.
func (w *walker) ask(p *walkPod, r spec) {
	w.Logf("  %s asks for %v", p, r)
	p.spec = r
	if r.files <= w.limit && r != p.want() {
		p.asked = append(p.asked, r)
		p.child, p.hasFiles, p.hasRoom = nil, false, p.hasRoom && p.isAlive && r.annotated
	}
	w.api.put(p.stored())
}

// remove deletes a pod. Its process ends before, or at the next quiet point. Another may take its place.
func (w *walker) remove(p *walkPod) {
	p.isDeleted = true
	if w.chance(2) {
		w.vanish(p, "finishes")
	}
	w.api.remove(p.namespace, p.name)
	if w.chance(2) {
		w.ask(w.named(p.namespace, p.name), p.want())
	}
}

// bear starts a pod's process: in the network that it had, if it has crashed, or in another one.
func (w *walker) bear(p *walkPod) {
	if p.isAlive {
		return
	}
	if p.pid++; p.net == "" || w.chance(3) {
		p.disturb()
		p.net, p.isNew = strconv.Itoa(p.pid), p.net != ""
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
	w.proc.end(p.pid)
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
	c := w.living()[p.number]
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
	w.Logf("  %+v", b)
	w.kids.behave(b)
}

// breakWatches sends the open watches a text that is none of theirs, and ends them.
func (w *walker) breakWatches(p *walkPod) {
	half := watchFrame("MODIFIED", p.of("7").stored().object())
	text := pick(w, []string{"", "", "", string(half[:w.random.IntN(len(half)-2)]), "<html>", "{}\n", "\x00\xff",
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
	w.Logf("  %s: %+v", verb, met)
	w.api.fail(verb, met)
}

// ---- The quiet points ----

// quiet ends all faults, mends all mistakes, waits until everything is right, and looks once more after a
// while. Events that hang do so until then.
func (w *walker) quiet() {
	w.Logf("  quiet")
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
	for _, p := range w.pods {
		if p.isDeleted || w.chance(8) {
			w.vanish(p, "finishes")
		}
		// If a pod has crashed at once in a new network, the program need not know that until it runs again.
		if !p.isDeleted && (w.chance(2) || p.isNew) {
			w.bear(p)
		}
		if !p.isDeleted && p.spec != p.want() {
			w.ask(p, p.want())
		}
	}
	// The last new pod never runs. Once its filter is compiled all changes before have come.
	began := time.Now()
	filter := began.String()
	w.api.put(annotated{pod{namespace: "z", name: "last"}, spec{value: "1", filter: filter}}.stored())
	w.await(began, func() bool {
		defer lock(&w.kids.mu)()
		return slices.Contains(w.kids.compiled, filter)
	})
	w.api.remove("z", "last")
	// What is to be stopped has ended then.
	time.Sleep(termGrace + 100*time.Millisecond)
	w.await(began, func() bool { return w.verdict() == nil && w.hasTold() })
	time.Sleep(w.millis(3000))
	synctest.Wait()
	if err := w.verdict(); err != nil {
		w.Errorf("not right %v after the last fault: %v", time.Since(began), err)
	}
	w.api.heal()
	w.hanging = ""

	// What is right at a quiet point is certain.
	living := w.living()
	for _, p := range w.pods {
		if p.asked, p.child = w.may(p), living[p.number]; p.child != nil {
			p.asked = []spec{requestOf(p.child)}
		}
		p.hasRoom, p.isNew = p.child != nil || p.hasFiles, false
	}
}

// hasTold says whether all Events are posted but those that hang.
func (w *walker) hasTold() bool {
	defer lock(&w.agent.queueLock)()
	return len(w.agent.queues) == min(1, len(w.agent.queues[w.hanging]))
}

// await waits until something is so, 7 minutes at most: tcpdump waits up to 5 if it has failed often.
func (w *walker) await(began time.Time, isSo func() bool) {
	for synctest.Wait(); !isSo() && time.Since(began) < 7*time.Minute; synctest.Wait() {
		time.Sleep(200*time.Millisecond + time.Since(began)/20)
	}
}

// verdict is on what runs, what is in the folders and what was told, by what the annotations say.
func (w *walker) verdict() error {
	var names []string
	// needed is the fewest files for which a pod without a child must have room.
	living, taken, needed := w.living(), 0, noLimit+1
	for _, p := range w.pods {
		if p.isDeleted {
			continue
		}
		c, may, name := living[p.number], w.may(p), p.namespace+"_"+p.name
		most := slices.MaxFunc(may, func(a, b spec) int { return cmp.Compare(a.files, b.files) }).files
		link := readLink(w.root + "/captures/" + name)
		if link != "" {
			names = append(names, name)
		}
		own, _ := findFiles(link)
		isRight, has := p.child == nil || c == p.child, "no child"
		reasons := []any{"CaptureStopped", "CaptureContinued", "CaptureWaiting"}
		switch {
		case c != nil:
			has = fmt.Sprintf("child %d for %v in %s", c.pid, requestOf(c), c.network)
			hasNetwork := filepath.Base(c.network) == "net-"+p.net
			isRight = isRight && link == c.stem && hasNetwork && slices.Contains(may, requestOf(c))
			names, taken = append(names, c.files...), taken+c.n
			reasons = []any{"CaptureStarted", "CaptureContinued"}
		case p.want().annotated && p.isAlive:
			isRight = isRight && link == "" && !p.hasRoom
			needed = min(needed, most)
		case p.want().annotated && len(own) > 0:
			taken += most
			for _, path := range own {
				names = append(names, filepath.Base(path))
			}
		default:
			isRight = isRight && link == "" && !p.hasFiles
		}
		if !p.want().annotated {
			// Nobody need have told that nothing is captured.
			reasons = []any{"CaptureStopped", "CaptureInvalid", nil}
		} else if len(may) > 1 {
			reasons = append(reasons, "CaptureInvalid")
		}
		last, _ := w.told.Load(p.uid)
		if !isRight || p.namespace != w.hanging && !slices.Contains(reasons, last) {
			return fmt.Errorf("%s in %q may have %v, has %s, %q in %q; told %v; certain: child %v, files %v, room %v",
				p, p.net, may, has, own, link, last, p.child != nil, p.hasFiles, p.hasRoom)
		}
		delete(living, p.number)
	}
	slices.Sort(names)
	all := append(namesIn(w, w.root), namesIn(w, w.root+"/captures")...)
	if len(living) > 0 || !slices.Equal(all, names) {
		return fmt.Errorf("there are %q, not %q; pods that are gone have %v", all, names, living)
	} else if needed <= w.limit-taken {
		return fmt.Errorf("a pod has no child, for %d files; %d of %d are taken", needed, taken, w.limit)
	}
	return nil
}

// ---- Fuzz targets: go test -fuzz FuzzAnnotations . ----

// transport is a function that answers requests.
type transport func(*http.Request) (*http.Response, error)

func (answers transport) RoundTrip(r *http.Request) (*http.Response, error) { return answers(r) }

// fuzzed is a node without pods, on which tcpdump does nothing.
func fuzzed(t testing.TB, server transport) *podWatch {
	a := testAgent(t, newProc(t).dir, t.TempDir())
	a.limit, a.api, a.ready = 100, server, func() {}
	a.start = func(context.Context, *os.File, ...string) *process {
		return &process{stderr: strings.NewReader(""), wait: func() error { return nil }}
	}
	return newPodWatch(t, a)
}

// FuzzAnnotations: accepted is a plain number, a line of text and a name. A refusal is a bounded line of text.
func FuzzAnnotations(f *testing.F) {
	for _, text := range []string{"1", "100", "101", "", "0", "-1", "+1", "01", " 1", "5abc", "1e3", "1_0", "٣",
		"\x00", "\xff", " udp\n", "host é", "a\nb", "\u2028", strings.Repeat("é", 512), strings.Repeat("é", 513),
		strings.Repeat("9", 300), "net1.100", "-i", "a/b", "interface-of-15", "interface-of-16c"} {
		f.Add(text)
	}
	w := fuzzed(f, nil)
	number, iface := regexp.MustCompile(`^([1-9][0-9]?|100)$`), regexp.MustCompile(`^$|^[\w.][\w.-]{0,14}$`)
	isControl := func(r rune) bool { return !unicode.IsPrint(r) }
	f.Fuzz(func(t *testing.T, text string) {
		filter := strings.TrimSpace(text)
		isFilter := len(filter) <= 1024 && !strings.ContainsFunc(filter, isControl)
		for name, isValid := range map[string]bool{annotation: number.MatchString(text),
			interfaceKey: iface.MatchString(text), filterKey: isFilter} {
			var e event
			e.Object.Metadata.Annotations = map[string]string{annotation: "5", name: text}
			p, asked := e.pod()
			key, value, mustBe := (&capture{agent: w.agent, pod: p}).check(t.Context(), asked)
			told := fmt.Sprintf("%s %q %s", key, cut(value), mustBe) // what apply puts into its Event
			isText := len(told) <= 1000 && utf8.ValidString(told) && !strings.ContainsFunc(told, isControl)
			if (mustBe == "") != isValid || !isText {
				t.Errorf("%s=%q is valid: %v; refused with %q", name, text, isValid, told)
			}
		}
	})
}

// FuzzWatch: whatever a watch sends stops no capture of another pod, nor is the server asked without end.
func FuzzWatch(f *testing.F) {
	web := string(watchFrame("ADDED", podNamed("web", "a", "5").stored().object()))
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
			old := podNamed("old", "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "1")
			w.apply(ctx, old.pod, old.spec)
			w.version = "v1"
			w.watch(ctx)
			if w.captures[old.uid] == nil && !strings.Contains(text, old.uid) {
				t.Errorf("%q stops the capture of a pod that is not in it", text)
			}
			time.AfterFunc(time.Minute, end)
			w.follow(ctx)
			if watches > 160 {
				t.Errorf("%q: more than 160 watches in a minute", text)
			}
			w.agent.alive.Wait()
		})
	})
}

// FuzzCat: whatever is in a capture's files, what cat writes has whole packets alone, as many as it says.
func FuzzCat(f *testing.F) {
	whole := string(pcap(1))
	for _, text := range []string{"", whole[:5], whole[:pcapHeader], whole, string(pcap(1, 2)[:70])} {
		f.Add(whole, text)
		f.Add(text, whole)
	}
	f.Fuzz(func(t *testing.T, first, second string) {
		root := t.TempDir()
		stem := filepath.Join(root, "capture-web.pcap")
		must(t, os.Mkdir(root+"/captures", 0o755), os.Symlink(stem, root+"/captures/default_web"),
			os.WriteFile(stem+"0", []byte(first), 0o644), os.WriteFile(stem+"1", []byte(second), 0o644))
		var stdout, stderr bytes.Buffer
		err := cat(root, "default/web", &stdout, &stderr)
		if is(t, "it fails", err != nil, max(len(first), len(second)) < pcapHeader); err != nil {
			return
		}
		header := stdout.String()[:pcapHeader]
		is(t, "the header is a file's", strings.HasPrefix(first, header) || strings.HasPrefix(second, header), true)
		packets, rest := 0, stdout.Bytes()[pcapHeader:]
		for ; len(rest) >= packetHeader; packets++ {
			// A packet that is cut panics.
			rest = rest[packetHeader+int(binary.NativeEndian.Uint32(rest[8:])):]
		}
		said := strings.Replace(stderr.String(), "packets", "packet", 1)
		if len(rest) > 0 || !strings.HasSuffix(said, fmt.Sprintf("%d packet, %d bytes\n", packets, stdout.Len())) {
			t.Errorf("%q and %q: %d packets, %d bytes too many, said is %q", first, second, packets, len(rest), said)
		}
	})
}
