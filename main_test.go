package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
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

// The promises, in the order of main.go.

// No request of any test may go to a proxy. That of the environment is read once in a process: not t.Setenv.
func init() { os.Setenv("HTTPS_PROXY", "http://proxy.test:3128") }

const (
	// The UIDs of all pods in these stories begin alike.
	uidA, uidB, uidC = "1b2c3d4e-0000-a", "1b2c3d4e-0000-b", "1b2c3d4e-0000-c"

	// What is told: hosts if a pod has the host's network, and again if tcpdump begins in files with packets.
	started   = "Normal CaptureStarted"
	hosts     = "Warning CaptureStarted: this pod has the host's network, so the files hold the node's"
	again     = "Warning CaptureStarted: tcpdump started over at the first file, and the packets in that file"
	stopped   = "Normal CaptureStopped"
	waiting   = "Warning CaptureWaiting"
	failed    = "Warning CaptureFailed"
	invalid   = "Warning CaptureInvalid"
	continued = "Normal CaptureContinued"
)

var web, db, young = podNamed("web", uidA, "3"), podNamed("db", uidB, "3"), podNamed("new", uidC, "1")

// of asks for a number of files, or with "" for nothing, on for an interface, and filtered for a filter.
func (p annotated) of(value string) annotated        { p.value = value; return p }
func (p annotated) on(iface string) annotated        { p.iface = iface; return p }
func (p annotated) filtered(filter string) annotated { p.filter = filter; return p }

// keptAfter is after for a last tcpdump that has ended, and whose files are there.
func (w *world) keptAfter(wait time.Duration, events ...string) {
	w.Helper()
	w.pass(wait)
	last := w.kids.last()
	paths, _ := findFiles(last.stem)
	is(w, "tcpdump lives", last.lives(), false)
	is(w, "files that are kept", len(paths), len(last.files))
	w.told(events...)
}

// change has a pod change, and checks what runs some seconds later, and which Events came.
func (w *world) change(p annotated, running files, events ...string) {
	w.Helper()
	w.see(p)
	w.after(waitingTime+time.Second, running, events...)
}

// born sees a pod whose network is there.
func (w *world) born(pid int, p annotated) {
	w.proc.pod(pid, p.kubeletUID)
	w.see(p)
}

// finishes ends a pod. Its cgroup and its eth0 go, which the last tcpdump notices.
func (w *world) finishes(p annotated) {
	w.proc.gone(p.uid)
	w.kids.last().exit("tcpdump: pcap_loop: The interface disappeared\n"+closing, errStatus)
}

func each[T any](t *testing.T, cases map[string]T, story func(w *world, test T)) {
	for name, test := range cases {
		t.Run(name, func(t *testing.T) { simulate(t, 0, func(w *world) { story(w, test) }) })
	}
}

func (w *world) watchedFrom(want ...string) {
	w.Helper()
	synctest.Wait()
	var got []string
	for _, watch := range w.api.asked("watch") {
		got = append(got, watch.from)
	}
	is(w, "watches from", got, want)
}

// untilWatching returns at the moment, on 100 ms, at which a watch is open, or gives up after 10 minutes.
func (w *world) untilWatching() {
	for began := time.Now(); w.api.watching() == 0 && time.Since(began) < 10*time.Minute; {
		w.pass(100 * time.Millisecond)
	}
}

// checkBackoff checks random waits that double up to most, with the API server's Retry-After on top.
func checkBackoff(t testing.TB, requests []fakeRequest, least, most, retryAfter time.Duration) {
	t.Helper()
	seen := map[time.Duration]bool{}
	for i, request := range requests[1:] {
		wait := request.at.Sub(requests[i].at) - retryAfter
		if wait < least || wait > 2*least || seen[wait] {
			t.Errorf("wait %d is %v, want from %v to %v", i, wait, least, 2*least)
		}
		seen[wait], least = true, min(2*least, most/2)
	}
}

func says(t testing.TB, err error, words string) {
	t.Helper()
	if !strings.Contains(fmt.Sprint(err), words) {
		t.Errorf("the error is %v, want %s", err, words)
	}
}

// The environment configures the program. All that is missing or wrong is named at once.
func TestConfiguration(t *testing.T) {
	const least = 64<<20 + 1_000_000 + 262_144 + 16 // the log, and one file
	type environment map[string]string
	for _, test := range []struct {
		set      environment
		limit    int // 0: all that is set is wrong
		diskFree int64
	}{
		{limit: math.MaxInt32, diskFree: 15},
		{set: environment{"DISK_LIMIT": fmt.Sprint(least), "DISK_FREE": "0"}, limit: 1},
		{set: environment{"DISK_FREE": "99"}, limit: math.MaxInt32, diskFree: 99},
		{set: environment{"DISK_LIMIT": fmt.Sprint(least - 1), "DISK_FREE": "-1"}},
		{set: environment{"DISK_LIMIT": "1Gi", "DISK_FREE": "100"}},
		{set: environment{"NODE_NAME": "", "KUBERNETES_SERVICE_HOST": "", "KUBERNETES_SERVICE_PORT": "",
			"DISK_FREE": "15%"}},
	} {
		all := environment{
			"NODE_NAME": "node-1", "KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
		maps.Copy(all, test.set)
		a, err := newAgent(func(name string) string { return all[name] })
		if test.limit > 0 {
			must(t, err)
			is(t, "configuration", []any{a.nodeName, a.url, a.account, a.proc, a.root, a.limit, a.diskFree},
				[]any{"node-1", "https://[fd00::1]:443", "/var/run/secrets/kubernetes.io/serviceaccount",
					"/proc", "/", test.limit, test.diskFree})
			continue
		}
		for name, value := range test.set {
			says(t, err, name+" is "+strings.Replace(strconv.Quote(value), `""`, "empty", 1))
		}
	}
}

// A program that can't do its work does not begin, and says what it lacks.
func TestStart(t *testing.T) {
	proc, root := newProc(t), t.TempDir()
	ctx, end := context.WithCancel(t.Context())
	end()
	begin := func(proc, root string) error { return testAgent(t, proc, root).run(ctx) }
	must(t, begin(proc.dir, root))
	says(t, begin(proc.dir, root), "another packetcapture is running here")
	proc.regrow("/systemd")
	proc.make("/user.slice")
	says(t, begin(proc.dir, t.TempDir()), "no cgroup kubepods is in "+proc.dir+
		"/1/root/sys/fs/cgroup, nor in systemd or pids")
	says(t, begin("/none", t.TempDir()), "this needs hostPID, CAP_SYS_PTRACE and "+
		"appArmorProfile Unconfined: no cgroup kubepods is in /none/1/root/sys/fs/cgroup")
	for _, arguments := range [][]string{{"help"}, {"dog", "no/pod"}, {"cat"}, {"live", "no/pod", "x"}} {
		says(t, run(t.Context(), arguments),
			fmt.Sprintf("can't run %q: use cat or live with <namespace>/<pod>", arguments))
	}
	says(t, run(t.Context(), []string{"cat", "no/pod"}), `"no/pod" is not captured here`)
	says(t, run(t.Context(), []string{"live", "no/pod"}), `"no/pod" is not captured here`)
	t.Setenv("NODE_NAME", "")
	says(t, run(t.Context(), nil), "NODE_NAME is empty")
}

// ---- The watch, and the annotations ----

// The first watch that delivers makes the program ready, and its annotated pods are captured. Of a static pod
// the kubelet's UID counts, which an annotation names. Another pod's UID does not count there.
func TestFirstWatch(t *testing.T) {
	simulate(t, 0, func(w *world) {
		static := podNamed("etcd", "0e7c", "2").on("lo").filtered(" tcp port 80\n")
		static.kubeletUID = "0123456789abcdef0123456789abcdef"
		thief := map[string]string{annotation: "1", "kubernetes.io/config.mirror": uidB}
		w.api.push("", breaks)
		w.api.fail("watch", fault{times: 1, code: 500})
		w.api.fail("watch", fault{times: 1, code: 200, body: string(errorFrame(500, "no leader"))})
		w.api.put(fakePod{"shop", "thief", "0bad", thief, 0})
		w.see(young.of(""))
		w.born(50, web.of("5"))
		w.proc.pod(51, db.uid)
		w.born(52, static)
		w.pass(2 * time.Second)
		is(t, "delivered", w.delivered.Load(), 0)
		w.untilWatching()
		is(t, "delivered", w.delivered.Load(), 4)
		w.runs(files{"etcd": 2, "web": 5})
		w.logged(`the interface is lo; the filter is \"tcp port 80\"`, 1)
		w.logged("the filter is", 1)

		w.pass(2 * time.Second)
		w.api.push("", ends) // the versions so far came in no order: none is one to go on from
		w.watchedFrom("0", "0", "0", "0", "0")
		w.see(web.of("6"))
		w.lose(podNamed("web", "01d", "5"))
		w.runs(files{"etcd": 2, "web": 6}) // what is late about its predecessor stops nothing
		w.lose(web)
		last := w.see(db.of(""))
		w.api.push("", ends)
		w.runs(files{"etcd": 2})
		w.watchedFrom("0", "0", "0", "0", "0", last)
		is(t, "tcpdumps", w.kids.started(), 3)
	})
}

// When the server has no history any more, or a whole watch has brought nothing, the program begins anew, at
// once. Captures whose pods have gone meanwhile are stopped, but only when all pods have come.
func TestGone(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.born(50, web)
		w.born(51, db)
		w.proc.pod(52, young.uid)
		last := w.marked()
		w.api.fail("watch", fault{times: 1, code: 500})
		w.api.push("", ends)
		synctest.Wait()
		w.lose(db)
		w.see(young)
		w.api.compact(true)
		w.untilWatching()
		w.watchedFrom("0", last, last, "0")
		is(t, "the watch after it is gone comes", w.api.asked("watch")[3].at, w.api.asked("watch")[2].at)
		w.runs(files{"db": 3, "new": 1, "web": 3}) // there may be more pods to come
		now := w.marked()
		w.runs(files{"new": 1, "web": 3})
		is(t, "tcpdumps", w.kids.started(), 3)
		w.logged("410 Gone", 0)

		for range 2 {
			w.api.push("", ends)
			w.pass(2 * time.Second)
		}
		w.watchedFrom("0", last, last, "0", now, "0")
	})
}

// A watch that ends at its time limit is no failure. The limits differ, so that the nodes' watches spread;
// the fake checks that they are 300 to 600 s. No watch is kept for longer.
func TestTimeLimit(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.api.bookmarkEvery = time.Minute
		w.api.push("", ends)
		w.pass(24 * time.Hour)
		watches, limits := w.api.asked("watch")[1:], map[string]bool{}
		for i, next := range watches[1:] {
			is(t, "time of a watch", fmt.Sprint(next.at.Sub(watches[i].at).Seconds()), watches[i].limit)
			is(t, "the next watch begins anew", next.from == anyVersion, false)
			limits[next.limit] = true
		}
		is(t, "a day sees 60 limits", len(limits) >= 60, true)
		w.logged("WARN", 1)

		w.api.freeze()
		w.pass(22 * time.Minute) // one is open, the next is not answered
		is(t, "there is a third watch", len(w.api.asked("watch")) >= 1+len(watches)+2, true)
	})
}

// A broken event applies nothing. When a watch has shown that it works, the next one goes on from its last
// event's version, and the waits begin anew.
func TestBrokenWatch(t *testing.T) {
	mark, deleted := string(bookmarkFrame(9)), `{"type":"DELETED","object":{"metadata":{"uid":"`+uidA+`"`
	type test struct {
		silent time.Duration // before the text
		text   string
		end    ending
		from   string
	}
	each(t, map[string]test{
		"cut in an event":     {text: mark + deleted, end: ends, from: "v9"},
		"no resourceVersion":  {text: mark + deleted + "}}}", from: "v9"},
		"lost after an event": {text: mark, end: breaks, from: "v9"},
		"lost after a second": {silent: time.Second, end: breaks, from: "v102"},
	}, func(w *world, test test) {
		w.born(50, web)
		w.marked()
		w.api.fail("watch", fault{times: 6, code: 500})
		w.api.push("", ends)
		w.untilWatching()
		w.pass(test.silent)
		before, ended := len(w.api.asked("watch")), fakeRequest{at: time.Now()}
		w.api.push(test.text, test.end)
		w.pass(2 * time.Second)
		next := w.api.asked("watch")[before]
		is(w, "it watches from", next.from, test.from)
		checkBackoff(w, []fakeRequest{ended, next}, 800*time.Millisecond, 30*time.Second, 0)
		w.runs(files{"web": 3})
		is(w, "tcpdumps", w.kids.started(), 1)
	})
}

// Whatever the trouble, the server is asked again after growing waits, on top of what it asks for. The log
// tells once when it begins and when it ends, the second time too.
func TestTrouble(t *testing.T) {
	type test struct {
		fault
		says  string
		extra time.Duration // that is waited
	}
	each(t, map[string]test{
		"200, then closed": {fault: fault{code: 200}, says: "EOF"},
		"502 of a proxy":   {fault: fault{code: 502, body: "<html>"}, says: "502 Bad Gateway: no Status"},
		"more than 64 KiB": {fault: fault{code: 502, body: `{"message":"` + strings.Repeat("x", 64<<10) + `"}`},
			says: "502 Bad Gateway: no Status"},
		"lost":           {fault: fault{err: syscall.ECONNRESET}, says: "connection reset"},
		"wait of -100 s": {fault: fault{code: 429, retryAfter: "-100"}, says: "429 Too Many Requests: so"},
		"wait of years":  {fault: fault{code: 429, retryAfter: "9999999999"}, says: "429", extra: time.Minute},
	}, func(w *world, test test) {
		for outage := range 2 {
			w.marked()
			before := len(w.api.asked("watch"))
			w.api.fail("watch", test.fault)
			w.api.push("", ends)
			w.pass(20 * time.Minute)
			watches := w.api.asked("watch")[before:]
			is(w, "it is tried again and again", len(watches) > 11, true)
			checkBackoff(w, watches, 800*time.Millisecond, 30*time.Second, test.extra)
			w.logged("WARN", outage+1)
			w.logged(test.says, outage+1)
			w.logged("https://", 0)
			w.logged("watched again", outage)

			w.api.heal()
			w.untilWatching()
			w.marked()
			w.logged("watched again", outage+1)
		}
	})
}

// An invalid annotation starts and stops nothing. One Event says what was read, and what it must be.
func TestMistakes(t *testing.T) {
	const many = invalid + `: The annotation tcpdump.antrea.io is "many": it must be a plain decimal number ` +
		"of files, from 1 to 5; nothing changes"
	const refused = invalid + `: /filter is "refused": it must be a pcap filter with numeric hosts ` +
		"and ports (tcpdump: can't parse filter expression: syntax error); nothing changes"
	simulate(t, 5, func(w *world) {
		w.proc.pod(50, web.uid)
		w.change(web.of("many"), nil, many)
		w.change(web.of("many").filtered("udp"), nil)
		w.change(web.of(""), nil)
		w.change(web.of("many"), nil, many)
		w.change(web.of("6"), nil, invalid+`: is "6": it must be a plain decimal number`)
		two, running := web.of("2"), files{"web": 2}
		w.change(two, running, started)
		w.change(two.filtered("refused"), running, refused)
		w.change(two.filtered("refused"), running) // something else has changed
		w.change(two.filtered("a\nb"), running,
			invalid+`: /filter is "a\nb": it must be a pcap filter, a line`)
		w.change(two.filtered(strings.Repeat("x", 1025)), running,
			invalid+`: is "`+strings.Repeat("x", 128)+`…": it must be a pcap filter, a line`)
		w.change(two.on("a/b"), running, invalid+`: /interface is "a/b": it must be the name of a network`)
		w.change(two, running, continued)
		w.change(two.filtered("refused"), running, refused)
		w.change(web.of("3"), files{"web": 3}, stopped, started)
		is(t, "tcpdumps", w.kids.started(), 2)
		is(t, "filters", w.kids.compiled, []string{"refused", "refused"})

		w.kids.behave(behaviour{compile: time.Minute})
		w.see(web.filtered("icmp"))
		w.pass(time.Second)
		w.end()
		w.told(stopped) // and no filter is refused
	})
}

// ---- A capture, its tcpdump and its files ----

// A capture starts 25 ms after its pod's network, or 0.5 s if it has waited for 5 minutes. What it lacks is told
// once, after 3 s.
func TestWaiting(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.see(web)
		w.see(db)
		w.after(waitingTime-1, nil)
		network := waiting + ": Waiting for the pod's network: the pod has not started yet, or has ended"
		w.after(25*time.Millisecond, nil, network, network)
		w.pass(295 * time.Second)
		w.proc.pod(50, web.uid)
		w.after(25*time.Millisecond, files{"web": 3}, started)
		w.pass(10*time.Second - 40*time.Millisecond) // it was just looked for
		w.proc.pod(51, db.uid)
		w.after(400*time.Millisecond, files{"web": 3})
		w.after(100*time.Millisecond, files{"web": 3, "db": 3}, started)

		newer, namesake := podNamed("web", uidC, "2"), podNamed("web", "1b2c3d4e-0000-d", "1")
		namesake.namespace = "other"
		w.born(52, newer)
		w.born(53, namesake)
		w.after(2*time.Minute, files{"web": 3, "db": 3, "web_1b2c3d4e": 1},
			started, waiting+": its file name: an earlier capture has not ended yet")
		w.lose(web)
		w.after(time.Second, files{"web": 2, "db": 3, "web_1b2c3d4e": 1}, stopped, started)

		// With N=1, too, two pods of one name have a file each.
		one, other := podNamed("one", "1", "1"), podNamed("one", "2", "1")
		other.namespace = "other"
		w.born(54, one)
		w.born(55, other)
		w.after(time.Second, files{"web": 2, "db": 3, "web_1b2c3d4e": 1, "one": 1, "one_2": 1}, started, started)
	})
}

// A pod that has finished keeps its files until the pod goes, or its annotation changes or goes. An Event
// says so if the pod is still there some seconds later. A new network is captured.
func TestFinishedPod(t *testing.T) {
	const counted = stopped + ": Stopped: 7 packets captured, 2 packets dropped by the kernel"
	const gone = "; the pod's network is gone; the files (300 bytes) stay until it is back, or the annotation or the pod goes"
	const deleted = "; its files (300 bytes) are deleted"
	simulate(t, 5, func(w *world) {
		w.born(50, web)
		w.pass(time.Minute)
		w.finishes(web)
		w.keptAfter(waitingTime-time.Second, started)
		w.born(60, db.of("4"))
		w.keptAfter(10*time.Minute, counted+gone, waiting+": room for N=4: 3 of the node's 5 files")
		w.proc.joins(51, web.uid, "new")
		w.after(time.Second, files{"web": 3}, again)
		for i, net := range []string{"newer", "newest"} {
			w.proc.end(51 + i)
			w.proc.joins(52+i, web.uid, net)
			w.after(time.Second, files{"web": 3},
				counted+" since tcpdump started over; the pod has a new network", again)
			is(t, "network", filepath.Base(w.kids.last().network), "net-"+net)
		}

		w.finishes(web)
		w.pass(waitingTime - time.Second)
		w.change(web.of("2"), files{"db": 4}, counted+" since tcpdump started over"+deleted, started,
			waiting+": the pod's network")
		w.finishes(db)
		w.pass(waitingTime - time.Second)
		w.lose(db)
		w.after(0, nil, counted+deleted)
	})
}

// A capture goes on while its pod crashes, even without a pause process, as under CRI-O. A tcpdump that does
// not notice the end of its pod is told to end, after two more seconds in which it reads the last packets.
func TestEndOfPod(t *testing.T) {
	for _, test := range []struct {
		net, iface, told string
		losesNetwork     bool          // or its cgroup
		at               time.Duration // in a second
	}{
		{net: uidA, iface: "lo", told: started, at: 1},
		{net: uidA, iface: "any", told: started, at: time.Second - 1, losesNetwork: true},
		{net: host, told: hosts, at: time.Second - 1},
	} {
		simulate(t, 0, func(w *world) {
			w.proc.joins(50, web.uid, test.net)
			w.see(web.on(test.iface))
			w.told(test.told)
			w.proc.end(50)
			w.pass(time.Minute)
			w.proc.joins(51, web.uid, test.net)
			w.pass(time.Minute + test.at)
			if test.losesNetwork {
				w.proc.interfaces(uidA, "lo")
			} else {
				w.proc.gone(uidA)
			}
			w.after(2*time.Second, files{"web": 3})
			w.keptAfter(time.Second)
			w.keptAfter(waitingTime+time.Second, stopped+": network is gone; the files (300 bytes) stay")
		})
	}
}

// A tcpdump that can't be ended holds up the next one. One that fails is tried again, after pauses that double
// from 0.2 s to 5 minutes, and begin anew after a run of a minute. An Event says why.
func TestRestarts(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{startup: time.Second, deaf: true, immortal: true})
		w.born(50, web)
		w.kids.behave(behaviour{})
		w.see(web.of("4")) // before it has started: no Event says that it has
		w.after(time.Hour, files{"web": 3})
		w.kids.last().exit(closing, errKilled)
		w.after(0, files{"web": 4}, started)

		w.kids.behave(behaviour{refusal: syscall.EAGAIN})
		w.kids.last().exit("", errKilled)
		tries := []fakeRequest{{at: time.Now()}}
		w.pass(time.Hour)
		w.told(failed+": tcpdump has ended (signal: killed); it is tried again, with pauses of up to 5 minutes",
			failed+": tcpdump has ended (resource temporarily unavailable); it is tried again")
		tries = append(tries, w.kids.attempts[2:]...)
		is(t, "it is started again and again", len(tries) > 16, true)
		checkBackoff(t, tries, 200*time.Millisecond, 5*time.Minute, 0)

		w.kids.behave(behaviour{})
		w.after(7*time.Minute, files{"web": 4}, again)
		w.kids.last().exit("", errKilled) // it has run for a minute
		w.after(400*time.Millisecond, files{"web": 4}, failed, again)
		before := w.kids.started()
		for range 600 {
			w.kids.last().exit("", errKilled) // at once
			w.pass(time.Second)
		}
		n := w.kids.started() - before
		is(t, "it is started again in 10 minutes 5 to 13 times", n >= 5 && n <= 13, true)
	})
}

// A tcpdump that had to be killed can't say how many packets it has written.
func TestKilled(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{deaf: true})
		w.born(50, web)
		w.told(started)
		w.lose(web)
		w.after(termGrace, nil, stopped+
			": Stopped: an unknown number of packets captured; its files (300 bytes) are deleted")
	})
}

// tcpdump captures eth0, any in the host's network, or what the annotation names, once the pod has that: "2"
// would be the second one. A filter is one argument, compiled for the device. Nothing keeps the network open.
func TestArguments(t *testing.T) {
	for _, test := range []struct {
		net, iface, filter, device, link, told string
		isMissing                              bool // the interface, at first
	}{
		{net: uidA, device: "eth0", told: started},
		{net: uidA, iface: "any", filter: "-w /x", device: "any", link: "LINUX_SLL2", told: started},
		{net: uidA, iface: "2", filter: "$(reboot)", device: "2", link: "EN10MB", told: started, isMissing: true},
		{net: host, filter: "--", device: "any", link: "LINUX_SLL2", told: hosts},
		{net: host, iface: "eth0", filter: "udp", device: "eth0", link: "EN10MB", told: hosts, isMissing: true},
	} {
		simulate(t, 0, func(w *world) {
			w.proc.joins(50, web.uid, test.net)
			w.see(web.on(test.iface).filtered(test.filter))
			if test.isMissing {
				w.after(time.Minute, nil, waiting+": the interface "+test.iface+": the pod has lo, e")
				w.proc.interfaces(test.net, "lo", "eth0", test.iface)
				w.pass(time.Second)
			}
			w.after(0, files{"web": 3}, test.told)
			want := []string{"-C", "1", "-W", "3", "-w", w.root + "/capture-web.pcap",
				"-U", "-Z", "root", "-p", "-i", test.device, "-B", "4096", "--", test.filter}
			if test.filter != "" {
				is(t, "link type", w.kids.links, []string{test.link})
			}
			is(t, "arguments", w.kids.last().arguments, want)
			is(t, "network", filepath.Base(w.kids.last().network), "net-"+test.net)
			is(t, "files that are open", len(openIn(w.proc.dir)), 0)
		})
	}
}

// Of what tcpdump says its first warning, its last complaint and its counts are kept. All of it is read.
func TestStderr(t *testing.T) {
	const listening = "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n"
	long := "tcpdump: " + strings.Repeat("é", 119)
	for _, test := range []struct{ text, warning, complaint, counts string }{
		{text: listening + "1 packet captured\n1 packet received by filter\n0 packets dropped by kernel\n",
			counts: "1 packet captured, 0 packets dropped by the kernel"},
		{text: "tcpdump: first\n" + listening + "nsenter: last", complaint: "nsenter: last"},
		{text: "tcpdump: eth0: no permission\n(socket: not permitted)\n", complaint: "tcpdump: eth0: no permission"},
		{text: "tcpdump: data link type LINUX_SLL2\n" + listening},
		{text: "tcpdump: WARNING: first\nWarning: late\n" + listening, warning: "tcpdump: WARNING: first"},
		{text: long, complaint: long},
		{text: long + "é", complaint: long + "…"},
		{text: strings.Repeat("x", 1<<20) + "\n"}, // longer than a line may be
	} {
		stderr, warning, listens := strings.NewReader(test.text), "", false
		child := &process{stderr: stderr, wait: func() error { return errStatus }}
		counts, err := child.read(func(said string) { warning, listens = said, true })
		got := []any{warning, err.Error(), counts, listens, stderr.Len()}
		want := []any{test.warning, cmp.Or(test.complaint, errStatus.Error()), test.counts,
			strings.Contains(test.text, listening), 0}
		is(t, fmt.Sprintf("%.99q: warning, error, counts, listens, bytes left", test.text), got, want)
	}
}

// The files of all captures are bounded, here by 5. What does not fit waits. A change that needs no more
// files than before keeps its room, whoever waits; of a larger number an Event says what is free.
func TestRoom(t *testing.T) {
	a, b, c := podNamed("a", "a", ""), podNamed("b", "b", ""), podNamed("c", "c", "")
	simulate(t, 5, func(w *world) {
		w.kids.behave(behaviour{shutdown: 700 * time.Millisecond})
		for i, p := range []annotated{a, b, c} {
			w.proc.pod(50+i, p.uid)
		}
		running := files{"a": 5}
		w.change(a.of("5"), running, started)
		w.change(b.of("5"), running, waiting+": N=5")
		w.change(b.of("3"), running, waiting+": N=3")
		w.change(c.of("1"), running, waiting)
		link, err := os.Lstat(w.root + "/captures/default_a")
		must(t, err)
		w.change(a.of("5").filtered("udp"), running, stopped, started)
		now, err := os.Lstat(w.root + "/captures/default_a")
		must(t, err)
		is(t, "when the link was made", now.ModTime(), link.ModTime()) // with the room, which was kept
		running = files{"b": 3, "c": 1}
		w.change(a.of("5").on("net1"), running, stopped, started, started, waiting+": the interface net1")
		w.change(a.of("4"), running, waiting+": room for N=4")
		w.change(b.of(""), files{"a": 4, "c": 1}, stopped, started)

		w.change(a.of("3"), files{"a": 3, "c": 1}, stopped, started)
		w.change(c.of(""), files{"a": 3}, stopped)
		w.change(c.of("4"), files{"a": 3}, waiting+": 3 of the node's 5 files")
		running = files{"a": 3, "b": 1}
		w.change(b.of("1"), running, started)
		w.change(a.of("5"), running, invalid+
			`: is "5": it must be at most 4 now, because other captures have the rest of the node's 5`)
		w.change(a.of("3"), running, continued)
		w.see(a.of("4")) // while its tcpdump stops, c asks for the last file
		w.change(c.of("1"), files{"a": 4, "b": 1}, stopped, started, waiting+": 5 of the node's 5 files")
		w.see(a.of("1"))
		w.pass(600 * time.Millisecond) // c has looked, and a's tcpdump has not ended
		is(w, "c's link", readLink(w.root+"/captures/default_c"), "")
		w.after(time.Second, files{"a": 1, "b": 1, "c": 1}, stopped, started, started)
	})

	// A capture that still runs does not take back the room that was reserved for its successor.
	node := fuzzed(t, nil).agent
	one := &capture{agent: node, pod: web.pod, spec: spec{files: 3}}
	is(t, "missing", one.takeRoom(), "")
	one.captured = true
	_, _, mustBe := one.check(t.Context(), spec{value: "9", files: 9})
	is(t, "what it must be", mustBe, "")
	is(t, "missing", one.takeRoom(), "")
	is(t, "room", node.rooms[one.stem], 9)
}

// A part of the disk stays free. A capture waits until there is more. One that runs stops, and its files stay.
func TestDiskFull(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.agent.diskFree = 15
		// With the link there, the path leads to /proc, in which nothing is free.
		link := w.root + "/captures/full"
		w.agent.root = link + "/../.."
		must(t, os.Symlink("/proc/self/fd", link))
		w.born(50, web)
		w.after(time.Hour, nil, waiting+": disk space: 15 % of it and 1262160 bytes must be free")
		must(t, os.Remove(link))
		w.after(time.Second, files{"web": 3}, started)
		must(t, os.Symlink("/proc/self/fd", link))
		w.keptAfter(time.Hour, failed+": too little disk is free", stopped+": the files (300 bytes) stay until")
		must(t, os.Remove(link))
		w.after(time.Second, files{"web": 3}, again)
	})
}

// ---- A pod's cgroup, its processes and its network ----

// networkOf is the name of the network that is found for a pod, "" if there is none.
func networkOf(t *testing.T, proc *fakeProc, p annotated) string {
	g, err := newCgroups(proc.dir)
	must(t, err)
	network := g.find(p.pod, sandbox{}).network
	if network == "" {
		return ""
	}
	return strings.TrimPrefix(filepath.Base(filepath.Dir(network)), "net-")
}

// openIn are the links of what is open in a folder.
func openIn(dir string) []string {
	links, _ := filepath.Glob("/proc/self/fd/*")
	return slices.DeleteFunc(links, func(link string) bool { return !strings.HasPrefix(readLink(link), dir) })
}

// A pod is found by its cgroup, whoever makes that: on cgroup v1 and v2, with the kubelet's and systemd's
// names, in each class of pods, and a level deeper in kind. What is no hash never becomes a path.
func TestCgroupNames(t *testing.T) {
	for _, test := range []struct{ hierarchy, pod, process string }{
		{process: "/kubepods/podUID/cafe"},
		{process: "/kubepods/burstable/podUID/cafe"},
		{process: "/kubepods/besteffort/podUID/cafe"},
		{process: "/kubepods.slice/kubepods-podU_ID.slice/crio-cafe.scope/container/within"},
		{hierarchy: "/systemd",
			process: "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_ID.slice/x"},
		{hierarchy: "/pids", process: "/kubepods/podUID/cafe"},
		{hierarchy: "/systemd", process: "/kubelet/kubepods/podUID/cafe"},
		{process: "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/" +
			"kubelet-kubepods-burstable-podU_ID.slice/x.scope"},
		// The kubelet has systemd make them, and the runtime does not.
		{hierarchy: "/systemd", pod: "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_ID.slice",
			process: "/system.slice/containerd.service/kubepods-burstable-podU_ID.slice:cri-containerd:cafe"},
		{pod: "/kubepods.slice/kubepods-podU_ID.slice",
			process: "/system.slice/kubepods-podU_ID.slice:cri-containerd:cafe"},
	} {
		proc, static := newProc(t), web
		proc.regrow(test.hierarchy)
		static.kubeletUID = "0123456789abcdef0123456789abcdef" // names its cgroup
		for i, uid := range []string{uidA, uidB, static.kubeletUID} {
			named := strings.NewReplacer("UID", uid, "U_ID", strings.ReplaceAll(uid, "-", "_"))
			proc.make(named.Replace(cmp.Or(test.pod, test.process)))
			proc.add(fakeProcess{pid: 50 + i, cgroup: named.Replace(test.process), net: uid, root: "pod"})
		}
		for _, p := range []annotated{web, db, static} {
			is(t, "network in "+test.process, networkOf(t, proc, p), p.kubeletUID)
		}
		is(t, "network of nobody", networkOf(t, proc, podNamed("web", uidA[:8], "3")), "")
	}

	for _, hash := range []string{"", "..", "xyz", "cafe/cafe", "cafe/", "/", "*", uidA} {
		var e event
		e.Object.Metadata.UID = uidB
		e.Object.Metadata.Annotations = map[string]string{"kubernetes.io/config.mirror": hash}
		p, _ := e.pod()
		is(t, fmt.Sprintf("the kubelet's UID with the hash %q", hash), p.kubeletUID, uidB)
	}
	away := func(*http.Request) (*http.Response, error) { return nil, io.EOF }
	for _, uid := range []string{"..", "cafe/", "/cafe", "*"} {
		w := fuzzed(t, away)
		var e event
		e.Type, e.Object.Metadata.UID, e.Object.Metadata.ResourceVersion = "MODIFIED", uid, "1"
		e.Object.Metadata.Annotations = map[string]string{annotation: "1"}
		must(t, w.next(t.Context(), &e, nil))
		is(t, fmt.Sprintf("captures of the UID %q", uid), len(w.captures), 0)
	}
}

// Of a pod's processes the oldest with eth0 counts: never one of the runtime, nor one in a network within.
func TestOldestProcess(t *testing.T) {
	type in struct{ net, root string } // a process
	for name, test := range map[string]struct {
		processes []in // the oldest first; PIDs go down, as after they wrapped around
		network   string
	}{
		"the runtime is still to join":      {processes: []in{{host, host}}, network: ""},
		"the pod's files are still to come": {processes: []in{{"pod", host}}, network: "pod"},
		"hostNetwork under CRI-O":           {processes: []in{{host, host}, {host, "pod"}}, network: host},
		"a network within":                  {processes: []in{{"pod", "pod"}, {"nested", "web"}}, network: "pod"},
		"gVisor's gofer has no interface":   {processes: []in{{"empty", "gofer"}, {"pod", "pod"}}, network: "pod"},
		"it has eth0, among others":         {processes: []in{{"multus", "pod"}}, network: "multus"},
		"it has another interface":          {processes: []in{{"eth00", "pod"}}, network: ""},
	} {
		proc := newProc(t)
		proc.interfaces("empty", "lo")
		proc.interfaces("eth00", "lo", "eth00")
		proc.interfaces("multus", "lo", "net1", "eth00", "eth0")
		add := func(i int) {
			ps := test.processes[i]
			proc.add(fakeProcess{pid: 100 - i, cgroup: cgroupOf(uidA), net: ps.net, root: ps.root, born: 9_999 + i})
		}
		for i := range test.processes {
			add(i)
		}
		is(t, name, networkOf(t, proc, web), test.network)
		add(0)
		is(t, name+", and the oldest is listed last", networkOf(t, proc, web), test.network)
	}
}

// A process that ends while it is looked at no longer counts, whichever of its files has gone already.
func TestEndedProcess(t *testing.T) {
	for file, net := range map[string]string{"stat": uidA, "net": uidA, "ns/net": uidA, "root": host} {
		proc := newProc(t)
		proc.joins(50, web.uid, net)
		proc.joins(51, web.uid, "later")
		must(t, os.Remove(proc.dir+"/50/"+file))
		is(t, "network without "+file, networkOf(t, proc, web), "later")
	}

	// It may also end before its network is open. That is no failure: another process is looked for.
	simulate(t, 0, func(w *world) {
		w.proc.joins(50, web.uid, "first")
		must(t, os.Remove(w.proc.dir+"/net-first/ns"))
		w.see(web)
		w.after(time.Second, nil)
		w.proc.end(50)
		w.proc.pod(51, web.uid)
		w.after(birthPoll, files{"web": 3}, started)
	})
}

// A process may end, and its PID become another pod's, which is never captured.
func TestReusedPID(t *testing.T) {
	proc := newProc(t)
	proc.pod(50, web.uid)
	g, err := newCgroups(proc.dir)
	must(t, err)
	s := g.find(web.pod, sandbox{})
	proc.pod(50, db.uid)
	proc.pod(51, web.uid)
	now := g.find(web.pod, s)
	is(t, "the network that is found", now.network, s.network)

	c := &capture{agent: &agent{proc: proc.dir}}
	says(t, c.runTcpdump(t.Context(), s), "the pod's network: file does not exist")
	is(t, "files that are open", len(openIn(proc.dir)), 0)
	proc.end(50)
	says(t, c.runTcpdump(t.Context(), s), "/50/ns/net: no such file")
}

// ---- Events, the API server, and cat ----

// An Event goes to its pod's namespace, the kubelet's UID and the log.
func TestEventIsPosted(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.pass(time.Hour)
		p := annotated{pod{"shop", "web", "0123456789", "89abcdef"}, spec{value: "3"}}
		w.born(50, p)
		podName, _ := os.Hostname()
		message := "Capturing into " + w.root + "/capture-web.pcap* (N=3, 1 MB each) in " +
			"kube-system/" + podName + "; the interface is eth0"
		name := fmt.Sprintf("packetcapture-%x-01234567", time.Date(2000, 1, 1, 1, 0, 0, 0, time.UTC).UnixNano())
		is(t, "Events", w.api.posted(), []fields{{
			"apiVersion": "v1", "kind": "Event", "metadata": fields{"namespace": "shop", "name": name},
			"involvedObject": fields{"apiVersion": "v1", "kind": "Pod",
				"namespace": "shop", "name": "web", "uid": "89abcdef"},
			"type": "Normal", "reason": "CaptureStarted", "message": message, "count": 1.0,
			"source":         fields{"component": "packetcapture", "host": "node-1"},
			"firstTimestamp": "2000-01-01T01:00:00Z", "lastTimestamp": "2000-01-01T01:00:00Z",
		}})
		w.logged(fmt.Sprintf("level=INFO msg=CaptureStarted namespace=shop pod=web message=%q", message), 1)
		w.see(p.of("x"))
		w.logged("level=WARN msg=CaptureInvalid", 1)
	})
}

// An Event is tried again while the server is away, for 10 minutes at most, and not if it is refused, or if an
// earlier try has posted it. The next one is posted all the same.
func TestEventIsTriedAgain(t *testing.T) {
	type test struct {
		fault
		tries  int           // 0: as many as go into 10 minutes
		extra  time.Duration // that is waited
		isLost int           // as the log says
	}
	each(t, map[string]test{
		"500":          {fault: fault{times: 8, code: 500}, tries: 9},
		"429":          {fault: fault{times: 1, code: 429, retryAfter: "40"}, tries: 2, extra: 40 * time.Second},
		"401":          {fault: fault{times: 1, code: 401}, tries: 2},
		"no answer":    {fault: fault{times: 1, hangs: time.Hour}, tries: 2, extra: 10 * time.Second},
		"it is there":  {fault: fault{code: 409, body: `{"reason": "AlreadyExists"}`}, tries: 1},
		"a quota":      {fault: fault{times: 1, code: 409, body: `{"reason": "Conflict"}`}, tries: 2},
		"503 for long": {fault: fault{code: 503}, isLost: 1},
		"403":          {fault: fault{code: 403}, tries: 1, isLost: 1},
	}, func(w *world, test test) {
		w.api.fail("post", test.fault)
		w.see(web.of("x"))
		w.pass(time.Hour)
		posts := w.api.asked("post")
		if test.tries > 0 {
			is(w, "tries", len(posts), test.tries)
		} else {
			took := posts[len(posts)-1].at.Sub(posts[0].at).Minutes()
			is(w, "it is tried for 10 minutes", took > 9 && took < 11, true)
		}
		checkBackoff(w, posts, 800*time.Millisecond, 30*time.Second, test.extra)
		w.logged("an Event was not posted", test.isLost)
		if test.times > 0 {
			w.told(invalid + `: is "x"`)
		}
		w.api.heal()
		w.see(web.of("y"))
		w.told(invalid + `: is "y"`)
	})
}

// The watch never waits: the server would close it. Events wait in their order, up to 1,000 of a namespace.
func TestFlood(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{startup: time.Hour, deaf: true})
		w.api.fail("post", fault{code: 503})
		w.born(50, web)
		last, told := "", []string(nil)
		for i := range eventQueue + 100 {
			w.api.put(web.of(fmt.Sprint("x", i)).stored())
			told = append(told, fmt.Sprintf(`%s: is "x%d"`, invalid, i))
			last = w.api.put(web.of(fmt.Sprint(i%7 + 1)).stored())
		}
		w.api.push("", ends)
		w.watchedFrom("0", last) // all was read in no time
		w.pass(5 * time.Minute)
		w.runs(files{"web": 1})
		w.api.heal()
		w.pass(time.Minute)
		w.told(told[:eventQueue+1]...) // one is being posted, and the others wait
	})
}

// What was told before the end of the program is posted, and holds up its end for 4.5 s at most.
func TestLastEvents(t *testing.T) {
	type test struct {
		namespace string // whose Events hang
		hangs     time.Duration
		told      []string
	}
	last := stopped + ": 7 packets captured"
	each(t, map[string]test{
		"the server thinks":       {hangs: 4 * time.Second, told: []string{invalid, last}},
		"the server answers none": {hangs: time.Hour},
		"another namespace hangs": {namespace: "shop", hangs: time.Hour, told: []string{last}},
	}, func(w *world, test test) {
		w.born(50, web)
		w.told(started)
		w.api.fail("post "+test.namespace, fault{hangs: test.hangs})
		w.see(annotated{pod{"shop", "web", "05", "05"}, spec{value: "x"}})
		w.pass(time.Second)
		began := time.Now()
		w.end()
		w.program.Wait()
		is(w, "the end is in time", time.Since(began) <= min(test.hangs, 4500*time.Millisecond), true)
		w.told(test.told...)
	})
}

// The client speaks HTTP/2, asks no proxy, and trusts only a certificate of the CA, for the server's address. A
// CA that can't be read leaves the last. A connection that is silent, even to a ping, ends within a minute.
func TestConnection(t *testing.T) {
	var versions []int
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		versions = append(versions, r.ProtoMajor)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	a := testAgent(t, "/none", "/none")
	a.url = server.URL
	get := func() error {
		defer a.api.(*http.Transport).CloseIdleConnections()
		_, err := a.do(t.Context(), "GET", "/", "", "")
		return err
	}
	says(t, get(), "ca.crt holds no certificate")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	must(t, os.WriteFile(a.account+"/ca.crt", ca, 0o600), get(), os.Truncate(a.account+"/ca.crt", 100), get())
	a.url = strings.Replace(server.URL, "127.0.0.1", "localhost", 1)
	says(t, get(), "certificate is valid for example.com")
	is(t, "HTTP's versions", versions, []int{2, 2})

	simulate(t, 0, func(w *world) {
		transport := testAgent(w, "/none", "/none").api.(*http.Transport)
		transport.DialTLSContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			w.Cleanup(func() { theirs.Close() })
			go io.Copy(io.Discard, tls.Server(theirs, server.TLS))
			conn := tls.Client(ours, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
			return conn, conn.HandshakeContext(ctx)
		}
		w.agent.api = transport
		w.marked()
		w.api.push("", ends)
		w.pass(50 * time.Second)
		w.logged("can't watch the pods", 1)
		w.logged("T00:00:00", 0) // a proxy, which init has set, would have failed at once
	})
}

// pcap is a file of packets, each with its time: four in a second.
func pcap(times ...uint32) []byte {
	var b bytes.Buffer
	binary.Write(&b, binary.NativeEndian, []uint32{0xa1b2c3d4, 2 | 4<<16, 0, 0, 262144, 1})
	for _, at := range times {
		data := fmt.Sprintf("packet of %d", at)
		binary.Write(&b, binary.NativeEndian, []uint32{at / 4, at % 4, uint32(len(data)), uint32(len(data))})
		b.WriteString(data)
	}
	return b.Bytes()
}

type contents map[string][]byte // of a capture's files, by the digits in their names

// writeFiles writes the files of default/web, and those of others.
func writeFiles(t *testing.T, all contents) (root string) {
	root = t.TempDir()
	must(t, os.Mkdir(root+"/captures", 0o755), os.Symlink(root+"/capture-db.pcap", root+"/captures/ns2_db"),
		os.Symlink(root+"/capture-web.pcap", root+"/captures/default_web"),
		os.WriteFile(root+"/capture-web.pcap0.pcap1", pcap(99), 0o644),
		os.WriteFile(root+"/capture-x.pcap", pcap(99), 0o644))
	for digits, text := range all {
		must(t, os.WriteFile(root+"/capture-web.pcap"+digits, text, 0o644))
	}
	return root
}

type writerFunc func(text []byte) (int, error)

func (w writerFunc) Write(text []byte) (int, error) { return w(text) }

// cat writes the files as one pcap, the oldest first and whole packets alone, and says how much that was. A
// file that is overwritten meanwhile is left out, and cat says so. A reader that goes away ends it.
func TestCat(t *testing.T) {
	gone := errors.New("the reader has gone")
	for name, test := range map[string]struct {
		files contents
		then  contents // is written when the first file has been read
		err   error    // of the reader
		want  []byte
		says  string
	}{
		"empty": {files: contents{"": pcap()}, want: pcap(), says: "0 packets, 24 bytes\n"},
		"one":   {files: contents{"": pcap(1)}, want: pcap(1), says: "1 packet, 51 bytes\n"},
		"the last has no bytes": {files: contents{"": append(pcap(1), make([]byte, packetHeader)...)},
			want: append(pcap(1), make([]byte, packetHeader)...), says: "2 packets, 67 bytes\n"},
		"the last is cut": {files: contents{"": pcap(1, 2)[:77]}, want: pcap(1), says: "1 packet, 51 bytes\n"},
		"turned": {files: contents{"0": pcap(), "1": pcap()[:23], "2": pcap(4), "3": pcap(3), "4": pcap(0, 2)},
			want: pcap(0, 2, 3, 4), says: "4 packets, 132 bytes\n"},
		"equal": {files: contents{"0": pcap(5, 6), "1": pcap(5)},
			want: pcap(5, 6, 5), says: "3 packets, 105 bytes\n"},
		"one begun": {files: contents{"0": pcap(), "1": pcap(1)}, then: contents{"0": pcap(3)},
			want: pcap(1, 3), says: "2 packets, 78 bytes\n"},
		"the last grows": {files: contents{"0": pcap(1), "1": pcap(3)}, then: contents{"1": pcap(3, 4)},
			want: pcap(1, 3, 4), says: "3 packets, 105 bytes\n"},
		"overwritten": {files: contents{"0": pcap(1), "1": pcap(3), "2": pcap(5)}, then: contents{"1": pcap(9)},
			want: pcap(1, 5),
			says: "packets may be missing: /capture-web.pcap1 was overwritten or deleted\n2 packets, 78 bytes\n"},
		"the last is overwritten": {files: contents{"0": pcap(1), "1": pcap(3)}, then: contents{"1": pcap(9)},
			want: pcap(1),
			says: "packets may be missing: /capture-web.pcap1 was overwritten or deleted\n1 packet, 51 bytes\n"},
		"the reader goes": {files: contents{"0": pcap(1), "1": pcap(3)}, err: gone, want: pcap(1)},
	} {
		root := writeFiles(t, test.files)
		var out, said bytes.Buffer
		err := cat(root, "default/web", writerFunc(func(text []byte) (int, error) {
			for digits, text := range test.then {
				must(t, os.WriteFile(root+"/capture-web.pcap"+digits, text, 0o644))
			}
			out.Write(text)
			return len(text), test.err
		}), &said)
		is(t, name+": error", err, test.err)
		is(t, name, out.String(), string(test.want))
		is(t, name+": it says", strings.ReplaceAll(said.String(), root, ""), test.says)
	}

	// Of a pod that is not captured itself it writes nothing, whatever other pod has its name.
	root := writeFiles(t, contents{"0": pcap(1), "1": pcap(2)})
	for _, name := range []string{"ns2/web", "web", "default_web", "/web", "default/", "default/web/", "",
		"default/../captures/default_web", "../../captures/default_web", "default/x", "/capture-web.pcap0"} {
		var out, said bytes.Buffer
		says(t, cat(root, name, &out, &said), strconv.Quote(name)+" is not captured here: use "+
			`<namespace>/<pod>, one of ["default/web" "ns2/db"]`)
		is(t, name+": written", out.String()+said.String(), "")
	}
	says(t, cat(root, "ns2/db", io.Discard, io.Discard), "ns2/db has no file to read now")
	root = writeFiles(t, contents{"": pcap()[:23]})
	says(t, cat(root, "default/web", io.Discard, io.Discard), "default/web has no file to read now")
	says(t, live(t.Context(), root, "default/web"), "no tcpdump is capturing default/web now")
}
