// Packetcapture captures the packets of annotated Pods with tcpdump, on every node of a Kubernetes cluster.
//
// It runs as a DaemonSet and watches the Pods of its own node. A Pod that is annotated
//
//	kubectl annotate pod web tcpdump.antrea.io="5"
//
// is captured into five rotating files of 1,000,000 bytes, /capture-web.pcap0 to /capture-web.pcap4, in the
// container of the packetcapture Pod of that node. A changed number starts the capture again; when the annotation
// or the Pod goes, the capture stops and its files are deleted. A second annotation narrows what is captured:
//
//	kubectl annotate pod web tcpdump.antrea.io/filter="tcp port 80"
//
// Events on the Pod (kubectl describe pod) tell what happens.
//
// The environment configures it:
//
//	NODE_NAME                 the node whose Pods are captured; required
//	KUBERNETES_SERVICE_HOST   the API server; required, Kubernetes sets both
//	KUBERNETES_SERVICE_PORT
//	POD_NAME                  this Pod's name, for the Events; default the host name
//	DISK_LIMIT                bytes of disk that the container may take, its files and its log; default no limit
//	HEALTH_ADDR               where /healthz and /readyz are served; default ":8080"
//	LOG_LEVEL                 debug, info, warn or error; default info
//
// One goroutine owns the state, (*controller).loop. Whatever happens reaches it as a message: a change of the
// watch, the report of a child, a timer. After each one it compares what the annotations ask for with what runs,
// and does what is missing. Everything else only carries messages to it or away from it.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
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
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
)

const (
	annotation       = "tcpdump.antrea.io"
	filterAnnotation = "tcpdump.antrea.io/filter"

	// The UID that the kubelet gave to a static Pod, which it reads from a file; the API's is another. The second holds the
	// same and can't be added to a Pod: with the first alone, who may annotate one Pod could have another captured.
	hashAnnotation   = "kubernetes.io/config.hash"
	mirrorAnnotation = "kubernetes.io/config.mirror"

	// Of a Pod only the metadata is asked for: it holds the annotations, and spec and status are the larger part.
	metadata     = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
	metadataList = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

	// podInterface is the only name that containerd and CRI-O let a CNI give the Pod's interface. Left to choose,
	// tcpdump takes "any" while there is none yet, and then never notices that the Pod is gone.
	podInterface = "eth0"

	// fileBytes is the most that one file takes: -C 1 is 1,000,000 bytes in every version of tcpdump, checked before
	// a packet is written, and a packet is at most 262,144 bytes (the default -s) behind a header of 16.
	fileBytes = 1_000_000 + 262_144 + 16
	logBytes  = 64 << 20      // kept from DISK_LIMIT for the container's log: the kubelet's default is 5 times 10 MiB
	maxN      = math.MaxInt32 // tcpdump reads -W with atoi into an int
	maxFilter = 4096          // bytes; Linux takes no argument over 128 KiB

	birthPoll  = 25 * time.Millisecond   // how often a new Pod's sandbox is looked for: containers start 100 ms after it
	noNetwork  = 30 * time.Second        // how long a Pod may have no network before that is told
	slowPoll   = time.Second             // how often room is looked for, and a sandbox that was lost
	sweepPoll  = 10 * time.Second        // how often every process is looked at, while a sandbox is looked for
	termGrace  = 2 * time.Second         // from SIGTERM to SIGKILL
	exitGrace  = 3500 * time.Millisecond // for all captures to end when the program is told to, of 5 s in all
	flushGrace = time.Second             // for the last Events, after that
	backoffMax = 30 * time.Second
	repeatMax  = 5 * time.Minute // an Event that repeats is counted up for this long at most
)

var (
	restartBackoff = backoff{least: 125 * time.Millisecond, most: 250 * time.Millisecond} // of tcpdump
	// Of requests: an API server that loses 5,000 nodes at once is to see fewer than 500 requests a second from then on.
	// So the first wait spreads the nodes over 30 s, and the later ones, of 27 to 30 s, keep them spread (TestHerd).
	requestBackoff = backoff{least: 800 * time.Millisecond, most: backoffMax}
	// Until the program has watched for the first time: nodes start one by one, and nothing is captured yet.
	startBackoff = backoff{least: 800 * time.Millisecond, most: 1600 * time.Millisecond}
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	cfg, err := readConfig(os.Getenv)
	if err == nil {
		err = run(ctx, cfg)
	}
	if err != nil {
		slog.Error("packetcapture can't run", "error", err)
		os.Exit(1)
	}
}

// run is the program. It returns when it can't start, or when ctx has ended and every capture is stopped.
func run(ctx context.Context, cfg config) error {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.logLevel})))
	c, err := newController(cfg)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", cfg.health)
	if err != nil {
		return fmt.Errorf("HEALTH_ADDR %q: %w", cfg.health, err)
	}
	defer listener.Close()
	slog.Info("packetcapture starts", "node", cfg.node, "api", cfg.api, "diskLimit", cfg.limit)
	go (&http.Server{Handler: c.health(), ReadHeaderTimeout: 5 * time.Second}).Serve(listener)
	go c.watch.run(ctx)
	recording, stopRecording := context.WithCancel(context.Background())
	recorded := make(chan struct{})
	go func() { c.recorder.run(recording); close(recorded) }()
	c.loop(ctx)
	stopRecording()
	<-recorded
	slog.Info("packetcapture ends")
	return nil
}

// config is what the program is told from outside; the folders are other ones in tests.
type config struct {
	node, pod, namespace string // this Pod's
	api, health          string
	account              string // folder with the service account's token, ca.crt and namespace
	proc                 string // where the host's processes are
	root                 string // folder that the files land in
	limit                int64  // bytes that the files may take together
	logLevel             slog.Level
}

// readConfig names what is missing or wrong: none of it can mend itself while the program runs.
func readConfig(getenv func(string) string) (cfg config, err error) {
	// Without a node, spec.nodeName= would select the Pods that no node has.
	for _, name := range []string{"NODE_NAME", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"} {
		if getenv(name) == "" {
			return cfg, fmt.Errorf("%s is empty: it must be set, as it is by daemonset.yaml and Kubernetes", name)
		}
	}
	hostname, _ := os.Hostname()
	cfg = config{
		node: getenv("NODE_NAME"), pod: cmp.Or(getenv("POD_NAME"), hostname), proc: "/proc", root: "/",
		api:     "https://" + net.JoinHostPort(getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")),
		account: "/var/run/secrets/kubernetes.io/serviceaccount",
		limit:   math.MaxInt64, health: cmp.Or(getenv("HEALTH_ADDR"), ":8080"),
	}
	if limit := getenv("DISK_LIMIT"); limit != "" {
		if cfg.limit, err = strconv.ParseInt(limit, 10, 64); err != nil || cfg.limit <= logBytes {
			return cfg, fmt.Errorf("DISK_LIMIT is %q: it must be a number of bytes above %d", limit, logBytes)
		}
		cfg.limit -= logBytes
	}
	if level := getenv("LOG_LEVEL"); level != "" {
		if err := cfg.logLevel.UnmarshalText([]byte(level)); err != nil {
			return cfg, fmt.Errorf("LOG_LEVEL is %q: it must be debug, info, warn or error", level)
		}
	}
	return cfg, nil
}

// ---- The watch: a list, then its changes, for as long as the program runs ----

// pod is what the program keeps of a Pod: who it is, and what its annotations say, unchecked.
type pod struct {
	namespace, name, uid string
	kubeletUID           string // names its cgroups, and its Events: a static Pod's is not the API's UID
	annotated            bool
	value, filter        string
}

// change is a message of the watch: the annotated Pods of a whole list, or one Pod that changed or is gone.
type change struct {
	kind string // LISTED, or as in the API: ADDED, MODIFIED, DELETED
	pods []pod
}

// podWatch follows the node's Pods. It is in one of two states: it must list, or (fresh) it may watch from version.
// A list makes it fresh, and 410 Gone, which comes as an answer or as an event, makes it list again: the server no longer
// has the history since then. Any trouble is waited out, so that many nodes don't return at once, and the watch goes on
// from version: the captures never notice.
type podWatch struct {
	kube      *kube
	node      string
	changes   chan<- change
	version   string // resourceVersion of the last list or event, opaque: a place in the API's history; "0" at first: any
	fresh     bool
	known     map[string]pod // the annotated Pods, by namespace/name, as they were sent
	retry     backoff
	complaint string // the last error that was logged: nothing is said twice
}

func (w *podWatch) run(ctx context.Context) {
	for ctx.Err() == nil {
		next, doing := w.list, "listing pods"
		if w.fresh {
			next, doing = w.watch, "watching pods"
		}
		err := next(ctx)
		if err == nil || ctx.Err() != nil {
			continue
		}
		if isStatus(err, http.StatusGone) {
			w.fresh = false
		}
		cause := err.Error()
		if network := new(net.OpError); errors.As(err, &network) {
			cause = network.Err.Error() // without the port, which differs each time
		}
		wait := w.retry.next(err)
		if isStatus(err, http.StatusForbidden) { // only a person can mend it
			wait = backoffMax + wait/10
		}
		if w.complaint != cause {
			w.complaint = cause
			slog.Warn("the Pods can't be watched, captures go on", "error", fmt.Errorf("%s: %w", doing, err), "retryIn", wait)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// list sends the annotated Pods of the node. A version that the server can't serve is dropped, so that the next try
// reads what is stored. It never sets a limit, which would bypass the server's cache.
func (w *podWatch) list(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	query := url.Values{"fieldSelector": {"spec.nodeName=" + w.node}}
	if w.version != "" {
		query.Set("resourceVersion", w.version)
	}
	all := change{kind: "LISTED"}
	for {
		page, err := w.page(ctx, query, &all.pods)
		if isStatus(err, http.StatusGone, http.StatusGatewayTimeout) {
			w.version = ""
		}
		if err != nil {
			return err
		}
		if page.Continue == "" {
			slog.Debug("listed", "annotated", len(all.pods), "resourceVersion", page.ResourceVersion)
			if err := w.send(ctx, all); err != nil {
				return err
			}
			w.known = map[string]pod{}
			for _, p := range all.pods {
				w.known[p.namespace+"/"+p.name] = p
			}
			w.version, w.fresh = page.ResourceVersion, true
			return nil
		}
		query.Del("resourceVersion") // the token has its own
		query.Set("continue", page.Continue)
	}
}

// page appends a page's annotated Pods. It reads them one by one: of a list of 10 MB only these take memory.
func (w *podWatch) page(ctx context.Context, query url.Values, annotated *[]pod) (page listMetadata, err error) {
	response, err := w.kube.do(ctx, "GET", "/api/v1/pods?"+query.Encode(), metadataList, nil)
	if err != nil {
		return page, err
	}
	defer response.Body.Close()
	decoder := json.NewDecoder(response.Body)
	begin, err := decoder.Token()
	if err == nil && begin != json.Delim('{') {
		err = fmt.Errorf("the list begins with %v", begin)
	}
	for err == nil && decoder.More() {
		key, _ := decoder.Token() // what is wrong with it, the next call says
		switch key {
		case "metadata":
			err = decoder.Decode(&page)
		case "items":
			err = readItems(decoder, annotated)
		default:
			err = decoder.Decode(new(json.RawMessage))
		}
	}
	if err == nil {
		_, err = decoder.Token() // its end: a list that is cut is none
	}
	if err == nil && page.ResourceVersion == "" {
		err = errors.New("the list has no resourceVersion")
	}
	return page, err
}

func readItems(decoder *json.Decoder, annotated *[]pod) error {
	begin, err := decoder.Token()
	switch {
	case err != nil || begin == nil: // null, when there are none
		return err
	case begin != json.Delim('['):
		return fmt.Errorf("the list's items begin with %v", begin)
	}
	for decoder.More() {
		var o object
		if err := decoder.Decode(&o); err != nil {
			return err
		}
		if p := o.pod(); p.annotated {
			*annotated = append(*annotated, p)
		}
	}
	_, err = decoder.Token() // its end
	return err
}

// watch reads changes until the server ends it, which it is asked to do after 5 to 10 minutes, so that the watches of
// many nodes spread; 30 s later it ends in any case. It returns nil when it ended as agreed.
func (w *podWatch) watch(ctx context.Context) error {
	limit := 300 + rand.IntN(301)
	ctx, cancel := context.WithTimeout(ctx, time.Duration(limit+30)*time.Second)
	defer cancel()
	query := url.Values{
		"fieldSelector": {"spec.nodeName=" + w.node}, "watch": {"true"}, "resourceVersion": {w.version},
		"allowWatchBookmarks": {"true"}, "timeoutSeconds": {strconv.Itoa(limit)},
	}
	response, err := w.kube.do(ctx, "GET", "/api/v1/pods?"+query.Encode(), metadata, nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	slog.Debug("watching", "resourceVersion", w.version, "seconds", limit)
	began, proven := time.Now(), false
	for decoder := json.NewDecoder(response.Body); err == nil; {
		var e watchEvent
		if err = decoder.Decode(&e); err == nil {
			err = w.heed(ctx, e)
			proven = proven || err == nil
		}
	}
	// A mere 200 proves nothing: a server that accepts and closes must not be asked without end.
	if proven = proven || time.Since(began) >= time.Second; proven {
		w.retry = requestBackoff
	}
	switch {
	case err != io.EOF:
		return err
	case !proven:
		return errors.New("it ended within a second without an event")
	}
	return nil
}

// heed passes an event on and keeps its resourceVersion. ERROR has none; a BOOKMARK has nothing else.
func (w *podWatch) heed(ctx context.Context, e watchEvent) error {
	o := &e.Object
	if e.Type == "ERROR" {
		return &statusError{Code: o.Code, Message: o.Message}
	}
	version := o.Metadata.ResourceVersion
	if version == "" {
		return errors.New("an event has no resourceVersion")
	}
	slog.Debug("event", "type", e.Type, "namespace", o.Metadata.Namespace, "pod", o.Metadata.Name, "resourceVersion", version)
	if e.Type != "BOOKMARK" {
		if err := w.pass(ctx, e.Type, o.pod()); err != nil {
			return err
		}
	}
	if w.version = version; w.complaint != "" {
		w.complaint = ""
		slog.Info("the Pods are watched again")
	}
	return nil
}

// pass sends a change on if it is about a capture. Most are not: the kubelet's, of the status.
func (w *podWatch) pass(ctx context.Context, kind string, p pod) error {
	name := p.namespace + "/" + p.name
	known, isKnown := w.known[name]
	stays := p.annotated && kind != "DELETED"
	if stays && p == known || !stays && !isKnown {
		return nil
	}
	if err := w.send(ctx, change{kind, []pod{p}}); err != nil {
		return err
	}
	switch {
	case stays:
		w.known[name] = p
	case kind != "DELETED" || p.uid == known.uid: // it may be a predecessor that is gone
		delete(w.known, name)
	}
	return nil
}

func (w *podWatch) send(ctx context.Context, c change) error {
	select {
	case w.changes <- c:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

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
	listMetadata struct{ ResourceVersion, Continue string }
	watchEvent   struct {
		Type   string
		Object object
	}
)

func (o *object) pod() pod {
	m := &o.Metadata
	kubeletUID := m.UID
	if hash := m.Annotations[hashAnnotation]; hash != "" && hash == m.Annotations[mirrorAnnotation] {
		kubeletUID = hash
	}
	value, annotated := m.Annotations[annotation]
	annotated = annotated && m.UID != "" && !strings.Contains(m.Name, "/") // these become paths
	return pod{
		namespace: m.Namespace, name: m.Name, uid: m.UID, kubeletUID: kubeletUID,
		annotated: annotated, value: value, filter: m.Annotations[filterAnnotation],
	}
}

// ---- The state, and the one goroutine that owns it ----

// request is what an annotation asks for. The zero request asks for nothing.
type request struct {
	n      int
	filter string
}

// bytes is the most that the files of the request can take.
func (r request) bytes() int64 { return int64(r.n) * fileBytes }

// capture is an annotated Pod, or one whose capture is still to be cleared away. In reconcile, what is asked for
// meets what there is. Its life:
//
//	asked for (want), given room and a name for its files (have), its sandbox is looked for (due),
//	tcpdump is started (cmd) and says that it listens (started), is told to stop (killAt),
//	has exited (cmd is nil again), its files are deleted and its room is free (have is zero again)
//
// tcpdump that exits by itself goes back to where the sandbox is looked for.
type capture struct {
	pod
	want    request
	invalid string // why the annotation makes no sense, while it does not
	refused bool   // tcpdump does not take the filter: nothing is tried until the annotation changes
	asked   int    // its place among those that wait for room
	waiting bool   // it waits for room, or for the Pod's network, and that was told

	grant
	due    time.Time // when its sandbox is looked for
	cmd    *exec.Cmd // nsenter, which becomes tcpdump; nil when none runs
	onHost bool      // it captures the host's network
	killAt time.Time // when SIGKILL follows the SIGTERM that was sent; zero: none was
	keep   bool      // its files stay when it has been stopped
	retry  backoff
	said   string // the last line of the log about it
}

// grant is the room that a capture was given on the disk, and what became of it.
type grant struct {
	have    request   // what it was given for
	stem    string    // the path of the files without digits: /capture-web.pcap
	since   time.Time // when it was given
	started bool      // tcpdump has captured into the files
	output  *output   // what the last child said
	failure string    // why it ended, until that is told
	full    bool      // it was stopped because the disk is full
}

// controller owns the captures, in loop. Its functions are os/exec's, and other ones in tests.
type controller struct {
	config
	watch     *podWatch
	recorder  *recorder
	sandboxes *sandboxes
	captures  map[string]*capture // by Pod UID: a Pod that is recreated under its name is another Pod
	asked     int                 // how often something was asked for
	ending    time.Time           // when the program ends whatever a child does; zero: it was not told to

	changes chan change
	inbox   chan func()   // what other goroutines have to say; loop runs it
	over    chan struct{} // closed when nobody listens to the inbox any more
	ready   atomic.Bool   // the first list is reconciled

	start  func(*exec.Cmd) (stderr io.Reader, err error)
	wait   func(*exec.Cmd) error // when stderr has ended
	signal func(*exec.Cmd, os.Signal) error
}

func newController(cfg config) (*controller, error) {
	k, err := newKube(cfg.api, cfg.account)
	if err != nil {
		return nil, err
	}
	namespace, err := os.ReadFile(filepath.Join(cfg.account, "namespace"))
	if err != nil {
		return nil, fmt.Errorf("the service account's namespace: %w", err)
	}
	cfg.namespace = string(namespace)
	sandboxes, err := newSandboxes(cfg.proc)
	if err != nil {
		return nil, fmt.Errorf("the host's namespaces, which need hostPID and CAP_SYS_PTRACE: %w", err)
	}
	leftover, _ := findFiles(cfg.root, isCapture)
	if err := removeFiles(leftover); err != nil {
		return nil, fmt.Errorf("deleting the files of an earlier run: %w", err)
	}
	changes := make(chan change, 1024) // so that the watch never waits for a start or a stop
	return &controller{
		config:    cfg,
		watch:     &podWatch{kube: k, node: cfg.node, changes: changes, version: "0", retry: startBackoff},
		recorder:  newRecorder(k, cfg.node),
		sandboxes: sandboxes, captures: map[string]*capture{},
		changes: changes, inbox: make(chan func()), over: make(chan struct{}),
		start: start, wait: (*exec.Cmd).Wait,
		signal: func(cmd *exec.Cmd, s os.Signal) error { return cmd.Process.Signal(s) },
	}, nil
}

// loop is where everything that happens arrives. It returns when ctx has ended and the captures are cleared away.
func (c *controller) loop(ctx context.Context) {
	defer close(c.over)
	changes, done, isListed := c.changes, ctx.Done(), false
	timer := time.NewTimer(time.Hour)
	for {
		select {
		case change := <-changes:
			c.apply(change)
			isListed = isListed || change.kind == "LISTED"
		case say := <-c.inbox:
			say()
		case <-timer.C:
		case <-done:
			changes, done = nil, nil
			c.end()
		}
		wait := c.reconcile(time.Now())
		c.ready.Store(isListed)
		if !c.ending.IsZero() && (len(c.captures) == 0 || !time.Now().Before(c.ending)) {
			return
		}
		timer.Reset(wait)
	}
}

// say has loop run f: so other goroutines reach the state.
func (c *controller) say(f func()) {
	select {
	case c.inbox <- f:
	case <-c.over:
	}
}

// end has all captures stopped, side by side.
func (c *controller) end() {
	slog.Info("packetcapture is told to end", "captures", len(c.captures))
	c.ending = time.Now().Add(exitGrace)
	for _, p := range c.captures {
		p.release()
	}
}

// apply takes over what the watch says. A list is compared: what it does not hold is gone, what it holds goes on.
func (c *controller) apply(ch change) {
	stays := map[string]bool{}
	for _, p := range ch.pods {
		stays[p.uid] = p.annotated && ch.kind != "DELETED"
		if stays[p.uid] {
			c.ask(p)
		}
	}
	for uid, p := range c.captures {
		about := ch.kind == "LISTED" // or of this Pod, or of one that was recreated under its name
		for _, other := range ch.pods {
			isName := other.name == p.name && other.namespace == p.namespace
			about = about || other.uid == uid || isName && ch.kind != "DELETED"
		}
		if about && !stays[uid] {
			p.release()
		}
	}
}

// ask notes what a Pod's annotations ask for. If they make no sense, what they asked for before stays.
func (c *controller) ask(by pod) {
	p := c.captures[by.uid]
	if p == nil {
		p = &capture{retry: restartBackoff}
		c.captures[by.uid] = p
	}
	p.pod = by
	want, err := parseRequest(p.value, p.filter)
	switch {
	case err == nil && want != p.want:
		c.asked++
		p.want, p.asked, p.invalid, p.waiting, p.refused = want, c.asked, "", false, false
		p.retry.failures = 0
	case err == nil:
		p.invalid = ""
	case p.invalid != err.Error():
		p.invalid = err.Error()
		c.tell(p, "Warning", "CaptureInvalid", "%s", p.invalid)
	}
}

// release notes that nothing is asked for any more.
func (p *capture) release() { p.want, p.invalid = request{}, "" }

// parseRequest says what it read and what is accepted when the annotations make no sense. tcpdump itself would take
// "5abc" for 5.
func parseRequest(value, filter string) (request, error) {
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil || n < 1 || n > maxN || value != strconv.FormatInt(n, 10) {
		return request{}, fmt.Errorf("the annotation %s is %.64q: accepted is the number of files to rotate through, "+
			"a plain decimal number from 1 to %d", annotation, value, maxN)
	}
	unprintable := func(r rune) bool { return !unicode.IsPrint(r) }
	if strings.ContainsFunc(filter, unprintable) || len(filter) > maxFilter {
		return request{}, fmt.Errorf("the annotation %s is %.64q (%d bytes): accepted is a pcap filter "+
			"expression, a line of printable text of at most %d bytes", filterAnnotation, filter, len(filter), maxFilter)
	}
	return request{int(n), filter}, nil
}

// reconcile compares what is asked for with what there is, and does what is missing. It may be called at any time,
// and returns after how long it must be called again if nothing happens before.
func (c *controller) reconcile(now time.Time) (wait time.Duration) {
	for uid, p := range c.captures {
		if p.cmd != nil && (p.want != p.have || !p.killAt.IsZero()) {
			c.stop(p, now)
		} else if p.cmd == nil && p.want != p.have {
			c.clear(p)
		}
		if p.want == (request{}) && p.have == (request{}) && p.invalid == "" {
			delete(c.captures, uid)
		}
	}
	c.admit(now)
	free := freeBytes(c.root) // full: not even one file fits, nor what the files may still grow
	full := free < fileBytes && free < c.unwritten()
	c.launch(now, full)
	wait = time.Hour
	for _, p := range c.captures {
		if full && p.cmd != nil && p.killAt.IsZero() {
			c.tell(p, "Warning", "CaptureFailed", "The disk is full: the capture stops, and the last packets of its files may "+
				"be cut; it is started again, at the first file, when there is room")
			p.full, p.keep = true, true
			c.stop(p, now)
		}
		wait = min(wait, slowPoll) // for room on the disk, or a disk that fills up
		for _, at := range []time.Time{p.due, p.killAt, c.ending} {
			if at.After(now) {
				wait = min(wait, at.Sub(now))
			}
		}
	}
	return wait
}

// stop sends SIGTERM, and SIGKILL to a child that does not heed it. Its files go when it has exited, never before.
func (c *controller) stop(p *capture, now time.Time) {
	switch {
	case p.killAt.IsZero():
		c.signal(p.cmd, syscall.SIGTERM) // fails when it has ended: then it is about to be said
	case !now.Before(p.killAt):
		slog.Warn("tcpdump does not heed SIGTERM and is killed", p.log()...)
		c.signal(p.cmd, syscall.SIGKILL)
	default:
		return
	}
	p.killAt = now.Add(termGrace)
}

// clear deletes the files of a capture that has no child, and gives its room back.
func (c *controller) clear(p *capture) {
	if p.have == (request{}) {
		return
	}
	files, bytes := findFiles(c.root, p.owns)
	if err := removeFiles(files); err != nil { // it is tried again, and keeps its room until then
		c.tell(p, "Warning", "CaptureFailed", "Its files can't be deleted: %v", err)
		return
	}
	if p.started {
		c.tell(p, "Normal", "CaptureStopped", "Stopped: %s; its files (%d bytes) are deleted", p.output.counts(), bytes)
	}
	p.grant = grant{}
}

// admit gives room and a name to the captures that wait for it, in the order in which they were asked for, so that
// no large one is overtaken for ever.
func (c *controller) admit(now time.Time) {
	var queue []*capture
	var taken int64
	for _, p := range c.captures {
		taken += p.have.bytes()
		if p.want != (request{}) && p.have == (request{}) && !p.refused {
			queue = append(queue, p)
		}
	}
	if len(queue) == 0 {
		return // without a look at the disk
	}
	slices.SortFunc(queue, func(a, b *capture) int { return cmp.Compare(a.asked, b.asked) })
	room := min(c.limit-taken, freeBytes(c.root)-c.unwritten())
	most := room + taken // if nothing else were captured here
	for _, p := range queue {
		stem, free := c.stemFor(p)
		need := p.want.bytes()
		if free && need <= room {
			room -= need
			p.grant, p.due, p.waiting = grant{have: p.want, stem: stem, since: now}, now, false
			continue
		}
		if need > room && !p.waiting {
			p.waiting = true
			what := "it starts by itself when those that were asked for before have their room, and there is enough"
			if need > most {
				what = "it never has: ask for fewer"
			}
			c.tell(p, "Warning", "CaptureWaiting", "Waiting for room: %d files can take %d bytes, and all captures of this node "+
				"together may take %d; %s", p.want.n, need, most, what)
		}
		if need > room && need <= most { // those behind it wait too; one that never fits is passed
			room = 0
		}
	}
}

// unwritten is how many bytes the captures may still write into the room that they have.
func (c *controller) unwritten() (bytes int64) {
	for _, p := range c.captures {
		bytes += p.have.bytes()
	}
	_, written := findFiles(c.root, isCapture)
	return bytes - written
}

// stemFor is the path of a capture's files without the digits, and whether no capture has it. A name that a Pod of
// another namespace uses gets the Pod's UID behind a "_", which is in no Pod name. One that is used by the Pod's
// predecessor is soon free.
func (c *controller) stemFor(p *capture) (stem string, free bool) {
	plain := filepath.Join(c.root, "capture-"+p.name+".pcap")
	stem, free = plain, true
	for _, other := range c.captures { // at most one has it
		if other.stem == plain {
			stem = filepath.Join(c.root, fmt.Sprintf("capture-%s_%.8s.pcap", p.name, p.uid))
			free = other.namespace != p.namespace
		}
	}
	return stem, free
}

// isLooking reports whether the capture's sandbox must be looked for: there is no child, or one in the host's
// network, which does not go away when the Pod does.
func (p *capture) isLooking() bool {
	return p.have != (request{}) && p.have == p.want && p.killAt.IsZero() && (p.cmd == nil || p.onHost)
}

// launch looks for the sandboxes that are due, all in one look at /proc, and starts tcpdump in them unless the disk is
// full.
func (c *controller) launch(now time.Time, full bool) {
	var due []*capture
	wanted := map[string]bool{}
	for _, p := range c.captures {
		if p.isLooking() && !now.Before(p.due) {
			due = append(due, p)
			wanted[p.kubeletUID] = true
		}
	}
	if len(due) == 0 {
		return
	}
	found := c.sandboxes.find(wanted, now)
	for _, p := range due {
		p.due = now.Add(slowPoll)
		b := found[p.kubeletUID]
		switch {
		case b != nil && p.cmd == nil && !full:
			c.capture(p, b, now)
		case b != nil && p.cmd == nil && !p.full: // the disk filled up between its room and its start
			p.full = true
			c.tell(p, "Warning", "CaptureWaiting", "Waiting for room: the disk is full; it starts by itself when there is enough")
		case b == nil && p.cmd != nil: // the last process of a Pod in the host's network has ended
			p.keep = true
			c.stop(p, now)
		case b == nil && p.failure != "":
			p.failure = ""
			c.tell(p, "Normal", "CaptureStopped", "Stopped: %s; the Pod's network is gone, the files stay until the "+
				"annotation or the Pod goes, or the Pod has a new network", p.output.counts())
		case b == nil && !p.started:
			p.due = now.Add(birthPoll)
			if !p.waiting && now.Sub(p.since) > noNetwork {
				p.waiting = true
				c.tell(p, "Warning", "CaptureWaiting", "Waiting for the Pod's network: it does not run yet, or has ended; the "+
					"capture starts when it has one")
			}
		}
	}
	for _, b := range found {
		b.network.Close()
	}
}

// ---- A capture: from nsenter's start to tcpdump's end ----

// capture starts tcpdump in a sandbox, whose file the caller closes.
func (c *controller) capture(p *capture, b *sandbox, now time.Time) {
	if p.failure != "" && !p.full {
		what := "tcpdump ended by itself (%s) and is started again"
		if p.started {
			what += ", at the first file: the packets in that one are lost"
		}
		c.tell(p, "Warning", "CaptureFailed", what, p.failure)
	}
	p.failure, p.full = "", false
	p.onHost = b.isHost
	cmd := exec.Command("nsenter", p.arguments()...)
	cmd.ExtraFiles = []*os.File{b.network} // descriptor 3 there
	output := &output{began: now, onListen: func() { c.say(func() { c.listening(p, cmd) }) }}
	stderr, err := c.start(cmd)
	if err != nil {
		p.due = now.Add(p.retry.next(nil))
		c.tell(p, "Warning", "CaptureFailed", "tcpdump can't be started: %v", err)
		return
	}
	p.cmd, p.output = cmd, output
	go func() {
		// Its stderr ends when it does. To wait for that takes no thread, as waiting for the process would. The struct
		// hides os.File's own way to copy, which takes a buffer of 32 KiB.
		io.CopyBuffer(output, struct{ io.Reader }{stderr}, make([]byte, 512))
		err := c.wait(cmd)
		c.say(func() { c.exited(p, cmd, err) })
	}()
}

// start starts a child whose stderr is to be read to its end before it is waited for.
func start(cmd *exec.Cmd) (stderr io.Reader, err error) {
	if stderr, err = cmd.StderrPipe(); err != nil {
		return nil, err
	}
	return stderr, cmd.Start()
}

// arguments are nsenter's. It execs, so that the child's PID is tcpdump's.
func (p *capture) arguments() []string {
	device := podInterface
	if p.onHost {
		device = "any"
	}
	arguments := []string{
		"--net=/proc/self/fd/3", "--", "tcpdump",
		"-C", "1", // 1,000,000 bytes; "1M" is an error before 4.99.6
		"-W", strconv.Itoa(p.have.n),
		"-w", p.stem,
		"-U",         // each packet is written as it comes, or a file stays empty until 4 KiB are there
		"-Z", "root", // or it becomes user tcpdump, who may not open the next file in /
		"-p", // not promiscuous: the Pod's own packets
		"-i", device,
		// KiB of the kernel's ring. Of packets of 200 bytes at 50,000 and 150,000 a second, the default of 2 MiB lost none
		// and up to 2 %, with 4 to 64 MiB none. Never --immediate-mode, without the up to a second that packets stay in
		// the ring: it lost 27 % and 35 %, with 16 MiB 1 % and 9 %. A Pod that ends has its network for longer.
		"-B", "4096",
	}
	if p.have.filter != "" {
		arguments = append(arguments, "--", p.have.filter) // never an option
	}
	return arguments
}

// listening is called when tcpdump says that it captures.
func (c *controller) listening(p *capture, cmd *exec.Cmd) {
	if p.cmd != cmd || !p.killAt.IsZero() {
		return
	}
	p.started = true
	kind, what := "Normal", fmt.Sprintf("Capturing into %s, rotated at 1 MB, in %s/%s", p.files(), c.namespace, c.pod)
	if p.have.filter != "" {
		what += fmt.Sprintf("; the filter is %.64q", p.have.filter)
	}
	if p.onHost {
		kind, what = "Warning", what+"; this Pod has the host's network, so the files hold the whole node's traffic"
	}
	c.tell(p, kind, "CaptureStarted", "%s", what)
}

// exited is called when a child has ended and was waited for.
func (c *controller) exited(p *capture, cmd *exec.Cmd, err error) {
	if p.cmd != cmd {
		return
	}
	p.cmd = nil
	stopped := !p.killAt.IsZero() && !p.keep
	p.killAt, p.keep = time.Time{}, false
	if stopped {
		c.clear(p)
		return
	}
	p.failure = p.output.complaint()
	if p.failure == "" {
		p.failure = fmt.Sprint(cmp.Or(err, errors.New("exit status 0")))
	}
	if p.have.filter != "" && !p.started && p.output.refusesFilter(p.stem) {
		c.tell(p, "Warning", "CaptureFailed", "tcpdump refuses the filter %.64q (%s): nothing is tried until the "+
			"annotation changes", p.have.filter, p.failure)
		p.refused = true
		c.clear(p)
		return
	}
	if time.Since(p.output.began) > backoffMax {
		p.retry.failures = 0
	}
	p.due = time.Now().Add(p.retry.next(nil))
	slog.Debug("tcpdump ended by itself", append(p.log(), "reason", p.failure)...)
}

// files names a capture's files as tcpdump does: one has no digits, more have as many as N-1.
func (p *capture) files() string {
	if p.have.n == 1 {
		return p.stem
	}
	last := strconv.Itoa(p.have.n - 1)
	return fmt.Sprintf("%d files, %s%0*d to %s%s", p.have.n, p.stem, len(last), 0, p.stem, last)
}

// owns reports whether a file's name is one of this capture's: web's are never those of web-2 or of web.pcap0.
func (p *capture) owns(name string) bool {
	return strings.TrimRight(name, digits) == filepath.Base(p.stem)
}

func (p *capture) log() []any {
	return []any{"namespace", p.namespace, "pod", p.name, "n", cmp.Or(p.have.n, p.want.n)}
}

// output is what a child says on stderr: the end of it, for its last words and its counts.
type output struct {
	began    time.Time // when the child was started
	onListen func()    // called once, when tcpdump says that it captures
	listens  bool
	text     []byte
}

// Write takes what the child says as it comes.
func (o *output) Write(text []byte) (int, error) {
	o.text = append(o.text, text...)
	if !o.listens && bytes.Contains(o.text, []byte("listening on ")) {
		o.listens = true
		o.onListen()
	}
	o.text = o.text[max(0, len(o.text)-4096):]
	return len(text), nil
}

// complaint is the last thing that tcpdump or nsenter complained of, "" if nothing.
func (o *output) complaint() (last string) {
	for line := range strings.Lines(string(o.text)) {
		named := strings.HasPrefix(line, "tcpdump: ") || strings.HasPrefix(line, "nsenter: ")
		if named && !strings.Contains(line, "listening on ") && !strings.Contains(line, "data link type ") {
			last = strings.TrimSpace(line)
		}
	}
	return last
}

// refusesFilter reports whether tcpdump ended because of its filter. It compiles it between opening the device and
// opening the file; its complaints about these two begin with their names, and those about the machine end with an errno.
func (o *output) refusesFilter(stem string) bool {
	complaint, ok := strings.CutPrefix(o.complaint(), "tcpdump: ")
	for _, prefix := range []string{podInterface + ": ", "any: ", stem} {
		ok = ok && !strings.HasPrefix(complaint, prefix)
	}
	for _, errno := range []syscall.Errno{syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.EPERM} {
		ok = ok && !strings.HasSuffix(strings.ToLower(complaint), errno.Error())
	}
	return ok && !o.listens
}

// counts is what tcpdump counted, by its closing lines; one that was killed wrote none.
func (o *output) counts() string {
	captured, dropped := "an unknown number of", "an unknown number"
	for line := range strings.Lines(string(o.text)) {
		count, what, _ := strings.Cut(strings.TrimSpace(line), " ")
		if count == "" || strings.Trim(count, digits) != "" {
			continue
		}
		if strings.HasSuffix(what, " captured") {
			captured = count
		} else if strings.HasSuffix(what, " dropped by kernel") {
			dropped = count
		}
	}
	return fmt.Sprintf("%s packets captured, %s dropped by the kernel", captured, dropped)
}

// ---- A Pod's network namespace ----

// sandboxes finds the network namespaces of Pods by the host's processes, with any runtime.
type sandboxes struct {
	proc              string
	hostNet, hostRoot os.FileInfo             // of the host's first process
	pids              map[string]map[int]bool // the processes of each Pod, by the UID in the names of their cgroups
	swept             time.Time               // when every process was looked at last
	newest            int                     // the PID that was given out last when it was marked
	marked            time.Time               // by a sweep, or a second after the last mark
	since             int                     // what is newer than this PID may be new, or not yet in its cgroup
}

// sandbox is a Pod's network namespace.
type sandbox struct {
	network *os.File
	isHost  bool
	born    uint64 // when the process started that it was found by, in clock ticks since boot
}

func newSandboxes(proc string) (*sandboxes, error) {
	hostNet, err := os.Stat(proc + "/1/ns/net")
	if err != nil {
		return nil, err
	}
	hostRoot, err := os.Stat(proc + "/1/root")
	return &sandboxes{proc: proc, hostNet: hostNet, hostRoot: hostRoot}, err
}

// find returns the sandboxes of the Pods that have one; the caller closes their files.
func (s *sandboxes) find(wanted map[string]bool, now time.Time) map[string]*sandbox {
	found, scanned := map[string]*sandbox{}, false
	for uid := range wanted {
		b := s.oldest(uid)
		if b == nil && !scanned {
			s.scan(now)
			scanned = true
			b = s.oldest(uid)
		}
		if b != nil {
			found[uid] = b
		}
	}
	return found
}

// oldest opens a Pod's sandbox. The process that holds it is the first that started: containers come later, and may
// have network namespaces of their own within.
func (s *sandboxes) oldest(uid string) (first *sandbox) {
	for pid := range s.pids[uid] {
		dir := s.proc + "/" + strconv.Itoa(pid)
		b := s.open(dir)
		if b == nil {
			continue
		}
		// The PID may have gone to another process, before or just now, which must never be captured: look again.
		if inPod(readFile(dir+"/cgroup"), uid) && (first == nil || b.born < first.born) {
			first, b = b, first
		}
		if b != nil {
			b.network.Close()
		}
	}
	return first
}

// open opens the network namespace of a process. It returns nil when the process has ended, and when it is the
// runtime's, which sits in the Pod's cgroup with the host's network and the host's files: one that is still to
// become the Pod's, or CRI-O's monitor. With the host's network but other files it is a Pod's with hostNetwork.
func (s *sandboxes) open(dir string) *sandbox {
	network, err := os.Open(dir + "/ns/net")
	if err != nil {
		return nil
	}
	b := &sandbox{network: network, born: startTime(readFile(dir + "/stat"))}
	info, err := network.Stat()
	if b.isHost = err == nil && os.SameFile(info, s.hostNet); b.isHost {
		var root os.FileInfo
		root, err = os.Stat(dir + "/root")
		if err == nil && os.SameFile(root, s.hostRoot) {
			err = os.ErrNotExist
		}
	}
	if err != nil {
		network.Close()
		return nil
	}
	return b
}

// scan takes note of the processes of all Pods: now and then of every one, and in between of those that are new. So
// waiting for a Pod's first process costs next to nothing.
func (s *sandboxes) scan(now time.Time) {
	loadavg := readFile(s.proc + "/loadavg") // its last field is the PID that was given out last
	newest, _ := strconv.Atoi(strings.TrimSpace(loadavg[strings.LastIndex(loadavg, " ")+1:]))
	isFar := newest < s.newest || newest-s.since >= 1000
	if isFar { // the last ones may still be on their way into their cgroups
		s.since, s.newest, s.marked = newest-200, newest, now
	}
	if isFar || now.Sub(s.swept) >= sweepPoll {
		s.sweep()
		s.swept = now
	}
	for pid := s.since + 1; pid <= newest; pid++ { // again each time, for the same reason
		s.note(pid)
	}
	if now.Sub(s.marked) >= slowPoll { // those up to the mark before are older than that, and where they belong
		s.since, s.newest, s.marked = s.newest, newest, now
	}
}

func (s *sandboxes) sweep() {
	s.pids = map[string]map[int]bool{}
	if dir, err := os.Open(s.proc); err == nil {
		defer dir.Close()
		names, _ := dir.Readdirnames(-1)
		for _, name := range names {
			if pid, err := strconv.Atoi(name); err == nil {
				s.note(pid)
			}
		}
	}
}

// note takes note of the Pods that a process's cgroup names: cgroupfs has a folder pod<UID>, systemd one
// kubepods-burstable-pod<UID with _ for ->.slice. On a node that is itself a Pod's container there are two.
func (s *sandboxes) note(pid int) {
	cgroup := readFile(s.proc + "/" + strconv.Itoa(pid) + "/cgroup")
	for folder := range strings.FieldsFuncSeq(cgroup, func(r rune) bool { return r == '/' || r == '\n' }) {
		uid, ok := strings.CutPrefix(folder, "pod")
		if slice, isSlice := strings.CutSuffix(folder, ".slice"); isSlice {
			at := strings.LastIndex(slice, "-pod") + 1
			uid, ok = strings.CutPrefix(strings.ReplaceAll(slice[at:], "_", "-"), "pod")
		}
		if ok && s.pids[uid] == nil {
			s.pids[uid] = map[int]bool{}
		}
		if ok {
			s.pids[uid][pid] = true
		}
	}
}

// inPod reports whether a cgroup is a Pod's.
func inPod(cgroup, uid string) bool {
	return strings.Contains(strings.ReplaceAll(cgroup, "_", "-"), "pod"+uid)
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

// ---- Events ----

// tell writes a line of the log and an Event of the Pod. Its kind is Normal, or Warning for what a person should see.
func (c *controller) tell(p *capture, kind, reason, format string, arguments ...any) {
	e := event{p.namespace, p.name, p.kubeletUID, kind, reason, fmt.Sprintf(format, arguments...)}
	level := slog.LevelInfo
	if kind == "Warning" {
		level = slog.LevelWarn
	}
	if p.said != e.message { // while it stays the same, it is in the log once
		p.said = e.message
		slog.Log(context.Background(), level, reason, append(p.log(), "message", e.message)...)
	}
	select {
	case c.recorder.news <- e:
	default: // it never delays a capture
		slog.Warn("an Event is lost, too many wait", p.log()...)
	}
}

type event struct{ namespace, name, uid, kind, reason, message string }

// tally counts an Event.
type tally struct {
	first, last time.Time
	count       int       // how often since it was posted
	posted      int       // how often it was posted
	due         time.Time // when it may be posted
}

// recorder posts Events. One that repeats is counted up before it is posted again, for longer each time; one that
// the API server does not take now is tried again.
type recorder struct {
	kube    *kube
	node    string
	news    chan event
	tallies map[event]*tally
	retry   backoff
	pause   time.Time // nothing is posted before
}

func newRecorder(k *kube, node string) *recorder {
	return &recorder{kube: k, node: node, news: make(chan event, 1024), tallies: map[event]*tally{}, retry: requestBackoff}
}

// run posts until ctx ends, and then what is left, for flushGrace.
func (r *recorder) run(ctx context.Context) {
	for ctx.Err() == nil {
		next, due := r.next(time.Now())
		select {
		case e := <-r.news:
			r.count(e, time.Now())
		case <-time.After(time.Until(due)):
			if next != nil {
				r.post(ctx, *next)
			}
		case <-ctx.Done():
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), flushGrace)
	defer cancel()
	for len(r.news) > 0 {
		r.count(<-r.news, time.Now())
	}
	for e, t := range r.tallies {
		if t.count > 0 && ctx.Err() == nil {
			r.post(ctx, e)
		}
	}
}

func (r *recorder) count(e event, now time.Time) {
	t := r.tallies[e]
	if t == nil {
		t = &tally{due: now}
		r.tallies[e] = t
	}
	if t.count == 0 {
		t.first = now
	}
	t.last = now
	t.count++
}

// next is the Event that is due first, nil if none, and when. Those that are long past are forgotten.
func (r *recorder) next(now time.Time) (next *event, due time.Time) {
	due = now.Add(repeatMax)
	for e, t := range r.tallies {
		if t.count > 0 && t.due.Before(due) {
			next, due = &e, t.due
		} else if t.count == 0 && now.Sub(t.last) > 2*repeatMax {
			delete(r.tallies, e)
		}
	}
	if due.Before(r.pause) {
		due = r.pause
	}
	return next, due
}

// post creates an Event object. One that the API server will never take is dropped, which is normal (403) in a namespace
// that is being deleted; anything else is tried again.
func (r *recorder) post(ctx context.Context, e event) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	t := r.tallies[e]
	type fields = map[string]any
	body, _ := json.Marshal(fields{ // strings, numbers and times never fail
		"apiVersion": "v1", "kind": "Event",
		"metadata":       fields{"namespace": e.namespace, "generateName": "packetcapture-"},
		"involvedObject": fields{"apiVersion": "v1", "kind": "Pod", "namespace": e.namespace, "name": e.name, "uid": e.uid},
		"type":           e.kind, "reason": e.reason, "message": e.message, "count": t.count,
		"source":         fields{"component": "packetcapture", "host": r.node},
		"firstTimestamp": t.first.UTC().Format(time.RFC3339), "lastTimestamp": t.last.UTC().Format(time.RFC3339),
	})
	response, err := r.kube.do(ctx, "POST", "/api/v1/namespaces/"+e.namespace+"/events", "application/json", body)
	if err == nil {
		response.Body.Close()
	} else if !isStatus(err, 400, 403, 404, 409, 413, 422) {
		r.pause = time.Now().Add(r.retry.next(err))
		t.due = r.pause // the others come first: it may be this one alone
		return
	} else {
		slog.Warn("an Event is refused", "namespace", e.namespace, "pod", e.name, "error", err)
	}
	r.retry.failures = 0
	hush := time.Second << t.posted // short for what a person does twice
	if e.kind == "Warning" {
		hush *= 10
	}
	t.count, t.due = 0, time.Now().Add(min(hush, repeatMax))
	t.posted = min(t.posted+1, 10)
}

// ---- The API server ----

// kube speaks to the API server as the service account, for several goroutines.
type kube struct {
	api, account string
	roots        atomic.Pointer[x509.CertPool] // of the last CA bundle that could be read
	complained   atomic.Bool                   // that it can't be read now
	http         http.Client                   // no Timeout: it would end watches
}

// newKube fails when the token or the CA can't be read: then nothing mounted them.
func newKube(api, account string) (*kube, error) {
	k := &kube{api: api, account: account}
	if _, err := k.token(); err != nil {
		return nil, err
	}
	if err := k.loadCA(); err != nil {
		return nil, err
	}
	k.http.Transport = &http.Transport{ // without a Proxy: the service address must never go through HTTPS_PROXY
		DialTLSContext:    k.dial,
		ForceAttemptHTTP2: true, // its own dialing turns HTTP/2 off otherwise, and with it the pings
		// A server that is silent for 45 s is gone: a connection that is half open would never end a watch. Of a list no
		// more is taken than is read soon: by default it is 4 MiB.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second, MaxReceiveBufferPerStream: 256 << 10},
	}
	return k, nil
}

// token is read for each request: it is replaced every hour.
func (k *kube) token() (string, error) {
	token, err := os.ReadFile(filepath.Join(k.account, "token"))
	if err != nil {
		return "", fmt.Errorf("the service account's token: %w", err)
	}
	return strings.TrimSpace(string(token)), nil
}

func (k *kube) loadCA() error {
	bundle, err := os.ReadFile(filepath.Join(k.account, "ca.crt"))
	if err != nil {
		return fmt.Errorf("the service account's CA: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(bundle) {
		return errors.New("the service account's CA: ca.crt holds no certificate")
	}
	k.roots.Store(roots)
	return nil
}

// dial reads the CA bundle again for each connection, since it may be replaced; an unreadable one keeps the last.
func (k *kube) dial(ctx context.Context, network, address string) (net.Conn, error) {
	err := k.loadCA()
	if complained := k.complained.Swap(err != nil); err != nil && !complained {
		slog.Warn("the last CA bundle stays", "error", err)
	}
	dialer := tls.Dialer{
		NetDialer: &net.Dialer{Timeout: 10 * time.Second},
		Config:    &tls.Config{RootCAs: k.roots.Load(), NextProtos: []string{"h2", "http/1.1"}},
	}
	return dialer.DialContext(ctx, network, address)
}

// do sends a request and returns the answer, whose body the caller closes; what is not 2xx is a *statusError.
func (k *kube) do(ctx context.Context, method, path, accept string, body []byte) (*http.Response, error) {
	token, err := k.token()
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, method, k.api+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header = http.Header{"Authorization": {"Bearer " + token}, "Accept": {accept},
		"Content-Type": {"application/json"}, "User-Agent": {"packetcapture"}}
	response, err := k.http.Do(request)
	if wrapped := new(url.Error); errors.As(err, &wrapped) {
		return nil, wrapped.Err // without the URL, which differs each time: an error that stays is logged once
	}
	if response.StatusCode/100 == 2 {
		return response, nil
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

// ---- Helpers ----

const digits = "0123456789"

// health serves /healthz, which waits for loop to turn, and /readyz. The API server matters for neither.
func (c *controller) health() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {
		select {
		case c.inbox <- func() {}:
		case <-time.After(2 * time.Second):
			http.Error(w, "the loop does not turn", http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, r *http.Request) {
		if !c.ready.Load() {
			http.Error(w, "the first list is still to come", http.StatusServiceUnavailable)
		}
	})
	return mux
}

// backoff says how long to wait after a failure: at first from least to most, then twice as long each time.
type backoff struct {
	least, most time.Duration
	failures    int
}

// next is never the same, so that nodes do not act in step. What the API server asked for comes on top: it asks all
// nodes for the same.
func (b *backoff) next(err error) time.Duration {
	least, most := b.least, min(b.most<<b.failures, backoffMax)
	if b.failures > 0 {
		least = most * 9 / 10
	}
	b.failures = min(b.failures+1, 10)
	wait := least + rand.N(most-least)
	if status := new(statusError); errors.As(err, &status) {
		wait += status.retryAfter
	}
	return wait
}

// isCapture reports whether a file's name is one of any capture's.
func isCapture(name string) bool {
	return strings.HasPrefix(name, "capture-") && strings.HasSuffix(strings.TrimRight(name, digits), ".pcap")
}

// findFiles returns the paths of a folder's files whose names match, and their bytes.
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

// freeBytes is what a folder's file system has room for; one that does not say is not taken for full.
func freeBytes(folder string) int64 {
	var stat syscall.Statfs_t
	if err := syscall.Statfs(folder, &stat); err != nil {
		return math.MaxInt64
	}
	return int64(stat.Bavail) * int64(stat.Bsize)
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
