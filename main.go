// Packetcapture captures the packets of annotated pods with tcpdump, on every node of a
// Kubernetes cluster.
//
// It runs as a DaemonSet, and each of its pods watches the pods of its own node. A pod that is
// annotated
//
//	kubectl annotate pod web tcpdump.antrea.io="5"
//
// is captured into five rotating files of 1,000,000 bytes, /capture-web.pcap0 to
// /capture-web.pcap4, in the packetcapture container of that node. A changed annotation starts the
// capture over. When the annotation is removed or the pod is deleted, the capture stops and its files
// are deleted.
// Two more annotations say what is captured:
//
//	tcpdump.antrea.io/filter="tcp port 80"   a pcap filter; default: every packet
//	tcpdump.antrea.io/interface="lo"         an interface of the pod, or any; default: eth0
//
// Events on the pod tell what happens, and the folder /captures has a link for each captured pod.
// Two commands in the container read a capture:
//
//	packetcapture cat default/web    writes its files to stdout as one pcap
//	packetcapture live default/web   writes its packets to stdout as they come, until stdin ends
//
// The environment configures the program:
//
//	NODE_NAME    the node whose pods are captured; required
//	DISK_LIMIT   bytes of disk that the container may use; default: no limit
//	DISK_FREE    percent of the disk that captures leave free; default: 15
//	KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT   the API server; required, Kubernetes sets both
//
// (*podWatch).follow keeps a watch of the node's pods, (*podWatch).apply starts and stops captures as
// the annotations ask, and (*capture).live is the life of one. These three are the program; the rest
// is detail.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
)

const (
	annotation          = "tcpdump.antrea.io"
	filterAnnotation    = annotation + "/filter"
	interfaceAnnotation = annotation + "/interface"
	// A static pod's cgroup is named after its config.hash. A user can add that to a pod, with another
	// pod's UID, but not config.mirror. So the hash counts if both are equal.
	hashAnnotation   = "kubernetes.io/config.hash"
	mirrorAnnotation = "kubernetes.io/config.mirror"
	// anyVersion begins a watch with all pods, from the API server's cache.
	anyVersion = "0"

	// podInterface is the only name that containerd and CRI-O let a CNI give a pod's interface.
	podInterface   = "eth0"
	digits         = "0123456789"
	interfaceChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._-" + digits

	// fileBytes is the most that a file takes. tcpdump compares its size with -C 1, 1,000,000 bytes,
	// before it writes a packet, and that has at most 262,144 bytes and a header of 16.
	fileBytes = 1_000_000 + 262_144 + 16
	// logBytes is the part of DISK_LIMIT for the container's log: the kubelet keeps 5 times 10 MiB.
	logBytes = 64 << 20
	// maxFilter is in bytes. The worst filter compiles in 0.15 s; one of 4,096 bytes takes 9 s.
	maxFilter = 1024

	// birthPoll is how often a capture looks for its pod's network, about 100 ms after which the first
	// container starts. After birthTime it looks every second.
	birthPoll = 25 * time.Millisecond
	birthTime = 5 * time.Minute
	// waitingTime is how long a capture waits before it says so. Most pods have started by then, and
	// the captures of deleted pods have stopped.
	waitingTime = 3 * time.Second
	// ringDelay is how long tcpdump goes on when its pod has ended: it reads its ring once a second.
	ringDelay = 3 * time.Second
	// termGrace is the time from SIGTERM to SIGKILL, and exitGrace that for the end of the program, which
	// may take 5 s.
	termGrace = 2 * time.Second
	exitGrace = 4500 * time.Millisecond
	// An Event is tried for eventTime, and up to eventQueue of a namespace may wait.
	eventTime  = 10 * time.Minute
	eventQueue = 1000
)

var (
	requestBackoff = backoff{least: 800 * time.Millisecond, most: 30 * time.Second} // client-go's
	tcpdumpBackoff = backoff{least: 200 * time.Millisecond, most: 5 * time.Minute}  // the kubelet's

	errFull     = errors.New("the disk is full: the last packets of the files may be cut")
	errReplaced = errors.New("its annotations have changed")
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "packetcapture:", err)
		os.Exit(1)
	}
}

// run executes the command that the arguments name. Without arguments it runs the controller.
func run(ctx context.Context, arguments []string) error {
	switch {
	case len(arguments) == 2 && arguments[0] == "cat":
		return cat("/", arguments[1], os.Stdout, os.Stderr)
	case len(arguments) == 2 && arguments[0] == "live":
		return live(ctx, "/", arguments[1])
	case len(arguments) > 0:
		return fmt.Errorf("%q is no command: accepted are cat and live with <namespace>/<pod>",
			cut(strings.Join(arguments, " ")))
	}

	cfg, err := readConfig(os.Getenv)
	if err != nil {
		return err
	}
	a, err := newAgent(cfg)
	if err == nil {
		slog.Info("packetcapture starts", "node", a.nodeName, "api", a.url, "files", a.disk.limit)
		a.run(ctx)
	}
	return err
}

type config struct {
	nodeName, podName, podNamespace string // of the program's own pod
	url, account                    string // of the API server; the folder of the service account
	proc, root                      string // where the host's processes are, and where the files go
	diskLimit, diskFree             int64  // bytes for all files together; percent to leave free
}

// readConfig returns an error that names all that is missing or wrong.
func readConfig(getenv func(string) string) (cfg config, err error) {
	required := func(name string) string {
		if getenv(name) == "" {
			err = errors.Join(err, fmt.Errorf("%s is empty: daemonset.yaml or Kubernetes sets it", name))
		}
		return getenv(name)
	}
	number := func(name string, standard, least, most int64) int64 {
		value := cmp.Or(getenv(name), fmt.Sprint(standard))
		n, parseErr := strconv.ParseInt(value, 10, 64)
		if parseErr != nil || n < least || n > most {
			err = errors.Join(err, fmt.Errorf("%s is %q: accepted is a number from %d to %d",
				name, cut(value), least, most))
		}
		return n
	}

	cfg = config{nodeName: required("NODE_NAME"), proc: "/proc", root: "/",
		account: "/var/run/secrets/kubernetes.io/serviceaccount"}
	host, port := required("KUBERNETES_SERVICE_HOST"), required("KUBERNETES_SERVICE_PORT")
	cfg.url = "https://" + net.JoinHostPort(host, port)
	cfg.podName, _ = os.Hostname()
	cfg.podNamespace = readFile(cfg.account + "/namespace")
	cfg.diskLimit = number("DISK_LIMIT", math.MaxInt64, logBytes+fileBytes, math.MaxInt64) - logBytes
	cfg.diskFree = number("DISK_FREE", 15, 0, 99)
	return cfg, err
}

// agent holds what the watch and all captures of this node share.
type agent struct {
	config
	api     *client
	cgroups *cgroups
	disk    *disk
	events  *events
	alive   sync.WaitGroup // captures
	ready   func()         // called when the watch delivers
	start   func(ctx context.Context, network *os.File, arguments ...string) (*process, error)
}

func newAgent(cfg config) (*agent, error) {
	groups, err := newCgroups(cfg.proc)
	if err != nil {
		return nil, fmt.Errorf("the host's processes can't be seen, for which hostPID, CAP_SYS_PTRACE and, "+
			"with AppArmor, a profile that allows ptrace (Unconfined) are needed: %w", err)
	}
	// A container starts with fresh files: the folder is there only if another program has made it.
	if err := os.Mkdir(filepath.Join(cfg.root, "captures"), 0o755); err != nil {
		return nil, fmt.Errorf("another packetcapture runs in this container: %w", err)
	}
	a := &agent{config: cfg, api: newClient(cfg.url, cfg.account), cgroups: groups, start: start}
	limit := int(min(cfg.diskLimit/fileBytes, math.MaxInt32)) // tcpdump reads -W into an int
	a.disk = &disk{config: cfg, limit: limit, owners: map[string]*capture{}}
	a.events = &events{api: a.api, nodeName: cfg.nodeName, queues: map[string][]event{}}
	a.events.ctx, a.events.stop = context.WithCancel(context.Background())
	// The readiness probe only connects. Without the timeout idle connections would pile up.
	probe := &http.Server{Addr: ":8080", ReadTimeout: 5 * time.Second}
	a.ready = sync.OnceFunc(func() {
		go func() { slog.Error("the readiness probe can't be answered", "error", probe.ListenAndServe()) }()
	})
	return a, nil
}

// run captures until ctx ends. Then all captures end side by side and the last Events are posted, and
// exitGrace later it returns in any case, whatever a tcpdump or the API server does.
func (a *agent) run(ctx context.Context) {
	defer a.events.stop()
	go func() {
		newPodWatch(a).follow(ctx)
		a.alive.Wait()
		a.events.posting.Wait()
		a.events.stop()
	}()
	<-ctx.Done()
	sleep(a.events.ctx, exitGrace)
}

// ---- Follow: a watch of the node's pods, and what their annotations ask for ----

// pod is who a pod is, and what its annotations ask for.
type pod struct {
	namespace, name, uid string
	kubeletUID           string // in the name of its cgroup: a static pod's is not the API's
	annotated            bool
	value, filter, iface string // its annotations
	files                int    // to rotate through; 0 if value is no number
}

type followed struct {
	pod     pod      // as it was seen last
	refusal string   // why its annotations are invalid; "" if they are not
	capture *capture // for its last valid annotations; nil if there were none
	stop    context.CancelCauseFunc
}

type podWatch struct {
	agent     *agent
	captures  map[string]*followed // by UID: a pod that is recreated under its name is another pod
	version   string               // the last resourceVersion
	seen      map[string]bool      // UIDs that the watch has delivered
	retry     backoff
	complaint string // the last error, without digits; "" when all is well
}

func newPodWatch(a *agent) *podWatch {
	captures := map[string]*followed{}
	return &podWatch{agent: a, captures: captures, version: anyVersion, retry: requestBackoff}
}

// follow keeps a watch open until ctx ends. A broken watch never stops a capture.
func (w *podWatch) follow(ctx context.Context) {
	for ctx.Err() == nil {
		version := w.version
		err := w.watch(ctx)
		isGone := statusOf(err) == http.StatusGone

		// Begin anew if the server has no history since our version. Do the same if a whole watch has not
		// moved our version, not even by a bookmark: the server may be behind it, after a restore of etcd.
		if isGone || err == nil && w.version == version {
			w.version = anyVersion
		}
		// After the time limit, and when a version is gone for the first time, watch again at once.
		if err == nil || isGone && version != anyVersion || ctx.Err() != nil {
			continue
		}
		// Digits do not count: the text may contain a port, which differs each time.
		complaint := strings.Join(strings.FieldsFunc(err.Error(), unicode.IsDigit), "")
		if complaint != w.complaint {
			w.complaint = complaint
			slog.Warn("the pods can't be watched, captures go on", "error", err)
		}
		sleep(ctx, w.retry.next(err))
	}
}

// watch applies events until the stream ends, and returns nil if that was its time limit: 5 to 10
// minutes, so that the nodes' watches spread. It asks for metadata alone: a pod's rest is larger.
func (w *podWatch) watch(ctx context.Context) error {
	limit := 300 + rand.IntN(301)
	asking, cancel := context.WithTimeout(ctx, time.Duration(limit+30)*time.Second)
	defer cancel()
	path := fmt.Sprintf("/api/v1/pods?fieldSelector=spec.nodeName%%3D%s&watch=true&resourceVersion=%s"+
		"&allowWatchBookmarks=true&timeoutSeconds=%d", w.agent.nodeName, url.QueryEscape(w.version), limit)
	accept := "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
	body, err := w.agent.api.do(asking, "GET", path, accept, nil)
	if err != nil {
		return err
	}
	defer body.Close()

	// A server that accepts watches and closes them must not be asked without end: a watch works if it
	// brings us to another version, or lasts a second.
	w.seen = map[string]bool{}
	version, began, works := w.version, time.Now(), false
	for decoder := json.NewDecoder(body); err == nil; {
		err = w.next(ctx, decoder)
		works = w.version != version || time.Since(began) >= time.Second
		if works {
			w.retry = requestBackoff
		}
		if works && w.complaint != "" {
			w.complaint = ""
			slog.Info("the pods are watched again")
		}
	}
	if works && err == io.EOF {
		return nil
	}
	return err
}

// next applies one event of the watch. A watch from anyVersion begins with all pods as ADDED, in any
// order. The first other event, a bookmark within a minute, says that these were all: captures of pods
// that did not come are stopped, and from then on a watch can go on from the last event's version.
func (w *podWatch) next(ctx context.Context, decoder *json.Decoder) error {
	var e struct { // a new one each time: decoding leaves alone what an event does not have
		Type   string
		Object object
	}
	if err := decoder.Decode(&e); err != nil {
		return err
	}
	uid, version := e.Object.Metadata.UID, e.Object.Metadata.ResourceVersion
	switch {
	case e.Type == "ERROR" || version == "":
		return &statusError{e.Object.Code, cmp.Or(e.Object.Message, "an event has no resourceVersion"), 0}
	case e.Type == "ADDED" || e.Type == "MODIFIED":
		w.apply(ctx, e.Object.pod())
	case e.Type == "DELETED":
		w.forget(uid)
	}
	w.agent.ready()

	w.seen[uid] = true
	if w.version == anyVersion {
		if e.Type == "ADDED" {
			return nil
		}
		for uid := range w.captures {
			if !w.seen[uid] {
				w.forget(uid)
			}
		}
	}
	w.version = version
	return nil
}

// apply starts, changes or stops a pod's capture as its annotations ask. An invalid annotation
// produces an Event and does not affect the running capture.
func (w *podWatch) apply(ctx context.Context, p pod) {
	f := cmp.Or(w.captures[p.uid], &followed{stop: func(error) {}})
	switch {
	case !p.annotated:
		w.forget(p.uid)
		return
	case f.pod == p:
		return
	}
	// The new capture exists before the annotations are checked, because it may take over the old one's
	// room. It goes on if the annotations are those of the running capture again, after invalid ones.
	c := &capture{agent: w.agent, pod: p, replaces: f.capture, ended: make(chan struct{})}
	last, goesOn := f.refusal, f.capture != nil && f.capture.pod == p
	w.captures[p.uid], f.pod, f.refusal = f, p, ""
	if !goesOn {
		f.refusal = w.refusal(ctx, c)
	}

	tell := w.agent.events.tell
	switch {
	case f.refusal != "" && (f.refusal == last || ctx.Err() != nil):
	case f.refusal != "" && f.capture == nil:
		tell(p, "Warning", "CaptureInvalid", f.refusal+"; nothing is captured")
	case f.refusal != "":
		tell(p, "Warning", "CaptureInvalid", f.refusal+"; what was asked for before goes on as it was")
	case goesOn:
		tell(p, "Normal", "CaptureContinued",
			"The annotations are valid again, and the capture went on as it was")
	default:
		f.stop(errReplaced)
		ctx, f.stop = context.WithCancelCause(ctx)
		f.capture = c
		w.agent.alive.Go(func() { c.live(ctx) })
	}
}

func (w *podWatch) forget(uid string) {
	if f := w.captures[uid]; f != nil {
		f.stop(nil)
	}
	delete(w.captures, uid)
}

// refusal says why annotations are invalid, and what is accepted. It is "" if they are valid: then the
// capture has the room of the one that it replaces.
func (w *podWatch) refusal(ctx context.Context, c *capture) string {
	p, limit := c.pod, w.agent.disk.limit
	refuse := func(annotation, value, accepted string, a ...any) string {
		said := fmt.Sprintf("the annotation %s is %q: accepted is ", annotation, cut(value))
		return said + fmt.Sprintf(accepted, a...)
	}
	isUnprintable := func(r rune) bool { return !unicode.IsPrint(r) }
	isName := !strings.HasPrefix(p.iface, "-") && strings.Trim(p.iface, interfaceChars) == ""
	switch {
	case p.files < 1 || p.files > limit || p.value != strconv.Itoa(p.files): // tcpdump takes "5abc" for 5
		return refuse(annotation, p.value,
			"the number of files to rotate through, a plain decimal number from 1 to %d", limit)
	case len(p.iface) > 15 || !isName:
		return refuse(interfaceAnnotation, p.iface, "the name of a network interface, or any, "+
			"at most 15 characters of a-z A-Z 0-9 . _ -, not beginning with -")
	case len(p.filter) > maxFilter || strings.ContainsFunc(p.filter, isUnprintable):
		return refuse(filterAnnotation, p.filter,
			"a pcap filter expression, a line of printable text of at most %d bytes", maxFilter)
	}
	if complaint := w.compile(ctx, p); complaint != "" {
		return refuse(filterAnnotation, p.filter,
			"a pcap filter expression, in which hosts and ports are numbers; %s", complaint)
	}
	if free := w.agent.disk.handOver(c); free < p.files {
		return refuse(annotation, p.value,
			"at most %d now, because other captures have the rest of this node's %d files", free, limit)
	}
	return ""
}

// compile has tcpdump compile a filter, and returns its complaint. It runs in an empty network
// namespace, where a name can't be looked up: no filter may make DNS queries leave the cluster.
func (w *podWatch) compile(ctx context.Context, p pod) string {
	if p.filter == "" {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	link := "EN10MB"
	if s, _ := w.agent.cgroups.find(p, sandbox{}); s.device(p) == "any" {
		link = "LINUX_SLL2"
	}
	said := &report{}
	tcpdump, err := w.agent.start(ctx, nil, "tcpdump", "-y", link, "-d", "--", p.filter)
	if err == nil {
		err = said.read(tcpdump, func() {})
	}
	if err == nil {
		return ""
	}
	return cmp.Or(said.complaint, err.Error())
}

// ---- A capture, from its start to its last file ----

// capture is one capture of one pod. Its own goroutine changes it, stem and room under the disk's lock.
type capture struct {
	agent    *agent
	pod      pod
	replaces *capture      // nil if there was none
	ended    chan struct{} // closed when its files are deleted
	captured bool          // into files that are there
	counts   string        // what tcpdump counted last
	told     string        // the last message
	stem     string        // the path of its files without digits; "" without room
	room     int           // in files
}

// tell has an Event posted, unless that would say the same again.
func (c *capture) tell(kind, reason, format string, a ...any) {
	if message := fmt.Sprintf(format, a...); message != c.told {
		c.told = message
		c.agent.events.tell(c.pod, kind, reason, message)
	}
}

// live is the life of a capture: it waits for the pod, runs tcpdump, and runs it again when it fails.
// It returns when ctx has ended, tcpdump has exited and the files are deleted.
func (c *capture) live(ctx context.Context) {
	defer close(c.ended)
	defer c.clear()
	if c.replaces != nil {
		<-c.replaces.ended
		c.replaces = nil
	}

	for retry := tcpdumpBackoff; ; {
		s, ok := c.await(ctx)
		if !ok && !c.captured && context.Cause(ctx) != errReplaced {
			c.tell("Normal", "CaptureStopped", "Stopped: nothing was captured")
		}
		if !ok {
			return
		}
		began := time.Now()
		err := c.runTcpdump(ctx, s)
		// A run of more than a minute was a success, so the pauses begin small again.
		if time.Since(began) > time.Minute {
			retry.failures = 0
		}
		// If the network is gone, await tells it, unless it comes back soon.
		now, hasNetwork := c.agent.cgroups.find(c.pod, s)
		switch {
		case ctx.Err() != nil:
		case c.captured && hasNetwork && now.network != s.network:
			c.tell("Normal", "CaptureStopped",
				"Stopped: %s; the pod's new network is captured from now on", c.counts)
		case hasNetwork || err == errFull:
			c.tell("Warning", "CaptureFailed", "%v; it is tried again, after pauses that grow to 5 minutes", err)
			sleep(ctx, retry.next(nil))
		}
	}
}

// await returns the pod's network once nothing is missing for a capture, and false if ctx ends first.
// What has been missing for a while, it tells once.
func (c *capture) await(ctx context.Context) (s sandbox, ok bool) {
	began, told := time.Now(), ""
	for ctx.Err() == nil {
		var missing string
		if s, missing = c.look(s); missing == "" {
			return s, true
		}
		waited := time.Since(began)
		if what, _, _ := strings.Cut(missing, ":"); waited >= waitingTime && what != told {
			told = what
			c.tellWaiting(what, missing)
		}
		poll := 10 * birthPoll
		if s.network == "" {
			poll = birthPoll
		}
		// A pod that has ended does not come back. One with a cgroup may get a new network.
		if waited >= birthTime || c.captured && c.agent.cgroups.of(c.pod) == "" {
			poll = time.Second
		}
		sleep(ctx, poll)
	}
	return s, false
}

// look returns the pod's network, and what is missing for a capture: "<what>: <why>", or "" if nothing
// is. last is the network that it returned before.
func (c *capture) look(last sandbox) (s sandbox, missing string) {
	s, ok := c.agent.cgroups.find(c.pod, last)
	if !ok && !c.captured {
		c.clear() // it may have room of the capture that it replaced
	}
	device := s.device(c.pod)
	switch {
	case !ok:
		return s, "the pod's network: it does not run yet, or has ended"
	// tcpdump takes "2" for the second interface, and has devices that are none, such as nflog.
	case device != "any" && !slices.Contains(s.interfaces, device):
		return s, "the interface " + device + ": the pod has " + cut(strings.Join(s.interfaces, ", "))
	}
	return s, c.agent.disk.take(c)
}

func (c *capture) tellWaiting(what, missing string) {
	if _, size := findFiles(c.stem); c.captured {
		c.tell("Normal", "CaptureStopped", "Stopped: %s; %s is gone, the files (%d bytes) stay until the "+
			"annotation or the pod goes", c.counts, what, size)
	} else {
		c.tell("Warning", "CaptureWaiting", "Waiting for %s; the capture starts by itself", missing)
	}
}

// clear deletes the files, which no tcpdump writes any more, and gives their room back.
func (c *capture) clear() {
	paths, size := findFiles(c.stem)
	for _, path := range paths {
		if err := os.Remove(path); err != nil {
			slog.Error("a file can't be deleted", "error", err)
		}
	}
	if c.captured {
		c.tell("Normal", "CaptureStopped", "Stopped: %s; its files (%d bytes) are deleted", c.counts, size)
	}
	c.captured = false
	c.agent.disk.give(c)
}

// tellStarted tells that tcpdump captures. What is not as usual makes it a Warning.
func (c *capture) tellStarted(s sandbox, warning string) {
	kind, more := "Normal", ""
	if c.pod.filter != "" {
		more = fmt.Sprintf("; the filter is %q", cut(c.pod.filter))
	}
	warn := func(isSo bool, text string) {
		if isSo {
			kind, more = "Warning", more+"; "+text
		}
	}
	warn(s.isHost, "this pod has the host's network, so the files hold the whole node's traffic")
	warn(c.captured, "tcpdump began again at the first file, and the packets in that one are lost")
	warn(warning != "", "tcpdump says: "+warning)
	c.captured = true
	c.tell(kind, "CaptureStarted", "Capturing into %s, rotated at 1 MB, in %s/%s; the interface is %s%s",
		fileNames(c.stem, c.pod.files), c.agent.podNamespace, c.agent.podName, s.device(c.pod), more)
}

// ---- tcpdump: one run of it ----

// runTcpdump runs tcpdump once: until ctx ends, oversee stops it, or it ends by itself. It returns why.
func (c *capture) runTcpdump(ctx context.Context, s sandbox) error {
	network, err := c.agent.cgroups.open(s, c.pod)
	if err != nil {
		return fmt.Errorf("the pod's network can't be opened: %w", err)
	}
	running, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	tcpdump, err := c.agent.start(running, network, c.arguments(s.device(c.pod))...)
	network.Close() // or it would keep the pod's interface alive
	if err != nil {
		return fmt.Errorf("tcpdump can't be started: %w", err)
	}

	ended, end := context.WithCancel(context.Background())
	c.agent.alive.Go(func() { c.oversee(running, ended, stop, s, tcpdump.pid) })
	said, since := &report{}, ""
	if c.captured {
		since = ", since tcpdump began again"
	}
	c.counts = "no packet captured"
	err = said.read(tcpdump, func() {
		// From now on it may write packets. If it is killed, it can't say how many.
		c.counts = "an unknown number of packets captured"
		if ctx.Err() == nil {
			c.tellStarted(s, said.warning)
		}
	})
	end()
	c.counts = cmp.Or(strings.Join(said.counts, ", "), c.counts) + since
	if running.Err() != nil {
		return context.Cause(running)
	}
	status := fmt.Sprint(cmp.Or(err, errors.New("exit status 0")))
	return fmt.Errorf("tcpdump ended by itself (%s)", cmp.Or(said.complaint, status))
}

// oversee stops tcpdump when the disk is full, or when the pod's network has gone or changed. If
// tcpdump does not end, an Event says so.
func (c *capture) oversee(running, ended context.Context, stop func(error), s sandbox, pid int) {
	hadNetwork := time.Now()
	for sleep(running, time.Second); running.Err() == nil; sleep(running, time.Second) {
		now, ok := c.agent.cgroups.find(c.pod, s)
		if !ok { // while a pod of CRI-O crashes, only tcpdump is in its network
			now, ok = c.agent.cgroups.find(c.pod, sandbox{network: s.network, pid: strconv.Itoa(pid)})
		}
		if ok {
			hadNetwork = time.Now()
		}
		switch {
		case c.agent.disk.isFull():
			stop(errFull)
		case ok && now.network != s.network:
			stop(errors.New("the pod has a new network"))
		case time.Since(hadNetwork) >= ringDelay:
			stop(errors.New("the pod's network is gone"))
		}
	}
	// It has been told to end. After termGrace it was sent SIGKILL, so now it should be gone.
	if sleep(ended, termGrace+time.Second); ended.Err() == nil {
		why := "SIGTERM and SIGKILL were sent, and it still runs; its files stay until it ends"
		c.agent.events.tell(c.pod, "Warning", "CaptureFailed",
			fmt.Sprintf("tcpdump (PID %d) can't be ended: %s", pid, why))
	}
}

// arguments are the command line. nsenter executes tcpdump in its place, so the child's PID is
// tcpdump's. The command live reads the line in /proc and takes over all arguments behind the path.
func (c *capture) arguments(device string) []string {
	// -C 1 is 1,000,000 bytes in every version; a unit is an error before 4.99.6. -U writes each packet
	// as it comes. With -Z root it may create the next file in /, which the user tcpdump may not. -p keeps
	// to the pod's own packets. -B 4096 is a ring of 4 MiB, for a tcpdump that is held up: make measure.
	arguments := []string{"nsenter", "--net=/proc/self/fd/3", "--", "tcpdump", "-C", "1",
		"-W", strconv.Itoa(c.pod.files), "-w", c.stem, "-U", "-Z", "root", "-p", "-i", device, "-B", "4096"}
	if c.pod.filter != "" {
		arguments = append(arguments, "--", c.pod.filter) // never an option
	}
	return arguments
}

// process is a program that runs. Its stderr must be read to the end, and then wait be called.
type process struct {
	pid    int
	stderr io.Reader
	wait   func() error
}

// start starts a program with a network namespace as its descriptor 3 or, without one, in an empty
// network namespace. When ctx ends, the program gets SIGTERM, and after termGrace SIGKILL.
func start(ctx context.Context, network *os.File, arguments ...string) (*process, error) {
	cmd := exec.CommandContext(ctx, arguments[0], arguments[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = termGrace
	if network != nil {
		cmd.ExtraFiles, cmd.Stdout = []*os.File{network}, os.Stdout
	} else {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	}
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	return &process{cmd.Process.Pid, stderr, cmd.Wait}, nil
}

type report struct {
	warning   string   // its first one
	complaint string   // the last thing that it or nsenter complained of
	counts    []string // what it counted, at its end
}

// read takes what a program says until it ends, and returns how. It calls listening when it captures.
func (r *report) read(program *process, listening func()) error {
	for lines := bufio.NewScanner(program.stderr); lines.Scan(); {
		line := lines.Text()
		first, _, _ := strings.Cut(line, " ")
		switch {
		case strings.Contains(line, "listening on "):
			listening()
		case strings.HasSuffix(line, " captured"): // "1 packet captured"
			r.counts = append(r.counts, line)
		case strings.HasSuffix(line, " dropped by kernel"):
			r.counts = append(r.counts, first+" dropped by the kernel")
		case strings.Contains(strings.ToLower(line), "warning: "):
			r.warning = cmp.Or(r.warning, cut(line))
		case (first == "tcpdump:" || first == "nsenter:") && !strings.Contains(line, "data link type "):
			r.complaint = cut(line)
		}
	}
	io.Copy(io.Discard, program.stderr) // a line of more than 64 KiB ends the scanner
	return program.wait()
}

// ---- Files, and the room for them ----

// disk is the room and the names that all captures share.
type disk struct {
	config
	limit  int // files that all captures together may have
	mu     sync.Mutex
	owners map[string]*capture // by stem: who has room
}

func (d *disk) link(p pod) string { return filepath.Join(d.root, "captures", p.namespace+"_"+p.name) }

// free returns how many files the capture of a stem may have. The lock is held.
func (d *disk) free(stem string) int {
	free := d.limit
	for other, owner := range d.owners {
		if other != stem {
			free -= owner.room
		}
	}
	return free
}

// take gives a capture its stem, its link and room for its files, or returns what is missing. If a pod
// of another namespace has the same name, a part of the UID follows the name, after a "_" that no name
// has.
func (d *disk) take(c *capture) (missing string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	stem := cmp.Or(c.stem, filepath.Join(d.root, "capture-"+c.pod.name+".pcap"))
	if owner := d.owners[stem]; owner != nil && owner.pod.namespace != c.pod.namespace {
		stem = filepath.Join(d.root, fmt.Sprintf("capture-%s_%.8s.pcap", c.pod.name, c.pod.uid))
	}
	owner, free := d.owners[stem], d.free(stem)
	switch {
	case owner != nil && owner != c:
		return "its file name: an earlier capture has not ended yet"
	case d.isFull():
		return fmt.Sprintf("disk space: %d %% of the disk and %d bytes must be free", d.diskFree, fileBytes)
	case c.pod.files > free:
		return fmt.Sprintf("room: N=%d is asked for, and %d of the %d files that this node may have "+
			"are taken", c.pod.files, d.limit-free, d.limit)
	case owner == nil:
		if err := os.Symlink(stem, d.link(c.pod)); err != nil {
			return "its link: " + err.Error()
		}
	}
	c.stem, c.room, d.owners[stem] = stem, c.pod.files, c
	return ""
}

// handOver gives a capture the room of the one that it replaces, so that nobody takes it in between,
// and more if it asks for more. It returns how many files are free for it. If they are too few, it
// does nothing.
func (d *disk) handOver(c *capture) (free int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := c.replaces
	if old == nil || d.owners[old.stem] != old {
		return d.limit // it will wait for its room
	}
	if free = d.free(old.stem); c.pod.files <= free {
		// The old files are there first and the new ones afterwards. So the larger number is enough.
		c.stem, c.room, d.owners[old.stem] = old.stem, max(old.room, c.pod.files), c
	}
	return free
}

// give takes a capture's room back, if it has not been handed over.
func (d *disk) give(c *capture) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch owner := d.owners[c.stem]; {
	case owner == c:
		os.Remove(d.link(c.pod))
		delete(d.owners, c.stem)
	case owner != nil:
		owner.room = owner.pod.files // it has waited for these files to be deleted
	}
	c.stem, c.room = "", 0
}

// isFull reports whether less is free than captures leave free, or than one file takes. On a full disk
// tcpdump would go on, and cut its files without a word.
func (d *disk) isFull() bool {
	var stat syscall.Statfs_t
	err := syscall.Statfs(d.root, &stat)
	free, total := int64(stat.Bavail)*stat.Bsize, int64(stat.Blocks)*stat.Bsize
	return err == nil && free < max(fileBytes, total/100*d.diskFree)
}

// fileNames names a capture's files as tcpdump does: one has no digits, more have as many as n-1.
func fileNames(stem string, n int) string {
	if n == 1 {
		return stem
	}
	last := strconv.Itoa(n - 1)
	return fmt.Sprintf("%d files, %s%0*d to %s%s", n, stem, len(last), 0, stem, last)
}

// findFiles returns the paths of a capture's files, and how many bytes they have. The files of web are
// never those of web-2, or of a pod that is named web.pcap0.
func findFiles(stem string) (paths []string, size int64) {
	if stem == "" {
		return nil, 0
	}
	all, _ := filepath.Glob(stem + "*")
	for _, path := range all {
		if info, err := os.Lstat(path); err == nil && strings.TrimRight(path, digits) == stem {
			paths, size = append(paths, path), size+info.Size()
		}
	}
	return paths, size
}

// ---- A pod's cgroup, its processes and its network ----

// cgroups is the kernel's tree of cgroups, which knows whether a pod is on the node, and its processes.
type cgroups struct {
	proc    string
	tree    string   // its root; with cgroup v1 the root of one of its hierarchies
	classes []string // the cgroups that hold those of the pods, one of each QoS class
	hostNet string   // the network of the host's first process
	mu      sync.Mutex
	strays  []string // all containers' cgroups that are beside their pods', as they were listed last
	listed  time.Time
}

// sandbox is a pod's network, and a process that is in it.
type sandbox struct {
	network, pid string // "net:[4026532281]" names a namespace as long as it lives
	isHost       bool
	interfaces   []string
}

func (s sandbox) device(p pod) string {
	if s.isHost {
		return cmp.Or(p.iface, "any")
	}
	return cmp.Or(p.iface, podInterface)
}

// newCgroups finds kubepods, which is a level deeper in kind. cgroup v1 has it in each hierarchy: those
// of systemd and pids have the fewest files to look through.
func newCgroups(proc string) (g *cgroups, err error) {
	g = &cgroups{proc: proc}
	if g.hostNet, err = os.Readlink(proc + "/1/ns/net"); err != nil {
		return nil, err
	}
	root := proc + "/1/root/sys/fs/cgroup"
	trees := []string{root + "/systemd", root + "/pids", root}
	for _, g.tree = range trees {
		for _, name := range []string{"/kubepods", "/*kubepods.slice", "/*/kubepods", "/*/*kubepods.slice"} {
			found, _ := filepath.Glob(g.tree + name)
			if len(found) == 0 {
				continue
			}
			prefix, suffix := found[0]+"/", ""
			if slice, isSystemd := strings.CutSuffix(filepath.Base(found[0]), ".slice"); isSystemd {
				prefix, suffix = prefix+slice+"-", ".slice"
			}
			g.classes = []string{prefix + "burstable" + suffix, prefix + "besteffort" + suffix, found[0]}
			return g, nil
		}
	}
	return nil, fmt.Errorf("no cgroup kubepods is in %s", strings.Join(trees, " or "))
}

// of returns the path of a pod's cgroup. It is "" before the kubelet has made it, and after the pod has
// ended: the kubelet removes it 1 to 2 s after the last container.
func (g *cgroups) of(p pod) string {
	if p.kubeletUID == "" || strings.Trim(p.kubeletUID, "abcdef-"+digits) != "" {
		return "" // it must not become a part of a path
	}
	for _, class := range g.classes {
		path := class + "/pod" + p.kubeletUID
		if slice, isSystemd := strings.CutSuffix(class, ".slice"); isSystemd {
			uid := strings.ReplaceAll(p.kubeletUID, "-", "_")
			path = class + "/" + filepath.Base(slice) + "-pod" + uid + ".slice"
		}
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}

// find returns the network of a pod: that of the oldest process, since containers may make networks of
// their own. As long as last's process is in it, nothing has changed.
func (g *cgroups) find(p pod, last sandbox) (found sandbox, ok bool) {
	cgroup := g.of(p)
	if cgroup == "" {
		return found, false
	}
	if s, isPods := g.sandboxOf(last.pid); isPods && s.network == last.network {
		return s, true
	}
	pids := processesIn(cgroup)
	if len(pids) == 0 {
		for _, stray := range g.straysOf(cgroup) {
			pids = append(pids, processesIn(stray)...)
		}
	}
	oldest := uint64(math.MaxUint64)
	for _, pid := range pids {
		s, isPods := g.sandboxOf(pid)
		if born := g.startTime(pid); isPods && born < oldest {
			found, ok, oldest = s, true, born
		}
	}
	return found, ok
}

// sandboxOf returns the network of a process, and whether that is its pod's. gVisor's gofer has one of
// its own without interfaces. A process in the host's network that has the host's files as well belongs
// to the runtime, and has not entered the pod's network yet.
func (g *cgroups) sandboxOf(pid string) (s sandbox, isPods bool) {
	dir := filepath.Join(g.proc, pid)
	network, err := os.Readlink(dir + "/ns/net")
	if err != nil {
		return s, false
	}
	s = sandbox{network: network, pid: pid, isHost: network == g.hostNet}
	for line := range strings.Lines(readFile(dir + "/net/dev")) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			s.interfaces = append(s.interfaces, strings.TrimSpace(name))
		}
	}
	if !s.isHost {
		return s, slices.Contains(s.interfaces, podInterface)
	}
	files, err := os.Stat(dir + "/root")
	hosts, hostErr := os.Stat(g.proc + "/1/root")
	return s, err == nil && hostErr == nil && !os.SameFile(files, hosts)
}

// open opens a pod's network, whose file the caller closes. The process may have ended since it was
// found, and its PID be another pod's. So the pod's network is found once more when the file is open.
func (g *cgroups) open(s sandbox, p pod) (*os.File, error) {
	file, err := os.Open(filepath.Join(g.proc, s.pid, "ns/net"))
	if err != nil {
		return nil, err
	}
	now, ok := g.find(p, sandbox{})
	if opened, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", file.Fd())); !ok || opened != now.network {
		file.Close()
		return nil, errors.New("the process that it was found by has ended")
	}
	return file, nil
}

// straysOf returns the cgroups of a pod's containers that are not below the pod's: a runtime that makes
// them itself takes the path of a slice, which the kubelet has systemd make, for a plain name.
func (g *cgroups) straysOf(cgroup string) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if time.Since(g.listed) >= 4*birthPoll { // all captures share the list
		v2, _ := filepath.Glob(g.tree + "/system.slice/*.slice:*:*")
		v1, _ := filepath.Glob(g.tree + "/system.slice/*.service/*.slice:*:*")
		g.strays, g.listed = append(v2, v1...), time.Now()
	}
	return slices.DeleteFunc(slices.Clone(g.strays), func(stray string) bool {
		return !strings.HasPrefix(filepath.Base(stray), filepath.Base(cgroup)+":")
	})
}

func processesIn(cgroup string) []string {
	pids := strings.Fields(readFile(cgroup + "/cgroup.procs"))
	var stat syscall.Stat_t
	if syscall.Stat(cgroup, &stat); stat.Nlink == 2 {
		return pids // a folder has two links and one for each folder in it: it need not be read
	}
	below, _ := os.ReadDir(cgroup)
	for _, entry := range below {
		if entry.IsDir() {
			pids = append(pids, processesIn(cgroup+"/"+entry.Name())...)
		}
	}
	return pids
}

// startTime is field 22 of a process's stat, in clock ticks. Field 2, a command, ends at the last ")".
func (g *cgroups) startTime(pid string) uint64 {
	stat := readFile(filepath.Join(g.proc, pid, "stat"))
	fields := strings.Fields(stat[strings.LastIndex(stat, ")")+1:])
	if len(fields) < 20 {
		return math.MaxUint64 // it has ended
	}
	ticks, _ := strconv.ParseUint(fields[19], 10, 64)
	return ticks
}

// ---- Events ----

type event struct {
	pod                   pod
	kind, reason, message string
	at                    time.Time
}

// events posts Events, those of a namespace in their order. No namespace's webhook holds up another's.
type events struct {
	api      *client
	nodeName string
	ctx      context.Context // of all requests; stop ends it
	stop     context.CancelFunc
	posting  sync.WaitGroup
	mu       sync.Mutex
	queues   map[string][]event // by namespace, while a goroutine posts them
}

// tell writes a line of the log and has an Event posted. It never waits.
func (e *events) tell(p pod, kind, reason, message string) {
	log := slog.Info
	if kind == "Warning" {
		log = slog.Warn
	}
	log(reason, "namespace", p.namespace, "pod", p.name, "message", message)
	e.mu.Lock()
	defer e.mu.Unlock()
	queue, isPosting := e.queues[p.namespace]
	if len(queue) >= eventQueue {
		slog.Warn("an Event is lost, too many wait", "namespace", p.namespace, "pod", p.name)
		return
	}
	e.queues[p.namespace] = append(queue, event{p, kind, reason, message, time.Now()})
	if !isPosting {
		e.posting.Go(func() { e.postAll(p.namespace) })
	}
}

func (e *events) postAll(namespace string) {
	for {
		e.mu.Lock()
		queue := e.queues[namespace]
		if len(queue) == 0 {
			delete(e.queues, namespace)
			e.mu.Unlock()
			return
		}
		e.queues[namespace] = queue[1:]
		e.mu.Unlock()
		e.post(queue[0])
	}
}

// post tries to post an Event until it is there, or never will be.
func (e *events) post(next event) {
	type fields = map[string]any
	p, at := next.pod, next.at.UTC().Format(time.RFC3339)
	// Times have seconds alone: by their names kubectl lists those of a second in their order.
	name := fmt.Sprintf("packetcapture-%x-%.8s", next.at.UnixNano(), p.uid)
	path := "/api/v1/namespaces/" + p.namespace + "/events"
	body, _ := json.Marshal(fields{ // strings never fail
		"apiVersion": "v1", "kind": "Event", "metadata": fields{"namespace": p.namespace, "name": name},
		"involvedObject": fields{"apiVersion": "v1", "kind": "Pod",
			"namespace": p.namespace, "name": p.name, "uid": p.kubeletUID},
		"type": next.kind, "reason": next.reason, "message": next.message, "count": 1,
		"source":         fields{"component": "packetcapture", "host": e.nodeName},
		"firstTimestamp": at, "lastTimestamp": at,
	})
	for retry := requestBackoff; ; {
		ctx, cancel := context.WithTimeout(e.ctx, 10*time.Second)
		answer, err := e.api.do(ctx, "POST", path, "application/json", body)
		cancel()
		code := statusOf(err)
		// 401, 429 and 5xx pass. 403, say, does not, in a namespace that is being deleted.
		isFinal := code > 0 && code < 500 && code != 401 && code != 429
		switch {
		case err == nil:
			answer.Close()
			return
		case code == http.StatusConflict: // an earlier try has posted it
			return
		case isFinal || time.Since(next.at) >= eventTime || e.ctx.Err() != nil:
			slog.Warn("an Event is not posted", "namespace", p.namespace, "pod", p.name, "error", err)
			return
		}
		sleep(e.ctx, retry.next(err))
	}
}

// ---- The API server ----

type object struct {
	Metadata struct {
		Namespace, Name, UID, ResourceVersion string
		Annotations                           map[string]string
	}
	Code    int // of a Status, the object of ERROR
	Message string
}

func (o *object) pod() pod {
	m := &o.Metadata
	p := pod{namespace: m.Namespace, name: m.Name, uid: m.UID, kubeletUID: m.UID}
	if hash := m.Annotations[hashAnnotation]; hash != "" && hash == m.Annotations[mirrorAnnotation] {
		p.kubeletUID = hash
	}
	p.value, p.annotated = m.Annotations[annotation]
	p.files, _ = strconv.Atoi(p.value)
	p.filter = strings.TrimSpace(m.Annotations[filterAnnotation])
	p.iface = m.Annotations[interfaceAnnotation]
	p.annotated = p.annotated && m.UID != "" && !strings.Contains(m.Name, "/") // it becomes a path
	return p
}

// client speaks to the API server as the service account, for several goroutines.
type client struct {
	url, account string
	roots        atomic.Pointer[x509.CertPool] // of the last CA bundle that could be read
	http         http.Client                   // no Timeout: it would end watches
}

func newClient(url, account string) *client {
	c := &client{url: url, account: account}
	// There is no Proxy: the service address must never go through HTTPS_PROXY. A DialTLSContext turns
	// HTTP/2 off, and with it the pings that notice a half-open connection, unless it is forced.
	c.http.Transport = &http.Transport{DialTLSContext: c.dial, ForceAttemptHTTP2: true,
		HTTP2: &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second,
			MaxReceiveBufferPerStream: 256 << 10}} // no more of an answer than is read soon
	return c
}

// dial reads the CA bundle each time, since it may be replaced. One that can't be read keeps the last.
func (c *client) dial(ctx context.Context, network, address string) (net.Conn, error) {
	roots := x509.NewCertPool()
	if roots.AppendCertsFromPEM([]byte(readFile(c.account + "/ca.crt"))) {
		c.roots.Store(roots)
	}
	if roots = c.roots.Load(); roots == nil {
		return nil, fmt.Errorf("%s/ca.crt holds no certificate", c.account)
	}
	dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second},
		Config: &tls.Config{RootCAs: roots, NextProtos: []string{"h2", "http/1.1"}}}
	return dialer.DialContext(ctx, network, address)
}

// do sends a request and returns the body of the answer, which the caller closes. An answer other than
// 2xx is a *statusError. The token is read each time, because it is replaced every hour.
func (c *client) do(ctx context.Context, verb, path, as string, body []byte) (io.ReadCloser, error) {
	token, err := os.ReadFile(c.account + "/token")
	if err != nil {
		return nil, fmt.Errorf("the service account's token: %w", err)
	}
	request, err := http.NewRequestWithContext(ctx, verb, c.url+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header = http.Header{"Authorization": {"Bearer " + strings.TrimSpace(string(token))},
		"Accept": {as}, "Content-Type": {"application/json"}, "User-Agent": {"packetcapture"}}
	response, err := c.http.Do(request)
	if wrapped := new(url.Error); errors.As(err, &wrapped) {
		return nil, wrapped.Err // without the URL
	}
	if response.StatusCode/100 == 2 {
		return response.Body, nil
	}

	defer response.Body.Close()
	status := &statusError{Message: "no Status in the answer"} // it may be a proxy's
	json.NewDecoder(io.LimitReader(response.Body, 64<<10)).Decode(status)
	status.Code = response.StatusCode
	seconds, _ := strconv.Atoi(response.Header.Get("Retry-After"))
	status.retryAfter = time.Duration(min(max(seconds, 0), 60)) * time.Second
	return nil, status
}

// statusError is an answer of the API server other than 2xx, or an ERROR event of a watch.
type statusError struct {
	Code       int
	Message    string
	retryAfter time.Duration // the least to wait; a minute at most, whatever the server says
}

func (e *statusError) Error() string {
	if e.Code == 0 {
		return e.Message
	}
	return fmt.Sprintf("%d %s: %s", e.Code, http.StatusText(e.Code), e.Message)
}

func statusOf(err error) int {
	if status := new(statusError); errors.As(err, &status) {
		return status.Code
	}
	return 0
}

// ---- cat and live: what reads a capture ----

// findCapture returns the stem of the capture of a pod, which is named <namespace>/<pod>.
func findCapture(root, name string) (stem string, err error) {
	namespace, pod, _ := strings.Cut(name, "/")
	stem, err = os.Readlink(filepath.Join(root, "captures", namespace+"_"+pod))
	if err == nil && !strings.Contains(pod, "/") {
		return stem, nil
	}
	var all []string
	links, _ := os.ReadDir(filepath.Join(root, "captures"))
	for _, link := range links {
		all = append(all, strings.Replace(link.Name(), "_", "/", 1))
	}
	return "", fmt.Errorf("%q is not captured here: accepted is <namespace>/<pod>, of %q", cut(name), all)
}

const (
	pcapHeader   = 24 // bytes of a file's header, the same in all files of a capture
	packetHeader = 16 // and of a packet's: seconds, fraction, captured length, length; of 4 bytes each
)

// readHead returns a file's header with that of its first packet, and the packet's time. A file
// without a packet has just been begun, so it counts as the newest.
func readHead(path string) (head []byte, first uint64) {
	file, _ := os.Open(path)
	defer file.Close()
	head, _ = io.ReadAll(io.LimitReader(file, pcapHeader+packetHeader))
	if len(head) < pcapHeader+packetHeader {
		return head, math.MaxUint64
	}
	number := binary.NativeEndian.Uint32
	return head, uint64(number(head[24:]))<<32 | uint64(number(head[28:]))
}

// cat writes the files of a capture as one pcap, the oldest one first. It says on stderr how much that
// was: kubectl exec cuts a stream to a slow reader, and exits with 0.
func cat(root, name string, stdout, stderr io.Writer) error {
	stem, err := findCapture(root, name)
	if err != nil {
		return err
	}
	heads, times := map[string][]byte{}, map[string]uint64{}
	paths, _ := findFiles(stem)
	for _, path := range paths {
		heads[path], times[path] = readHead(path)
	}
	slices.SortStableFunc(paths, func(a, b string) int { return cmp.Compare(times[a], times[b]) })

	packets, written := 0, 0
	for _, path := range paths {
		data, _ := os.ReadFile(path)
		now, _ := readHead(path)
		// tcpdump may overwrite a file while it is read. It is whole if it begins as it did before, both in
		// what was read and afterwards.
		switch head := heads[path]; {
		case len(head) < pcapHeader:
			continue
		case !bytes.HasPrefix(data, head) || !bytes.HasPrefix(now, head):
			fmt.Fprintf(stderr, "packets may be missing: %s was overwritten or deleted\n", path)
			continue
		}
		count, end := countPackets(data)
		packets += count
		n, err := stdout.Write(data[min(written, pcapHeader):end])
		if written += n; err != nil {
			return err
		}
	}
	if written == 0 {
		return fmt.Errorf("%s has no file to read yet: kubectl describe pod tells why", name)
	}
	noun := "packets"
	if packets == 1 {
		noun = "packet"
	}
	fmt.Fprintf(stderr, "%d %s, %d bytes\n", packets, noun, written)
	return nil
}

func countPackets(data []byte) (count, end int) {
	for end = pcapHeader; end+packetHeader <= len(data); count++ {
		next := end + packetHeader + int(binary.NativeEndian.Uint32(data[end+8:]))
		if next > len(data) {
			break
		}
		end = next
	}
	return count, end
}

// live writes packets of a capture to stdout as they come, with a second tcpdump in the same network.
// It ends when the capture's tcpdump ends, and when stdin does: nothing else tells a process that
// kubectl exec has started that its kubectl has gone.
func live(ctx context.Context, root, name string) error {
	stem, err := findCapture(root, name)
	if err != nil {
		return err
	}
	stat, network, shared := findTcpdump(stem)
	if stat == nil {
		return fmt.Errorf("no tcpdump captures %s now: kubectl describe pod tells why", name)
	}
	ctx, stop := context.WithCancelCause(ctx)
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop(errors.New("stdin has ended: kubectl exec needs -i and a stdin that stays open"))
	}()
	go func() {
		for ctx.Err() == nil && isAlive(stat) {
			sleep(ctx, 100*time.Millisecond)
		}
		fmt.Fprintln(os.Stderr, "The capture's tcpdump has ended.")
		stop(nil)
	}()
	words := []string{"nsenter", "--net=/proc/self/fd/3", "--", "tcpdump", "--immediate-mode", "-w", "-"}
	tcpdump, err := start(ctx, network, append(words, shared...)...)
	if err != nil {
		return err
	}
	said := &report{}
	if err := said.read(tcpdump, func() {}); ctx.Err() == nil {
		return fmt.Errorf("tcpdump has ended (%s)", cmp.Or(said.complaint, fmt.Sprint(err)))
	}
	if cause := context.Cause(ctx); cause != context.Canceled {
		return cause
	}
	return nil
}

// findTcpdump finds the tcpdump that writes a capture's files, by its arguments. It must be in this
// container, because a process of another pod may have the same ones. It returns the process's open
// stat and network, and its arguments behind the path.
func findTcpdump(stem string) (stat, network *os.File, shared []string) {
	own, _ := os.Readlink("/proc/self/ns/mnt")
	dirs, _ := filepath.Glob("/proc/[1-9]*")
	for _, dir := range dirs {
		stat, _ := os.Open(dir + "/stat")
		network, _ := os.Open(dir + "/ns/net")
		mounts, _ := os.Readlink(dir + "/ns/mnt")
		words := strings.Split(strings.TrimSuffix(readFile(dir+"/cmdline"), "\x00"), "\x00")
		i := slices.Index(words, stem)
		if mounts == own && words[0] == "tcpdump" && i > 0 && words[i-1] == "-w" && isAlive(stat) {
			return stat, network, words[i+1:]
		}
		stat.Close()
		network.Close()
	}
	return nil, nil, nil
}

// isAlive reads the open stat of a process. That fails once it has ended, even if its PID is another's.
func isAlive(stat *os.File) bool {
	_, err := stat.ReadAt(make([]byte, 1), 0)
	return err == nil
}

// ---- Helpers ----

// backoff says how long to wait after a failure: from least, twice as long each time, up to most.
type backoff struct {
	least, most time.Duration
	failures    int
}

// next adds jitter, so that nodes do not retry in step, and what the API server asks for.
func (b *backoff) next(err error) time.Duration {
	base := min(b.least<<b.failures, b.most/2)
	b.failures = min(b.failures+1, 16)
	wait := base + rand.N(base)
	if status := new(statusError); errors.As(err, &status) {
		wait += status.retryAfter
	}
	return wait
}

func sleep(ctx context.Context, wait time.Duration) {
	select {
	case <-time.After(wait):
	case <-ctx.Done():
	}
}

// cut shortens a text of somebody else's, and shows that it did.
func cut(text string) string {
	if runes := []rune(text); len(runes) > 128 {
		return string(runes[:128]) + "…"
	}
	return text
}

// readFile returns a file's text, "" if it can't be read: a process may have ended.
func readFile(path string) string {
	text, _ := os.ReadFile(path)
	return string(text)
}
