// Packetcapture captures the packets of annotated pods with tcpdump, on every node of a Kubernetes cluster.
//
// It runs as a DaemonSet and watches the pods of its own node. A pod that is annotated
//
//	kubectl annotate pod web tcpdump.antrea.io="5"
//
// is captured into five rotating files of 1,000,000 bytes, /capture-web.pcap0 to /capture-web.pcap4, in the packetcapture
// container of that node. A changed number starts the capture again; when the annotation or the pod goes, the capture
// stops and its files are deleted. Two more annotations say what is captured:
//
//	tcpdump.antrea.io/filter="tcp port 80"   a pcap filter; default every packet
//	tcpdump.antrea.io/interface="lo"         an interface of the pod, or any; default eth0
//
// Events on the pod (kubectl describe pod) tell what happens. In the packetcapture pod, packetcapture cat [-f] web
// writes the files to stdout as one pcap, and with -f goes on with what comes. The environment configures the program:
//
//	NODE_NAME     the node whose pods are captured; required
//	DISK_LIMIT    bytes of disk that the container may take, its files and its log; default no limit
//	DISK_FREE     percent of the file system that captures leave free; default 15
//	KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT   the API server; required, Kubernetes sets both
//
// Two kinds of goroutine do the work. One follows the node's pods, and starts and stops captures as the annotations
// ask: (*podWatch).follow. Each capture has one of its own, which lives from the annotation to the last deleted
// file: (*capture).live. Who has read these two knows the program. One more posts the Events: (*node).record.
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
	"maps"
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

	// The kubelet names a static pod's cgroups by its config.hash. Who may annotate can add another pod's UID as config.hash to a
	// pod that is there, but no config.mirror. So the hash counts only if both are the same.
	hashAnnotation   = "kubernetes.io/config.hash"
	mirrorAnnotation = "kubernetes.io/config.mirror"

	letters      = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	digits       = "0123456789"
	podInterface = "eth0" // the only name that containerd and CRI-O let a CNI give a pod's interface

	// fileBytes is the most that one file takes: -C 1 is 1,000,000 bytes in every version of tcpdump, checked before
	// a packet is written, and a packet is at most 262,144 bytes (the default -s) behind a header of 16.
	fileBytes = 1_000_000 + 262_144 + 16
	logBytes  = 64 << 20 // kept from DISK_LIMIT for the container's log: the kubelet's default is 5 times 10 MiB
	maxFilter = 1024     // bytes: tcpdump compiles that in 0.25 s and 12 MB at worst; 4,096 take 9 s and 110 MB

	birthPoll   = 25 * time.Millisecond   // how often a pod's network is looked for: containers start 100 ms after it
	birthTime   = 5 * time.Minute         // for so long; then once a second
	waitingTime = 30 * time.Second        // how long a pod may have no network at first before that is told
	goneTime    = 5 * time.Second         // how long its network may be gone: a pod that is deleted is gone by then
	emptyTime   = 6 * time.Minute         // how long a pod may have no process: CRI-O's crash loops wait up to 5 minutes
	lastPackets = 3 * time.Second         // how long tcpdump goes on without the pod's eth0: it reads its ring every second
	termGrace   = 2 * time.Second         // from SIGTERM to SIGKILL
	exitGrace   = 4500 * time.Millisecond // for the captures and the last Events, when the program is told to end, of 5 s in all
	repeatTime  = 5 * time.Minute         // in which a Warning is not repeated, unless something else was told since
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
	listener, err := net.Listen("tcp", ":8080") // a lock as well: a second program in this pod would delete the first one's files
	if err != nil {
		return fmt.Errorf("serving /healthz and /readyz: %w", err)
	}
	n, err := newNode(cfg)
	if err != nil {
		return err
	}
	go n.health().Serve(listener)
	slog.Info("packetcapture starts", "node", n.nodeName, "api", n.api, "files", n.disk.limit)
	n.run(ctx)
	return nil
}

// config is what the program is told from outside; the folders are other ones in tests.
type config struct {
	nodeName, podName, podNamespace string // this pod's
	api, account                    string // the API server's address; folder with the service account's token, ca.crt and namespace
	proc, root                      string // where the host's processes are, and where the files go
	diskLimit                       int64  // bytes that the files may take together
	diskFree                        int64  // percent of the file system that they leave free
}

// readConfig names what is missing or wrong. The program ends then: to wait would mend none of it.
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
			err = fmt.Errorf("%s is %q: it must be a number from %d to %d", name, cut(value), least, most)
		}
		return n
	}
	hostname, _ := os.Hostname()
	cfg = config{
		nodeName: getenv("NODE_NAME"), podName: hostname, proc: "/proc", root: "/",
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
	news      chan *event    // Events to post; nil is the end
	start     starter        // of tcpdump; another one in tests
	alive     sync.WaitGroup // captures whose files are not deleted yet
	ready     atomic.Bool    // the first list has been applied
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
	if _, err := removeFiles(cfg.root, ""); err != nil {
		return nil, fmt.Errorf("deleting the files of an earlier run: %w", err)
	}
	limit := min(cfg.diskLimit/fileBytes, math.MaxInt32) // tcpdump reads -W with atoi into an int
	return &node{config: cfg, kube: newKube(cfg.api, cfg.account), processes: ps, news: make(chan *event, 1024), start: start,
		disk: &disk{config: cfg, limit: int(limit), taken: map[string]pod{}, freed: make(chan struct{})}}, nil
}

// run captures until ctx ends. Then every capture ends, side by side, and the last Events are posted.
func (n *node) run(ctx context.Context) {
	recording, stop := context.WithCancel(context.Background())
	end := func() { stop(); n.news <- nil } // whatever a tcpdump or the API server does
	context.AfterFunc(ctx, func() { time.AfterFunc(exitGrace, end) })
	go func() {
		newPodWatch(n).follow(ctx)
		n.alive.Wait()
		n.news <- nil
	}()
	n.record(recording)
}

func (n *node) health() *http.Server {
	return &http.Server{Handler: n, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, IdleTimeout: time.Minute}
}

// ServeHTTP answers /healthz and /readyz. Once the first list is applied, the API server matters for neither.
func (n *node) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	since := n.applying.Load()
	switch {
	case r.URL.Path == "/readyz" && !n.ready.Load():
		http.Error(w, "the first list is still to come", http.StatusServiceUnavailable)
	case r.URL.Path == "/healthz" && since != 0 && time.Since(time.Unix(0, since)) > 30*time.Second:
		http.Error(w, "a change of a pod is not applied after 30s", http.StatusServiceUnavailable)
	}
}

// ---- Follow: a list of the node's pods, then its changes, and what their annotations ask for ----

// pod is what the program keeps of a pod: who it is, and what its annotations ask for.
type pod struct {
	namespace, name, uid string
	kubeletUID           string // names its cgroups, and its Events: a static pod's is not the API's UID
	annotated, hasIface  bool
	value                string // of the annotation
	files                int    // to rotate through, which apply reads from value
	filter               string // a pcap filter; "": every packet
	iface                string // "": eth0, or any for a pod with the host's network
}

// followed is what follow keeps of an annotated pod.
type followed struct {
	pod         // as it was seen last
	started pod // as its capture was; zero: none was
	stop    context.CancelFunc
}

// podWatch follows the pods of its node.
type podWatch struct {
	*node
	captures  map[string]*followed // by pod UID: a pod that is recreated under its name is another pod
	version   string               // resourceVersion of the last list or event, opaque; "0": any, from its cache; "": the newest
	retry     backoff
	complaint string // the last error that was logged: nothing is said twice
	proven    bool   // the last watch gave an event or a second: a server that accepts and closes must not be asked without end
}

func newPodWatch(n *node) *podWatch {
	return &podWatch{node: n, captures: map[string]*followed{}, version: "0", retry: startBackoff, proven: true}
}

// follow lists the node's pods, and then watches them, until ctx ends. All captures hang on ctx, never on a request's, and
// notice nothing of this:
//
//	list   done                   -> watch
//	list   410, 504               -> list without a version: the server can't serve that one
//	watch  ended as agreed        -> watch
//	watch  410, also in an ERROR  -> list: the server has no history since that version
//	either any trouble            -> the same again, after a wait
func (w *podWatch) follow(ctx context.Context) {
	var relisted time.Time
	for step := w.list; ctx.Err() == nil; {
		err := step(ctx)
		switch {
		case err == nil:
			step = w.watch
			continue
		case ctx.Err() != nil:
			return
		case isStatus(err, http.StatusGone):
			step = w.list
			if time.Since(relisted) > time.Second { // at once, but not without end
				relisted = time.Now()
				continue
			}
		}
		wait, cause := w.retry.next(err), err.Error()
		if network := new(net.OpError); errors.As(err, &network) {
			cause = network.Err.Error() // without the port, which differs each time
		}
		if w.complaint != cause {
			w.complaint = cause
			slog.Warn("the pods can't be watched, captures go on", "error", err, "retryIn", wait)
		}
		sleep(ctx, wait)
	}
}

// ask sends a list or a watch; the caller closes the answer. Of a pod only the metadata is asked for: it holds the
// annotations, and spec and status are the larger part.
func (w *podWatch) ask(ctx context.Context, kind string, query url.Values) (io.ReadCloser, error) {
	query.Set("fieldSelector", "spec.nodeName="+w.nodeName)
	query.Set("resourceVersion", w.version)
	return w.kube.do(ctx, "GET", "/api/v1/pods?"+query.Encode(), "application/json;as="+kind+";g=meta.k8s.io;v=v1", nil)
}

// list applies the node's pods: what the list does not hold is stopped, what it holds goes on. It sets no limit, which
// would bypass the server's cache.
func (w *podWatch) list(ctx context.Context) error {
	asking, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	answer, err := w.ask(asking, "PartialObjectMetadataList", url.Values{})
	if isStatus(err, http.StatusGone, http.StatusGatewayTimeout) {
		w.version = ""
	}
	if err != nil {
		return err
	}
	defer answer.Close()
	var l object
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
	w.version = l.Metadata.ResourceVersion
	w.ready.Store(true)
	return nil
}

// watch applies changes until the server ends it, which it is asked to do after 5 to 10 minutes, so that the watches
// of many nodes spread; 30 s later it ends in any case. It returns nil when it ended as agreed.
func (w *podWatch) watch(ctx context.Context) error {
	limit := 300 + rand.IntN(301)
	asking, cancel := context.WithTimeout(ctx, time.Duration(limit+30)*time.Second)
	defer cancel()
	answer, err := w.ask(asking, "PartialObjectMetadata",
		url.Values{"watch": {"true"}, "allowWatchBookmarks": {"true"}, "timeoutSeconds": {strconv.Itoa(limit)}})
	if err != nil {
		return err
	}
	defer answer.Close()
	if w.proven {
		w.recovered()
	}
	w.proven = false
	for began, decoder := time.Now(), json.NewDecoder(answer); err == nil; {
		err = w.next(ctx, decoder)
		if err == nil || time.Since(began) >= time.Second {
			w.proven, w.retry = true, requestBackoff
			w.recovered()
		}
	}
	if w.proven && err == io.EOF {
		return nil
	}
	return err
}

// recovered logs that the watch is back, if it was gone.
func (w *podWatch) recovered() {
	if w.complaint != "" {
		w.complaint = ""
		slog.Info("the pods are watched again")
	}
}

// next applies the next event and keeps its resourceVersion. ERROR has none; a BOOKMARK has nothing else.
func (w *podWatch) next(ctx context.Context, decoder *json.Decoder) error {
	var e struct { // a new one each time: decoding leaves alone what an event does not name
		Type   string
		Object object
	}
	if err := decoder.Decode(&e); err != nil {
		return err
	}
	version := e.Object.Metadata.ResourceVersion
	switch {
	case e.Type == "ERROR" || version == "":
		return &statusError{Code: e.Object.Code, Message: cmp.Or(e.Object.Message, "an event has no resourceVersion")}
	case e.Type == "ADDED" || e.Type == "MODIFIED":
		w.apply(ctx, e.Object.pod())
	case e.Type == "DELETED":
		w.forget(e.Object.Metadata.UID)
	}
	w.version = version
	return nil
}

// apply starts, changes or stops a pod's capture as its annotations ask. Annotations that make no sense are told, and
// leave alone what runs. A capture that is replaced ends beside the new one, which waits for the name of its files.
func (w *podWatch) apply(ctx context.Context, p pod) {
	w.applying.Store(time.Now().UnixNano())
	defer w.applying.Store(0)
	p.files, _ = strconv.Atoi(p.value)
	p.filter = strings.TrimSpace(p.filter)
	f := w.captures[p.uid]
	switch {
	case !p.annotated:
		w.forget(p.uid)
		return
	case f == nil:
		f = &followed{stop: func() {}}
		w.captures[p.uid] = f
	case f.pod == p:
		return
	}
	f.pod = p
	switch refusal := w.refusal(ctx, p); {
	case refusal != "" && f.started.files == 0:
		w.tell(p, "Warning", "CaptureInvalid", refusal+"; nothing is captured")
	case refusal != "":
		w.tell(p, "Warning", "CaptureInvalid", refusal+"; what was asked for before goes on as it was")
	case p != f.started:
		f.stop()
		ctx, f.stop = context.WithCancel(ctx)
		f.started = p
		c := &capture{node: w.node, pod: p, told: map[string]time.Time{}}
		w.alive.Go(func() { c.live(ctx) })
	}
}

// forget stops the capture of a pod that is no longer annotated, or gone.
func (w *podWatch) forget(uid string) {
	if f := w.captures[uid]; f != nil {
		f.stop()
		delete(w.captures, uid)
	}
}

// refusal is "", or what of a pod's annotations can't be: what was read, and what is accepted.
func (w *podWatch) refusal(ctx context.Context, p pod) string {
	refuse := func(annotation, value, accepted string) string {
		return fmt.Sprintf("the annotation %s is %q: accepted is %s", annotation, cut(value), accepted)
	}
	isUnprintable := func(r rune) bool { return !unicode.IsPrint(r) }
	switch {
	case p.files < 1 || p.files > w.disk.limit || p.value != strconv.Itoa(p.files): // tcpdump itself takes "5abc" for 5
		return refuse(annotation, p.value,
			"the number of files to rotate through, a plain decimal number from 1 to "+strconv.Itoa(w.disk.limit))
	case p.hasIface && (p.iface == "" || len(p.iface) > 15 || p.iface[0] == '-' || strings.Trim(p.iface, letters+digits+"._-") != ""):
		return refuse(interfaceAnnotation, p.iface,
			"the name of a network interface, or any, at most 15 characters of a-z A-Z 0-9 . _ -, not beginning with -")
	case strings.ContainsFunc(p.filter, isUnprintable) || len(p.filter) > maxFilter:
		return refuse(filterAnnotation, p.filter,
			fmt.Sprintf("a pcap filter expression, a line of printable text of at most %d bytes", maxFilter))
	}
	if complaint := w.compile(ctx, p); complaint != "" {
		return refuse(filterAnnotation, p.filter, "a pcap filter expression, in which hosts and ports are numbers; "+complaint)
	}
	return ""
}

// compile has tcpdump compile a filter, without a device, and returns what it complains of. Where tcpdump can't do it
// now, the capture will tell. No name is looked up on the way: see dnsConfig in daemonset.yaml.
func (w *podWatch) compile(ctx context.Context, p pod) string {
	if p.filter == "" {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	link, output := "EN10MB", &report{listening: func() {}}
	if s, _ := w.processes.find(p); p.iface == "any" || p.iface == "" && s.isHost {
		link = "LINUX_SLL2"
	}
	tcpdump, err := w.start(ctx, nil, "tcpdump", "-y", link, "-d", "--", p.filter)
	if err == nil && output.read(tcpdump, func() {}) != nil {
		return output.complaint
	}
	return ""
}

// ---- A capture, from its start to its last file ----

// capture is one capture of one pod. Only its own goroutine changes it.
type capture struct {
	*node
	pod
	stem    string               // path of its files without digits, /capture-web.pcap; "" while it has no name and no room
	opened  bool                 // tcpdump has captured into these files
	counted string               // what tcpdump counted when it ended last
	told    map[string]time.Time // when each message was told last
	last    string               // the last one of them
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
	began, poll := time.Now(), birthPoll
	for told := false; ctx.Err() == nil; sleep(ctx, poll) {
		_, found := c.processes.find(c.pod)
		waited := time.Since(began)
		switch {
		case found:
			return true
		case waited >= goneTime && c.opened && !told:
			told = true
			c.tell("Normal", "CaptureStopped", "Stopped: "+c.counted+"; the pod's network is gone, the files stay until the annotation "+
				"or the pod goes, or the pod has a new network", 0)
		case waited >= waitingTime && !c.opened && !told:
			told = true
			c.tell("Warning", "CaptureWaiting", "Waiting for the pod's network: it does not run yet, or has ended; the capture starts "+
				"when it has one", 0)
		case waited >= birthTime: // at whole seconds: all that wait look together then, and share one look at /proc
			poll = time.Until(time.Now().Truncate(time.Second).Add(time.Second))
		}
	}
	return false
}

// awaitRoom returns true when the capture has a name and room on the disk, and false when ctx ends first.
func (c *capture) awaitRoom(ctx context.Context) bool {
	for told := false; c.stem == ""; {
		stem, missing, freed := c.disk.take(c.pod)
		if c.stem = stem; stem != "" {
			break
		}
		if missing != "" && !told {
			told = true
			c.tell("Warning", "CaptureWaiting", "Waiting for room: "+missing+"; the capture starts by itself when there is enough", 0)
		}
		select {
		case <-freed:
		case <-time.After(time.Second):
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// explain tells why tcpdump ended although it is still asked for, and returns how long to wait before it is started again.
func (c *capture) explain(err error, retry *backoff) (wait time.Duration) {
	_, hasNetwork := c.processes.find(c.pod)
	switch {
	case errors.Is(err, errMoved) && c.opened:
		c.tell("Normal", "CaptureStopped", "Stopped: "+c.counted+"; the pod has a new network, in which it is captured from now on", 0)
	case errors.Is(err, errMoved), errors.Is(err, errGone): // awaitNetwork tells if it stays so
	case hasNetwork, errors.Is(err, errFull): // else the pod has just ended, which is why tcpdump has
		wait = retry.next(nil)
		c.tell("Warning", "CaptureFailed", err.Error(), wait)
	}
	return wait
}

// clear deletes the files, which no tcpdump writes any more, and gives name and room back.
func (c *capture) clear() {
	if c.stem == "" {
		return
	}
	size, err := removeFiles(c.root, c.stem)
	if err != nil {
		slog.Error("files can't be deleted", "namespace", c.namespace, "pod", c.name, "error", err)
	}
	if c.opened {
		c.tell("Normal", "CaptureStopped", fmt.Sprintf("Stopped: %s; its files (%d bytes) are deleted", c.counted, size), 0)
	}
	c.disk.give(c.stem)
	c.stem, c.opened = "", false
}

// tellStarted is called once tcpdump captures.
func (c *capture) tellStarted(isHost bool, warning string) {
	kind, message := "Normal", "Capturing into "+fileNames(c.stem, c.files)+", rotated at 1 MB, in "+c.podNamespace+"/"+c.podName
	add := func(isSo bool, itsKind, text string) {
		if isSo {
			kind, message = itsKind, message+"; "+text
		}
	}
	// A Warning comes after all that is normal.
	add(c.iface != "", "Normal", "the interface is "+c.iface)
	add(c.filter != "", "Normal", fmt.Sprintf("the filter is %q", cut(c.filter)))
	add(isHost, "Warning", "this pod has the host's network, so the files hold the whole node's traffic")
	add(c.opened, "Warning", "tcpdump began again at the first file, and the packets in that one are lost")
	add(warning != "", "Warning", "tcpdump says: "+warning)
	c.opened = true
	c.tell(kind, "CaptureStarted", message, 0)
}

// tell writes a line of the log and an Event of the pod; what failed is tried again after wait. A message is not repeated
// within repeatTime if it was the last one. If it was not, it is repeated, so that the last Event is true: but not a failure
// if the last one is less than goneTime old at the next try.
func (c *capture) tell(kind, reason, message string, wait time.Duration) {
	now := time.Now()
	isRepeated := now.Sub(c.told[message]) < repeatTime
	if isRepeated && (message == c.last || wait > 0 && now.Add(wait).Sub(c.told[c.last]) < goneTime) {
		return
	}
	c.told[message], c.last = now, message
	if wait > 0 {
		message += fmt.Sprintf("; it is tried again in %v, and then after growing pauses of up to 30s", wait.Round(100*time.Millisecond))
	}
	c.node.tell(c.pod, kind, reason, message)
}

// ---- tcpdump: one run of it ----

// runTcpdump captures in the pod's network, and returns why that ended.
func (c *capture) runTcpdump(ctx context.Context) error {
	running, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	s, tcpdump, err := c.startTcpdump(running)
	if err != nil {
		return err
	}
	output, listens, since := &report{}, false, ""
	if c.opened {
		since = ", since tcpdump began again"
	}
	output.listening = func() {
		if listens = true; ctx.Err() == nil {
			c.tellStarted(s.isHost, output.warning)
		}
	}
	seen, ticks := time.Now(), 0 // ticks are the silent seconds since it was told to end
	err = output.read(tcpdump, func() {
		if running.Err() == nil {
			c.oversee(stop, s, tcpdump, &seen)
		} else if ticks++; ticks == 4 { // it had termGrace, and then SIGKILL
			c.node.tell(c.pod, "Warning", "CaptureFailed", fmt.Sprintf("tcpdump (PID %d) can't be ended: SIGTERM and SIGKILL were "+
				"sent, and it still runs (%v); its files stay until it ends", tcpdump.pid, cmp.Or(tcpdump.kill(), errors.New("no error"))))
		}
	})
	if listens { // one that was killed has counted nothing
		c.counted = cmp.Or(strings.Join(output.counts, ", "), "an unknown number of packets captured") + since
	}
	if running.Err() != nil {
		return context.Cause(running)
	}
	return fmt.Errorf("tcpdump ended by itself (%s)", output.lastWords(err))
}

// oversee stops a tcpdump that should no longer run. seen is when a process of the pod was seen last.
func (c *capture) oversee(stop context.CancelCauseFunc, s sandbox, tcpdump *child, seen *time.Time) {
	current, ok := s, true
	// Nothing has changed while that process is in that network, and tcpdump itself notices the end of eth0.
	if network, _ := os.Readlink(s.dir + "/ns/net"); network != s.network || s.isHost || c.iface != "" {
		current, ok = c.processes.find(c.pod)
	}
	patience := emptyTime
	if !ok && !s.isHost && !slices.Contains(interfaces(fmt.Sprintf("%s/%d", c.proc, tcpdump.pid)), podInterface) {
		patience = lastPackets
	}
	switch {
	case c.disk.isFull():
		stop(fmt.Errorf("%w: the capture stops, and the last packets of its files may be cut", errFull))
	case ok && current.network != s.network:
		stop(errMoved)
	case ok:
		*seen = time.Now()
	case time.Since(*seen) >= patience:
		stop(errGone)
	}
}

// startTcpdump starts tcpdump in the pod's network. ctx ends it.
func (c *capture) startTcpdump(ctx context.Context) (s sandbox, tcpdump *child, err error) {
	s, ok := c.processes.find(c.pod)
	switch {
	case !ok:
		return s, nil, errGone
	case c.disk.isFull():
		return s, nil, errFull
	}
	device := cmp.Or(c.iface, podInterface)
	if s.isHost {
		device = cmp.Or(c.iface, "any")
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
	tcpdump, err = c.start(ctx, network, c.arguments(device)...)
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
		"-W", strconv.Itoa(c.files),
		"-w", c.stem,
		"-U",         // each packet is written as it comes, or a file stays empty until 4 KiB are there
		"-Z", "root", // or it becomes user tcpdump, who may not open the next file in /
		"-p", // not promiscuous: the pod's own packets
		"-i", device,
		// KiB of the kernel's ring. Of packets of 200 bytes at 50,000 and 150,000 a second, the default of 2 MiB lost none
		// and up to 2 %, with 4 to 64 MiB none. Never --immediate-mode: packets are in the file up to a second earlier, but
		// it lost 27 % and 35 %, with 16 MiB 1 % and 9 %.
		"-B", "4096",
	}
	if c.filter != "" {
		arguments = append(arguments, "--", c.filter) // never an option
	}
	return arguments
}

// starter starts a program, with network, if any, as its descriptor 3. When ctx ends the program gets SIGTERM, and after
// termGrace SIGKILL. Its stderr must be read to the end, and then wait be called.
type starter func(ctx context.Context, network *os.File, arguments ...string) (*child, error)

// child is a program that runs.
type child struct {
	pid    int
	stderr interface {
		io.Reader
		SetReadDeadline(time.Time) error
	}
	wait, kill func() error
}

func start(ctx context.Context, network *os.File, arguments ...string) (*child, error) {
	cmd := exec.CommandContext(ctx, arguments[0], arguments[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = termGrace
	cmd.ExtraFiles = []*os.File{network}
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	return &child{cmd.Process.Pid, stderr.(*os.File), cmd.Wait, cmd.Process.Kill}, nil
}

// report is what a tcpdump says on stderr.
type report struct {
	listening func()   // called when it says that it captures
	warning   string   // its first one
	complaint string   // the last thing that it or nsenter complained of
	counts    []string // what it counted, at its end
	rest      string   // a line that has not ended yet
}

// read takes what a program says until it ends, and returns how. After each second of silence it calls tick. Unlike
// waiting for a process, this blocks no thread.
func (r *report) read(program *child, tick func()) error {
	for text := make([]byte, 512); ; {
		program.stderr.SetReadDeadline(time.Now().Add(time.Second))
		n, err := program.stderr.Read(text)
		r.take(string(text[:n]))
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			tick()
		case err != nil:
			return program.wait()
		}
	}
}

func (r *report) take(text string) {
	lines := strings.Split(r.rest+text, "\n")
	last := len(lines) - 1
	r.rest = lines[last][max(0, len(lines[last])-4096):]
	for _, line := range lines[:last] {
		first, _, _ := strings.Cut(line, " ")
		switch {
		case strings.Contains(line, "listening on "):
			r.listening()
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
}

// lastWords says why tcpdump ended: the signal that ended it, what it complained of, or its status.
func (r *report) lastWords(err error) string {
	if exit := new(exec.ExitError); errors.As(err, &exit) && !exit.Exited() {
		return err.Error()
	}
	return cmp.Or(r.complaint, fmt.Sprint(cmp.Or(err, errors.New("exit status 0"))))
}

// ---- Files, and the room for them ----

// disk is the room that all captures share, and the names of their files.
type disk struct {
	config
	limit int // files that all captures together may have

	mu    sync.Mutex
	taken map[string]pod // by stem: whose files have that name, and the room that they need
	freed chan struct{}  // closed when one is given back; then there is a new one
}

// take gives a capture a name and room for its files. It returns the stem; or none, and what is missing, which is "" while
// an earlier capture of the pod, or of one of the same name, has the name. A pod whose name a pod of another namespace has
// gets its UID behind a "_", which is in no pod name. freed is closed when it is worth another try.
func (d *disk) take(p pod) (stem, missing string, freed <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	stem = filepath.Join(d.root, "capture-"+p.name+".pcap")
	special := filepath.Join(d.root, fmt.Sprintf("capture-%s_%.8s.pcap", p.name, p.uid))
	other, isTaken := d.taken[stem]
	if isTaken && other.namespace != p.namespace {
		stem, isTaken = special, false
	}
	if _, isSpecialTaken := d.taken[special]; isSpecialTaken || isTaken { // by an earlier capture, which ends
		return "", "", d.freed
	}
	files := 0
	for _, other := range d.taken {
		files += other.files
	}
	_, written := findFiles(d.root, "")
	unwritten := int64(files)*fileBytes - written // what they may still take
	free, total := space(d.root)
	free -= total/100*d.diskFree + unwritten + fileBytes // one is spare, or isFull would stop captures that have filled theirs
	switch size := int64(p.files) * fileBytes; {
	case files+p.files > d.limit:
		missing = fmt.Sprintf("N=%d is asked for, and %d of the %d files that this node may have are taken", p.files, files, d.limit)
	case free < size:
		missing = fmt.Sprintf("N=%d can take %d bytes, and the disk has %d for them, with %d %% of it left free",
			p.files, size, max(0, free), d.diskFree)
	default:
		d.taken[stem] = p
		return stem, "", nil
	}
	return "", missing, d.freed
}

func (d *disk) give(stem string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.taken, stem)
	close(d.freed)
	d.freed = make(chan struct{})
}

// isFull reports whether the disk has room for not even one file: tcpdump would go on, and cut its files without a word.
func (d *disk) isFull() bool {
	free, _ := space(d.root)
	return free < fileBytes
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

// findFiles returns the paths of a capture's files, or with stem "" of all captures', and their bytes. web's are never
// those of web-2 or web.pcap0.
func findFiles(root, stem string) (paths []string, size int64) {
	all, _ := filepath.Glob(filepath.Join(root, "capture-*.pcap*"))
	for _, path := range all {
		its := strings.TrimRight(path, digits)
		if isMeant := its == stem || stem == "" && strings.HasSuffix(its, ".pcap"); !isMeant {
			continue
		}
		if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() {
			paths = append(paths, path)
			size += info.Size()
		}
	}
	return paths, size
}

// removeFiles deletes what findFiles finds.
func removeFiles(root, stem string) (size int64, err error) {
	paths, size := findFiles(root, stem)
	for _, path := range paths {
		err = errors.Join(err, os.Remove(path))
	}
	return size, err
}

// ---- A pod's network namespace ----

// processes knows the node's processes and the pods that they belong to, whatever the runtime.
type processes struct {
	config
	hostNet  string      // the network of the host's first process
	hostRoot os.FileInfo // and its files

	mu             sync.Mutex
	known          map[string]*process // by folder
	looked, forgot time.Time
}

type process struct {
	pod   string    // UID of the pod that its cgroup names, or ""
	born  uint64    // when it started, in clock ticks since boot
	first time.Time // when it was seen first
	grown bool      // its cgroup was read two seconds after that, or later
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
	return &processes{config: cfg, hostNet: hostNet, hostRoot: hostRoot, known: map[string]*process{}}, err
}

// find returns the network of a pod, by what is known, or after a look. One look serves all who ask within birthPoll.
func (ps *processes) find(p pod) (sandbox, bool) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	s, ok := ps.oldest(p)
	if now := time.Now(); !ok && now.Sub(ps.looked) >= birthPoll {
		ps.look(now)
		ps.looked = time.Now() // its end: it takes longer on a large node
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
	if now, ok := ps.networkOf(s.dir, p); !ok || now.network != s.network {
		file.Close()
		return nil, errors.New("the process that it was found by has ended")
	}
	return file, nil
}

// oldest is the network of the process that started first, of those that are in the pod's network. Containers start after it,
// and may have networks of their own within. The lock is held.
func (ps *processes) oldest(p pod) (s sandbox, ok bool) {
	if p.namespace == ps.podNamespace && p.name == ps.podName { // on cgroup v2 the path of its own cgroup is cut, and names no pod
		return ps.networkOf(ps.proc+"/self", p)
	}
	born := uint64(math.MaxUint64)
	for dir, known := range ps.known {
		if known.pod != p.kubeletUID || known.born >= born {
			continue
		}
		if its, isPods := ps.networkOf(dir, p); isPods {
			s, ok, born = its, true, known.born
		}
	}
	return s, ok
}

// networkOf returns the network of a process, if it is the pod's: not an empty one (gVisor's gofer) or one that is still being
// set up, nor the host's through a process that has the host's files as well, which is the runtime's (CRI-O's monitor, or
// one that is still to become the pod's).
func (ps *processes) networkOf(dir string, p pod) (sandbox, bool) {
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
// so its cgroup is read again until it is a pod's, or two seconds have passed. All are forgotten now and then: PIDs become others'.
// The lock is held.
func (ps *processes) look(now time.Time) {
	if now.Sub(ps.forgot) >= 10*time.Second {
		clear(ps.known)
		ps.forgot = now
	}
	names, _ := filepath.Glob(ps.proc + "/[1-9]*")
	for _, dir := range names {
		known := ps.known[dir]
		if known == nil {
			known = &process{first: now}
			ps.known[dir] = known
		}
		if known.pod == "" && !known.grown {
			known.grown = now.Sub(known.first) >= 2*time.Second
			known.pod = podOf(readFile(dir + "/cgroup"))
			known.born = startTime(readFile(dir + "/stat"))
		}
	}
}

// podOf is the UID of the pod that a cgroup names: cgroupfs has a folder pod<UID>, systemd one
// kubepods-burstable-pod<UID with _ for ->.slice. The first one counts: a container may name folders below its own as it
// likes.
func podOf(cgroup string) string {
	for name := range strings.FieldsFuncSeq(cgroup, func(r rune) bool { return r == '/' || r == '\n' }) {
		name = strings.TrimSuffix(name, ".slice")
		name = strings.ReplaceAll(name[strings.LastIndex(name, "-pod")+1:], "_", "-")
		uid, ok := strings.CutPrefix(name, "pod")
		if ok && uid != "" && strings.Trim(uid, digits+"abcdef-") == "" {
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
	for line := range strings.Lines(readFile(dir + "/net/dev")) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			names = append(names, strings.TrimSpace(name))
		}
	}
	return names
}

// readFile is a file of /proc as text, "" when its process has ended.
func readFile(path string) string {
	text, _ := os.ReadFile(path)
	return string(text)
}

// ---- Events ----

// event is an Event of a pod that is still to be posted.
type event struct {
	pod
	kind, reason, message string
	at                    time.Time
}

// tell writes a line of the log and has an Event posted. It never waits.
func (n *node) tell(p pod, kind, reason, message string) {
	level := map[string]slog.Level{"Normal": slog.LevelInfo, "Warning": slog.LevelWarn}[kind]
	slog.Log(context.Background(), level, reason, "namespace", p.namespace, "pod", p.name, "n", cut(p.value), "message", message)
	select {
	case n.news <- &event{p, kind, reason, message, time.Now()}:
	default:
		slog.Warn("an Event is lost, too many wait", "namespace", p.namespace, "pod", p.name)
	}
}

// record posts Events up to the end of them, each again and again while the API server is away, until ctx ends. One that
// is refused is dropped, which is normal (403) in a namespace that is being deleted.
func (n *node) record(ctx context.Context) {
	for e := <-n.news; e != nil && ctx.Err() == nil; e = <-n.news {
		err := n.post(ctx, e)
		for retry := requestBackoff; err != nil && !isRefusal(err) && ctx.Err() == nil; err = n.post(ctx, e) {
			sleep(ctx, retry.next(err))
		}
		if err != nil {
			slog.Warn("an Event is not posted", "namespace", e.namespace, "pod", e.name, "error", err)
		}
	}
}

func (n *node) post(ctx context.Context, e *event) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	type fields = map[string]any
	at := e.at.UTC().Format(time.RFC3339)
	body, _ := json.Marshal(fields{ // strings never fail
		"apiVersion": "v1", "kind": "Event",
		// Times have seconds alone: by their names kubectl lists those of a second in their order, while a pod has few.
		"metadata":       fields{"namespace": e.namespace, "generateName": fmt.Sprintf("packetcapture-%x-", e.at.UnixNano())},
		"involvedObject": fields{"apiVersion": "v1", "kind": "Pod", "namespace": e.namespace, "name": e.name, "uid": e.kubeletUID},
		"type":           e.kind, "reason": e.reason, "message": e.message, "count": 1,
		"source":         fields{"component": "packetcapture", "host": n.nodeName},
		"firstTimestamp": at, "lastTimestamp": at,
	})
	answer, err := n.kube.do(ctx, "POST", "/api/v1/namespaces/"+e.namespace+"/events", "application/json", body)
	if err == nil {
		answer.Close()
	}
	return err
}

// ---- The API server ----

// object is what is read of the API's types.
type object struct {
	Metadata struct {
		Namespace, Name, UID, ResourceVersion string
		Annotations                           map[string]string
	}
	Items   []object // of a list
	Code    int      // of a Status, the object of ERROR
	Message string
}

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
	dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second},
		Config: &tls.Config{RootCAs: roots, NextProtos: []string{"h2", "http/1.1"}}}
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
	status.retryAfter = time.Duration(min(max(seconds, 0), 60)) * time.Second
	return nil, status
}

// statusError is an answer of the API server other than 2xx, or an ERROR event of a watch.
type statusError struct {
	Code       int
	Message    string
	retryAfter time.Duration // the least to wait, if the server says so; a minute at most, whatever it says
}

func (e *statusError) Error() string {
	return fmt.Sprintf("%d %s: %s", e.Code, http.StatusText(e.Code), e.Message)
}

func isStatus(err error, codes ...int) bool {
	var status *statusError
	return errors.As(err, &status) && slices.Contains(codes, status.Code)
}

// isRefusal reports whether the API server has said no for good.
func isRefusal(err error) bool {
	return errors.As(err, new(*statusError)) && !isStatus(err, 401, 429, 502, 503, 504)
}

// ---- cat: the files of a capture as one pcap ----

// command runs `packetcapture cat`, in the pod whose files it reads.
func command(ctx context.Context, arguments []string, root string, stdout, stderr io.Writer) error {
	follow := len(arguments) == 3 && arguments[1] == "-f"
	name := arguments[len(arguments)-1]
	if arguments[0] != "cat" || len(arguments) != 2 && !follow || name == "" || strings.HasPrefix(name, "-") {
		return fmt.Errorf("%q is no command: accepted is cat [-f] <pod name or file>", cut(strings.Join(arguments, " ")))
	}
	stem, err := findStem(root, name)
	if err != nil {
		return err
	}
	j := &joiner{stdout: stdout, stderr: stderr}
	j.join(ctx, stem, follow)
	noun := "packets"
	if j.packets == 1 {
		noun = "packet"
	}
	fmt.Fprintf(stderr, "%d %s, %d bytes\n", j.packets, noun, j.bytes)
	return j.err
}

// untilStdinEnds is how cat -f notices that its `kubectl exec -i` has gone: of stdout the runtime does not tell it, and a
// write may then wait for ever. A stdin that ends at once says nothing: it is /dev/null at the other end.
func untilStdinEnds(ctx context.Context) context.Context {
	ctx, stop := context.WithCancel(ctx)
	go func() {
		began := time.Now()
		if io.Copy(io.Discard, os.Stdin); time.Since(began) > time.Second {
			stop()
			time.Sleep(termGrace)
			os.Exit(1)
		}
	}()
	return ctx
}

// findStem is the path, without digits, of the files of the capture that is meant by a pod's name, a file or a stem.
func findStem(root, name string) (string, error) {
	paths, _ := findFiles(root, "")
	file := strings.TrimRight(filepath.Base(name), digits)
	var all, found []string
	for _, path := range paths {
		stem := strings.TrimRight(path, digits)
		all = append(all, stem)
		base := filepath.Base(stem)
		if base == file || base == "capture-"+name+".pcap" || strings.HasPrefix(base, "capture-"+name+"_") {
			found = append(found, stem)
		}
	}
	slices.Sort(all)
	slices.Sort(found)
	all, found = slices.Compact(all), slices.Compact(found)
	switch len(found) {
	case 0:
		return "", fmt.Errorf("%q is not captured here; what is: %s", cut(name), cmp.Or(strings.Join(all, " "), "nothing"))
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("pods of several namespaces have the name %s, say which file: %s", name, strings.Join(found, " "))
}

// joiner writes the files of a capture as one pcap. tcpdump writes the next file over the oldest: so a file is known by the
// time of its first packet. All numbers in a file are of the node's byte order.
type joiner struct {
	stdout, stderr io.Writer
	header         []byte // the same in all files
	path           string // of the file that is read; "" before the first, and if it is gone
	first          uint64 // the time of its first packet
	offset         int64  // how far it has been read
	packets, bytes int
	err            error // that ended it
}

const (
	pcapHeader   = 24 // bytes of a file's header
	packetHeader = 16 // and of a packet's: seconds, their fraction, captured length, length; 4 bytes each
)

// join writes what the files hold, and with follow what comes, until they are deleted: that is how a capture ends.
func (j *joiner) join(ctx context.Context, stem string, follow bool) {
	for paths := []string{stem}; len(paths) > 0 && j.err == nil && ctx.Err() == nil; {
		paths, _ = findFiles(filepath.Dir(stem), stem)
		newer := j.newer(paths)
		j.read() // to its end, if there are newer ones
		for order := slices.Sorted(maps.Keys(newer)); len(order) > 0 && ctx.Err() == nil; order = order[1:] {
			j.path, j.first, j.offset = newer[order[0]], order[0], pcapHeader
			j.read()
		}
		if !follow {
			return
		}
		sleep(ctx, time.Duration(50+len(paths))*time.Millisecond) // a look at a file takes some 20 µs
	}
}

// newer are the files that come after the one that is read, by the time of their first packet.
func (j *joiner) newer(paths []string) map[uint64]string {
	newer := map[uint64]string{}
	for _, path := range paths {
		if first := j.look(path); first > j.first {
			newer[first] = path
		}
	}
	return newer
}

// look returns the time of a file's first packet, the seconds in the upper half, and 0 while it has none. The first header
// is written.
func (j *joiner) look(path string) uint64 {
	head := readAt(path, 0, pcapHeader+packetHeader)
	switch {
	case len(head) < pcapHeader:
		return 0
	case j.header == nil:
		j.header = head[:pcapHeader]
		j.bytes, j.err = j.stdout.Write(j.header)
	case !bytes.Equal(head[:pcapHeader], j.header):
		j.err = fmt.Errorf("%s is not of the same capture: its header differs", path)
		return 0
	}
	if len(head) < pcapHeader+packetHeader {
		return 0
	}
	return uint64(binary.NativeEndian.Uint32(head[24:]))<<32 | uint64(binary.NativeEndian.Uint32(head[28:]))
}

// read writes the whole packets of the file that are new, unless it has become another one meanwhile.
func (j *joiner) read() {
	if j.path == "" || j.err != nil {
		return
	}
	data := readAt(j.path, j.offset, math.MaxInt32)
	if j.look(j.path) != j.first {
		if _, err := os.Stat(j.path); err == nil || len(data) > 0 || j.offset == pcapHeader { // else the capture has ended
			fmt.Fprintf(j.stderr, "packets may be missing: %s was overwritten or deleted\n", j.path)
		}
		j.path = ""
		return
	}
	end := 0
	for len(data)-end >= packetHeader {
		size := packetHeader + int(binary.NativeEndian.Uint32(data[end+8:]))
		if len(data)-end < size {
			break
		}
		end += size
		j.packets++
	}
	n, err := j.stdout.Write(data[:end])
	j.offset, j.bytes, j.err = j.offset+int64(end), j.bytes+n, err
}

// readAt reads a part of a file, and less at its end. It is closed at once: a deleted file that is open takes room.
func readAt(path string, offset, length int64) []byte {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	data, _ := io.ReadAll(io.NewSectionReader(file, offset, length))
	return data
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

// sleep waits, but not longer than ctx.
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
