package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

const (
	uidA = "1b2c3d4e-0000-4000-8000-00000000000a"
	uidB = "1b2c3d4e-0000-4000-8000-00000000000b"
)

// web and db are pods that ask for 3 files.
var web, db = podNamed("web", uidA, "3"), podNamed("db", uidB, "3")

// of is a pod with another value of its annotation, "" for none.
func (p pod) of(value string) pod {
	p.value, p.annotated = value, value != ""
	return p
}

// on is a pod whose interface annotation is iface, "" for none.
func (p pod) on(iface string) pod {
	p.iface, p.hasIface = iface, iface != ""
	return p
}

// filtered is a pod with a filter.
func (p pod) filtered(filter string) pod {
	p.filter = filter
	return p
}

// is checks a value.
func is[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// born sees a pod that has just got a network, and waits until that is found.
func (w *world) born(pid int, p pod) pod {
	w.proc.pod(pid, p.uid)
	w.see(p)
	w.pass(birthPoll)
	return p
}

// running checks which children live, each as "<pod>:<N>", and that there are no files but theirs; or, with "kept:<number>", how
// many files there are that no child writes.
func (w *world) running(children string) {
	w.Helper()
	if number, ok := strings.CutPrefix(children, "kept:"); ok {
		is(w, "files of "+w.kids.last().stem, strconv.Itoa(len(w.fileNames())), number)
		is(w, "a child lives", w.kids.last().lives(), false)
		return
	}
	var want []string
	for _, child := range strings.Fields(children) {
		pod, n, _ := strings.Cut(child, ":")
		want = append(want, "capture-"+pod+".pcap "+n)
	}
	w.runs(want...)
}

// after lets time pass, and checks which children run then, and what was told since the last check.
func (w *world) after(d time.Duration, children string, told ...string) {
	w.Helper()
	w.pass(d)
	w.running(children)
	w.told(told...)
}

// A step is a line of a story: what happens; and some time later, which children run and what was told, with | in between.
type step struct {
	happens  action
	wait     time.Duration
	children string
	told     string
}

type action func(w *world)

func do(actions ...action) action {
	return func(w *world) {
		for _, a := range actions {
			a(w)
		}
	}
}

func behave(b behaviour) action           { return func(w *world) { w.kids.behave(b) } }
func exit(words string, err error) action { return func(w *world) { w.kids.last().exit(words, err) } }
func born(pid int, p pod) action          { return func(w *world) { w.born(pid, p) } }
func see(p pod) action                    { return func(w *world) { w.see(p) } }
func lose(p pod) action                   { return func(w *world) { w.lose(p) } }
func joins(ps fakeProcess) action         { return func(w *world) { w.proc.add(ps) } }
func network(pid int, uid string) action  { return func(w *world) { w.proc.pod(pid, uid) } }
func endOf(pid int) action                { return func(w *world) { w.proc.end(pid) } }
func interfacesOf(net string, names ...string) action {
	return func(w *world) { w.proc.interfaces(net, names...) }
}

// captures checks in which network the last child is.
func captures(net string) action {
	return func(w *world) { is(w, "network", filepath.Base(w.kids.last().network), "net-"+net) }
}

// What is told, in the steps of a story.
const (
	failed      = "Warning CaptureFailed"
	invalid     = "Warning CaptureInvalid"
	started     = "Normal CaptureStarted"
	stopped     = "Normal CaptureStopped"
	waiting     = "Warning CaptureWaiting"
	again       = "Warning CaptureStarted: tcpdump began again at the first file, and the packets in that one are lost"
	disappeared = "tcpdump: pcap_loop: The interface disappeared\n" + closing // tcpdump tells that
)

// startedIn is what is told of a pod with its own network, and with the host's.
var startedIn = map[string]string{uidA: started, host: "Warning CaptureStarted: the files hold the whole node's traffic"}

// tell tells stories, each in a world of its own. After the last step nothing more may be told.
func tell(t *testing.T, limit int64, b behaviour, stories map[string][]step) {
	for name, steps := range stories {
		t.Run(name, func(t *testing.T) {
			simulate(t, limit, func(w *world) {
				w.kids.behave(b)
				for i, s := range append(steps, step{wait: 10 * time.Second, children: steps[len(steps)-1].children}) {
					if s.happens != nil {
						s.happens(w)
					}
					told := strings.FieldsFunc(strings.ReplaceAll(s.told, "ROOT", w.root), func(r rune) bool { return r == '|' })
					w.after(s.wait, s.children, told...)
					if t.Failed() {
						t.Logf("at step %d", i+1)
						return
					}
				}
			})
		})
	}
}

// ---- What is asked for ----

// C2, C7, C9, C10: a mistake is told once, with what was read and what is accepted; what is cut shows it. It starts nothing, and
// a capture that runs goes on with its files, also when the mistake is mended by going back. Events that nobody takes away never
// delay a capture.
func TestMistakes(t *testing.T) {
	typos := []string{"tcp.port == 80", "“tcp port 80”"} // which only tcpdump refuses
	mistakes := map[string][]string{
		annotation: {"0", "-1", "+5", "5abc", " 5 ", "05", "1e3", "5.0", "٣", "", "99999999999999999999", "5\n", "5\x00", "0x5", "5_0",
			"$(reboot)", "-w /etc/passwd", strings.Repeat("5", 100<<10), strings.Repeat("\x00", 100<<10), strings.Repeat("ü", 128),
			strings.Repeat("ü", 129), strings.Repeat("…", 200), "6", "50000", "2147483647", "2147483648"},
		filterAnnotation:    append([]string{"tcp\nport 80", "\x00", "tcp\tport 80", "\x1b[2J", "tcp\u202eport", strings.Repeat("a", maxFilter+1)}, typos...),
		interfaceAnnotation: {"", "-i", "--", "a/b", "..//", "eth 0", " eth0", "eth0\n", "ü", "a:b", "a@b", "sixteen-letters-", "$(reboot)"},
	}
	check := func(w *world, good pod, children, end string) {
		w.kids.behave(behaviour{syntax: "tcpdump: can't parse filter expression: syntax error\n"})
		for name, texts := range mistakes {
			for _, text := range texts {
				bad := map[string]pod{annotation: web.of(text), filterAnnotation: web.of("5").filtered(text), interfaceAnnotation: web.of("5").on(text)}[name]
				bad.annotated, bad.hasIface = true, name == interfaceAnnotation
				w.see(bad)
				w.pass(time.Minute)
				w.see(bad)
				read := strconv.Quote(text)
				if letters := []rune(text); len(letters) > 128 {
					read = strconv.Quote(string(letters[:128]) + "…")
				}
				begin := "the annotation " + name + " is " + read
				if news := w.news(); len(news) != 1 || news[0].kind+" "+news[0].reason != invalid || len(news[0].message) > 1024 ||
					!strings.HasPrefix(news[0].message, begin) || !strings.Contains(news[0].message, "accepted is") || !strings.HasSuffix(news[0].message, end) {
					t.Errorf("told of %s %.20q: %v", name, text, news)
				}
				w.running(children)
				w.see(good)
				w.after(0, children)
			}
		}
		is(t, "children", w.kids.started(), len(strings.Fields(children)))
		is(t, "filters that tcpdump compiled", w.kids.compiled, typos)
	}
	simulate(t, 5, func(w *world) { check(w, web.of(""), "", "; nothing is captured") })
	simulate(t, 5, func(w *world) {
		w.born(50, web.of("5"))
		w.told(started)
		check(w, web.of("5"), "web:5", "; what was asked for before goes on as it was")
		for i := range 2000 {
			w.see(web.of(fmt.Sprint("x", i)))
		}
		w.see(web)
		w.running("web:3")
	})
}

// C2: the same again, and whatever else changes of a pod, leaves its child alone; also what others do. A change starts it
// again with its old files gone, as soon as its predecessor has ended; its removal stops it. C4: how tcpdump names the files.
func TestLifeOfAnAnnotation(t *testing.T) {
	const shutdown = 37 * time.Millisecond
	others := do(see(web), see(db), lose(db), lose(podNamed("web", "e", "5")), see(pod{namespace: "default", name: "web", uid: "d"}))
	steps := []step{{born(50, web), 0, "web:3", started}, {others, 10*time.Second + 300*time.Millisecond, "web:3", ""}, {others, time.Second, "web:3", ""}}
	running := "web:3"
	for _, change := range []struct{ n, files string }{
		{"11", "11 files, ROOT/capture-web.pcap00 to ROOT/capture-web.pcap10"}, {"10", "10 files, ROOT/capture-web.pcap0 to ROOT/capture-web.pcap9"},
		{"100", "100 files, ROOT/capture-web.pcap00 to ROOT/capture-web.pcap99"}, {"101", "101 files, ROOT/capture-web.pcap000 to ROOT/capture-web.pcap100"},
		{"2", "2 files, ROOT/capture-web.pcap0 to ROOT/capture-web.pcap1"}, {"1", "ROOT/capture-web.pcap"},
	} {
		steps = append(steps, step{see(web.of(change.n)), shutdown - 1, running, ""}) // until it has ended
		running = "web:" + change.n
		steps = append(steps, step{nil, 1, running, stopped + ": Stopped: 7 packets captured, 2 dropped by the kernel; its files (|" +
			started + ": Capturing into " + change.files + ", rotated at 1 MB, in kube-system/packetcapture-x"})
	}
	steps = append(steps, step{see(web.of("")), shutdown - 1, "web:1", ""}, step{nil, 1, "", stopped + ": its files (100 bytes) are deleted"})
	tell(t, 0, behaviour{shutdown: shutdown}, map[string][]step{"": steps})
}

// C3, C8, C9: tcpdump's arguments are the promised ones, a filter is one of them whatever it says, behind "--", and
// descriptor 3 is the pod's network, of which nothing stays open. A filter that changes or goes starts the capture again, and
// what is around it is nothing. C7: it is told, cut where it is long, and so is a warning of tcpdump's.
func TestArguments(t *testing.T) {
	longest := strings.Repeat("tcp ", maxFilter/4-1) + "port"
	simulate(t, 0, func(w *world) {
		p := w.born(50, web.of("7"))
		for i, filter := range []string{"", "tcp port 80", "-w /etc/passwd", "", "--", `'"; $(reboot) \`, "host ü", longest} {
			w.see(p.filtered(filter), p.filtered(" \n"+filter+" "))
			is(t, "children", w.kids.started(), i+1)
			want := []string{"--net=/proc/self/fd/3", "--", "tcpdump", "-C", "1", "-W", "7",
				"-w", filepath.Join(w.root, "capture-web.pcap"), "-U", "-Z", "root", "-p", "-i", "eth0", "-B", "4096"}
			if filter != "" {
				want = append(want, "--", filter)
			}
			is(t, "arguments", w.kids.last().arguments, want)
			captures(uidA)(w)
		}
		noneOpen(t, w.proc.dir)
		w.news()
		w.kids.behave(behaviour{warning: "Warning: Kernel filter failed: Invalid argument\n"})
		w.see(p.of("1").filtered(longest))
		w.after(0, "web:1", stopped, `Warning CaptureStarted: the filter is "`+longest[:128]+`…"; tcpdump says: Warning: Kernel filter failed: Invalid argument`)
	})
}

// C9: a filter is refused only by what tcpdump says of it, as the interface has it. Where that takes too long, or the
// program's end cuts it short, tcpdump will tell.
func TestCompile(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.add(fakeProcess{40, cgroupOf(uidB), host, "pod", 500})
		refuses := func(p pod) bool {
			p.files, _ = strconv.Atoi(p.value)
			return w.refusal(w.ctx, p) != ""
		}
		for words, want := range map[string]bool{
			"tcpdump: syntax error in filter expression: syntax error\n":            true,
			"tcpdump: data link type LINUX_SLL2\ntcpdump: unknown host 'nowhere'\n": true,
			"tcpdump: data link type LINUX_SLL2\n":                                  false, // and then it was killed
			" ":                                                                     false,
			"runtime/cgo: pthread_create failed: Resource temporarily unavailable\n": false,
		} {
			w.kids.behave(behaviour{syntax: words})
			is(t, "refused with "+words, refuses(web.filtered("tcp")), want)
		}
		w.kids.behave(behaviour{})
		for p, link := range map[pod]string{web: "EN10MB", web.on("any"): "LINUX_SLL2", db: "LINUX_SLL2", db.on("ens3"): "EN10MB"} {
			w.start = func(ctx context.Context, network *os.File, arguments ...string) (*child, error) {
				is(t, "arguments", arguments, []string{"tcpdump", "-y", link, "-d", "--", "tcp"})
				return nil, syscall.EAGAIN
			}
			is(t, "refused when tcpdump can't run", refuses(p.filtered("tcp")), false)
		}
		w.start = w.kids.start
		w.born(50, web)
		w.kids.behave(behaviour{compile: time.Minute})
		w.see(web.filtered("udp"))
		w.after(0, "web:3", started, stopped, started+`: the filter is "udp"`)
		time.AfterFunc(time.Second, w.end)
		w.see(web.filtered("icmp"))
		w.told(stopped)
	})
}

// C10: the device that tcpdump captures on. None is what tcpdump would make of a number or of a device that is none. One that is
// not there is told, takes no room, and is captured when it comes.
func TestInterfaces(t *testing.T) {
	for _, test := range []struct{ net, iface, device string }{
		{uidA, "", "eth0"}, {uidA, "lo", "lo"}, {uidA, "eth0.100", "eth0.100"}, {uidA, "any", "any"}, {host, "", "any"}, {host, "ens3", "ens3"},
		{uidA, "2", ""}, {uidA, "nflog", ""}, {uidA, "_", ""}, {uidA, ".x", ""}, {uidA, "fifteen-letters", ""}, {host, "eth0", ""},
	} {
		ps := fakeProcess{50, cgroupOf(uidA), test.net, "pod", 500}
		begins := do(interfacesOf(uidA, "lo", "eth0", "eth0.100"), joins(ps), see(web.of("5").on(test.iface)))
		missing := failed + ": the pod has no interface " + test.iface + ", but lo, "
		steps := []step{
			{begins, 0, "", missing},
			{nil, 10 * time.Minute, "", missing},
			{born(60, db.of("5")), 0, "db:5", started}, // meanwhile
			{lose(db), 0, "", stopped},
			{interfacesOf(test.net, "lo", "eth0", test.iface), 30 * time.Second, "web:5", startedIn[test.net]},
		}
		if test.device != "" {
			onDevice := func(w *world) { is(t, "device", w.kids.last().option("-i"), test.device) }
			steps = []step{{do(begins, onDevice), 0, "web:5", startedIn[test.net]}}
		}
		tell(t, 5, behaviour{}, map[string][]step{fmt.Sprint(test): steps})
	}
}

// ---- The pod's network ----

// C3, C4: a pod that is annotated before it runs is captured from its birth: its network is looked for every 25 ms, after 5
// minutes every second. Without one it takes no room, and however many wait, they look together. That it waits is told.
func TestBirth(t *testing.T) {
	for waiting, poll := range map[time.Duration]time.Duration{7 * time.Millisecond: birthPoll, birthTime - 2*time.Second: birthPoll, birthTime + time.Minute: time.Second} {
		simulate(t, 40, func(w *world) {
			for i := range 6 { // each at its own time
				w.see(podNamed(fmt.Sprint("web-", i), fmt.Sprint("a", i), "40"))
				w.pass(777 * time.Microsecond)
			}
			w.pass(waiting)
			looks, last := 0, time.Time{}
			for began := time.Now(); time.Since(began) < time.Second; w.pass(time.Millisecond) {
				w.processes.mu.Lock()
				if w.processes.looked != last {
					looks, last = looks+1, w.processes.looked
				}
				w.processes.mu.Unlock()
			}
			if most := int(time.Second/poll) + 1; looks > most {
				t.Errorf("after %v: %d looks in a second, want %d", waiting, looks, most)
			}
			w.news()
			w.proc.pod(50, "a5")
			w.after(poll+birthPoll, "web-5:40", started)
		})
	}
	simulate(t, 0, func(w *world) {
		w.see(web)
		w.after(waitingTime-birthPoll, "")
		w.after(time.Hour, "", "Warning CaptureWaiting: network")
	})
}

// C5, C7: a pod whose network goes keeps its files until the annotation or the pod goes, or it has a new network. That is told
// when the pod is still there some seconds later: a plain deletion is one CaptureStopped.
func TestFinishedPod(t *testing.T) {
	tell(t, 5, behaviour{}, map[string][]step{
		"it is deleted": {
			{born(50, web), 0, "web:3", started},
			{do(endOf(50), exit(disappeared, errStatus)), goneTime - time.Second, "kept:3", ""},
			{lose(web), 0, "", stopped + ": are deleted"},
		},
		"it stays": {
			{born(50, web), 0, "web:3", started},
			{do(endOf(50), exit(disappeared, errStatus)), 10 * time.Minute, "kept:3",
				stopped + ": Stopped: 7 packets captured, 2 dropped by the kernel; the pod's network is gone, the files stay"},
			{see(web), time.Minute, "kept:3", ""},
			{born(51, db), 0, "kept:3", waiting + ": 3 of the 5"}, // the files take room
			{lose(db), 0, "kept:3", ""},
			{network(60, uidA), time.Second, "web:3", again}, // as after a restart of the node
			{see(web.of("2")), 0, "web:2", stopped + ": are deleted|" + started},
			{do(endOf(60), exit(closing, errStatus)), time.Minute, "kept:2", stopped + ": the files stay"},
			{lose(web), 0, "", stopped + ": are deleted"},
		},
	})
}

// C3, C5: between two runs of a container a pod of CRI-O may have no process for 5 minutes, and its capture goes on. After 6 it
// has ended, also where its CNI leaves the interface; the files stay, and go if the annotation changes or goes meanwhile.
func TestNoProcess(t *testing.T) {
	for net, told := range startedIn {
		run := func(pid int) action { return joins(fakeProcess{pid, cgroupOf(uidA), net, "pod", 500}) }
		story := func(value, children, end string) []step {
			return []step{
				{do(run(50), see(web)), 0, "web:3", told},
				{endOf(50), 5 * time.Minute, "web:3", ""},
				{run(51), 10 * time.Second, "web:3", ""},
				{endOf(51), 5 * time.Minute, "web:3", ""},
				{run(52), 10 * time.Second, "web:3", ""},
				// The host has the first one's PID then. After 6 minutes tcpdump is told to end, which takes a second.
				{do(endOf(52), joins(fakeProcess{50, "0::/system.slice/cron.service\n", host, host, 900})), 6 * time.Minute, "web:3", ""},
				{see(web.of(value)), 10 * time.Second, children, end},
			}
		}
		tell(t, 0, behaviour{shutdown: time.Second}, map[string][]step{
			"and nothing else":       story("3", "kept:3", stopped+": the files stay"),
			"and no annotation":      story("", "", stopped+": its files (300 bytes) are deleted"),
			"and another annotation": story("2", "", stopped+": its files (300 bytes) are deleted"),
		})
	}
}

// C3: a new sandbox of the pod ends the capture of the old one, although that lives on, and is captured within a second.
func TestNewSandbox(t *testing.T) {
	for _, iface := range []string{"eth0", "any"} {
		tell(t, 0, behaviour{}, map[string][]step{iface: {
			{born(50, web.on(iface)), time.Minute + 300*time.Millisecond, "web:3", started},
			{do(endOf(50), joins(fakeProcess{60, cgroupOf(uidA), "new", "new", 600})), time.Second, "web:3",
				stopped + ": 7 packets captured, 2 dropped by the kernel; the pod has a new network|" + again},
			{captures("new"), 0, "web:3", ""},
		}})
	}
}

// C10: on any and on lo tcpdump never notices that the pod's network is gone. It gets two more seconds to read its ring,
// in which a pod's very last packets are; then it ends, and the files stay.
func TestRingIsRead(t *testing.T) {
	for _, iface := range []string{"any", "lo"} {
		for _, at := range []time.Duration{1, 500 * time.Millisecond, time.Second - 1} {
			tell(t, 0, behaviour{}, map[string][]step{fmt.Sprint(iface, " at ", at): {
				{born(50, web.on(iface)), time.Minute - birthPoll + at, "web:3", started + ": the interface is " + iface},
				{interfacesOf(uidA, "lo"), 2 * time.Second, "web:3", ""},
				{nil, time.Second, "kept:3", ""},
				{nil, goneTime, "kept:3", stopped + ": the files stay"},
			}})
		}
	}
}

// ---- Names and files ----

// C4: a capture's end deletes its own files, which are matched exactly, and leaves those of captures with similar names. The
// same name in another namespace gets the UID behind it.
func TestSimilarNames(t *testing.T) {
	pods := []pod{podNamed("web", "0", "3"), podNamed("web-2", "1", "3"), podNamed("web.pcap0", "2", "3"), podNamed("web.pcap", "3", "3"),
		podNamed("we", "4", "3"), {namespace: "other", name: "web", uid: uidB, kubeletUID: uidB, annotated: true, value: "3"}}
	for gone, p := range pods {
		simulate(t, 0, func(w *world) {
			for i, p := range pods {
				w.born(50+i, p)
			}
			w.running("web:3 web-2:3 web.pcap0:3 web.pcap:3 we:3 web_1b2c3d4e:3")
			own := w.kids.at(gone)
			strangers := []string{"capture-web.pcapng", "capture-web.pcap0.gz", "capture-my-web.pcap", "capture-web.pcap0~", "capture-web_1b2c3d4f.pcap1"}
			for _, name := range strangers {
				must(t, os.WriteFile(filepath.Join(w.root, name), nil, 0o644))
			}
			want := slices.DeleteFunc(w.fileNames(), func(name string) bool { return slices.Contains(own.files, name) })
			must(t, os.WriteFile(own.stem, nil, 0o644), os.WriteFile(own.stem+"099", nil, 0o644))
			w.lose(p)
			is(t, "files after "+p.name, w.fileNames(), want)
			for _, name := range strangers {
				must(t, os.Remove(filepath.Join(w.root, name)))
			}
		})
	}
}

// C4: what an earlier run left is deleted, and nothing else.
func TestLeftovers(t *testing.T) {
	root := t.TempDir()
	stay := []string{"capture-dir.pcap", "capture-web.pcap.gz", "capture-web.pcapng", "capture-web.txt", "etc", "my-capture-web.pcap", "web.pcap"}
	for _, name := range append([]string{"capture-web.pcap", "capture-web.pcap0", "capture-web.pcap123", "capture-web_12345678.pcap7",
		"capture-web.pcap0.pcap"}, stay[1:]...) {
		must(t, os.WriteFile(filepath.Join(root, name), nil, 0o644))
	}
	must(t, os.Mkdir(filepath.Join(root, stay[0]), 0o755))
	_, err := newNode(testConfig(t, newProc(t).dir, root))
	must(t, err)
	is(t, "files that stay", namesIn(t, root), stay)
}

// ---- Room ----

// C4: the sum of N is bounded by 5. What does not fit waits, and holds up nobody.
func TestRoom(t *testing.T) {
	const s = time.Second
	as := func(name, value string) action { // a pod that has a network asks for N, or for nothing
		return do(network(int(name[0]), name), see(podNamed(name, name, "").of(value)))
	}
	tell(t, 5, behaviour{}, map[string][]step{
		"up to the bound": {{as("a", "3"), s, "a:3", started}, {as("b", "2"), s, "a:3 b:2", started}, {as("c", "1"), s, "a:3 b:2", waiting},
			{as("c", "1"), s, "a:3 b:2", ""}},
		"a smaller one makes room": {{as("a", "5"), s, "a:5", started}, {as("b", "3"), s, "a:5", waiting},
			{as("a", "2"), s, "b:3 a:2", stopped + "|" + started + "|" + started}},
		"one grows into its own": {{as("a", "3"), s, "a:3", started}, {as("a", "5"), s, "a:5", stopped + "|" + started}},
		"one that grows waits": {{as("a", "3"), s, "a:3", started}, {as("b", "2"), s, "a:3 b:2", started},
			{as("a", "4"), s, "b:2", stopped + "|" + waiting}, {as("b", ""), s, "a:4", stopped + "|" + started}},
		"whoever fits goes first": {{as("a", "3"), s, "a:3", started}, {as("b", "5"), s, "a:3", waiting}, {as("c", "1"), s, "a:3 c:1", started},
			{as("d", "1"), s, "a:3 c:1 d:1", started}, {as("a", ""), s, "c:1 d:1", stopped}, {as("c", ""), s, "d:1", stopped},
			{as("d", ""), s, "b:5", stopped + "|" + started}},
		"more than there ever is": {{as("a", "6"), s, "", invalid}, {as("b", "5"), s, "b:5", started}, {as("b", "6"), s, "b:5", invalid},
			{as("b", ""), s, "", stopped}},
		"one that waits goes": {{as("a", "3"), s, "a:3", started}, {as("b", "4"), s, "a:3", waiting}, {as("b", ""), s, "a:3", ""},
			{as("c", "2"), s, "a:3 c:2", started}, {as("a", ""), s, "c:2", stopped}},
		"one that waits changes": {{as("a", "3"), s, "a:3", started}, {as("b", "4"), s, "a:3", waiting}, {as("b", "2"), s, "a:3 b:2", started}},
		"one that waits is no more": {{as("a", "5"), s, "a:5", started}, {as("b", "4"), s, "a:5", waiting}, {as("b", "x"), s, "a:5", invalid},
			{as("a", ""), s, "b:4", stopped + "|" + started}},
		"one that waits is found by another process": {{as("a", "5"), s, "a:5", started}, {as("b", "5"), s, "a:5", waiting},
			{do(endOf('b'), network(60, "b"), as("a", "")), s, "b:5", stopped + "|" + started}},
		"one that waits loses its network": {{as("a", "5"), s, "a:5", started}, {as("b", "5"), s, "a:5", waiting},
			{do(endOf('b'), as("a", "")), s, "", stopped}, {network(60, "b"), birthPoll, "b:5", started}},
	})
}

// C4, C5: pods that come and change at once, and faster than their tcpdumps start and stop, in the end run as asked. Those that
// fit are never told to wait.
func TestManyAtOnce(t *testing.T) {
	const ms = time.Millisecond
	for _, b := range []behaviour{{}, {shutdown: 300 * ms}, {startup: 300 * ms, shutdown: 500 * ms}, {startup: 50 * ms, deaf: true}} {
		for _, pause := range []time.Duration{0, 40 * ms, 350 * ms} {
			simulate(t, 40, func(w *world) {
				w.kids.behave(b)
				for i := range 10 {
					w.proc.pod(50+i, fmt.Sprint("a", i))
				}
				for i := range 13 * 10 {
					id := fmt.Sprint("a", i%10)
					w.apply(w.ctx, podNamed(id, id, "").of([]string{"3", "4", ""}[i%3]))
					time.Sleep(pause / 10)
				}
				w.pass(termGrace + 2*time.Second)
				w.running("a0:3 a1:4 a3:3 a4:4 a6:3 a7:4 a9:3")
				if news := w.news(); slices.ContainsFunc(news, func(e event) bool { return e.kind == "Warning" }) {
					t.Errorf("told %v", news)
				}
			})
		}
	}
}

// C4: a part of the file system stays free, and what captures may still write is not promised twice.
func TestDiskFree(t *testing.T) {
	simulate(t, 0, func(w *world) {
		free, total := space(w.root)
		percent := free / (total / 100)
		w.disk.diskFree = percent // less than 1 % of it is left for captures, and this one needs 2 %
		a := w.born(50, web.of(strconv.FormatInt(total/50/fileBytes, 10)))
		w.told(fmt.Sprintf("Warning CaptureWaiting: with %d %% of it left free; the capture starts by itself", percent))
		keep := func(percent int64) {
			w.disk.mu.Lock()
			defer w.disk.mu.Unlock()
			w.disk.diskFree = percent
		}
		keep(max(0, percent-10))
		w.after(time.Second, "web:"+a.value, started)
		keep(0)
		most := strconv.FormatInt(free/10*6/fileBytes, 10) // 60 % of what is free
		w.see(web.of(most))
		w.born(60, db.of(most))
		w.after(0, "web:"+most, stopped, started, waiting+": can take")
		w.lose(web)
		w.after(0, "db:"+most, stopped, started)
	})
}

// ---- tcpdump's life ----

// C4, C5: removed and annotated again before the exit, or recreated as another pod: the old child ends first, then a new one
// starts. A pod of another namespace need not wait: it has a name of its own, for as long as it is captured.
func TestSameName(t *testing.T) {
	another, other := podNamed("web", uidB, "3"), podNamed("web", uidB, "3")
	other.namespace = "other"
	stories := map[string][]step{
		"the old pod is gone after the new one": {
			{do(network(60, uidB), born(50, web)), 0, "web:3", started},
			{see(another), 0, "web:3", ""},
			{lose(web), time.Second, "web:3", stopped + "|" + started},
			{captures(uidB), 0, "web:3", ""},
		},
		"in two namespaces": {
			{born(50, web), 0, "web:3", started},
			{born(51, other), 0, "web:3 web_1b2c3d4e:3", started + ": ROOT/capture-web_1b2c3d4e.pcap0"},
			{lose(web), time.Second, "web_1b2c3d4e:3", stopped},
			{born(52, podNamed("web", "c", "2")), 0, "web_1b2c3d4e:3 web:2", started},
			{lose(other), time.Second, "web:2", stopped},
		},
		"in two namespaces, and the second one changes when the first is gone": {
			{born(50, web), 0, "web:3", started},
			{born(51, other), 0, "web:3 web_1b2c3d4e:3", started},
			{lose(web), time.Second, "web_1b2c3d4e:3", stopped},
			{see(other.of("2")), 0, "web_1b2c3d4e:3", ""},
			{nil, time.Second, "web:2", stopped + "|" + started},
		},
	}
	for _, next := range []pod{web, web.of("4"), another} {
		stories[next.uid+" "+next.value] = []step{
			{do(network(60, uidB), born(50, web)), 0, "web:3", started},
			{lose(web), 100 * time.Millisecond, "web:3", ""},
			{see(next), 900 * time.Millisecond, "web:" + next.value, stopped + "|" + started},
			{captures(next.uid), 0, "web:" + next.value, ""},
		}
	}
	tell(t, 0, behaviour{shutdown: time.Second}, stories)
}

// C5: what is removed while its tcpdump starts leaves nothing, and was never told to have started, also when "listening on"
// comes between SIGTERM and the end.
func TestRemovedWhileStarting(t *testing.T) {
	for _, shutdown := range []time.Duration{100 * time.Millisecond, 1500 * time.Millisecond} {
		steps := []step{{born(50, web), 0, "web:3", ""}, {lose(web), shutdown - 1, "web:3", ""}, {nil, 1, "", ""}}
		tell(t, 0, behaviour{startup: time.Second, shutdown: shutdown}, map[string][]step{"": steps})
	}
}

// C5, C7: what fails is told when it happens, once in 5 minutes, with when it is tried again, and is tried again with growing
// pauses until it succeeds. A change does not wait.
func TestFailures(t *testing.T) {
	const noDevice = "tcpdump: eth0: No such device exists"
	for words, b := range map[string]behaviour{
		"resource temporarily unavailable":   {refusal: syscall.EAGAIN},
		"executable file not found in $PATH": {refusal: &exec.Error{Name: "nsenter", Err: exec.ErrNotFound}},
		"ended by itself (" + noDevice + ")": {words: noDevice + "\n"},
		"ended by itself (exit status 1)":    {words: "\n"},
	} {
		simulate(t, 0, func(w *world) {
			w.kids.behave(b)
			w.born(50, web)
			_, pause, _ := strings.Cut(w.news()[0].message, words+"; it is tried again in ")
			pause, _, _ = strings.Cut(pause, ", and then ")
			told, err := time.ParseDuration(pause)
			must(t, err)
			is(t, "what is told is rounded", told, told.Round(100*time.Millisecond))
			w.after(repeatTime-time.Second, "")
			w.after(time.Minute, "", failed+": "+words)
			at := w.kids.attempts
			if wait := at[1].Sub(at[0]); (wait - told).Abs() > 50*time.Millisecond {
				t.Errorf("it was tried again after %v, and %q was told", wait, pause)
			}
			for i, least := 1, 125*time.Millisecond; i < len(at); i, least = i+1, min(2*least, 15*time.Second) {
				if pause := at[i].Sub(at[i-1]); pause < least || pause > 2*least {
					t.Errorf("pause %d was %v, want %v to %v", i, pause, least, 2*least)
				}
			}
			w.see(web.of("4"))
			if before, now := len(at), len(w.kids.attempts); before < 15 || now != before+1 {
				t.Errorf("%d attempts, and %d when the pod has changed", before, now)
			}
			w.kids.behave(behaviour{})
			w.after(30*time.Second, "web:4", failed+": "+words, started)
		})
	}
}

// C7: a message is repeated only if another one came in between; a failure not if that will be old by seconds at the next try.
func TestRepeats(t *testing.T) {
	simulate(t, 0, func(w *world) {
		c := &capture{node: w.node, pod: web, told: map[string]time.Time{}}
		for i, each := range []struct {
			reason string
			wait   time.Duration
			isTold bool
		}{
			{"CaptureWaiting", 0, true}, {"CaptureFailed", time.Second, true}, {"CaptureWaiting", 0, true}, {"CaptureFailed", goneTime - 1, false},
			{"CaptureStarted", 0, true}, {"CaptureFailed", goneTime, true}, {"CaptureFailed", time.Hour, false}, {"CaptureStarted", 0, true},
		} {
			c.tell("Warning", each.reason, each.reason, each.wait)
			is(t, fmt.Sprint(i, ": told"), len(w.news()) > 0, each.isTold)
		}
	})
}

// C5, C7: a tcpdump that ends by itself is started again, and its last words are told. Packets are lost only when it has begun
// again. One that has proved itself does not wait long. An interface that is renamed is told as what it is.
func TestEndsByItself(t *testing.T) {
	renamed := func(iface, becomes, told string) []step {
		return []step{
			{do(interfacesOf(uidA, "lo", "eth0", "net1"), born(50, web.on(iface))), 0, "web:3", started},
			{do(interfacesOf(uidA, "lo", becomes), exit(disappeared, errStatus)), time.Minute, "kept:3", told},
			{interfacesOf(uidA, "lo", "eth0", "net1"), 30 * time.Second, "web:3", again},
		}
	}
	tell(t, 0, behaviour{}, map[string][]step{
		"eth0 is renamed": renamed("eth0", "net1", stopped+": the pod's network is gone, the files stay"),
		"net1 is renamed": renamed("net1", "eth0", failed+": The interface disappeared); it is tried again in |"+
			failed+": the pod has no interface net1, but lo, eth0; it is tried again in "),
		"killed": {
			{born(50, web), 0, "web:3", started},
			{do(behave(behaviour{refusal: syscall.EAGAIN}), exit(disappeared, errStatus)), 0, "kept:3",
				failed + ": The interface disappeared); it is tried again in "},
			{nil, time.Minute, "kept:3", failed + ": can't be started"},
			{behave(behaviour{}), 30 * time.Second, "web:3", again},
			{nil, time.Minute, "web:3", ""},
			{exit("", errKilled), 250 * time.Millisecond, "web:3", failed + ": signal: killed|" + again},
			{nil, time.Minute, "web:3", ""},
			{exit("", errKilled), 250 * time.Millisecond, "web:3", failed + ": signal: killed|" + again},
			{exit("", errKilled), 0, "kept:3", ""}, // within seconds
			{lose(web), time.Minute, "", stopped},  // before it is started again
		}})
	simulate(t, 0, func(w *world) { // killed as soon as it runs: while nothing is captured for longer, the last Event says so
		w.born(50, web)
		var last event
		told, idle := 0, time.Duration(0)
		for range 2400 {
			if w.kids.last().lives() {
				idle = 0
				w.kids.last().exit("", errKilled)
			}
			w.pass(100 * time.Millisecond)
			idle += 100 * time.Millisecond
			for _, e := range w.news() {
				told, last = told+1, e
			}
			if idle > goneTime && last.reason != "CaptureFailed" && !w.kids.last().lives() {
				t.Fatalf("nothing has been captured for %v, and the last Event is %s: %s", idle, last.reason, last.message)
			}
		}
		if told < 10 || told > 60 {
			t.Errorf("%d Events were told in 4 minutes", told)
		}
	})
	simulate(t, 0, func(w *world) { // it has begun also when it ends in the same moment, in which its capture looks at the pod
		w.kids.behave(behaviour{words: "tcpdump: listening on eth0\ntcpdump: eth0: gone\n", startup: time.Second})
		var pods []pod
		for i := range 50 {
			pods = append(pods, podNamed(fmt.Sprint("web-", i), fmt.Sprint("a", i), "3"))
			w.proc.pod(50+i, pods[i].uid)
		}
		w.see(pods...)
		w.pass(time.Second)
		told := map[string]int{}
		for _, e := range w.news() {
			told[e.kind+" "+e.reason]++
		}
		is(t, "what is told of 50 pods", told, map[string]int{started: 50, failed: 50})
	})
}

// ---- The program's end ----

// C5: told to end, the program stops all captures side by side, in whatever state they are.
func TestEnd(t *testing.T) {
	simulate(t, 30, func(w *world) {
		for i, b := range []behaviour{{}, {startup: time.Minute}, {deaf: true}, {shutdown: time.Second}, {}, {deaf: true}, {refusal: syscall.EAGAIN}} {
			w.kids.behave(b)
			w.born(50+i, podNamed(fmt.Sprint("web-", i), fmt.Sprint(i), "3"))
		}
		w.kids.at(4).exit("", errKilled)    // waits for its restart
		w.lose(podNamed("web-2", "2", "3")) // is being stopped
		w.see(podNamed("web-3", "3", "4"))  // is being changed
		w.proc.pod(60, "b")
		w.see(podNamed("no-network", "a", "1"), podNamed("no-room", "b", "30"), podNamed("bad", "c", "x"))
		w.pass(time.Second)
		w.news()
		w.finish(termGrace)
		w.after(0, "", slices.Repeat([]string{stopped}, 4)...)
	})
}

// C5, C7: a tcpdump that can't be ended is told, with what was tried and what the system said. Its successor waits, and the
// program ends within 5 seconds all the same.
func TestImmortalChild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api, w := newFakeAPI(t), newWorld(t, 0)
		w.kube.http.Transport = api
		api.accept("token")
		asks := func(n string) {
			api.put(fakePod{namespace: "default", name: "web", uid: uidA, annotations: map[string]string{annotation: n}})
		}
		asks("3")
		w.proc.pod(50, uidA)
		w.kids.behave(behaviour{deaf: true, immortal: true})
		time.AfterFunc(time.Minute, func() { asks("4") })
		time.AfterFunc(time.Hour, func() { w.kids.last().exit(closing, errKilled) })
		time.AfterFunc(2*time.Hour, w.end)
		began := time.Now()
		w.node.run(w.ctx)
		if took := time.Since(began) - 2*time.Hour; took < 0 || took > 5*time.Second {
			t.Errorf("the program took %v to end", took)
		}
		w.running("web:4")
		is(t, "signals", w.kids.signals(), []string{"terminated", "killed"})
		told := ""
		for _, e := range api.posted() {
			told += fmt.Sprint(e["reason"], ": ", e["message"], "\n")
		}
		const killed = `tcpdump \(PID 10000%d\) can't be ended: SIGTERM and SIGKILL were sent, and it still runs \(permission denied\); its files stay.*`
		want := fmt.Sprintf("^CaptureStarted: .*\nCaptureFailed: "+killed+"\nCaptureStopped: .*\nCaptureStarted: .* 4 files.*\nCaptureFailed: "+killed+"\n$", 0, 1)
		if !regexp.MustCompile(want).MatchString(told) {
			t.Errorf("told\n%s, want\n%s", told, want)
		}
		w.kids.last().exit("", errKilled) // as the runtime does
		w.alive.Wait()
		w.pass(0)
		w.running("")
	})
}

// ---- Words ----

// C5, C7: of what a child says its warning, its last words and its counts are kept, however it comes and however much it is.
func TestStderr(t *testing.T) {
	const listening = "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n"
	const all = "7 packets captured, 2 dropped by the kernel"
	const warning, noIPv4 = "Warning: Kernel filter failed: x", "tcpdump: WARNING: eth0: no IPv4"
	const gone, noTcpdump = "tcpdump: pcap_loop: The interface disappeared", "nsenter: failed to execute tcpdump: No such file or directory"
	long := "tcpdump: " + strings.Repeat("x", 120)
	for _, test := range []struct{ text, warning, complaint, counts string }{
		{"", "", "", ""},
		{listening + "\n1 packet captured\n1 packet received by filter\n0 packets dropped by kernel\n", "", "", "1 packet captured, 0 dropped by the kernel"},
		{listening + gone + "\n" + closing, "", gone, all},
		{listening + strings.Repeat("noise\n", 10_000) + closing, "", "", all},
		{"tcpdump: data link type LINUX_SLL2\n" + listening, "", "", ""},
		{warning + "\n" + listening + "Warning: late\n", warning, "", ""},
		{noIPv4 + "\n" + listening, noIPv4, "", ""},
		{noTcpdump + "\n", "", noTcpdump, ""},
		{long + "\n", "", long[:128] + "…", ""},
	} {
		for _, size := range []int{1, 7, 1 << 20} {
			listens := false
			said := &report{listening: func() { listens = true }}
			for chunk := range slices.Chunk([]byte(test.text), size) {
				said.take(string(chunk))
			}
			about := fmt.Sprintf("%.100q in pieces of %d: ", test.text, size)
			is(t, about+"warning, complaint and counts", []string{said.warning, said.complaint, strings.Join(said.counts, ", ")}, []string{test.warning, test.complaint, test.counts})
			is(t, about+"it listens", listens, strings.Contains(test.text, listening))
			is(t, about+"more is kept than 4 KiB", len(said.rest) > 4096, false)
		}
	}
}
