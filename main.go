// Packetcapture captures the packets of annotated pods with tcpdump, on every node of a Kubernetes cluster.
//
// It runs as a DaemonSet and watches the pods of its own node. A pod that is annotated
//
//	kubectl annotate pod web tcpdump.antrea.io="5"
//
// is captured into five rotating files of 1,000,000 bytes, /capture-web.pcap0 to /capture-web.pcap4, in the
// container of the packetcapture pod of that node. A changed number starts the capture again; when the annotation
// or the pod goes, the capture stops and its files are deleted. Two more annotations say what is captured:
//
//	kubectl annotate pod web tcpdump.antrea.io/filter="tcp port 80"
//	kubectl annotate pod web tcpdump.antrea.io/interface="lo"
//
// Events on the pod (kubectl describe pod) tell what happens. In the packetcapture pod
//
//	packetcapture cat [-f] web
//
// writes the files to stdout as one pcap, and with -f goes on with what comes. The environment configures the program:
//
//	NODE_NAME                 the node whose pods are captured; required
//	KUBERNETES_SERVICE_HOST   the API server; required, Kubernetes sets both
//	KUBERNETES_SERVICE_PORT
//	POD_NAME                  this pod's name, for the Events; default the host name
//	DISK_LIMIT                bytes of disk that the container may take, its files and its log; default no limit
//	DISK_FREE                 percent of the file system that captures leave free; default 15
//
// Two kinds of goroutine do the work. One follows the node's pods, and starts and stops captures as the annotations
// ask: (*podWatch).follow. Each capture has one of its own, which lives from the annotation to the last deleted
// file: (*capture).live. Who has read these two knows the program.
package main

import (
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
	filterAnnotation    = "tcpdump.antrea.io/filter"
	interfaceAnnotation = "tcpdump.antrea.io/interface"

	// The kubelet gives a static pod a UID of its own, which names its cgroups and stands in the first of these. Anybody may
	// add that one to a pod and have another pod captured; the second, which holds the same, nobody can add.
	hashAnnotation   = "kubernetes.io/config.hash"
	mirrorAnnotation = "kubernetes.io/config.mirror"

	// Of a pod only the metadata is asked for: it holds the annotations, and spec and status are the larger part.
	metadata     = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
	metadataList = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

	podInterface = "eth0" // the only name that containerd and CRI-O let a CNI give a pod's interface

	// fileBytes is the most that one file takes: -C 1 is 1,000,000 bytes in every version of tcpdump, checked before
	// a packet is written, and a packet is at most 262,144 bytes (the default -s) behind a header of 16.
	fileBytes = 1_000_000 + 262_144 + 16
	logBytes  = 64 << 20 // kept from DISK_LIMIT for the container's log: the kubelet's default is 5 times 10 MiB
	maxFilter = 1024     // bytes: tcpdump compiles that in 0.15 s and 12 MB at worst; 4,096 take 9 s and 110 MB

	birthPoll   = 25 * time.Millisecond   // how often a pod's network is looked for: containers start 100 ms after it
	birthTime   = 5 * time.Minute         // for so long; then once a second
	waitingTime = 30 * time.Second        // how long a pod may have no network before that is told
	goneTime    = 5 * time.Second         // how long its network may be gone: a pod that is deleted is gone by then
	emptyTime   = 6 * time.Minute         // how long a pod may have no process: CRI-O's crash loops wait up to 5 minutes
	lastPackets = 3 * time.Second         // how long tcpdump goes on without the pod's eth0: it reads its ring every second
	termGrace   = 2 * time.Second         // from SIGTERM to SIGKILL
	exitGrace   = 3500 * time.Millisecond // for all captures to end when the program is told to, of 5 s in all
	flushGrace  = time.Second             // for the last Events, after that
	compileTime = 5 * time.Second         // for tcpdump to compile a filter
	repeatTime  = 5 * time.Minute         // in which a Warning that stays the same is told once
	healthTime  = 30 * time.Second        // for a change of a pod to be applied
)

var (
	requestBackoff = backoff{least: 800 * time.Millisecond, most: 30 * time.Second} // like client-go's
	startBackoff   = backoff{least: 800 * time.Millisecond, most: 3 * time.Second}  // until the first watch: nodes start one by one
	tcpdumpBackoff = backoff{least: 125 * time.Millisecond, most: 30 * time.Second}
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "packetcapture:", err)
		os.Exit(1)
	}
}

// run is the controller, or with arguments the command that they name.
func run(ctx context.Context, arguments []string) error {
	if len(arguments) > 0 {
		if slices.Contains(arguments, "-f") {
			ctx = untilStdinEnds(ctx)
		}
		return command(ctx, arguments, "/", os.Stdout, os.Stderr)
	}
	cfg, err := readConfig(os.Getenv)
	if err != nil {
		return err
	}
	n, err := newNode(cfg)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", ":8080")
	if err != nil {
		return fmt.Errorf("serving /healthz and /readyz: %w", err)
	}
	server := n.health()
	go server.Serve(listener)
	defer server.Close()
	slog.Info("packetcapture starts", "node", n.nodeName, "api", n.api, "files", n.disk.limit)
	n.run(ctx)
	slog.Info("packetcapture ends")
	return nil
}

// config is what the program is told from outside; the folders are other ones in tests.
type config struct {
	nodeName, podName, podNamespace string // this pod's
	api, account                    string // its address; folder with the service account's token, ca.crt and namespace
	proc, root                      string // where the host's processes are, and where the files go
	diskLimit                       int64  // bytes that the files may take together
	diskFree                        int64  // percent of the file system that they leave free
}

// readConfig names what is missing or wrong: none of it can mend itself while the program runs.
func readConfig(getenv func(string) string) (cfg config, err error) {
	// Without a node, spec.nodeName= would select the pods that no node has.
	for _, name := range []string{"NODE_NAME", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"} {
		if getenv(name) == "" {
			return cfg, fmt.Errorf("%s is empty: it must be set, as it is by daemonset.yaml and Kubernetes", name)
		}
	}
	number := func(name string, standard, least, most int64) int64 {
		value := cmp.Or(getenv(name), strconv.FormatInt(standard, 10))
		n, parsing := strconv.ParseInt(value, 10, 64)
		if parsing != nil || n < least || n > most {
			err = fmt.Errorf("%s is %s: it must be a number from %d to %d", name, quote(value), least, most)
		}
		return n
	}
	hostname, _ := os.Hostname()
	cfg = config{
		nodeName: getenv("NODE_NAME"), podName: cmp.Or(getenv("POD_NAME"), hostname), proc: "/proc", root: "/",
		api:       "https://" + net.JoinHostPort(getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")),
		account:   "/var/run/secrets/kubernetes.io/serviceaccount",
		diskLimit: number("DISK_LIMIT", math.MaxInt64, logBytes+fileBytes, math.MaxInt64) - logBytes,
		diskFree:  number("DISK_FREE", 15, 0, 99),
	}
	return cfg, err
}

// node is what follow and the captures share.
type node struct {
	config
	kube      *kube
	processes *processes
	disk      *disk
	events    *events
	start     starter        // of tcpdump; another one in tests
	alive     sync.WaitGroup // captures whose files are not deleted yet
	listed    atomic.Bool    // the first list has been applied
	applying  atomic.Int64   // since when follow applies a change, in Unix nanoseconds; 0 while it waits for one
}

func newNode(cfg config) (*node, error) {
	namespace, err := os.ReadFile(filepath.Join(cfg.account, "namespace"))
	if err != nil {
		return nil, fmt.Errorf("the service account, which the DaemonSet mounts: %w", err)
	}
	cfg.podNamespace = string(namespace)
	ps, err := newProcesses(cfg)
	if err != nil {
		return nil, fmt.Errorf("the host's namespaces, which need hostPID, CAP_SYS_PTRACE, and on a node with AppArmor "+
			"a profile that allows ptrace (Unconfined; RuntimeDefault denies it): %w", err)
	}
	leftover, _ := findFiles(cfg.root, isCapture)
	if err := removeFiles(leftover); err != nil {
		return nil, fmt.Errorf("deleting the files of an earlier run: %w", err)
	}
	k := newKube(cfg.api, cfg.account)
	return &node{config: cfg, kube: k, processes: ps, disk: newDisk(cfg), events: newEvents(k, cfg.nodeName), start: start}, nil
}

// run captures until ctx ends. Then every capture ends, side by side, and what is left of the Events is posted.
func (n *node) run(ctx context.Context) {
	recording, stopRecording := context.WithCancel(context.Background())
	recorded, gone := make(chan struct{}), make(chan struct{})
	go func() { n.events.record(recording); close(recorded) }()
	newPodWatch(n).follow(ctx)
	go func() { n.alive.Wait(); close(gone) }()
	select {
	case <-gone:
	case <-time.After(exitGrace):
		slog.Warn("a tcpdump does not end: its files stay")
	}
	stopRecording()
	<-recorded
}

// health serves /healthz and /readyz. The API server matters for neither.
func (n *node) health() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {
		if since := n.applying.Load(); since != 0 && time.Since(time.Unix(0, since)) > healthTime {
			http.Error(w, fmt.Sprintf("a change of a pod is not applied after %v", healthTime), http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, r *http.Request) {
		if !n.listed.Load() {
			http.Error(w, "the first list is still to come", http.StatusServiceUnavailable)
		}
	})
	return &http.Server{Handler: mux, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, IdleTimeout: time.Minute}
}

// ---- Follow: a list of the node's pods, then its changes, and what their annotations ask for ----

// pod is what the program keeps of a pod: who it is, and what its annotations say, unchecked.
type pod struct {
	namespace, name, uid string
	kubeletUID           string // names its cgroups, and its Events: a static pod's is not the API's UID
	annotated, hasIface  bool
	value, filter, iface string
}

// request is what a pod's annotations ask for, checked.
type request struct {
	n      int    // files to rotate through
	filter string // a pcap filter; "": every packet
	iface  string // "": eth0, or any for a pod with the host's network
}

// followed is what follow keeps of an annotated pod.
type followed struct {
	pod             // as it was seen last
	running request // what its capture was started for; zero: none was
	stop    context.CancelFunc
}

// podWatch follows the pods of its node. It is in one of two states: it must list, or (current) it watches from version.
//
//	list   done                   -> watch
//	list   410, 504               -> list whatever is stored: the server can't serve that version
//	watch  ended in time          -> watch
//	watch  410, or as an ERROR    -> list: the server has no history since that version
//	either any trouble            -> the same again, after a wait
//
// Captures never notice any of it.
type podWatch struct {
	*node
	captures  map[string]*followed // by pod UID: a pod that is recreated under its name is another pod
	version   string               // resourceVersion of the last list or event, opaque; "0": any, from the server's cache
	current   bool                 // version is one to watch from
	retry     backoff
	gone      time.Time // when a 410 was answered with a list at once
	unproven  bool      // the last watch was accepted, and failed at once
	complaint string    // the last error that was logged: nothing is said twice
	compiled  request   // the last one whose filter tcpdump took
}

func newPodWatch(n *node) *podWatch {
	return &podWatch{node: n, captures: map[string]*followed{}, version: "0", retry: startBackoff}
}

// follow returns when ctx ends. All captures hang on ctx, never on a request's.
func (w *podWatch) follow(ctx context.Context) {
	for ctx.Err() == nil {
		next, doing := w.list, "listing pods"
		if w.current {
			next, doing = w.watch, "watching pods"
		}
		if err := next(ctx); err != nil && ctx.Err() == nil {
			sleep(ctx, w.failed(fmt.Errorf("%s: %w", doing, err)))
		}
	}
}

// failed notes what went wrong, says it once, and returns how long to wait before asking again.
func (w *podWatch) failed(err error) (wait time.Duration) {
	if isStatus(err, http.StatusGone) {
		w.current = false
		if time.Since(w.gone) > time.Second {
			w.gone = time.Now()
			return 0
		}
	}
	wait = w.retry.next(err)
	if isStatus(err, http.StatusForbidden) { // only a person can mend it
		wait = 30*time.Second + wait/10
	}
	cause := err.Error()
	if network := new(net.OpError); errors.As(err, &network) {
		cause = network.Err.Error() // without the port, which differs each time
	}
	if w.complaint != cause {
		w.complaint = cause
		slog.Warn("the pods can't be watched, captures go on", "error", err, "retryIn", wait)
	}
	return wait
}

// ask sends a list or a watch; the caller closes the answer.
func (w *podWatch) ask(ctx context.Context, accept string, query url.Values) (io.ReadCloser, error) {
	query.Set("fieldSelector", "spec.nodeName="+w.nodeName)
	if w.version != "" {
		query.Set("resourceVersion", w.version)
	}
	return w.kube.do(ctx, "GET", "/api/v1/pods?"+query.Encode(), accept, nil)
}

// list applies the node's pods: what the list does not hold is stopped, what it holds goes on. It sets no limit, which
// would bypass the server's cache.
func (w *podWatch) list(ctx context.Context) error {
	asking, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	answer, err := w.ask(asking, metadataList, url.Values{})
	if isStatus(err, http.StatusGone, http.StatusGatewayTimeout) {
		w.version = ""
	}
	if err != nil {
		return err
	}
	defer answer.Close()
	var l podList
	if err := json.NewDecoder(answer).Decode(&l); err != nil {
		return err
	}
	if l.Metadata.ResourceVersion == "" {
		return errors.New("the list has no resourceVersion")
	}
	there := map[string]bool{}
	for _, o := range l.Items {
		there[o.Metadata.UID] = true
		w.apply(ctx, o.pod())
	}
	for uid := range w.captures {
		if !there[uid] {
			w.forget(uid)
		}
	}
	w.version, w.current = l.Metadata.ResourceVersion, true
	w.listed.Store(true)
	return nil
}

// watch applies changes until the server ends it, which it is asked to do after 5 to 10 minutes, so that the watches
// of many nodes spread; 30 s later it ends in any case. It returns nil when it ended as agreed.
func (w *podWatch) watch(ctx context.Context) error {
	limit := 300 + rand.IntN(301)
	asking, cancel := context.WithTimeout(ctx, time.Duration(limit+30)*time.Second)
	defer cancel()
	answer, err := w.ask(asking, metadata,
		url.Values{"watch": {"true"}, "allowWatchBookmarks": {"true"}, "timeoutSeconds": {strconv.Itoa(limit)}})
	if err != nil {
		return err
	}
	defer answer.Close()
	if !w.unproven { // else a 200 says nothing
		w.recovered()
	}
	began, proven := time.Now(), false
	for decoder := json.NewDecoder(answer); err == nil; {
		err = w.next(ctx, decoder)
		// A mere 200 proves nothing: a server that accepts and closes must not be asked without end.
		if proven = proven || err == nil || time.Since(began) >= time.Second; proven {
			w.recovered()
			w.retry = requestBackoff
		}
	}
	w.unproven = !proven
	switch {
	case err != io.EOF:
		return err
	case !proven:
		return errors.New("it ended within a second without an event")
	}
	return nil
}

// recovered says that the watch is back after trouble.
func (w *podWatch) recovered() {
	if w.complaint != "" {
		w.complaint = ""
		slog.Info("the pods are watched again")
	}
}

// next applies the next event and keeps its resourceVersion. ERROR has none; a BOOKMARK has nothing else.
func (w *podWatch) next(ctx context.Context, decoder *json.Decoder) error {
	var e watchEvent // a new one each time: decoding leaves alone what an event does not name
	if err := decoder.Decode(&e); err != nil {
		return err
	}
	version := e.Object.Metadata.ResourceVersion
	switch {
	case e.Type == "ERROR":
		return &statusError{Code: e.Object.Code, Message: e.Object.Message}
	case version == "":
		return errors.New("an event has no resourceVersion")
	case e.Type == "ADDED" || e.Type == "MODIFIED":
		w.apply(ctx, e.Object.pod())
	case e.Type == "DELETED":
		w.forget(e.Object.Metadata.UID)
	}
	w.version = version
	return nil
}

// apply starts, changes or stops a pod's capture as its annotations ask. Annotations that make no sense are told, and
// leave alone what runs.
func (w *podWatch) apply(ctx context.Context, p pod) {
	w.applying.Store(time.Now().UnixNano())
	defer w.applying.Store(0)
	if !p.annotated {
		w.forget(p.uid)
		return
	}
	f := w.captures[p.uid]
	if f == nil {
		f = &followed{stop: func() {}}
		w.captures[p.uid] = f
	}
	if f.pod == p {
		return
	}
	f.pod = p
	asked, err := w.check(ctx, p)
	switch {
	case err != nil && f.running.n > 0:
		w.events.tell(p, "Warning", "CaptureInvalid", err.Error()+"; the capture that runs goes on as it was")
	case err != nil:
		w.events.tell(p, "Warning", "CaptureInvalid", err.Error()+"; nothing is captured")
	case asked != f.running:
		f.stop()
		f.running, f.stop = asked, w.begin(ctx, p, asked)
	}
}

// forget stops the capture of a pod that is no longer annotated, or gone.
func (w *podWatch) forget(uid string) {
	if f := w.captures[uid]; f != nil {
		f.stop()
		delete(w.captures, uid)
	}
}

// begin starts a capture and returns what stops it. The one that it replaces, if any, ends meanwhile: it waits for its name.
func (w *podWatch) begin(ctx context.Context, p pod, asked request) context.CancelFunc {
	ctx, stop := context.WithCancel(ctx)
	c := &capture{node: w.node, pod: p, asked: asked, told: map[string]time.Time{}}
	w.alive.Go(func() {
		defer stop()
		c.live(ctx)
	})
	return stop
}

// check says what a pod's annotations ask for, or what was read and what is accepted. tcpdump itself takes "5abc" for 5.
func (w *podWatch) check(ctx context.Context, p pod) (asked request, err error) {
	n, err := strconv.Atoi(p.value)
	asked = request{n, strings.TrimSpace(p.filter), p.iface}
	isControl := func(r rune) bool { return !unicode.IsPrint(r) }
	switch {
	case err != nil || n < 1 || n > w.disk.limit || p.value != strconv.Itoa(n):
		return asked, fmt.Errorf("the annotation %s is %s: accepted is the number of files to rotate through, "+
			"a plain decimal number from 1 to %d", annotation, quote(p.value), w.disk.limit)
	case p.hasIface && !isInterface(p.iface):
		return asked, fmt.Errorf("the annotation %s is %s: accepted is the name of a network interface, or any, at most 15 "+
			"characters of a-z A-Z 0-9 . _ -, not beginning with -", interfaceAnnotation, quote(p.iface))
	case strings.ContainsFunc(asked.filter, isControl) || len(asked.filter) > maxFilter:
		return asked, fmt.Errorf("the annotation %s is %s (%d bytes): accepted is a pcap filter expression, a line of "+
			"printable text of at most %d bytes", filterAnnotation, quote(asked.filter), len(asked.filter), maxFilter)
	case asked.filter == "" || asked.filter == w.compiled.filter && asked.iface == w.compiled.iface:
		return asked, nil // the pods of a Deployment have the same filter
	}
	if err = w.compile(ctx, asked); err != nil {
		err = fmt.Errorf("the annotation %s is %s, which is refused (%w): accepted is a pcap filter expression, in which "+
			"hosts and ports are numbers", filterAnnotation, quote(asked.filter), err)
	}
	return asked, err
}

// compile has tcpdump compile a filter, without a device. It is refused only if tcpdump says so: where tcpdump can't
// run now, the capture will tell. No name is looked up on the way: see dnsConfig in daemonset.yaml.
func (w *podWatch) compile(ctx context.Context, asked request) error {
	ctx, cancel := context.WithTimeout(ctx, compileTime)
	defer cancel()
	link, said := "EN10MB", newStderr()
	if asked.iface == "any" {
		link = "LINUX_SLL2"
	}
	child, err := w.start(ctx, said, nil, "tcpdump", "-y", link, "-d", "--", asked.filter)
	if err != nil {
		return nil
	}
	if child.wait() == nil {
		w.compiled = asked
		return nil
	}
	if ctx.Err() == context.DeadlineExceeded { // and not the end of the program
		return fmt.Errorf("it takes longer than %v to compile", compileTime)
	}
	if complaint := said.complaint(); complaint != "" {
		return errors.New(complaint)
	}
	return nil
}

// ---- A capture, from its start to its last file ----

// capture is one capture of one pod. Only its own goroutine uses it.
type capture struct {
	*node
	pod
	asked   request
	stem    string               // path of its files without digits, /capture-web.pcap; "" while it has no name and no room
	opened  bool                 // tcpdump has captured into these files
	counted string               // what tcpdump counted when it ended last
	told    map[string]time.Time // Warnings, and when they were told
}

// Why a tcpdump was ended although its capture goes on.
var (
	errMoved = errors.New("the pod has a new network")
	errGone  = errors.New("the pod's network is gone")
	errFull  = errors.New("the disk is full")
)

// live is the life of a capture. It returns when ctx has ended, its tcpdump has exited and its files are deleted.
func (c *capture) live(ctx context.Context) {
	defer c.clear()
	for retry := tcpdumpBackoff; c.awaitNetwork(ctx) && c.awaitRoom(ctx); {
		began := time.Now()
		err := c.runTcpdump(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > retry.most {
			retry.failures = 0
		}
		wait := c.explain(err, &retry)
		if !c.opened {
			c.clear() // without files it takes no room
		}
		sleep(ctx, wait)
	}
}

// awaitNetwork returns true when the pod has its network, and false when ctx ends first. Between a pod's network and its
// first container there is little time, so it looks often.
func (c *capture) awaitNetwork(ctx context.Context) bool {
	began, told := time.Now(), false
	for ctx.Err() == nil {
		if _, ok := c.processes.find(c.pod); ok {
			return true
		}
		waited, poll := time.Since(began), birthPoll
		switch {
		case told:
		case c.opened && waited >= goneTime:
			told = true
			c.tell("CaptureStopped", "Stopped: "+c.counted+"; the pod's network is gone, the files stay until the annotation "+
				"or the pod goes, or the pod has a new network")
		case !c.opened && waited >= waitingTime:
			told = true
			c.warn("CaptureWaiting", "Waiting for the pod's network: it does not run yet, or has ended", "the capture starts when it has one")
		}
		if waited >= birthTime {
			poll = untilNextSecond()
		}
		sleep(ctx, poll)
	}
	return false
}

// awaitRoom returns true when the capture has a name and room on the disk, and false when ctx ends first. A capture that has both already
// waits while the disk is full.
func (c *capture) awaitRoom(ctx context.Context) bool {
	for told := false; ctx.Err() == nil; {
		var predecessor <-chan struct{}
		missing := ""
		if c.stem == "" {
			c.stem, predecessor, missing = c.disk.take(c.pod, c.asked.n)
		} else if c.disk.isFull() {
			missing = "the disk is full"
		}
		if c.stem != "" && missing == "" {
			return true
		}
		if missing != "" && !told {
			told = true
			c.warn("CaptureWaiting", "Waiting for room: "+missing, "the capture starts by itself when there is enough")
		}
		select {
		case <-predecessor: // none is a nil channel, on which nothing comes
		case <-time.After(untilNextSecond()):
		case <-ctx.Done():
		}
	}
	return false
}

// explain tells why tcpdump ended although it is still asked for, and returns how long to wait before it is started
// again. That the network is gone is told by awaitNetwork, if it stays so.
func (c *capture) explain(err error, retry *backoff) (wait time.Duration) {
	_, hasNetwork := c.processes.find(c.pod)
	switch {
	case errors.Is(err, errMoved):
		c.tell("CaptureStopped", "Stopped: "+c.counted+"; the pod has a new network, in which it is captured from now on")
	case errors.Is(err, errFull):
		c.warn("CaptureFailed", "The disk is full: the capture stops, and the last packets of its files may be cut",
			"it is started again, at the first file, when there is room")
	case hasNetwork && !errors.Is(err, errGone):
		wait = retry.next(nil)
		c.warn("CaptureFailed", err.Error(), fmt.Sprintf("it is tried again in %v", wait.Round(100*time.Millisecond)))
	}
	return wait
}

// clear deletes the files, which no tcpdump writes any more, and gives name and room back.
func (c *capture) clear() {
	if c.stem == "" {
		return
	}
	files, bytes := findFiles(c.root, func(name string) bool { return ownsFile(c.stem, name) })
	if err := removeFiles(files); err != nil {
		slog.Error("files can't be deleted", "namespace", c.namespace, "pod", c.name, "error", err)
	}
	if c.opened {
		c.tell("CaptureStopped", fmt.Sprintf("Stopped: %s; its files (%d bytes) are deleted", c.counted, bytes))
	}
	c.disk.give(c.stem)
	c.stem, c.opened = "", false
}

// tellStarted is called once tcpdump captures.
func (c *capture) tellStarted(s sandbox, said *stderr) {
	what, warnings := "Capturing into "+fileNames(c.stem, c.asked.n)+", rotated at 1 MB, in "+c.podNamespace+"/"+c.podName, []string{}
	if c.asked.iface != "" {
		what += "; the interface is " + c.asked.iface
	}
	if c.asked.filter != "" {
		what += "; the filter is " + quote(c.asked.filter)
	}
	if s.isHost {
		warnings = append(warnings, "this pod has the host's network, so the files hold the whole node's traffic")
	}
	if c.opened {
		warnings = append(warnings, "tcpdump began again at the first file, and the packets in that one are lost")
	}
	if said.warning != "" {
		warnings = append(warnings, "tcpdump says: "+said.warning)
	}
	c.opened = true
	if len(warnings) > 0 {
		c.warn("CaptureStarted", what, strings.Join(warnings, "; "))
	} else {
		c.tell("CaptureStarted", what)
	}
}

// tell writes a line of the log and an Event of the pod.
func (c *capture) tell(reason, message string) { c.events.tell(c.pod, "Normal", reason, message) }

// warn tells what a person should see, unless it did so a short time ago. Only the detail may differ then.
func (c *capture) warn(reason, message, detail string) {
	if at, ok := c.told[message]; !ok || time.Since(at) >= repeatTime {
		c.told[message] = time.Now()
		c.events.tell(c.pod, "Warning", reason, message+"; "+detail)
	}
}

// ---- tcpdump: one run of it ----

// runTcpdump captures in the pod's network, and returns why that ended. Every second it looks whether it still should.
func (c *capture) runTcpdump(ctx context.Context) error {
	running, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	said := newStderr()
	s, tcpdump, err := c.startTcpdump(running, said)
	if err != nil {
		return err
	}
	ended, listening := make(chan error, 1), said.listening
	go func() { ended <- tcpdump.wait() }()
	tellStarted := sync.OnceFunc(func() { c.tellStarted(s, said) })
	for seen := time.Now(); running.Err() == nil; {
		select {
		case <-listening:
			listening = nil // it is closed, and would come again and again
			tellStarted()
		case err := <-ended:
			if c.counted = said.counts(); said.listens() {
				tellStarted()
			}
			return fmt.Errorf("tcpdump ended by itself (%s)", said.lastWords(err))
		case <-time.After(untilNextSecond()):
			if why := c.whyEnd(s, tcpdump, &seen); why != nil {
				stop(why)
			}
		case <-running.Done():
		}
	}
	select {
	case <-ended:
	case <-time.After(termGrace + time.Second):
		c.warn("CaptureFailed", fmt.Sprintf("tcpdump (PID %d) can't be ended: SIGTERM and SIGKILL were sent, and it still runs (%v)",
			tcpdump.pid, tcpdump.kill()), "its files stay until it ends")
		<-ended
	}
	if c.counted = said.counts(); said.listens() && ctx.Err() == nil {
		tellStarted()
	}
	return context.Cause(running)
}

// startTcpdump starts tcpdump in the pod's network. ctx ends it.
func (c *capture) startTcpdump(ctx context.Context, said *stderr) (sandbox, *child, error) {
	s, ok := c.processes.find(c.pod)
	if !ok {
		return s, nil, errGone
	}
	device := cmp.Or(c.asked.iface, podInterface)
	if s.isHost {
		device = cmp.Or(c.asked.iface, "any")
	}
	// tcpdump takes "2" for the second interface that there is, and has devices that are none, such as nflog.
	if names := interfaces(s.dir); device != "any" && !slices.Contains(names, device) {
		return s, nil, fmt.Errorf("the pod has no interface %s, but %s", device, cut(strings.Join(names, ", ")))
	}
	network, err := c.processes.open(s, c.pod)
	if err != nil {
		return s, nil, fmt.Errorf("the pod's network can't be opened: %w", err)
	}
	defer network.Close() // at once: an open file keeps the namespace, and the pod's interface, alive
	tcpdump, err := c.start(ctx, said, network, c.arguments(device)...)
	if err != nil {
		return s, nil, fmt.Errorf("tcpdump can't be started: %w", err)
	}
	return s, tcpdump, nil
}

// arguments are nsenter's. It execs, so that the child's PID is tcpdump's.
func (c *capture) arguments(device string) []string {
	arguments := []string{
		"nsenter", "--net=/proc/self/fd/3", "--", "tcpdump",
		"-C", "1", // 1,000,000 bytes; "1M" is an error before 4.99.6
		"-W", strconv.Itoa(c.asked.n),
		"-w", c.stem,
		"-U",         // each packet is written as it comes, or a file stays empty until 4 KiB are there
		"-Z", "root", // or it becomes user tcpdump, who may not open the next file in /
		"-p", // not promiscuous: the pod's own packets
		"-i", device,
		// KiB of the kernel's ring. Of packets of 200 bytes at 50,000 and 150,000 a second, the default of 2 MiB lost none
		// and up to 2 %, with 4 to 64 MiB none. Never --immediate-mode, without the up to a second that packets stay in
		// the ring: it lost 27 % and 35 %, with 16 MiB 1 % and 9 %.
		"-B", "4096",
	}
	if c.asked.filter != "" {
		arguments = append(arguments, "--", c.asked.filter) // never an option
	}
	return arguments
}

// whyEnd says why tcpdump must end although its capture goes on: nil, errMoved, errGone or errFull. seen is when a
// process of the pod was seen last.
func (c *capture) whyEnd(s sandbox, tcpdump *child, seen *time.Time) error {
	patience := emptyTime
	if !s.isHost && !slices.Contains(interfaces(c.processes.folder(tcpdump.pid)), podInterface) {
		patience = lastPackets
	}
	now, ok := c.processes.find(c.pod)
	if ok {
		*seen = time.Now()
	}
	switch {
	case ok && now.network != s.network:
		return errMoved
	case !ok && time.Since(*seen) >= patience:
		return errGone
	case c.disk.isFull():
		return errFull
	}
	return nil
}

// starter starts a program, with network, if any, as its descriptor 3. When ctx ends the program gets SIGTERM, and after
// termGrace SIGKILL. What it says on stderr is written there until wait returns, which must be called.
type starter func(ctx context.Context, stderr io.Writer, network *os.File, arguments ...string) (*child, error)

// child is a program that runs.
type child struct {
	pid        int
	wait, kill func() error
}

func start(ctx context.Context, stderr io.Writer, network *os.File, arguments ...string) (*child, error) {
	cmd := exec.CommandContext(ctx, arguments[0], arguments[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = termGrace
	cmd.ExtraFiles = []*os.File{network}
	pipe, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	return &child{pid: cmd.Process.Pid, kill: cmd.Process.Kill, wait: func() error {
		// Its stderr ends when it does. To wait for that takes no thread, as waiting for the process would. The struct
		// hides os.File's own way to copy, which takes a buffer of 32 KiB.
		io.CopyBuffer(stderr, struct{ io.Reader }{pipe}, make([]byte, 512))
		return cmd.Wait()
	}}, nil
}

// stderr is what a child says there: the end of it, for its last words and its counts.
type stderr struct {
	listening chan struct{} // closed when tcpdump says that it captures
	warning   string        // what it warned of until then
	text      []byte
}

func newStderr() *stderr { return &stderr{listening: make(chan struct{})} }

// Write takes what the child says as it comes.
func (e *stderr) Write(text []byte) (int, error) {
	e.text = append(e.text, text...)
	if !e.listens() && bytes.Contains(e.text, []byte("listening on ")) {
		e.warning = warningIn(string(e.text))
		close(e.listening)
	}
	e.text = e.text[max(0, len(e.text)-4096):]
	return len(text), nil
}

// warningIn is the first line that warns, "" if none does.
func warningIn(text string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(strings.ToLower(line), "warning: ") {
			return cut(strings.TrimSpace(line))
		}
	}
	return ""
}

func (e *stderr) listens() bool {
	select {
	case <-e.listening:
		return true
	default:
		return false
	}
}

// lastWords says why a child ended: the signal that ended it, what it complained of, or its status.
func (e *stderr) lastWords(err error) string {
	if exit := new(exec.ExitError); errors.As(err, &exit) && !exit.Exited() {
		return err.Error()
	}
	return cmp.Or(e.complaint(), fmt.Sprint(cmp.Or(err, errors.New("exit status 0"))))
}

// complaint is the last thing that tcpdump or nsenter complained of, "" if nothing.
func (e *stderr) complaint() (last string) {
	for line := range strings.Lines(string(e.text)) {
		isOwn := strings.HasPrefix(line, "tcpdump: ") || strings.HasPrefix(line, "nsenter: ")
		if isOwn && !strings.Contains(line, "listening on ") && !strings.Contains(line, "data link type ") {
			last = cut(strings.TrimSpace(line))
		}
	}
	return last
}

// counts is what tcpdump counted, by its closing lines ("1 packet captured"); one that was killed wrote none.
func (e *stderr) counts() string {
	captured, dropped := "an unknown number of packets", "an unknown number"
	for line := range strings.Lines(string(e.text)) {
		number, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		_, what, _ := strings.Cut(rest, " ")
		n, err := strconv.Atoi(number)
		switch {
		case err == nil && what == "captured":
			captured = count(n, "packet")
		case err == nil && what == "dropped by kernel":
			dropped = number
		}
	}
	return captured + " captured, " + dropped + " dropped by the kernel"
}

// ---- Files, and the room for them ----

const digits = "0123456789"

// disk is the room that all captures share, and the names of their files.
type disk struct {
	root        string
	limit       int   // files that all captures together may have
	freePercent int64 // of the file system, which they leave free

	mu    sync.Mutex
	names map[string]*holder // by stem
}

// holder has a name, and the room for its files.
type holder struct {
	namespace string
	files     int
	freed     chan struct{} // closed when the name is free
}

func newDisk(cfg config) *disk {
	limit := min(cfg.diskLimit/fileBytes, math.MaxInt32) // tcpdump reads -W with atoi into an int
	return &disk{root: cfg.root, limit: int(limit), freePercent: cfg.diskFree, names: map[string]*holder{}}
}

// take gives a capture a name and room for n files. It returns the stem; or freed, which is closed when an earlier capture
// of the pod, or of one of the same name, has given the name back; or what is missing. A pod whose name a pod of another
// namespace has gets its UID behind a "_", which is in no pod name.
func (d *disk) take(p pod, n int) (stem string, freed <-chan struct{}, missing string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	plain := filepath.Join(d.root, "capture-"+p.name+".pcap")
	special := filepath.Join(d.root, fmt.Sprintf("capture-%s_%.8s.pcap", p.name, p.uid))
	stem, other := plain, d.names[plain]
	if other != nil && other.namespace != p.namespace {
		stem, other = special, nil
	}
	if other = cmp.Or(d.names[special], other); other != nil {
		return "", other.freed, ""
	}
	if missing := d.missing(n); missing != "" {
		return "", nil, missing
	}
	d.names[stem] = &holder{p.namespace, n, make(chan struct{})}
	return stem, nil, ""
}

func (d *disk) give(stem string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.names[stem].freed)
	delete(d.names, stem)
}

// missing says why there is no room for n more files, "" if there is. The lock is held.
func (d *disk) missing(n int) string {
	taken, unwritten := d.taken()
	free, total := space(d.root)
	free -= total/100*d.freePercent + unwritten
	switch {
	case taken+n > d.limit:
		return fmt.Sprintf("%s asked for, and %d of the %d that this node may have are taken", count(n, "file"), taken, d.limit)
	case free < int64(n)*fileBytes:
		return fmt.Sprintf("%s can take %d bytes, and the disk has %d for them, with %d %% of it left free",
			count(n, "file"), int64(n)*fileBytes, max(0, free), d.freePercent)
	}
	return ""
}

// taken is the files of all captures, and how many bytes may still be written into them. The lock is held.
func (d *disk) taken() (files int, unwritten int64) {
	for _, h := range d.names {
		files += h.files
	}
	_, written := findFiles(d.root, isCapture)
	return files, int64(files)*fileBytes - written
}

// isFull reports whether neither one more file fits, nor what the captures may still write. tcpdump would not say so.
func (d *disk) isFull() bool {
	free, _ := space(d.root)
	if free >= fileBytes {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	_, unwritten := d.taken()
	return free < unwritten
}

// space is what a folder's file system has free and has in all, in bytes; one that does not say is not taken for full.
func space(folder string) (free, total int64) {
	var stat syscall.Statfs_t
	if err := syscall.Statfs(folder, &stat); err != nil {
		return math.MaxInt64, 0
	}
	return int64(stat.Bavail) * int64(stat.Bsize), int64(stat.Blocks) * int64(stat.Bsize)
}

// fileNames names a capture's files as tcpdump does: one has no digits, more have as many as n-1.
func fileNames(stem string, n int) string {
	if n == 1 {
		return stem
	}
	last := strconv.Itoa(n - 1)
	return fmt.Sprintf("%d files, %s%0*d to %s%s", n, stem, len(last), 0, stem, last)
}

// ownsFile reports whether a file's name is of the capture with that stem: web's are never those of web-2 or web.pcap0.
func ownsFile(stem, name string) bool { return strings.TrimRight(name, digits) == filepath.Base(stem) }

// isCapture reports whether a file's name is of any capture.
func isCapture(name string) bool {
	return strings.HasPrefix(name, "capture-") && strings.HasSuffix(strings.TrimRight(name, digits), ".pcap")
}

// findFiles returns the paths of a folder's files whose names match, sorted, and their bytes.
func findFiles(folder string, matches func(name string) bool) (paths []string, bytes int64) {
	entries, _ := os.ReadDir(folder)
	for _, entry := range entries {
		if !matches(entry.Name()) {
			continue
		}
		if info, err := entry.Info(); err == nil && info.Mode().IsRegular() {
			paths = append(paths, filepath.Join(folder, entry.Name()))
			bytes += info.Size()
		}
	}
	return paths, bytes
}

func removeFiles(paths []string) (err error) {
	for _, path := range paths {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// ---- A pod's network namespace ----

// processes knows the node's processes and the pods that they belong to, whatever the runtime.
type processes struct {
	proc     string
	own      string      // namespace/name of this pod
	hostNet  string      // the network of the host's first process
	hostRoot os.FileInfo // and its files

	mu             sync.Mutex
	known          map[int]*process // by PID
	looked, forgot time.Time
}

type process struct {
	pod   string    // UID of the pod that its cgroup names, or ""
	born  uint64    // when it started, in clock ticks since boot
	first time.Time // when it was seen first
}

// sandbox is a pod's network namespace, and a process that is in it.
type sandbox struct {
	network string // "net:[4026532281]": names the namespace as long as it lives
	dir     string // of the process
	isHost  bool
}

func newProcesses(cfg config) (*processes, error) {
	hostNet, err := os.Readlink(cfg.proc + "/1/ns/net")
	if err != nil {
		return nil, err
	}
	hostRoot, err := os.Stat(cfg.proc + "/1/root")
	own := cfg.podNamespace + "/" + cfg.podName
	return &processes{proc: cfg.proc, own: own, hostNet: hostNet, hostRoot: hostRoot, known: map[int]*process{}}, err
}

func (ps *processes) folder(pid int) string { return ps.proc + "/" + strconv.Itoa(pid) }

// find returns the network of a pod, by what is known, or after a look. One look serves all who ask within birthPoll.
func (ps *processes) find(p pod) (sandbox, bool) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	s, ok := ps.oldest(p)
	if now := time.Now(); !ok && now.Sub(ps.looked) >= birthPoll {
		ps.look(now)
		s, ok = ps.oldest(p)
	}
	return s, ok
}

// open opens the network namespace, whose file the caller closes. The process may have ended since it was found, and its
// PID may be another's, which must never be captured: so it is checked once more when the file is open.
func (ps *processes) open(s sandbox, p pod) (*os.File, error) {
	file, err := os.Open(s.dir + "/ns/net")
	if err != nil {
		return nil, err
	}
	if now, ok := ps.sandbox(s.dir, p); !ok || now.network != s.network {
		file.Close()
		return nil, errors.New("the process that it was found by has ended")
	}
	return file, nil
}

// oldest is the network of the pod's oldest process that has one with eth0. Containers start after that process, and may
// have networks of their own within. The lock is held.
func (ps *processes) oldest(p pod) (sandbox, bool) {
	if p.namespace+"/"+p.name == ps.own { // on cgroup v2 the path of its own cgroup is cut, and names no pod
		return ps.sandbox(ps.proc+"/self", p)
	}
	var pids []int
	for pid, known := range ps.known {
		if known.pod == p.kubeletUID {
			pids = append(pids, pid)
		}
	}
	slices.SortFunc(pids, func(a, b int) int { return cmp.Compare(ps.known[a].born, ps.known[b].born) })
	for _, pid := range pids {
		if s, ok := ps.sandbox(ps.folder(pid), p); ok {
			return s, true
		}
	}
	return sandbox{}, false
}

// sandbox is the network of a process, if it is the pod's: not an empty one (gVisor's gofer) or one that is still being
// set up, nor the host's through a process that has the host's files as well, which is the runtime's (CRI-O's monitor, or
// one that is still to become the pod's).
func (ps *processes) sandbox(dir string, p pod) (sandbox, bool) {
	network, err := os.Readlink(dir + "/ns/net")
	if err != nil {
		return sandbox{}, false
	}
	s := sandbox{network, dir, network == ps.hostNet}
	if s.isHost {
		root, err := os.Stat(dir + "/root")
		if err != nil || os.SameFile(root, ps.hostRoot) {
			return s, false
		}
	} else if !slices.Contains(interfaces(dir), podInterface) {
		return s, false
	}
	return s, dir == ps.proc+"/self" || podOf(readFile(dir+"/cgroup")) == p.kubeletUID
}

// look takes note of the processes that there are, and of their pods. A process enters its cgroup after it has started:
// so it is read again until it is a pod's, for a second. All are forgotten now and then: PIDs become others'. The lock is
// held.
func (ps *processes) look(now time.Time) {
	ps.looked = now
	if now.Sub(ps.forgot) >= 10*time.Second {
		clear(ps.known)
		ps.forgot = now
	}
	folder, err := os.Open(ps.proc)
	if err != nil {
		return
	}
	defer folder.Close()
	names, _ := folder.Readdirnames(-1)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		known := ps.known[pid]
		if known == nil {
			known = &process{first: now}
			ps.known[pid] = known
		}
		if known.pod == "" && now.Sub(known.first) <= time.Second {
			known.pod = podOf(readFile(ps.folder(pid) + "/cgroup"))
			known.born = startTime(readFile(ps.folder(pid) + "/stat"))
		}
	}
}

// podOf is the UID of the pod that a cgroup names: cgroupfs has a folder pod<UID>, systemd one
// kubepods-burstable-pod<UID with _ for ->.slice. The first one counts: a container may name folders below its own as it
// likes.
func podOf(cgroup string) string {
	for name := range strings.FieldsFuncSeq(cgroup, func(r rune) bool { return r == '/' || r == '\n' }) {
		if slice, ok := strings.CutSuffix(name, ".slice"); ok {
			name = strings.ReplaceAll(slice[strings.LastIndex(slice, "-pod")+1:], "_", "-")
		}
		uid, ok := strings.CutPrefix(name, "pod")
		if ok && uid != "" && strings.Trim(uid, "0123456789abcdef-") == "" {
			return uid
		}
	}
	return ""
}

// startTime is field 22 of a /proc/<pid>/stat. Field 2, the command, may hold anything and ends at the last ")".
func startTime(stat string) uint64 {
	fields := strings.Fields(stat[strings.LastIndex(stat, ")")+1:])
	if len(fields) < 20 {
		return math.MaxUint64
	}
	ticks, _ := strconv.ParseUint(fields[19], 10, 64)
	return ticks
}

// interfaces are the names in a process's net/dev, none if it has ended.
func interfaces(dir string) (names []string) {
	text, _ := os.ReadFile(dir + "/net/dev")
	for line := range strings.Lines(string(text)) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			names = append(names, strings.TrimSpace(name))
		}
	}
	return names
}

// readFile is a file of /proc as text, "" when its process has ended. It is read at once, with three system calls:
// thousands are, before a capture starts.
func readFile(path string) string {
	file, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer syscall.Close(file)
	var text [8192]byte
	n, _ := syscall.Read(file, text[:])
	return string(text[:max(n, 0)])
}

// ---- Events ----

// event is an Event of a pod that is still to be posted.
type event struct {
	pod
	kind, reason, message string
	at                    time.Time
}

// events posts Events.
type events struct {
	kube *kube
	node string
	news chan event // to record
}

func newEvents(k *kube, node string) *events { return &events{k, node, make(chan event, 1024)} }

// tell writes a line of the log and has an Event posted. It never waits.
func (es *events) tell(p pod, kind, reason, message string) {
	level := map[string]slog.Level{"Normal": slog.LevelInfo, "Warning": slog.LevelWarn}[kind]
	slog.Log(context.Background(), level, reason, "namespace", p.namespace, "pod", p.name, "n", p.value, "message", message)
	select {
	case es.news <- event{p, kind, reason, message, time.Now()}:
	default:
		slog.Warn("an Event is lost, too many wait", "namespace", p.namespace, "pod", p.name)
	}
}

// record posts until ctx ends, and then what is left, for flushGrace.
func (es *events) record(ctx context.Context) {
	posting, stop := context.WithCancel(context.Background())
	defer stop()
	context.AfterFunc(ctx, func() { time.AfterFunc(flushGrace, stop) })
	for ctx.Err() == nil || len(es.news) > 0 && posting.Err() == nil {
		select {
		case e := <-es.news:
			es.deliver(posting, e)
		case <-ctx.Done():
		}
	}
}

// deliver posts an Event, again and again while the API server is away. One that it refuses is dropped, which is normal
// (403) in a namespace that is being deleted.
func (es *events) deliver(ctx context.Context, e event) {
	for retry := requestBackoff; ctx.Err() == nil; {
		err := es.post(ctx, e)
		if err == nil {
			return
		}
		if status := new(statusError); errors.As(err, &status) && !isStatus(err, 401, 429, 502, 503, 504) {
			slog.Warn("an Event is refused", "namespace", e.namespace, "pod", e.name, "error", err)
			return
		}
		sleep(ctx, retry.next(err))
	}
}

func (es *events) post(ctx context.Context, e event) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	type fields = map[string]any
	at := e.at.UTC().Format(time.RFC3339)
	body, _ := json.Marshal(fields{ // strings never fail
		"apiVersion": "v1", "kind": "Event", "metadata": fields{"namespace": e.namespace, "generateName": "packetcapture-"},
		"involvedObject": fields{"apiVersion": "v1", "kind": "Pod", "namespace": e.namespace, "name": e.name, "uid": e.kubeletUID},
		"type":           e.kind, "reason": e.reason, "message": e.message, "count": 1,
		"source":         fields{"component": "packetcapture", "host": es.node},
		"firstTimestamp": at, "lastTimestamp": at,
	})
	answer, err := es.kube.do(ctx, "POST", "/api/v1/namespaces/"+e.namespace+"/events", "application/json", body)
	if err == nil {
		answer.Close()
	}
	return err
}

// ---- The API server ----

// The parts of the API's types that are read.
type (
	object struct {
		Metadata struct {
			Namespace, Name, UID, ResourceVersion string
			Annotations                           map[string]string
		}
		Code    int // of a Status, the object of ERROR
		Message string
	}
	podList struct {
		Metadata struct{ ResourceVersion string }
		Items    []object
	}
	watchEvent struct {
		Type   string
		Object object
	}
)

func (o *object) pod() pod {
	m := &o.Metadata
	p := pod{namespace: m.Namespace, name: m.Name, uid: m.UID, kubeletUID: m.UID, filter: m.Annotations[filterAnnotation]}
	if hash := m.Annotations[hashAnnotation]; hash != "" && hash == m.Annotations[mirrorAnnotation] {
		p.kubeletUID = hash
	}
	p.value, p.annotated = m.Annotations[annotation]
	p.iface, p.hasIface = m.Annotations[interfaceAnnotation]
	p.annotated = p.annotated && m.UID != "" && !strings.Contains(m.Name, "/") // these become paths
	return p
}

// kube speaks to the API server as the service account, for several goroutines.
type kube struct {
	api, account string
	roots        atomic.Pointer[x509.CertPool] // of the last CA bundle that could be read
	http         http.Client                   // no Timeout: it would end watches
}

func newKube(api, account string) *kube {
	k := &kube{api: api, account: account}
	k.http.Transport = &http.Transport{ // without a Proxy: the service address must never go through HTTPS_PROXY
		DialTLSContext:    k.dial,
		ForceAttemptHTTP2: true, // its own dialing turns HTTP/2 off otherwise, and with it the pings
		// A server that is silent for 45 s is gone: a connection that is half open would never end a watch. Of a list no
		// more is taken than is read soon: by default it is 4 MiB.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second, MaxReceiveBufferPerStream: 256 << 10},
	}
	return k
}

// dial reads the CA bundle again for each connection, since it may be replaced; an unreadable one keeps the last.
func (k *kube) dial(ctx context.Context, network, address string) (net.Conn, error) {
	bundle, _ := os.ReadFile(filepath.Join(k.account, "ca.crt"))
	if roots := x509.NewCertPool(); roots.AppendCertsFromPEM(bundle) {
		k.roots.Store(roots)
	}
	roots := k.roots.Load()
	if roots == nil {
		return nil, fmt.Errorf("%s/ca.crt holds no certificate", k.account)
	}
	dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: &tls.Config{RootCAs: roots, NextProtos: []string{"h2", "http/1.1"}}}
	return dialer.DialContext(ctx, network, address)
}

// do sends a request and returns the answer, which the caller closes; what is not 2xx is a *statusError.
func (k *kube) do(ctx context.Context, method, path, accept string, body []byte) (io.ReadCloser, error) {
	token, err := os.ReadFile(filepath.Join(k.account, "token")) // each time: it is replaced every hour
	if err != nil {
		return nil, fmt.Errorf("the service account's token: %w", err)
	}
	request, err := http.NewRequestWithContext(ctx, method, k.api+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header = http.Header{"Authorization": {"Bearer " + strings.TrimSpace(string(token))}, "Accept": {accept},
		"Content-Type": {"application/json"}, "User-Agent": {"packetcapture"}}
	response, err := k.http.Do(request)
	if wrapped := new(url.Error); errors.As(err, &wrapped) {
		return nil, wrapped.Err // without the URL, which differs each time: an error that stays is logged once
	}
	if response.StatusCode/100 == 2 {
		return response.Body, nil
	}
	defer response.Body.Close()
	status := &statusError{Message: "no Status in the answer"} // it may be a proxy's
	json.NewDecoder(io.LimitReader(response.Body, 64<<10)).Decode(status)
	status.Code = response.StatusCode
	seconds, _ := strconv.Atoi(response.Header.Get("Retry-After"))
	status.retryAfter = time.Duration(max(seconds, 0)) * time.Second
	return nil, status
}

// statusError is an answer of the API server other than 2xx, or an ERROR event of a watch.
type statusError struct {
	Code       int
	Message    string
	retryAfter time.Duration // the least to wait, if the server says so
}

func (e *statusError) Error() string {
	return fmt.Sprintf("%d %s: %s", e.Code, http.StatusText(e.Code), e.Message)
}

func isStatus(err error, codes ...int) bool {
	var status *statusError
	return errors.As(err, &status) && slices.Contains(codes, status.Code)
}

// ---- cat: the files of a capture as one pcap ----

// command runs `packetcapture cat`, in the pod whose files it reads.
func command(ctx context.Context, arguments []string, root string, stdout, stderr io.Writer) error {
	follow := len(arguments) == 3 && arguments[1] == "-f"
	name := arguments[len(arguments)-1]
	if arguments[0] != "cat" || len(arguments) != 2 && !follow || name == "" || strings.HasPrefix(name, "-") {
		return fmt.Errorf("%s is no command: accepted is cat [-f] <pod name or file>", quote(strings.Join(arguments, " ")))
	}
	stem, err := findStem(root, name)
	if err != nil {
		return err
	}
	j := &joiner{stem: stem, stdout: stdout, stderr: stderr}
	err = j.join(ctx, follow)
	fmt.Fprintf(stderr, "%s, %d bytes\n", count(j.packets, "packet"), j.bytes)
	return err
}

// untilStdinEnds is how cat -f notices that its `kubectl exec -i` has gone: of stdout the runtime does not tell it, and a
// write may then wait for ever. A stdin that ends at once says nothing: it is /dev/null at the other end.
func untilStdinEnds(ctx context.Context) context.Context {
	if info, err := os.Stdin.Stat(); err != nil || info.Mode()&os.ModeNamedPipe == 0 {
		return ctx
	}
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		began := time.Now()
		io.Copy(io.Discard, os.Stdin)
		if time.Since(began) > time.Second {
			cancel()
			time.Sleep(termGrace)
			os.Exit(1)
		}
	}()
	return ctx
}

// findStem is the path, without digits, of the files of the capture that is meant by a pod's name, a file or a stem.
func findStem(root, name string) (string, error) {
	stems, _ := findFiles(root, isCapture)
	for i, path := range stems {
		stems[i] = strings.TrimRight(path, digits)
	}
	slices.Sort(stems)
	stems = slices.Compact(stems)
	var found []string
	for _, stem := range stems {
		pod := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(stem), "capture-"), ".pcap")
		if plain, _, _ := strings.Cut(pod, "_"); plain == name {
			found = append(found, stem)
		}
	}
	file := filepath.Join(root, strings.TrimRight(filepath.Base(name), digits))
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return "", fmt.Errorf("pods of several namespaces have the name %s, say which file: %s", name, strings.Join(found, " "))
	case slices.Contains(stems, file):
		return file, nil
	}
	return "", fmt.Errorf("%s is not captured here; what is: %s", quote(name), cmp.Or(strings.Join(stems, " "), "nothing"))
}

// joiner writes the files of a capture as one pcap. A file is known by the time of its first packet, since tcpdump
// writes the next one over the oldest: by these times it keeps its place.
type joiner struct {
	stem           string
	stdout, stderr io.Writer
	header         []byte           // the same in all files
	order          binary.ByteOrder // of the numbers in them
	at             place
	packets, bytes int
}

// place is how far a file has been read.
type place struct {
	path   string
	first  uint64 // time of its first packet, with the seconds in the upper half
	offset int64
}

const (
	pcapHeader   = 24 // bytes of a file's header
	packetHeader = 16 // and of a packet's: seconds, their fraction, captured length, length; 4 bytes each
)

// join writes what the files hold, and with follow what comes, until they are deleted: that is how a capture ends.
func (j *joiner) join(ctx context.Context, follow bool) error {
	for {
		files, isThere, err := j.files()
		// First the last file's rest: it is full if there is a next one.
		if err = cmp.Or(err, j.read(), j.readNext(ctx, files)); err != nil {
			return err
		}
		if !follow || !isThere || ctx.Err() != nil {
			return nil
		}
		sleep(ctx, time.Duration(50+len(files))*time.Millisecond) // a look at a file takes some 20 µs
	}
}

// readNext reads the files that come after the one that was read last.
func (j *joiner) readNext(ctx context.Context, files []place) error {
	for _, file := range files {
		if file.first <= j.at.first || ctx.Err() != nil {
			continue
		}
		j.at = file
		if err := j.read(); err != nil {
			return err
		}
	}
	return nil
}

// files are those that hold a packet, the oldest first, and whether there are any.
func (j *joiner) files() (files []place, isThere bool, err error) {
	paths, _ := findFiles(filepath.Dir(j.stem), func(name string) bool { return ownsFile(j.stem, name) })
	for _, path := range paths {
		head, _ := readAt(path, 0, pcapHeader+packetHeader)
		if len(head) >= pcapHeader {
			err = cmp.Or(err, j.begin(path, head[:pcapHeader]))
		}
		if err == nil && len(head) == pcapHeader+packetHeader {
			files = append(files, place{path, j.timeOf(head[pcapHeader:]), pcapHeader})
		}
	}
	slices.SortStableFunc(files, func(a, b place) int { return cmp.Compare(a.first, b.first) })
	return files, len(paths) > 0, err
}

// begin writes the first file's header. Of what kind the packets are, and whether times are in micro- or nanoseconds,
// stands there alone.
func (j *joiner) begin(path string, header []byte) error {
	if j.header != nil && !bytes.Equal(header, j.header) {
		return fmt.Errorf("%s is not of the same capture: its header differs", path)
	}
	if j.header != nil {
		return nil
	}
	for _, order := range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		if magic := order.Uint32(header); magic == 0xa1b2c3d4 || magic == 0xa1b23c4d {
			j.header, j.order = header, order
			return j.write(header)
		}
	}
	return fmt.Errorf("%s is no pcap file: it begins with % x", path, header[:4])
}

func (j *joiner) timeOf(packet []byte) uint64 {
	return uint64(j.order.Uint32(packet))<<32 | uint64(j.order.Uint32(packet[4:]))
}

// read writes the whole packets that are new in the file at j.at, unless it has become another one meanwhile.
func (j *joiner) read() error {
	if j.at.path == "" {
		return nil
	}
	data, err := readAt(j.at.path, j.at.offset, math.MaxInt32)
	first, _ := readAt(j.at.path, pcapHeader, packetHeader)
	if err != nil || len(first) < packetHeader || j.timeOf(first) != j.at.first {
		if j.at.offset == pcapHeader || !errors.Is(err, os.ErrNotExist) { // else it is how a capture ends
			fmt.Fprintf(j.stderr, "packets may be missing: %s was overwritten or deleted\n", j.at.path)
		}
		j.at.path = "" // on with the next
		return nil
	}
	end := 0
	for len(data)-end >= packetHeader {
		size := packetHeader + int(j.order.Uint32(data[end+8:]))
		if len(data)-end < size {
			break
		}
		end += size
		j.packets++
	}
	j.at.offset += int64(end)
	return j.write(data[:end])
}

func (j *joiner) write(data []byte) error {
	n, err := j.stdout.Write(data)
	j.bytes += n
	return err
}

// readAt reads a part of a file, and less at its end. It is closed at once: a deleted file that is open takes room.
func readAt(path string, offset, length int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.NewSectionReader(file, offset, length))
}

// ---- Helpers ----

// backoff says how long to wait after a failure: from least to twice that, then twice as long each time, up to most.
type backoff struct {
	least, most time.Duration
	failures    int
}

// next is never the same, so that nodes do not act in step. What the API server asked for comes on top: it asks all
// nodes for the same.
func (b *backoff) next(err error) time.Duration {
	base := min(b.least<<b.failures, b.most/2)
	b.failures = min(b.failures+1, 16)
	wait := base + rand.N(base)
	if status := new(statusError); errors.As(err, &status) {
		wait += status.retryAfter
	}
	return wait
}

// isInterface reports whether a name can be an interface's: Linux has 15 bytes for it.
func isInterface(name string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	return name != "" && len(name) <= 15 && name[0] != '-' && strings.Trim(name, letters+digits+"._-") == ""
}

// sleep waits, but not longer than ctx.
func sleep(ctx context.Context, wait time.Duration) {
	select {
	case <-time.After(wait):
	case <-ctx.Done():
	}
}

// untilNextSecond has all that look every second look together.
func untilNextSecond() time.Duration {
	return time.Until(time.Now().Truncate(time.Second).Add(time.Second))
}

// quote is a text of somebody else's in quotes, and cut where it is long.
func quote(text string) string {
	if start := cut(text); start != text {
		return strconv.Quote(strings.TrimSuffix(start, "…")) + "…"
	}
	return strconv.Quote(text)
}

// cut shortens a text of more than 128 characters, and shows it.
func cut(text string) string {
	if runes := []rune(text); len(runes) > 128 {
		return string(runes[:128]) + "…"
	}
	return text
}

// count is "1 packet" or "2 packets".
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
