package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// The world around the program: a folder that looks like /proc, and children that stand in for tcpdump. The API server is
// in main_api_test.go. Time is that of testing/synctest, in which a minute takes no time and a goroutine that is left over
// fails the test.

func init() { slog.SetDefault(slog.New(slog.DiscardHandler)) }

// ---- /proc ----

const host = "host" // the name of the host's network and root

// fakeProc is a folder that looks like /proc.
type fakeProc struct {
	testing.TB
	dir string
}

type fakeProcess struct {
	pid       int
	cgroup    string
	net, root string // names: those of the same name are the same
	born      int
}

func newProc(t testing.TB) *fakeProc {
	p := &fakeProc{t, t.TempDir()}
	p.interfaces(host, "lo", "ens3")
	p.add(fakeProcess{pid: 1, cgroup: "0::/init.scope\n", net: host, root: host, born: 1})
	return p
}

func (p *fakeProc) path(pid int, file string) string {
	return filepath.Join(p.dir, strconv.Itoa(pid), file)
}

// interfaces sets what a network has. One that nobody has set has lo and eth0.
func (p *fakeProc) interfaces(net string, names ...string) {
	folder := filepath.Join(p.dir, "net-"+net)
	text := "Inter-|   Receive                      |  Transmit\n face |bytes    packets errs drop|bytes    packets errs drop\n"
	for _, name := range names {
		text += fmt.Sprintf("%6s: 1296 16 0 0 1296 16 0 0\n", name)
	}
	must(p, os.MkdirAll(folder, 0o755), os.WriteFile(filepath.Join(folder, "dev"), []byte(text), 0o644))
}

// add starts a process, or changes one.
func (p *fakeProc) add(ps fakeProcess) {
	p.Helper()
	net, root := filepath.Join(p.dir, "net-"+ps.net), filepath.Join(p.dir, "root-"+ps.root)
	os.RemoveAll(p.path(ps.pid, ""))
	if _, err := os.Stat(net); err != nil {
		p.interfaces(ps.net, "lo", "eth0")
	}
	must(p, os.MkdirAll(p.path(ps.pid, "ns"), 0o755), os.MkdirAll(root, 0o755), os.WriteFile(net+"/ns", nil, 0o644),
		os.Symlink(net+"/ns", p.path(ps.pid, "ns/net")), os.Symlink(root, p.path(ps.pid, "root")), os.Symlink(net, p.path(ps.pid, "net")),
		os.WriteFile(p.path(ps.pid, "cgroup"), []byte(ps.cgroup), 0o644),
		os.WriteFile(p.path(ps.pid, "stat"), []byte(statLine(ps.pid, "pause", ps.born)), 0o644))
}

// pod starts the process that holds a pod's network.
func (p *fakeProc) pod(pid int, uid string) {
	p.add(fakeProcess{pid: pid, cgroup: cgroupOf(uid), net: uid, root: uid, born: pid})
}

func (p *fakeProc) end(pid int) { must(p, os.RemoveAll(p.path(pid, ""))) }

// statLine is a /proc/<pid>/stat: its field 22 is when the process started.
func statLine(pid int, command string, born int) string {
	return fmt.Sprintf("%d (%s) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 %d 1000 2000 3 4\n", pid, command, born)
}

func cgroupOf(uid string) string {
	return "0::/../../kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice/cri-containerd-cafe.scope\n"
}

// ---- Children ----

// behaviour is how children act that are started from now on. The zero one listens and ends at once when it is told to.
type behaviour struct {
	refusal  error         // why none can be started
	startup  time.Duration // until it listens
	warning  string        // what it says just before
	words    string        // what it says instead, and exits with status 1
	shutdown time.Duration // from SIGTERM to its end
	deaf     bool          // it ignores SIGTERM
	immortal bool          // and SIGKILL
	syntax   string        // what tcpdump -d says of a filter, and exits with status 1; it says so of "refused" as well
	compile  time.Duration // how long it takes for that
}

// children stand in for tcpdump, and watch over what must hold at any time.
type children struct {
	testing.TB
	proc *fakeProc

	mu       sync.Mutex
	next     behaviour
	all      []*fakeChild
	attempts []time.Time // at which one was to be started
	compiled []string    // the filters that tcpdump -d was given
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
	quit      chan childEnd
	gone      chan struct{} // closed when it has ended
}

// childEnd is how a child ends: what it says, and what wait returns.
type childEnd struct {
	words string
	err   error
}

const closing = "7 packets captured\n9 packets received by filter\n2 packets dropped by kernel\n"

var (
	errKilled = errors.New("signal: killed")
	errStatus = errors.New("exit status 1")
)

func (k *children) behave(b behaviour) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.next = b
}

// start is a starter.
func (k *children) start(ctx context.Context, network *os.File, arguments ...string) (*child, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if slices.Contains(arguments, "-d") {
		return k.compiler(ctx, network, arguments)
	}
	k.attempts = append(k.attempts, time.Now())
	if k.next.refusal != nil {
		return nil, k.next.refusal
	}
	c := &fakeChild{behaviour: k.next, pid: 100_000 + len(k.all), arguments: arguments[1:], quit: make(chan childEnd, 10), gone: make(chan struct{})}
	if _, err := network.Stat(); err != nil {
		k.Errorf("the network's file is closed before the child has it: %v", err)
	}
	target, err := os.Readlink(network.Name())
	must(k, err)
	c.network = filepath.Dir(target)
	c.process, _ = strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(network.Name()))))
	k.proc.add(fakeProcess{pid: c.pid, cgroup: "0::/\n", net: strings.TrimPrefix(filepath.Base(c.network), "net-"), root: "packetcapture"})
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
	kill := func() error {
		if c.immortal {
			return errors.New("permission denied")
		}
		c.exit("", errKilled)
		return nil
	}
	return begin(c.pid, kill, func(stderr io.Writer) error { return k.live(ctx, c, stderr) }), nil
}

// compiler is tcpdump -d.
func (k *children) compiler(ctx context.Context, network *os.File, arguments []string) (*child, error) {
	b := k.next
	if network != nil || arguments[0] != "tcpdump" || arguments[len(arguments)-2] != "--" {
		k.Errorf("a filter is compiled with %q", arguments)
	}
	filter := arguments[len(arguments)-1]
	if filter == "refused" {
		b.syntax = "tcpdump: can't parse filter expression: syntax error\n"
	}
	k.compiled = append(k.compiled, filter)
	life := func(stderr io.Writer) error {
		if sleep(ctx, b.compile); ctx.Err() != nil {
			return errKilled
		}
		if b.syntax != "" {
			io.WriteString(stderr, b.syntax)
			return errStatus
		}
		return nil
	}
	return begin(1, nil, life), nil
}

// begin has a child live, whose stderr is one end of a pipe.
func begin(pid int, kill func() error, life func(stderr io.Writer) error) *child {
	ours, its := net.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := life(its)
		its.Close()
		ended <- err
	}()
	return &child{pid, ours, func() error { return <-ended }, kill}
}

// live is a child's life. Like os/exec it sends SIGTERM when ctx ends, and SIGKILL after termGrace.
func (k *children) live(ctx context.Context, c *fakeChild, stderr io.Writer) error {
	defer close(c.gone)
	defer k.proc.end(c.pid)
	startup, told, kill := time.After(c.startup), ctx.Done(), (<-chan time.Time)(nil)
	for {
		select {
		case <-startup:
			if c.words == "" {
				io.WriteString(stderr, c.warning+"tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n")
			} else {
				c.exit(c.words, errStatus)
			}
		case <-told:
			told, kill = nil, time.After(termGrace)
			c.signal(k, "terminated")
			if !c.deaf {
				time.AfterFunc(c.shutdown, func() { c.exit(closing, nil) })
			}
		case <-kill:
			c.signal(k, "killed")
			if !c.immortal {
				c.exit("", errKilled)
			}
		case e := <-c.quit:
			for _, file := range c.files {
				if _, err := os.Stat(filepath.Join(filepath.Dir(c.stem), file)); err != nil {
					k.Errorf("a file is gone before its child: %v", err)
				}
			}
			io.WriteString(stderr, e.words)
			return e.err
		}
	}
}

func (c *fakeChild) signal(k *children, name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c.signals = append(c.signals, name)
}

// started is how many there were.
func (k *children) started() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.all)
}

// at is the child that was started as number i.
func (k *children) at(i int) *fakeChild {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.all[i]
}

func (k *children) last() *fakeChild { return k.at(k.started() - 1) }

// signals are those that the last child was sent.
func (k *children) signals() []string {
	last := k.last()
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(last.signals)
}

func (c *fakeChild) lives() bool {
	select {
	case <-c.gone:
		return false
	default:
		return true
	}
}

// exit ends a child, by itself or by a signal; the first counts.
func (c *fakeChild) exit(words string, err error) {
	select {
	case c.quit <- childEnd{words, err}:
	default:
	}
}

func (c *fakeChild) option(name string) string {
	return c.arguments[slices.Index(c.arguments, name)+1]
}

// ---- The whole ----

// world is a node whose captures run in a bubble of time. The test stands where the list and the watch are: it applies
// pods as they would.
type world struct {
	*testing.T
	*podWatch
	kids *children
	proc *fakeProc
	root string
	ctx  context.Context // the program's
	end  context.CancelFunc
}

// simulate tells a story in a world whose captures may take the given number of files, 0 for no bound. When it is
// told, the program is told to end, and nothing may be left.
func simulate(t *testing.T, limit int64, story func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, limit)
		story(w)
		w.finish(5 * time.Second)
		w.runs()
	})
}

func newWorld(t *testing.T, limit int64) *world {
	t.Helper()
	proc := newProc(t)
	w := &world{T: t, kids: &children{TB: t, proc: proc}, proc: proc, root: t.TempDir()}
	cfg := testConfig(t, w.proc.dir, w.root)
	if limit > 0 {
		cfg.diskLimit = limit * fileBytes
	}
	n, err := newNode(cfg)
	must(t, err)
	n.start = w.kids.start
	w.podWatch = newPodWatch(n)
	w.ctx, w.end = context.WithCancel(t.Context())
	return w
}

// finish tells the program to end and waits for its captures.
func (w *world) finish(within time.Duration) {
	w.Helper()
	began := time.Now()
	w.end()
	w.alive.Wait()
	if took := time.Since(began); took > within {
		w.Errorf("the captures took %v to end, of %v", took, within)
	}
	synctest.Wait()
}

// see has the watch say that pods are there, or have changed, and waits until that has had its effect.
func (w *world) see(pods ...pod) {
	for _, p := range pods {
		w.apply(w.ctx, p)
	}
	synctest.Wait()
}

// lose has the watch say that pods are deleted.
func (w *world) lose(pods ...pod) {
	for _, p := range pods {
		w.forget(p.uid)
	}
	synctest.Wait()
}

// pass lets time pass.
func (w *world) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// news are the Events that were told since the last call.
func (w *world) news() (events []event) {
	for len(w.node.news) > 0 {
		events = append(events, *<-w.node.news)
	}
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

// runs checks which children live, each by "<file> <N>", and that the files are exactly theirs.
func (w *world) runs(want ...string) {
	w.Helper()
	var got, files []string
	w.kids.mu.Lock()
	for _, c := range w.kids.all {
		if c.lives() {
			got = append(got, fmt.Sprintf("%s %d", filepath.Base(c.stem), c.n))
			files = append(files, c.files...)
		}
	}
	w.kids.mu.Unlock()
	slices.Sort(got)
	slices.Sort(want)
	slices.Sort(files)
	if !slices.Equal(got, want) {
		w.Errorf("children %q, want %q", got, want)
	}
	if there := w.fileNames(); !slices.Equal(there, files) {
		w.Errorf("files %q, want %q", there, files)
	}
}

func (w *world) fileNames() []string { return namesIn(w, w.root) }

func namesIn(t testing.TB, folder string) (names []string) {
	entries, err := os.ReadDir(folder)
	must(t, err)
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// testConfig is a node with a service account that can be read.
func testConfig(t testing.TB, proc, root string) config {
	t.Helper()
	cfg := config{nodeName: "node-1", podName: "packetcapture-x", api: "https://127.0.0.1:1", account: t.TempDir(), proc: proc,
		root: root, diskLimit: 1 << 62}
	must(t, os.WriteFile(filepath.Join(cfg.account, "token"), []byte("token"), 0o600),
		os.WriteFile(filepath.Join(cfg.account, "namespace"), []byte("kube-system"), 0o600))
	return cfg
}

// podNamed is a pod of the namespace default whose annotation is value.
func podNamed(name, uid, value string) pod {
	return pod{namespace: "default", name: name, uid: uid, kubeletUID: uid, annotated: true, value: value}
}

// must ends the test on any error.
func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}
