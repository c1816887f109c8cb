package main

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// The world around a controller: a folder that looks like /proc, children that stand in for os/exec's, and the time
// of testing/synctest, in which a minute takes no time and a goroutine that is left over fails the test.

func init() { slog.SetDefault(slog.New(slog.DiscardHandler)) }

// ---- /proc ----

const host = "host" // the name of the host's network namespace and root

// fakeProc is a folder that looks like /proc.
type fakeProc struct {
	testing.TB
	dir string
}

type process struct {
	pid       int
	cgroup    string
	net, root string // names: those of the same name are the same
	born      int
}

func newProc(t testing.TB) *fakeProc {
	p := &fakeProc{t, t.TempDir()}
	p.add(process{pid: 1, cgroup: "0::/init.scope\n", net: host, root: host, born: 1})
	p.newest(1)
	return p
}

func (p *fakeProc) path(pid int, file string) string {
	return filepath.Join(p.dir, strconv.Itoa(pid), file)
}

// add starts a process, or changes one.
func (p *fakeProc) add(ps process) {
	p.Helper()
	net, root := filepath.Join(p.dir, "net-"+ps.net), filepath.Join(p.dir, "root-"+ps.root)
	os.RemoveAll(p.path(ps.pid, ""))
	must(p, os.MkdirAll(p.path(ps.pid, "ns"), 0o755), os.MkdirAll(root, 0o755), os.WriteFile(net, nil, 0o644),
		os.Symlink(net, p.path(ps.pid, "ns/net")), os.Symlink(root, p.path(ps.pid, "root")),
		os.WriteFile(p.path(ps.pid, "cgroup"), []byte(ps.cgroup), 0o644),
		os.WriteFile(p.path(ps.pid, "stat"), []byte(statLine(ps.pid, "pause", ps.born)), 0o644))
}

// pod starts the process that holds a Pod's sandbox, whose PID was given out last.
func (p *fakeProc) pod(pid int, uid string) {
	p.add(process{pid: pid, cgroup: cgroupOf(uid), net: uid, root: uid, born: pid})
	p.newest(pid)
}

func (p *fakeProc) end(pid int) { must(p, os.RemoveAll(p.path(pid, ""))) }

// newest sets the PID that was given out last.
func (p *fakeProc) newest(pid int) {
	text := fmt.Sprintf("0.20 0.18 0.12 1/80 %d\n", pid)
	must(p, os.WriteFile(filepath.Join(p.dir, "loadavg"), []byte(text), 0o644))
}

// statLine is a /proc/<pid>/stat: its field 22 is when the process started.
func statLine(pid int, command string, born int) string {
	return fmt.Sprintf("%d (%s) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 %d 1000 2000 3 4\n", pid, command, born)
}

func cgroupOf(uid string) string {
	return "0::/../../kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice/cri-containerd-cafe.scope\n"
}

// ---- Children ----

// behaviour is how children act that are started from now on. The zero one listens and ends at once.
type behaviour struct {
	refusal  error         // why none can be started
	startup  time.Duration // until it listens
	words    string        // what it says then instead, and exits with status 1
	shutdown time.Duration // from SIGTERM to its end
	deaf     bool          // it ignores SIGTERM
	immortal bool          // and SIGKILL
}

// children stand in for os/exec, and watch over what must hold at any time.
type children struct {
	*testing.T
	mu       sync.Mutex
	next     behaviour
	all      []*child
	attempts []time.Time // at which one was to be started
}

type child struct {
	behaviour
	pid, n    int
	stem      string   // its -w
	arguments []string // nsenter's
	network   string   // the file that it found at descriptor 3
	files     []string
	signals   []string
	quit      chan end
	gone      chan struct{} // closed when it has ended
	err       error
}

// end is how a child ends: what it says, and what wait returns.
type end struct {
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

func (k *children) start(cmd *exec.Cmd) (io.Reader, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.attempts = append(k.attempts, time.Now())
	if k.next.refusal != nil {
		return nil, k.next.refusal
	}
	c := &child{behaviour: k.next, pid: 100_000 + len(k.all), arguments: cmd.Args[1:], network: cmd.ExtraFiles[0].Name(),
		quit: make(chan end, 10), gone: make(chan struct{})}
	if _, err := cmd.ExtraFiles[0].Stat(); err != nil {
		k.Errorf("the namespace's file is closed before the child has it: %v", err)
	}
	c.stem = c.option("-w")
	c.n, _ = strconv.Atoi(c.option("-W"))
	for _, other := range k.all {
		if other.stem == c.stem && other.lives() {
			k.Errorf("two children write %s", c.stem)
		}
	}
	for i := range min(c.n, 3) {
		c.files = append(c.files, fileName(c.stem, c.n, i))
		must(k, os.WriteFile(c.files[i], make([]byte, 100), 0o644))
	}
	cmd.Process = &os.Process{Pid: c.pid}
	k.all = append(k.all, c)
	stderr, words := io.Pipe()
	go k.live(c, words)
	return stderr, nil
}

func (k *children) live(c *child, stderr *io.PipeWriter) {
	defer close(c.gone)
	defer stderr.Close()
	startup := time.After(c.startup)
	for {
		select {
		case <-startup:
			if c.words == "" {
				io.WriteString(stderr, "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n")
			} else {
				c.exit(c.words, errStatus)
			}
		case e := <-c.quit:
			for _, file := range c.files {
				if _, err := os.Stat(file); err != nil {
					k.Errorf("a file is gone before its child: %v", err)
				}
			}
			io.WriteString(stderr, e.words)
			c.err = e.err
			return
		}
	}
}

func (k *children) wait(cmd *exec.Cmd) error {
	c := k.of(cmd)
	<-c.gone
	return c.err
}

func (k *children) signal(cmd *exec.Cmd, s os.Signal) error {
	c := k.of(cmd)
	if !c.lives() {
		return os.ErrProcessDone
	}
	k.mu.Lock()
	c.signals = append(c.signals, s.String())
	k.mu.Unlock()
	switch {
	case s == syscall.SIGTERM && !c.deaf:
		time.AfterFunc(c.shutdown, func() { c.exit(closing, nil) })
	case s == syscall.SIGKILL && !c.immortal:
		c.exit("", errKilled)
	case s != syscall.SIGTERM && s != syscall.SIGKILL:
		k.Errorf("signal %v", s)
	}
	return nil
}

func (k *children) of(cmd *exec.Cmd) *child {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.all[slices.IndexFunc(k.all, func(c *child) bool { return c.pid == cmd.Process.Pid })]
}

// started is how many there were.
func (k *children) started() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.all)
}

// at is the child that was started as number i, last the last one.
func (k *children) at(i int) *child {
	k.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if i < 0 || i >= len(k.all) {
		k.Fatalf("there is no child %d of %d", i, len(k.all))
	}
	return k.all[i]
}

func (k *children) last() *child { k.Helper(); return k.at(k.started() - 1) }

// signals are those that the last child was sent.
func (k *children) signals() []string {
	last := k.last()
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(last.signals)
}

func (c *child) lives() bool {
	select {
	case <-c.gone:
		return false
	default:
		return true
	}
}

// exit ends a child, by itself or by a signal; the first counts.
func (c *child) exit(words string, err error) {
	select {
	case c.quit <- end{words, err}:
	default:
	}
}

func (c *child) option(name string) string {
	return c.arguments[slices.Index(c.arguments, name)+1]
}

// fileName is what tcpdump calls file i of n.
func fileName(stem string, n, i int) string {
	if n == 1 {
		return stem
	}
	return fmt.Sprintf("%s%0*d", stem, len(strconv.Itoa(n-1)), i)
}

// ---- The whole ----

// world is a controller whose loop runs in a bubble of time.
type world struct {
	*testing.T
	c    *controller
	kids *children
	proc *fakeProc
	root string
	end  context.CancelFunc
	done chan struct{} // closed when loop has returned
}

// simulate tells a story in a world whose captures may take the given number of files, 0 for no bound. When it is
// told, the program is told to end, and nothing may be left.
func simulate(t *testing.T, limit int64, story func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, limit)
		story(w)
		w.finish(5 * time.Second)
		for _, c := range w.kids.all {
			if c.lives() {
				t.Errorf("child %d is left: %v", c.pid, c.arguments)
			}
		}
		if files := w.files(); len(files) > 0 {
			t.Errorf("files are left: %v", files)
		}
	})
}

func newWorld(t *testing.T, limit int64) *world {
	t.Helper()
	w := &world{T: t, kids: &children{T: t}, proc: newProc(t), root: t.TempDir(), done: make(chan struct{})}
	cfg := testConfig(t, w.proc.dir, w.root)
	if limit > 0 {
		cfg.limit = limit * fileBytes
	}
	var err error
	w.c, err = newController(cfg)
	must(t, err)
	w.c.start, w.c.wait, w.c.signal = w.kids.start, w.kids.wait, w.kids.signal
	ctx, cancel := context.WithCancel(t.Context())
	w.end = cancel
	go func() { w.c.loop(ctx); close(w.done) }()
	return w
}

// finish tells the program to end and waits for that.
func (w *world) finish(within time.Duration) {
	w.Helper()
	began := time.Now()
	w.end()
	<-w.done
	if took := time.Since(began); took > within {
		w.Errorf("the program took %v to end, of %v", took, within)
	}
	synctest.Wait()
}

// send brings a change of the watch and waits until it has had its effect.
func (w *world) send(kind string, pods ...pod) {
	w.c.changes <- change{kind, pods}
	synctest.Wait()
}

// inside runs f in loop, where the state may be touched.
func (w *world) inside(f func()) {
	w.c.inbox <- f
	synctest.Wait()
}

// pass lets time pass.
func (w *world) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// events are those that were told since the last call.
func (w *world) events() (events []event) {
	for len(w.c.recorder.news) > 0 {
		events = append(events, <-w.c.recorder.news)
	}
	return events
}

// told checks the Events since the last call, each by "<kind> <reason>: <words in its message>".
func (w *world) told(want ...string) {
	w.Helper()
	events := w.events()
	ok := len(events) == len(want)
	for i := 0; ok && i < len(want); i++ {
		what, words, _ := strings.Cut(want[i], ": ")
		ok = what == events[i].kind+" "+events[i].reason && strings.Contains(events[i].message, words)
	}
	if !ok {
		w.Errorf("Events:\n%q\nwant:\n%q", events, want)
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
			for _, file := range c.files {
				files = append(files, filepath.Base(file))
			}
		}
	}
	w.kids.mu.Unlock()
	slices.Sort(got)
	slices.Sort(want)
	slices.Sort(files)
	if !slices.Equal(got, want) {
		w.Errorf("children %q, want %q", got, want)
	}
	if there := w.files(); !slices.Equal(there, files) {
		w.Errorf("files %q, want %q", there, files)
	}
}

func (w *world) files() (names []string) {
	entries, err := os.ReadDir(w.root)
	must(w, err)
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// testConfig is a node with a service account that can be read.
func testConfig(t testing.TB, proc, root string) config {
	t.Helper()
	cfg := config{node: "node-1", pod: "packetcapture-x", api: "https://127.0.0.1:1", account: t.TempDir(), proc: proc,
		root: root, limit: 1 << 62}
	must(t, os.WriteFile(filepath.Join(cfg.account, "token"), []byte("token"), 0o600),
		os.WriteFile(filepath.Join(cfg.account, "namespace"), []byte("kube-system"), 0o600),
		os.WriteFile(filepath.Join(cfg.account, "ca.crt"), someCA, 0o600))
	return cfg
}

// someCA is any certificate. It is made here because a bubble of time must have no server.
var someCA = func() []byte {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
}()

// podNamed is a Pod of the namespace default whose annotation is value.
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
