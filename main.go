// Packetcapture captures the packets of annotated pods with tcpdump. It runs as a DaemonSet, and
// each of its pods watches the pods of its own node. A pod that is annotated
//
//	kubectl annotate pod web tcpdump.antrea.io="5"
//
// is captured into five rotating files of 1,000,000 bytes, /capture-web.pcap0 to
// /capture-web.pcap4, in the packetcapture container of that node. A changed annotation starts the
// capture over. When the annotation or the pod goes, the capture stops and its files are deleted.
//
// Two more annotations say what is captured:
//
//	tcpdump.antrea.io/filter="tcp port 80"   a pcap filter; default: every packet
//	tcpdump.antrea.io/interface="lo"         an interface, or any; default: eth0 (hostNetwork: any)
//
// Events on the pod say what happens, and a link in /captures names each captured pod's files. Two
// commands in the container read a capture:
//
//	packetcapture cat default/web    writes its files to stdout as one pcap
//	packetcapture live default/web   writes its packets to stdout as they come, until stdin ends
//
// The environment configures the program:
//
//	NODE_NAME    the node whose pods are captured; required
//	DISK_LIMIT   bytes of disk that the container may use, 68371024 or more; default: no limit
//	DISK_FREE    percent of the disk that captures leave free; default: 15
//	KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT   the API server; required, Kubernetes sets both
//
// (*podWatch).follow keeps a watch of the node's pods, (*podWatch).apply starts the captures that
// annotations ask for, and (*capture).run is the life of one. All the rest is detail.
package main

import (
	"bufio"
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
	annotation   = "tcpdump.antrea.io"
	filterKey    = annotation + "/filter"
	interfaceKey = annotation + "/interface"
	// anyVersion begins a watch with all pods, from the API server's cache.
	anyVersion = "0"

	// podInterface is the only name that containerd and CRI-O let a CNI give a pod's interface.
	podInterface   = "eth0"
	digits, hex    = "0123456789", "0123456789abcdef"
	interfaceChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._-" + digits

	// fileBytes is the largest size of a file. tcpdump begins the next file at 1,000,000 bytes (-C 1),
	// but checks only before it writes a packet, which takes up to 262,144 bytes and a header of 16.
	fileBytes = 1_000_000 + 262_144 + 16
	// logBytes of DISK_LIMIT are for the container's log: the kubelet keeps 5 files of 10 MiB.
	logBytes = 64 << 20

	// birthPoll is how often a capture looks at first: containers start 100 ms after the network.
	birthPoll = 25 * time.Millisecond
	// waitingTime is how long a capture waits before an Event says so. Most pods have started by then.
	waitingTime = 3 * time.Second
	// termGrace passes between a tcpdump's SIGTERM and its SIGKILL.
	termGrace = 2 * time.Second
	// eventTime is how long an Event is retried. eventQueue is how many Events may wait per namespace.
	eventTime  = 10 * time.Minute
	eventQueue = 1000
)

var (
	// Jitter can double a pause: the longest are 30 s, as in client-go, and 5 min, as in the kubelet.
	requestBackoff = backoff{pause: 800 * time.Millisecond, most: 15 * time.Second}
	tcpdumpBackoff = backoff{pause: 200 * time.Millisecond, most: 150 * time.Second}

	errFull     = errors.New("too little disk is free: the last packets of the files may be cut")
	errReplaced = errors.New("replaced") // the next goroutine keeps the room, stem and link
)

func main() {
	ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "packetcapture:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, arguments []string) error {
	switch {
	case len(arguments) == 2 && arguments[0] == "cat":
		signal.Reset() // or a signal would not end cat
		return cat("/", arguments[1], os.Stdout, os.Stderr)
	case len(arguments) == 2 && arguments[0] == "live":
		return live(ctx, "/", arguments[1])
	case len(arguments) > 0:
		return fmt.Errorf("can't run %q: use cat or live with <namespace>/<pod>", arguments)
	}

	a, err := newAgent(os.Getenv)
	if err != nil {
		return err
	}
	slog.Info("packetcapture starts", "node", a.nodeName, "api", a.url, "files", a.limit)
	return a.run(ctx)
}

// agent holds what the watch and all captures of this node share.
type agent struct {
	nodeName, url, account string // url is the API server's, account the service account's folder
	proc, root             string // where the host's processes are, and where the files go
	limit                  int    // files that all captures together may have
	diskFree               int64  // percent to leave free

	cgroups *cgroups
	roots   atomic.Pointer[x509.CertPool] // the last CA bundle that could be read
	// api sends requests to the API server, start starts tcpdump, and ready makes the readiness probe
	// succeed: the watch calls it with each event. Tests replace these.
	api   http.RoundTripper
	start func(ctx context.Context, network *os.File, arguments ...string) *process
	ready func()
	// alive counts the goroutines that follow, that capture and that post Events.
	alive sync.WaitGroup

	// roomLock guards rooms: how many files a capture has room for, by its stem.
	roomLock sync.Mutex
	rooms    map[string]int

	// queueLock guards each capture's told, and queues: one per namespace, as a webhook may hang.
	queueLock sync.Mutex
	queues    map[string][]func()
}

// newAgent reads the environment. Its error names everything that is missing or wrong.
func newAgent(getenv func(string) string) (a *agent, err error) {
	for _, name := range []string{"NODE_NAME", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"} {
		if getenv(name) == "" {
			err = errors.Join(err, fmt.Errorf("%s is empty: daemonset.yaml or Kubernetes sets it", name))
		}
	}
	number := func(name string, standard, least, most int64) int64 {
		value := cmp.Or(getenv(name), fmt.Sprint(standard))
		n, parseErr := strconv.ParseInt(value, 10, 64)
		if parseErr != nil || n < least || n > most {
			err = errors.Join(err, fmt.Errorf("%s is %q: use %d to %d", name, value, least, most))
		}
		return n
	}

	host, port := getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")
	a = &agent{nodeName: getenv("NODE_NAME"), url: "https://" + net.JoinHostPort(host, port),
		proc: "/proc", root: "/", account: "/var/run/secrets/kubernetes.io/serviceaccount",
		start: start, ready: answerProbe, rooms: map[string]int{}, queues: map[string][]func(){}}
	disk := number("DISK_LIMIT", math.MaxInt64, logBytes+fileBytes, math.MaxInt64)
	a.limit = int(min((disk-logBytes)/fileBytes, math.MaxInt32)) // tcpdump reads -W into an int
	a.diskFree = number("DISK_FREE", 15, 0, 99)
	// Without Proxy, HTTPS_PROXY is ignored. HTTP/2 must be forced: its pings find dead connections.
	a.api = &http.Transport{DialTLSContext: a.dial, ForceAttemptHTTP2: true,
		HTTP2: &http.HTTP2Config{SendPingTimeout: 30 * time.Second, MaxReceiveBufferPerStream: 256 << 10}}
	return a, err
}

// answerProbe lets the readiness probe connect. ReadTimeout closes what others leave open.
var answerProbe = sync.OnceFunc(func() {
	probe := &http.Server{Addr: ":8080", ReadTimeout: 5 * time.Second}
	go func() { slog.Error("can't answer the readiness probe", "error", probe.ListenAndServe()) }()
})

// run captures until ctx ends. Then the captures have 4.5 s in all to end and to post Events.
func (a *agent) run(ctx context.Context) (err error) {
	if a.cgroups, err = newCgroups(a.proc); err != nil {
		return fmt.Errorf("this needs hostPID, CAP_SYS_PTRACE and appArmorProfile Unconfined: %w", err)
	}
	// A container starts with fresh files: the folder is there only if another program has made it.
	if err = os.Mkdir(filepath.Join(a.root, "captures"), 0o755); err != nil {
		return fmt.Errorf("another packetcapture is running here, or the root is read-only: %w", err)
	}

	w := podWatch{agent: a, captures: map[string]*capture{}, version: anyVersion}
	a.alive.Go(func() { w.follow(ctx) })
	<-ctx.Done()

	ended, end := context.WithTimeout(context.Background(), 4500*time.Millisecond)
	go func() { a.alive.Wait(); end() }()
	<-ended.Done()
	return nil
}

// ---- Follow: a watch of the node's pods, and what their annotations ask for ----

type pod struct {
	// kubeletUID names the pod's cgroup, and its Events. It differs from uid in a static pod.
	namespace, name, uid, kubeletUID string
}

// spec is what a pod's annotations ask for. files is value as a number, 0 if it is not one.
type spec struct {
	annotated            bool
	value, filter, iface string
	files                int
}

// podWatch follows the node's pods. One goroutine uses it.
type podWatch struct {
	agent *agent
	// captures is by UID, because a pod that is recreated under the same name is another pod.
	captures map[string]*capture
	// version is the resourceVersion of the last event, or anyVersion. complaint is the last error, or
	// "" when all is well, so that it is logged once. It has no digits: ports in it differ each time.
	version, complaint string
}

// follow keeps a watch open until ctx ends. A broken watch never stops a capture.
func (w *podWatch) follow(ctx context.Context) {
	for retry := requestBackoff; ctx.Err() == nil; {
		before := w.version
		worked, err := w.watch(ctx)
		if worked {
			retry = requestBackoff
		}
		switch status, _ := err.(statusError); {
		case (status.Code == http.StatusGone && before != anyVersion) ||
			(worked && err == io.EOF && w.version == before):
			// Too old a version: from anyVersion at once, but with a pause if that fails, too. Or not even a
			// bookmark came: after a restore, etcd's versions may be lower than ours.
			w.version = anyVersion
		case worked && err == io.EOF: // at its time limit: it watches again at once
		case ctx.Err() == nil:
			complaint := strings.Join(strings.FieldsFunc(err.Error(), unicode.IsDigit), "")
			if complaint != w.complaint {
				slog.Warn("can't watch the pods; captures go on", "error", err)
			}
			w.complaint = complaint
			sleep(ctx, retry.next(err))
		}
	}
}

// watch applies events until the stream ends, with io.EOF at its time limit (random, so that nodes
// do not ask in step). It worked if it brought a version or lasted a second. If not, pauses grow.
func (w *podWatch) watch(ctx context.Context) (worked bool, err error) {
	secs := 300 + rand.IntN(301)
	asking, cancel := context.WithTimeout(ctx, time.Duration(secs+30)*time.Second)
	defer cancel()
	path := fmt.Sprintf("/api/v1/pods?fieldSelector=spec.nodeName%%3D%s&watch=true&resourceVersion=%s"+
		"&allowWatchBookmarks=true&timeoutSeconds=%d", w.agent.nodeName, url.QueryEscape(w.version), secs)
	onlyMetadata := "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
	body, err := w.agent.do(asking, "GET", path, onlyMetadata, "")
	if err != nil {
		return false, err
	}
	defer body.Close()

	began, before, unseen := time.Now(), w.version, maps.Clone(w.captures)
	for decoder := json.NewDecoder(body); err == nil; {
		var e event // a new one each time: Decode keeps the old value of a field that an event lacks
		if err = decoder.Decode(&e); err == nil {
			err = w.next(ctx, &e, unseen)
		}
	}
	return w.version != before || time.Since(began) >= time.Second, err
}

// next applies one event. From anyVersion a watch begins with all pods, in ADDED events. The first
// of another type (a bookmark comes within a minute) ends the list, and the captures in unseen.
func (w *podWatch) next(ctx context.Context, e *event, unseen map[string]*capture) error {
	p, asked := e.pod()
	version := e.Object.Metadata.ResourceVersion
	switch {
	case e.Type == "ERROR":
		return e.Object.statusError
	case version == "":
		return errors.New("an event has no resourceVersion")
	case e.Type == "DELETED" || !asked.annotated || strings.Trim(p.uid, hex+"-") != "":
		w.forget(p.uid) // nothing for a bookmark, which has no UID. Only a UID may become a path.
	default:
		w.apply(ctx, p, asked)
	}
	w.agent.ready()

	if w.version == anyVersion {
		delete(unseen, p.uid)
		// Until the list is complete, a watch that breaks must begin with all pods again.
		if e.Type == "ADDED" {
			return nil
		}
		for uid := range unseen {
			w.forget(uid)
		}
	}
	if w.complaint != "" {
		w.complaint = ""
		slog.Info("the pods are watched again")
	}
	w.version = version
	return nil
}

// apply starts or changes a pod's capture. An invalid annotation leaves a running one alone.
func (w *podWatch) apply(ctx context.Context, p pod, asked spec) {
	c := w.captures[p.uid]
	if c == nil {
		c = &capture{agent: w.agent, pod: p, stop: func(error) {}, turn: make(chan struct{}, 1)}
		w.captures[p.uid] = c
	}
	if asked == c.last { // something else about the pod has changed
		return
	}
	c.last = asked
	if asked == c.valid {
		c.tell("Normal", "CaptureContinued", "The annotations are valid again; the capture is as it was")
		return
	}
	switch key, value, mustBe := c.check(ctx, asked); {
	case ctx.Err() != nil: // the program ends, which may have interrupted the check of the filter
	case mustBe != "":
		c.tell("Warning", "CaptureInvalid", "The annotation %s is %q: it must be %s; nothing changes",
			key, cut(value), mustBe)
	default:
		c.stop(errReplaced)
		ctx, c.stop = context.WithCancelCause(ctx)
		c.valid = asked
		w.agent.alive.Go(func() { c.run(ctx, asked) })
	}
}

func (w *podWatch) forget(uid string) {
	if c := w.captures[uid]; c != nil {
		c.stop(nil)
	}
	delete(w.captures, uid)
}

// check returns an invalid annotation's key and value, and what it must be. If all are valid, that
// is "", and a capture that has files has been given the room for more of them.
func (c *capture) check(ctx context.Context, asked spec) (key, value, mustBe string) {
	n, iface, filter, limit := asked.files, asked.iface, asked.filter, c.agent.limit
	switch {
	case n < 1 || n > limit || asked.value != strconv.Itoa(n): // tcpdump takes "5abc" for 5
		return annotation, asked.value, fmt.Sprint("a plain decimal number of files, from 1 to ", limit)
	case len(iface) > 15 || strings.HasPrefix(iface, "-") || strings.Trim(iface, interfaceChars) != "":
		return interfaceKey, iface, "the name of a network interface, or any, " +
			"at most 15 characters of a-z A-Z 0-9 . _ -, not beginning with -"
	// The watch waits while a filter is compiled: up to 0.15 s, but 9 s for one of 4,096 bytes.
	case len(filter) > 1024 || strings.TrimFunc(filter, unicode.IsPrint) != "":
		return filterKey, filter, "a pcap filter, a line of printable text of at most 1024 bytes"
	case filter != "":
		if err := c.compile(ctx, asked); err != nil {
			return filterKey, filter, fmt.Sprintf("a pcap filter with numeric hosts and ports (%v)", err)
		}
	}

	c.agent.roomLock.Lock()
	defer c.agent.roomLock.Unlock()
	switch free := c.free(); {
	case c.stem == "": // it has no files yet, and will wait for room
	case n > free:
		return annotation, asked.value, fmt.Sprintf(
			"at most %d now, because other captures have the rest of the node's %d files", free, limit)
	default: // reserved now: the running capture must not stop only for the next one to wait
		c.agent.rooms[c.stem] = max(n, c.agent.rooms[c.stem])
	}
	return "", "", ""
}

// compile returns tcpdump's error about a filter. An empty network keeps it from asking DNS.
func (c *capture) compile(ctx context.Context, asked spec) error {
	device := c.agent.cgroups.find(c.pod, sandbox{}).device(asked) // mostly "" before the pod starts
	linkType := map[bool]string{true: "LINUX_SLL2", false: "EN10MB"}[device == "any"]
	_, err := c.agent.start(ctx, nil, "-y", linkType, "-d", "--", asked.filter).read(func(string) {})
	return err
}

// ---- A capture, from its start to its last file ----

// capture is a pod's capture. Each valid change of the annotations starts run in a goroutine.
type capture struct {
	agent *agent
	pod   pod
	// The watch uses these: the last annotations, the last valid ones, and what stops their goroutine.
	last, valid spec
	stop        context.CancelCauseFunc

	// turn lets one goroutine work at a time: a mutex, but one that testing/synctest can wait for.
	turn chan struct{}
	// The goroutine whose turn it is uses these. captured says that packets may be in the files, and
	// counts is what the last tcpdump counted.
	spec     spec
	captured bool
	counts   string

	// stem is the path of the files without their digits, "" without room. It changes under roomLock,
	// so that the watch can read it. link, in /captures, leads to it. told is the last message.
	stem, link, told string
}

// run captures as the annotations ask until ctx ends: it waits for the pod, runs tcpdump, and runs
// it again when it fails. When it returns, tcpdump has exited and the files are deleted.
func (c *capture) run(ctx context.Context, asked spec) {
	c.turn <- struct{}{}
	defer func() { <-c.turn }()
	defer c.clear(ctx)
	c.spec, c.captured = asked, false

	for s, retry := c.await(ctx), tcpdumpBackoff; ctx.Err() == nil; s = c.await(ctx) {
		began := time.Now()
		err := c.runTcpdump(ctx, s)
		if time.Since(began) > time.Minute {
			retry = tcpdumpBackoff
		}
		// If the network is gone, await reports it. If there is a new one, it is captured at once.
		switch now := c.agent.cgroups.find(c.pod, s); {
		case ctx.Err() != nil:
		case errors.Is(err, os.ErrNotExist): // the process has just ended, as those that start a pod do
			sleep(ctx, birthPoll)
		case err == errFull || now.network == s.network:
			c.tell("Warning", "CaptureFailed", "%v; it is tried again, with pauses of up to 5 minutes", err)
			sleep(ctx, retry.next(nil))
		case now.network != "" && c.captured:
			c.tell("Normal", "CaptureStopped", "Stopped: %s; the pod has a new network", c.counts)
		}
	}
}

// await waits until nothing is missing for a capture, or ctx ends. An Event names what is missing.
func (c *capture) await(ctx context.Context) (s sandbox) {
	missing, named := "", ""
	for began := time.Now(); ctx.Err() == nil; {
		if s, missing = c.look(s); missing == "" || ctx.Err() != nil {
			break
		}
		waited := time.Since(began)
		if what, _, _ := strings.Cut(missing, ":"); waited >= waitingTime && what != named {
			named = what
			if _, size := findFiles(c.stem); c.captured {
				c.tell("Normal", "CaptureStopped", "Stopped: %s; %s is gone; the files (%d bytes) stay until "+
					"it is back, or the annotation or the pod goes", c.counts, what, size)
			} else {
				c.tell("Warning", "CaptureWaiting",
					"Waiting for %s; once it is there, the capture starts", missing)
			}
		}
		// Until it has captured something, a capture that waits holds no room.
		if !c.captured {
			c.clear(ctx)
		}

		poll := birthPoll
		if s.network != "" || waited >= 5*time.Minute {
			poll = time.Second / 2
		}
		// All captures look at the same moments, so that the program wakes up less often.
		sleep(ctx, time.Until(time.Now().Truncate(poll).Add(poll)))
	}
	return s
}

// look returns the pod's sandbox (its network), and what is missing: "" or "<what>: <why>".
func (c *capture) look(last sandbox) (s sandbox, missing string) {
	s = c.agent.cgroups.find(c.pod, last)
	device := s.device(c.spec)
	switch {
	case s.network == "":
		return s, "the pod's network: the pod has not started yet, or has ended"
	// tcpdump would accept more: "2" for the second interface, and nflog, which is not an interface.
	case device != "any" && !slices.Contains(s.interfaces, device):
		return s, "the interface " + device + ": the pod has " + cut(strings.Join(s.interfaces, ", "))
	}
	return s, c.takeRoom()
}

// clear deletes the files of a tcpdump that has exited, and gives up the room, the stem and the
// link. A goroutine that is replaced leaves these three to the next one.
func (c *capture) clear(ctx context.Context) {
	end := context.Cause(ctx) // asked once: it may become errReplaced meanwhile
	paths, sum := findFiles(c.stem)
	for _, path := range paths {
		if err := os.Remove(path); err != nil {
			slog.Error("a file can't be deleted", "error", err)
		}
	}
	if c.captured {
		c.tell("Normal", "CaptureStopped", "Stopped: %s; its files (%d bytes) are deleted", c.counts, sum)
	} else if end != nil && end != errReplaced {
		c.tell("Normal", "CaptureStopped", "Stopped: nothing was captured")
	}

	c.agent.roomLock.Lock()
	defer c.agent.roomLock.Unlock()
	if c.stem != "" && end != errReplaced {
		os.Remove(c.link)
		delete(c.agent.rooms, c.stem)
		c.stem = ""
	}
}

// tellStarted reports that tcpdump captures. Anything unusual makes the Event a Warning.
func (c *capture) tellStarted(s sandbox, warning string) {
	kind, more := "Normal", "; the interface is "+s.device(c.spec)
	if c.spec.filter != "" {
		more += fmt.Sprintf("; the filter is %q", cut(c.spec.filter))
	}
	warn := func(isSo bool, text string) {
		if isSo {
			kind, more = "Warning", more+"; "+text
		}
	}
	warn(s.standard == "any", "this pod has the host's network, so the files hold the node's traffic")
	warn(c.captured, "tcpdump started over at the first file, and the packets in that file are lost")
	warn(warning != "", "tcpdump says: "+warning)
	podName, _ := os.Hostname()
	c.tell(kind, "CaptureStarted", "Capturing into %s* (N=%d, 1 MB each) in %s/%s%s",
		c.stem, c.spec.files, readFile(c.agent.account+"/namespace"), podName, more)
}

// ---- tcpdump: one run of it ----

// runTcpdump runs tcpdump once: until ctx ends, oversee stops it, or it ends by itself. It returns
// why it ended. live uses the arguments after -w too, so -C and -W come before.
//
// -C 1 is 1,000,000 bytes in every version; a unit is an error before 4.99.6. -U writes each packet
// as it is read. -Z root keeps the right to create files in /, which the user tcpdump lacks. -p
// leaves promiscuous mode off: only the pod's own packets count. -B 4096 is a ring of 4 MiB, so
// that a held-up tcpdump loses nothing (see make measure). A filter after -- can't be an option.
func (c *capture) runTcpdump(ctx context.Context, s sandbox) error {
	network, err := os.Open(filepath.Join(c.agent.proc, s.pid, "ns/net"))
	// The PID may be another pod's by now: compare the name of what is open. (Fd of nil is harmless.)
	if opened, _ := os.Readlink(fmt.Sprint("/proc/self/fd/", network.Fd())); opened != s.network {
		network.Close()
		return fmt.Errorf("can't open the pod's network: %w", cmp.Or(err, os.ErrNotExist))
	}
	running, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	tcpdump := c.agent.start(running, network, "-C", "1", "-W", c.spec.value, "-w", c.stem,
		"-U", "-Z", "root", "-p", "-i", s.device(c.spec), "-B", "4096", "--", c.spec.filter)
	network.Close() // tcpdump has its own

	since := map[bool]string{true: " since tcpdump started over"}[c.captured]
	go c.oversee(running, stop, s, tcpdump.pid)
	counts, err := tcpdump.read(func(warning string) {
		if ctx.Err() == nil {
			c.tellStarted(s, warning)
			// If tcpdump is killed from now on, it can't say how many packets it has written.
			c.captured, c.counts = true, "an unknown number of packets captured"
		}
	})
	if counts != "" {
		c.counts = counts + since
	}
	status := cmp.Or(err, errors.New("exit status 0"))
	return cmp.Or(context.Cause(running), fmt.Errorf("tcpdump has ended (%v)", status))
}

// oversee stops a running tcpdump if the disk is full, or if the pod's network has gone or changed.
func (c *capture) oversee(running context.Context, stop func(error), s sandbox, pid string) {
	hadNetwork := time.Now()
	for sleep(running, time.Second); running.Err() == nil; sleep(running, time.Second) {
		now := c.agent.cgroups.find(c.pod, s).network
		// Under CRI-O, tcpdump may be alone in the pod's network after a container has crashed.
		if now == "" {
			now = c.agent.cgroups.find(c.pod, sandbox{network: s.network, pid: pid}).network
		}
		switch {
		case c.agent.isFull():
			stop(errFull)
		case now == s.network:
			hadNetwork = time.Now()
		case now != "", time.Since(hadNetwork) >= 3*time.Second: // tcpdump may still read its ring
			stop(errors.New("the pod's network has gone or changed"))
		}
	}
}

// process is a tcpdump, started or not. Its owner reads all of stderr, then calls wait: see read.
type process struct {
	pid    string
	stderr io.Reader
	wait   func() error
}

// start starts tcpdump in a network (nil: an empty one). nsenter becomes tcpdump and keeps its PID.
// When ctx ends, tcpdump gets SIGTERM, after termGrace SIGKILL. If it can't start, wait says why.
func start(ctx context.Context, network *os.File, arguments ...string) *process {
	cmd := exec.CommandContext(ctx, "tcpdump", arguments...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if network != nil {
		enter := []string{"--net=/proc/self/fd/3", "--", "tcpdump"} // 3 is the first of ExtraFiles
		cmd = exec.CommandContext(ctx, "nsenter", append(enter, arguments...)...)
		cmd.ExtraFiles, cmd.Stdout = []*os.File{network}, os.Stdout
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = termGrace
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return &process{stderr: strings.NewReader(""), wait: func() error { return err }}
	}
	return &process{strconv.Itoa(cmd.Process.Pid), stderr, cmd.Wait}
}

// read reads stderr until tcpdump ends. It calls listening, with the first warning or "", when
// tcpdump begins to capture. It returns the counts and, if tcpdump failed, its complaint or status.
func (p *process) read(listening func(warning string)) (counts string, err error) {
	warning, complaint := "", ""
	for lines := bufio.NewScanner(p.stderr); lines.Scan(); {
		line := lines.Text()
		switch {
		case strings.Contains(line, "listening on "):
			listening(warning)
		case strings.HasSuffix(line, " captured"): // "1 packet captured"
			counts = line
		case strings.HasSuffix(line, " dropped by kernel"):
			counts += ", " + strings.Replace(line, "by kernel", "by the kernel", 1)
		case strings.Contains(strings.ToLower(line), "warning: "):
			warning = cmp.Or(warning, cut(line))
		case (strings.HasPrefix(line, "tcpdump: ") || strings.HasPrefix(line, "nsenter: ")) &&
			!strings.Contains(line, "data link type "): // that is information, not a complaint
			complaint = cut(line)
		}
	}
	io.Copy(io.Discard, p.stderr) // a line of more than 64 KiB ends the scanner
	if err = p.wait(); err != nil && complaint != "" {
		err = errors.New(complaint)
	}
	return counts, err
}

// ---- Files, and the room for them ----

// takeRoom gives a capture its stem, its link and room for its files, or returns what is missing.
// If another namespace's pod has the stem, "_" and a part of the UID are added: no name has a "_".
func (c *capture) takeRoom() (missing string) {
	a, n := c.agent, c.spec.files
	a.roomLock.Lock()
	defer a.roomLock.Unlock()
	switch free := c.free(); {
	case a.isFull():
		return fmt.Sprintf("disk space: %d %% of it and %d bytes must be free", a.diskFree, fileBytes)
	case n > free:
		return fmt.Sprintf("room for N=%d: %d of the node's %d files are taken", n, a.limit-free, a.limit)
	case c.captured: // it has its room, and its successor may have reserved more
		return ""
	case c.stem == "":
		link := filepath.Join(a.root, "captures", c.pod.namespace+"_"+c.pod.name)
		stem := filepath.Join(a.root, "capture-"+c.pod.name+".pcap")
		if a.rooms[stem] > 0 {
			stem = filepath.Join(a.root, fmt.Sprintf("capture-%s_%.8s.pcap", c.pod.name, c.pod.uid))
		}
		if err := os.Symlink(stem, link); err != nil {
			return fmt.Sprintf("its file name: an earlier capture has not ended yet (%v)", err)
		}
		c.stem, c.link = stem, link
	}
	a.rooms[c.stem] = n
	return ""
}

// free is how many files a capture may have: those that no other capture has room for.
func (c *capture) free() int {
	free := c.agent.limit + c.agent.rooms[c.stem]
	for _, n := range c.agent.rooms {
		free -= n
	}
	return free
}

// isFull reports whether too little disk is free. On a full disk tcpdump cuts files silently.
func (a *agent) isFull() bool {
	var stat syscall.Statfs_t
	err := syscall.Statfs(a.root, &stat)
	free, total := int64(stat.Bavail)*stat.Bsize, int64(stat.Blocks)*stat.Bsize
	return err == nil && free < max(fileBytes, total/100*a.diskFree)
}

// findFiles returns a capture's files and their size. Those of a pod named web.pcap0 are not web's.
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

// cgroups is the kernel's tree of cgroups. It shows the node's pods and their processes.
type cgroups struct {
	// tree is their root (v1: of one hierarchy). classes, one per QoS class, hold the pods.
	proc, hostNet, tree string
	classes             []string
	// mu guards strays: the cgroups in system.slice when last listed. Containers may be there.
	mu     sync.Mutex
	strays []string
	listed time.Time
}

// sandbox is a pod's network, and a process that is in it.
type sandbox struct {
	// network is "net:[4026532281]", say, which names a namespace as long as it exists.
	network, pid string
	interfaces   []string
	// standard is captured unless an annotation names a device: eth0, or any in the host's network.
	standard string
}

func (s sandbox) device(asked spec) string { return cmp.Or(asked.iface, s.standard) }

// newCgroups finds the cgroup kubepods, a level deeper in kind. Of cgroup v1's hierarchies, systemd
// and pids have the fewest files to walk through. If the cgroups can be read, so can hostNet.
func newCgroups(proc string) (*cgroups, error) {
	hostNet, _ := os.Readlink(proc + "/1/ns/net")
	root := proc + "/1/root/sys/fs/cgroup"
	for _, tree := range []string{root + "/systemd", root + "/pids", root} {
		for _, name := range []string{"kubepods", "*kubepods.slice", "*/kubepods", "*/*kubepods.slice"} {
			if found, _ := filepath.Glob(tree + "/" + name); len(found) > 0 {
				classes := []string{below(found[0], "burstable"), below(found[0], "besteffort"), found[0]}
				return &cgroups{proc: proc, hostNet: hostNet, tree: tree, classes: classes}, nil
			}
		}
	}
	return nil, fmt.Errorf("no cgroup kubepods is in %s, nor in systemd or pids below it", root)
}

// below returns the path of a cgroup in another one; systemd puts that one's name in front.
func below(cgroup, name string) string {
	if slice, isSystemd := strings.CutSuffix(cgroup, ".slice"); isSystemd {
		name = filepath.Base(slice) + "-" + strings.ReplaceAll(name, "-", "_") + ".slice"
	}
	return cgroup + "/" + name
}

// find returns a pod's network: last's, while last.pid (the pod's process or tcpdump) is in it,
// else that of the pod's oldest process, since later ones may be in others. It is empty if no
// process has one, or the pod has no cgroup: the kubelet removes it 1 to 2 s after the pod's end.
func (g *cgroups) find(p pod, last sandbox) (s sandbox) {
	var all []string // the pod's cgroup and all below it
	for _, class := range g.classes {
		if all = cgroupsIn(below(class, "pod"+p.kubeletUID)); len(all) > 0 {
			break
		}
	}
	if now, inPod := g.sandboxOf(last.pid); inPod && now.network == last.network && len(all) > 0 {
		return now
	}

	if len(all) == 1 { // no container's cgroup is below the pod's
		all = append(all, g.straysOf("/"+filepath.Base(all[0])+":")...)
	}
	pids := ""
	for _, cgroup := range all {
		pids += readFile(cgroup + "/cgroup.procs")
	}
	oldest := uint64(math.MaxUint64)
	for pid := range strings.FieldsSeq(pids) {
		// Its start, in clock ticks, is field 22: [19] after the command, which ends at the last ")".
		stat := readFile(filepath.Join(g.proc, pid, "stat"))
		fields := strings.Fields(stat[strings.LastIndex(stat, ")")+1:])
		if now, inPod := g.sandboxOf(pid); inPod && len(fields) > 19 {
			if born, _ := strconv.ParseUint(fields[19], 10, 64); born < oldest {
				s, oldest = now, born
			}
		}
	}
	return s
}

// sandboxOf returns a process's network, and whether it is the pod's. gVisor's gofer has another
// one, without eth0. A process with the host's network and files is the runtime's, not the pod's.
func (g *cgroups) sandboxOf(pid string) (s sandbox, inPod bool) {
	dir := filepath.Join(g.proc, pid)
	network, err := os.Readlink(dir + "/ns/net")
	if err != nil {
		return s, false
	}
	s = sandbox{network: network, pid: pid, standard: podInterface}
	for line := range strings.Lines(readFile(dir + "/net/dev")) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			s.interfaces = append(s.interfaces, strings.TrimSpace(name))
		}
	}
	if network != g.hostNet {
		return s, slices.Contains(s.interfaces, podInterface)
	}
	s.standard = "any"
	root, err := os.Stat(dir + "/root")
	hostRoot, hostErr := os.Stat(g.proc + "/1/root")
	return s, err == nil && hostErr == nil && !os.SameFile(root, hostRoot)
}

// straysOf returns the cgroups of a pod's containers that are outside its own. That is so if only
// the kubelet uses the systemd driver: the runtime names them "<slice>:cri-containerd:<container>".
func (g *cgroups) straysOf(slice string) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if time.Since(g.listed) >= 4*birthPoll { // all captures share the list
		g.strays, g.listed = cgroupsIn(g.tree+"/system.slice"), time.Now()
	}
	isOther := func(stray string) bool { return !strings.Contains(stray, slice) }
	return slices.DeleteFunc(slices.Clone(g.strays), isOther)
}

// cgroupsIn returns a cgroup and all below it, if it exists.
func cgroupsIn(cgroup string) (all []string) {
	filepath.WalkDir(cgroup, func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			all = append(all, path)
			// A folder has two links and one for each folder in it, so one with two need not be read.
			if info, err := entry.Info(); err == nil && info.Sys().(*syscall.Stat_t).Nlink == 2 {
				return filepath.SkipDir
			}
		}
		return nil
	})
	return all
}

// ---- Events ----

// tell logs a message and queues an Event with it, unless it equals the capture's last one.
func (c *capture) tell(kind, reason, format string, values ...any) {
	a, namespace := c.agent, c.pod.namespace
	a.queueLock.Lock()
	defer a.queueLock.Unlock()
	message, at := fmt.Sprintf(format, values...), time.Now()
	if message == c.told {
		return
	}
	c.told = message
	log := map[string]func(string, ...any){"Normal": slog.Info, "Warning": slog.Warn}[kind]
	log(reason, "namespace", namespace, "pod", c.pod.name, "message", message)
	if len(a.queues[namespace]) > eventQueue {
		slog.Warn("an Event is lost: too many are waiting", "namespace", namespace, "pod", c.pod.name)
		return
	}
	a.queues[namespace] = append(a.queues[namespace], func() { c.post(kind, reason, message, at) })
	if len(a.queues[namespace]) == 1 {
		a.alive.Go(func() { a.postAll(namespace) })
	}
}

// postAll posts a namespace's Events. Each stays queued meanwhile: tell starts no second goroutine.
func (a *agent) postAll(namespace string) {
	a.queueLock.Lock()
	defer a.queueLock.Unlock()
	for ; len(a.queues[namespace]) > 0; a.queues[namespace] = a.queues[namespace][1:] {
		post := a.queues[namespace][0]
		a.queueLock.Unlock()
		post()
		a.queueLock.Lock()
	}
	delete(a.queues, namespace)
}

// post posts an Event. It retries until the Event is there, can't be posted, or is too old.
func (c *capture) post(kind, reason, message string, at time.Time) {
	type fields = map[string]any
	a, p, when := c.agent, c.pod, at.UTC().Format(time.RFC3339)
	// Event times are whole seconds. kubectl lists Events of the same second by name, so in order.
	name := fmt.Sprintf("packetcapture-%x-%.8s", at.UnixNano(), p.uid)
	path := "/api/v1/namespaces/" + p.namespace + "/events"
	body, _ := json.Marshal(fields{ // strings always encode
		"apiVersion": "v1", "kind": "Event", "metadata": fields{"namespace": p.namespace, "name": name},
		"involvedObject": fields{"apiVersion": "v1", "kind": "Pod",
			"namespace": p.namespace, "name": p.name, "uid": p.kubeletUID},
		"type": kind, "reason": reason, "message": message, "firstTimestamp": when, "lastTimestamp": when,
		"count": 1, "source": fields{"component": "packetcapture", "host": a.nodeName},
	})
	for retry := requestBackoff; ; {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_, err := a.do(ctx, "POST", path, "application/json", string(body))
		cancel() // it closes the answer, too
		status, _ := err.(statusError)
		switch code := status.Code; {
		case err == nil, status.Reason == "AlreadyExists": // an earlier try has posted it
			return
		// 401, 409 (a quota's), 429 and 5xx can be temporary. 403 in a namespace being deleted is not.
		case code/100 == 4 && code != 401 && code != 409 && code != 429, time.Since(at) >= eventTime:
			slog.Warn("an Event was not posted", "namespace", p.namespace, "pod", p.name, "error", err)
			return
		}
		time.Sleep(retry.next(err))
	}
}

// ---- The API server ----

// event is one event of a watch. Its object is a pod or, in an ERROR event, a Status.
type event struct {
	Type   string
	Object struct {
		Metadata struct {
			Namespace, Name, UID, ResourceVersion string
			Annotations                           map[string]string
		}
		statusError
	}
}

func (e *event) pod() (p pod, asked spec) {
	m := &e.Object.Metadata
	p = pod{m.Namespace, m.Name, m.UID, m.UID}
	// This hash names a static pod's cgroup. Users can set it, so only hex counts: no path, no UID.
	if hash := m.Annotations["kubernetes.io/config.mirror"]; strings.Trim(hash, hex) == "" {
		p.kubeletUID = cmp.Or(hash, m.UID)
	}
	value, annotated := m.Annotations[annotation]
	files, _ := strconv.Atoi(value)
	filter := strings.TrimSpace(m.Annotations[filterKey])
	return p, spec{annotated, value, filter, m.Annotations[interfaceKey], files}
}

// dial reads the CA bundle each time: it may be replaced. If that fails, it uses the last one.
func (a *agent) dial(ctx context.Context, network, address string) (net.Conn, error) {
	roots := x509.NewCertPool()
	if roots.AppendCertsFromPEM([]byte(readFile(a.account + "/ca.crt"))) {
		a.roots.Store(roots)
	}
	if roots = a.roots.Load(); roots == nil {
		return nil, fmt.Errorf("%s/ca.crt holds no certificate", a.account)
	}
	dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second},
		Config: &tls.Config{RootCAs: roots, NextProtos: []string{"h2", "http/1.1"}}}
	return dialer.DialContext(ctx, network, address)
}

// do sends a request and returns the answer's body, for the caller to close. Tokens change hourly.
func (a *agent) do(ctx context.Context, verb, path, as, body string) (io.ReadCloser, error) {
	token, tokenErr := os.ReadFile(a.account + "/token")
	request, err := http.NewRequestWithContext(ctx, verb, a.url+path, strings.NewReader(body))
	if err = cmp.Or(tokenErr, err); err != nil {
		return nil, err
	}
	request.Header = http.Header{"Authorization": {"Bearer " + strings.TrimSpace(string(token))},
		"Accept": {as}, "Content-Type": {"application/json"}, "User-Agent": {"packetcapture"}}
	response, err := a.api.RoundTrip(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode/100 == 2 {
		return response.Body, nil
	}

	defer response.Body.Close()
	status := statusError{Message: "no Status in the answer"} // it may be a proxy's
	json.NewDecoder(io.LimitReader(response.Body, 64<<10)).Decode(&status)
	status.Code = response.StatusCode
	seconds, _ := strconv.Atoi(response.Header.Get("Retry-After"))
	status.retryAfter = time.Duration(min(max(seconds, 0), 60)) * time.Second
	return nil, status
}

// statusError is an answer of the API server other than 2xx, or an ERROR event of a watch.
type statusError struct {
	Code            int
	Reason, Message string
	retryAfter      time.Duration
}

func (e statusError) Error() string {
	return fmt.Sprintf("%d %s: %s", e.Code, http.StatusText(e.Code), e.Message)
}

// ---- cat and live: what reads a capture ----

// findCapture returns the stem of a pod's capture. name is <namespace>/<pod>.
func findCapture(root, name string) (stem string, err error) {
	all, _ := filepath.Glob(root + "/captures/*")
	for i, link := range all {
		all[i] = strings.Replace(filepath.Base(link), "_", "/", 1)
		if all[i] == name {
			return os.Readlink(link)
		}
	}
	return "", fmt.Errorf("%q is not captured here: use <namespace>/<pod>, one of %q", cut(name), all)
}

// Sizes in bytes. A packet's header has its time (8), its captured length and its full length.
const pcapHeader, packetHeader, head = 24, 16, pcapHeader + packetHeader

// cat writes the files of a capture as one pcap, the oldest one first. A file whose head (its
// header and its first packet's) changes meanwhile is being overwritten, and is left out. It tells
// stderr how much it wrote, as kubectl exec may cut the output to a slow reader and exit with 0.
func cat(root, name string, stdout, stderr io.Writer) error {
	stem, err := findCapture(root, name)
	if err != nil {
		return err
	}
	paths, _ := findFiles(stem)
	heads, times := map[string]string{}, map[string][]uint32{}
	for _, path := range paths {
		// A file is as old as its first packet: seconds and microseconds. Without one it is the newest.
		heads[path], times[path] = readStart(path, head), []uint32{math.MaxUint32, 0}
		if start := []byte(heads[path]); len(start) == head {
			binary.Decode(start[pcapHeader:], binary.NativeEndian, times[path])
		}
	}
	slices.SortStableFunc(paths, func(a, b string) int { return slices.Compare(times[a], times[b]) })

	packets, written := 0, 0
	for _, path := range paths {
		switch data, err := os.ReadFile(path); {
		case err != nil || !strings.HasPrefix(readStart(path, head), heads[path]):
			fmt.Fprintf(stderr, "packets may be missing: %s was overwritten or deleted\n", path)
		case min(len(data), len(heads[path])) >= pcapHeader: // else it had just been begun
			count, end := countPackets(data)
			n, err := stdout.Write(data[min(written, pcapHeader):end]) // the first file's header is enough
			if packets, written = packets+count, written+n; err != nil {
				return err
			}
		}
	}
	if written == 0 {
		return fmt.Errorf("%s has no file to read now: try again, or see kubectl describe pod", name)
	}
	noun := map[bool]string{true: "packet", false: "packets"}[packets == 1]
	fmt.Fprintf(stderr, "%d %s, %d bytes\n", packets, noun, written)
	return nil
}

// countPackets counts the whole packets of a file, and returns where the last one ends.
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

// live writes a capture's packets to stdout as they arrive, from a second tcpdump in its network.
// It ends with the capture's tcpdump, or with stdin: the only sign that kubectl exec has gone.
func live(ctx context.Context, root, name string) error {
	stem, err := findCapture(root, name)
	if err != nil {
		return err
	}
	dir, options := findTcpdump(stem)
	network, err := os.Open(dir + "/ns/net")
	// A second look shows that the network that was opened is that of this tcpdump.
	if again, _ := findTcpdump(stem); err != nil || again != dir {
		return fmt.Errorf("no tcpdump is capturing %s now: kubectl describe pod says why", name)
	}

	running, stop := context.WithCancelCause(ctx)
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop(errors.New("stdin has ended: kubectl exec needs -i and a stdin that stays open"))
	}()
	go func() {
		for readFile(dir+"/cmdline") != "" { // as long as it lives
			time.Sleep(100 * time.Millisecond)
		}
		stop(nil) // no error: the cause is Canceled
	}()

	tcpdump := start(running, network, append([]string{"--immediate-mode", "-w", "-"}, options...)...)
	io.Copy(os.Stderr, tcpdump.stderr) // it says how many packets were dropped
	exit := cmp.Or(tcpdump.wait(), errors.New("exit status 0"))
	if cause := context.Cause(running); ctx.Err() == nil && cause != context.Canceled {
		return cmp.Or(cause, fmt.Errorf("tcpdump has ended (%v)", exit))
	}
	return nil
}

// findTcpdump returns the folder in /proc of the tcpdump that writes a capture's files, and its
// options after -w <stem>. It looks only at this container's processes: others can imitate one.
func findTcpdump(stem string) (dir string, options []string) {
	ours, _ := os.Readlink("/proc/self/ns/mnt")
	all, _ := filepath.Glob("/proc/[1-9]*")
	for _, dir := range all {
		mounts, _ := os.Readlink(dir + "/ns/mnt")
		before, after, found := strings.Cut(readFile(dir+"/cmdline"), "\x00-w\x00"+stem+"\x00")
		if mounts == ours && found && strings.HasPrefix(before, "tcpdump\x00") {
			return dir, strings.Split(strings.TrimSuffix(after, "\x00"), "\x00")
		}
	}
	return "", nil
}

// ---- Helpers ----

// backoff holds the shortest next pause, which doubles with each failure, up to most.
type backoff struct{ pause, most time.Duration }

// next returns a pause with jitter, so that nodes do not retry in step, plus Retry-After.
func (b *backoff) next(err error) time.Duration {
	wait := b.pause + rand.N(b.pause)
	b.pause = min(2*b.pause, b.most)
	status, _ := err.(statusError)
	return wait + status.retryAfter
}

func sleep(ctx context.Context, wait time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(wait):
	}
}

// cut shortens a text that comes from outside, and marks the cut with "…".
func cut(text string) string {
	if runes := []rune(text); len(runes) > 128 {
		return string(runes[:128]) + "…"
	}
	return text
}

func readFile(path string) string { return readStart(path, math.MaxInt64) }

// readStart returns a file's first bytes or "". os.Open would double the system calls.
func readStart(path string, size int64) string {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close()
	text, _ := io.ReadAll(io.LimitReader(file, size))
	return string(text)
}
