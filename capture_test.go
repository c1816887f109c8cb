package main

import (
	"fmt"
	"math"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// badValues are no N. tcpdump's own atoi would take some of them.
var badValues = []string{"0", "-1", "+5", "5abc", " 5 ", "05", "1e3", "5.0", "٣", "", "99999999999999999999",
	"2147483648", "5\n", "5\x00", "0x5", "5_0", "$(reboot)", "-w /etc/passwd", strings.Repeat("5", 100<<10),
	strings.Repeat("\x00", 100<<10)}

var badFilters = []string{"tcp\nport 80", "\x00", "tcp\tport 80", "\x1b[2J", strings.Repeat("a", maxFilter+1)}

// C2: N is a plain decimal number from 1 up.
func TestParseRequest(t *testing.T) {
	for value, n := range map[string]int{"1": 1, "5": 5, "10": 10, "2147483647": math.MaxInt32} {
		if got, err := parseRequest(value, "tcp"); err != nil || got != (request{n, "tcp"}) {
			t.Errorf("parseRequest(%q) = %v, %v", value, got, err)
		}
	}
	for _, value := range badValues {
		got, err := parseRequest(value, "")
		if err == nil || got != (request{}) {
			t.Errorf("parseRequest(%.20q) = %v, %v, want an error", value, got, err)
			continue
		}
		// Plain words for a person: what was read, and what is accepted.
		begin := strconv.Quote(value[:min(len(value), 64)])
		if text := err.Error(); !strings.Contains(text, begin) || !strings.Contains(text, "from 1 to") || len(text) > 1024 {
			t.Errorf("parseRequest(%.20q): %v", value, err)
		}
	}
}

// C9: a filter is a line of text. What it says is tcpdump's to judge.
func TestParseFilter(t *testing.T) {
	for _, filter := range []string{"", "tcp port 80", "-w /etc/passwd", "--", "'; reboot", `"quoted"`, "$(reboot)", "host ü",
		strings.Repeat("a", maxFilter)} {
		if got, err := parseRequest("5", filter); err != nil || got != (request{5, filter}) {
			t.Errorf("parseRequest with filter %.20q = %v, %v", filter, got, err)
		}
	}
	for _, filter := range badFilters {
		_, err := parseRequest("5", filter)
		if err == nil || !strings.Contains(err.Error(), filterAnnotation) || len(err.Error()) > 1024 {
			t.Errorf("parseRequest with filter %.20q: %v", filter, err)
		}
	}
}

// C2, C7: a value that is none is told once, and starts nothing.
func TestInvalidStartsNothing(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		for _, value := range badValues {
			w.send("MODIFIED", podNamed("web", uidA, value))
			w.told("Warning CaptureInvalid: accepted is")
			w.send("MODIFIED", podNamed("web", uidA, value))
			w.send("LISTED", podNamed("web", uidA, value))
			w.pass(time.Minute)
		}
		for _, filter := range badFilters {
			p := podNamed("web", uidA, "5")
			p.filter = filter
			w.send("MODIFIED", p)
			w.send("MODIFIED", p)
			w.told("Warning CaptureInvalid: accepted is")
		}
		w.runs()
		w.send("MODIFIED", podNamed("web", uidA, "5"))
		w.runs("capture-web.pcap 5")
	})
}

// C2: a capture that runs goes on with the N that it had.
func TestInvalidWhileRunning(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		w.send("LISTED", podNamed("web", uidA, "5"))
		w.told("Normal CaptureStarted: 5 files")
		for _, value := range badValues {
			w.send("MODIFIED", podNamed("web", uidA, value))
			w.told("Warning CaptureInvalid")
		}
		p := podNamed("web", uidA, "5")
		p.filter = "\x00"
		w.send("MODIFIED", p)
		w.told("Warning CaptureInvalid")
		w.send("MODIFIED", podNamed("web", uidA, "5"))
		w.runs("capture-web.pcap 5")
		if n := w.kids.started(); n != 1 {
			t.Errorf("%d children were started, want 1", n)
		}
		w.send("MODIFIED", podNamed("web", uidA, "none"))
		w.send("DELETED", podNamed("web", uidA, "none"))
		w.runs()
	})
}

// C2, C6: the same again, and whatever else changes of a Pod, leaves its child alone.
func TestSamePID(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		w.send("LISTED", podNamed("web", uidA, "5"))
		for _, kind := range []string{"ADDED", "MODIFIED", "LISTED", "MODIFIED"} {
			w.send(kind, podNamed("web", uidA, "5"))
			w.pass(time.Minute)
		}
		w.send("LISTED", podNamed("web", uidA, "5"), podNamed("db", uidB, "5"))
		w.send("DELETED", podNamed("db", uidB, "5"))
		w.send("DELETED", podNamed("unknown", "no such UID", "5"))
		w.runs("capture-web.pcap 5")
		w.told("Normal CaptureStarted: 5 files")
		if n := w.kids.started(); n != 1 {
			t.Errorf("%d children were started, want 1", n)
		}
	})
}

// C2: changed, it starts again and its old files are gone; removed in any way, it stops and they are gone.
func TestChangedAndRemoved(t *testing.T) {
	bare := podNamed("web", uidA, "")
	bare.annotated = false
	for _, remove := range []change{
		{"MODIFIED", []pod{bare}}, {"DELETED", []pod{podNamed("web", uidA, "2")}}, {"LISTED", nil},
	} {
		simulate(t, 0, func(w *world) {
			w.kids.behave(behaviour{shutdown: 300 * time.Millisecond})
			w.proc.pod(50, uidA)
			w.send("LISTED", podNamed("web", uidA, "11"))
			w.runs("capture-web.pcap 11")
			w.send("MODIFIED", podNamed("web", uidA, "2"))
			w.runs("capture-web.pcap 11") // until it has ended
			w.pass(300 * time.Millisecond)
			w.runs("capture-web.pcap 2")
			w.told("Normal CaptureStarted: 11 files", "Normal CaptureStopped: 7 packets captured, 2 dropped by the kernel; its "+
				"files (300 bytes)", "Normal CaptureStarted: 2 files")
			w.send(remove.kind, remove.pods...)
			w.runs("capture-web.pcap 2")
			w.pass(300 * time.Millisecond)
			w.runs()
			w.told("Normal CaptureStopped: its files (200 bytes) are deleted")
		})
	}
}

// C3, C8, C9: tcpdump's arguments are the promised ones, and a filter is one of them whatever it says, behind "--".
func TestArguments(t *testing.T) {
	const uidC, uidD, uidE = "c", "d", "e"
	filters := map[string]string{uidA: "", uidB: "tcp port 80", uidC: "-w /etc/passwd", uidD: "--", uidE: `'"; $(reboot) \`}
	simulate(t, 0, func(w *world) {
		for uid, filter := range filters {
			w.proc.pod(50+len(uid)+int(uid[len(uid)-1]), uid)
			p := podNamed("web-"+uid[len(uid)-1:], uid, "7")
			p.filter = filter
			w.send("ADDED", p)
			want := []string{"--net=/proc/self/fd/3", "--", "tcpdump", "-C", "1", "-W", "7",
				"-w", filepath.Join(w.root, "capture-"+p.name+".pcap"), "-U", "-Z", "root", "-p", "-i", "eth0", "-B", "4096"}
			if filter != "" {
				want = append(want, "--", filter)
			}
			if got := w.kids.last().arguments; !slices.Equal(got, want) {
				t.Errorf("arguments\n%q, want\n%q", got, want)
			}
			if got, _ := filepath.EvalSymlinks(w.kids.last().network); filepath.Base(got) != "net-"+uid {
				t.Errorf("descriptor 3 is %s", got)
			}
		}
		noneOpen(t, w.proc.dir)
	})
}

// C3: a Pod that is annotated before it runs is captured from its sandbox's birth.
func TestFromBirth(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.send("ADDED", podNamed("web", uidA, "5"))
		w.pass(10*time.Second + 7*time.Millisecond)
		w.runs()
		w.proc.pod(50, uidA)
		w.pass(birthPoll)
		w.runs("capture-web.pcap 5")
	})
}

// C3: Pods that never get a sandbox cost next to nothing: /proc is read in whole every ten seconds for all of them.
func TestWaitingIsCheap(t *testing.T) {
	simulate(t, 0, func(w *world) {
		for i := range 30 { // each at its own time
			w.send("ADDED", podNamed(fmt.Sprint("web-", i), fmt.Sprint("uid-", i), "1"))
			w.pass(time.Millisecond)
		}
		w.pass(time.Second)
		sweeps, last := 0, time.Time{}
		for range 2000 {
			w.pass(10 * time.Millisecond)
			w.inside(func() {
				if swept := w.c.sandboxes.swept; swept != last {
					sweeps, last = sweeps+1, swept
				}
			})
		}
		if sweeps < 2 || sweeps > 3 {
			t.Errorf("/proc was read in whole %d times in 20 s", sweeps)
		}
	})
}

// C3: a Pod with the host's network is captured with a Warning, and stops when its last process has ended.
func TestHostNetwork(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		simulate(t, 0, func(w *world) {
			w.kids.behave(behaviour{deaf: deaf})
			w.proc.add(process{50, cgroupOf(hash), host, "pod", 500})
			p := podNamed("web", uidA, "1")
			p.kubeletUID = hash // static, as such Pods often are
			w.send("LISTED", p)
			w.pass(time.Minute)
			w.runs("capture-web.pcap 1")
			w.told("Warning CaptureStarted: the whole node's traffic")
			if got := w.kids.last().option("-i"); got != "any" {
				t.Errorf("-i %s", got)
			}
			w.proc.end(50)
			w.pass(slowPoll + 2*termGrace)
			if w.kids.last().lives() {
				t.Errorf("it still runs, after %q", w.kids.signals())
			}
			w.told("Normal CaptureStopped: the files stay")
			w.send("DELETED", p)
			w.runs()
		})
	}
}

// C5: a capture that is stopped because its Pod has ended, and is changed or removed meanwhile, keeps no files.
func TestRemovedWhileItsPodEnds(t *testing.T) {
	for _, value := range []string{"", "2"} {
		simulate(t, 0, func(w *world) {
			w.kids.behave(behaviour{shutdown: time.Second})
			w.proc.add(process{50, cgroupOf(uidA), host, "pod", 500})
			w.send("LISTED", podNamed("web", uidA, "3"))
			w.proc.end(50)
			w.pass(slowPoll)
			if got := w.kids.signals(); len(got) != 1 {
				t.Fatalf("signals %q", got)
			}
			p := podNamed("web", uidA, value)
			p.annotated = value != ""
			w.send("MODIFIED", p)
			w.runs("capture-web.pcap 3")
			w.pass(time.Second)
			w.runs()
			w.told("Warning CaptureStarted", "Normal CaptureStopped: its files (300 bytes) are deleted")
		})
	}
}

// C4: the files have the names that tcpdump gives them.
func TestFileNames(t *testing.T) {
	for n, want := range map[int]string{
		1:   "/capture-web.pcap",
		2:   "2 files, /capture-web.pcap0 to /capture-web.pcap1",
		10:  "10 files, /capture-web.pcap0 to /capture-web.pcap9",
		11:  "11 files, /capture-web.pcap00 to /capture-web.pcap10",
		100: "100 files, /capture-web.pcap00 to /capture-web.pcap99",
		101: "101 files, /capture-web.pcap000 to /capture-web.pcap100",
	} {
		p := &capture{grant: grant{have: request{n: n}, stem: "/capture-web.pcap"}}
		if got := p.files(); got != want {
			t.Errorf("N=%d: %q, want %q", n, got, want)
		}
	}
}

// C4: what a capture's files are called is matched exactly.
func TestOwns(t *testing.T) {
	for _, test := range []struct {
		stem, name string
		owns       bool
	}{
		{"/capture-web.pcap", "capture-web.pcap", true},
		{"/capture-web.pcap", "capture-web.pcap0", true},
		{"/capture-web.pcap", "capture-web.pcap099", true},
		{"/capture-web.pcap", "capture-web-2.pcap", false},
		{"/capture-web.pcap", "capture-web.pcap0.pcap", false}, // of the Pod web.pcap0
		{"/capture-web.pcap", "capture-web.pcap0.pcap1", false},
		{"/capture-web.pcap", "capture-web.pcap.pcap0", false},
		{"/capture-web.pcap", "capture-web_12345678.pcap0", false},
		{"/capture-web.pcap", "capture-web.pcapng", false},
		{"/capture-web.pcap", "capture-web.pcap0.gz", false},
		{"/capture-web.pcap", "capture-my-web.pcap", false},
		{"/capture-web.pcap", "web.pcap", false},
		{"/capture-web.pcap0.pcap", "capture-web.pcap0.pcap3", true},
		{"/capture-web.pcap0.pcap", "capture-web.pcap0", false},
		{"/capture-web_12345678.pcap", "capture-web_12345678.pcap1", true},
		{"/capture-web_12345678.pcap", "capture-web.pcap1", false},
	} {
		if p := (&capture{grant: grant{stem: test.stem}}); p.owns(test.name) != test.owns {
			t.Errorf("%s owns %s: %v", test.stem, test.name, !test.owns)
		}
	}
}

// C4: captures with similar names side by side; each one's end leaves the others' files.
func TestSimilarNames(t *testing.T) {
	names := []string{"web", "web-2", "web.pcap0", "web.pcap", "we"}
	for _, gone := range names {
		simulate(t, 0, func(w *world) {
			var want []string
			for i, name := range names {
				w.proc.pod(50+i, name)
				w.send("ADDED", podNamed(name, name, "3"))
				if name != gone {
					want = append(want, "capture-"+name+".pcap 3")
				}
			}
			w.send("DELETED", podNamed(gone, gone, "3"))
			w.runs(want...)
		})
	}
}

// C4: the same name in another namespace gets the UID behind it, for as long as it is captured.
func TestSameNameInTwoNamespaces(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{shutdown: time.Second})
		w.proc.pod(50, uidA)
		w.proc.pod(51, uidB)
		a, b := podNamed("web", uidA, "3"), podNamed("web", uidB, "3")
		b.namespace = "other"
		w.send("LISTED", a, b)
		w.runs("capture-web.pcap 3", "capture-web_1b2c3d4e.pcap 3")
		w.send("DELETED", a)
		w.pass(time.Second)
		w.runs("capture-web_1b2c3d4e.pcap 3")
		w.proc.pod(52, "new")
		w.send("ADDED", podNamed("web", "new", "2"))
		w.runs("capture-web_1b2c3d4e.pcap 3", "capture-web.pcap 2")
		w.send("LISTED", podNamed("web", "new", "2"))
		w.pass(time.Second)
		w.runs("capture-web.pcap 2")
	})
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
	_, err := newController(testConfig(t, newProc(t).dir, root))
	must(t, err)
	if got := (&world{T: t, root: root}).files(); !slices.Equal(got, stay) {
		t.Errorf("%q stay, want %q", got, stay)
	}
}

// C4: the sum of N is bounded; what does not fit waits for its turn.
func TestRoom(t *testing.T) {
	type step struct {
		name, value string // "" removes the annotation
		runs        string // names and values that run then
		told        string // the reasons of the Events
	}
	const started, stopped, waits = "CaptureStarted ", "CaptureStopped ", "CaptureWaiting "
	for _, test := range []struct {
		name  string
		steps []step
	}{
		{"up to the bound", []step{{"a", "3", "a3", started}, {"b", "2", "a3 b2", started}, {"c", "1", "a3 b2", waits},
			{"c", "1", "a3 b2", ""}}},
		{"a released one makes room", []step{{"a", "3", "a3", started}, {"b", "3", "a3", waits}, {"a", "", "b3", stopped + started}}},
		{"a smaller one as well", []step{{"a", "5", "a5", started}, {"b", "3", "a5", waits}, {"a", "2", "b3 a2", stopped + started + started}}},
		{"none is overtaken", []step{{"a", "3", "a3", started}, {"b", "4", "a3", waits}, {"c", "1", "a3", waits},
			{"d", "1", "a3", waits}, {"a", "", "b4 c1", stopped + started + started}, {"b", "", "c1 d1", stopped + started}}},
		{"one that never fits is passed", []step{{"a", "6", "", waits}, {"b", "5", "b5", started}, {"b", "", "", stopped},
			{"a", "5", "a5", started}}},
		{"one that the disk never holds is passed", []step{{"a", "2147483647", "", waits}, {"b", "5", "b5", started}}},
		{"one that waits is released", []step{{"a", "3", "a3", started}, {"b", "4", "a3", waits}, {"c", "1", "a3", waits},
			{"b", "", "a3 c1", started}}},
		{"one that waits changes", []step{{"a", "3", "a3", started}, {"b", "4", "a3", waits}, {"b", "2", "a3 b2", started}}},
		{"one that grows too large stops", []step{{"a", "3", "a3", started}, {"a", "9", "", stopped + waits}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			simulate(t, 5, func(w *world) {
				for i, name := range []string{"a", "b", "c", "d"} {
					w.proc.pod(50+i, name)
				}
				for _, step := range test.steps {
					p := podNamed(step.name, step.name, step.value)
					p.annotated = step.value != ""
					w.send("MODIFIED", p)
					var want []string
					for _, one := range strings.Fields(step.runs) {
						want = append(want, "capture-"+one[:1]+".pcap "+one[1:])
					}
					w.runs(want...)
					reasons := ""
					for _, e := range w.events() {
						reasons += e.reason + " "
					}
					if reasons != step.told {
						t.Errorf("%v: told %q", step, reasons)
					}
				}
				w.pass(10 * time.Second)
				w.told() // who waits does not say so again
			})
		})
	}
}

// C4: without a bound the free disk is one.
func TestFreeDisk(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		w.proc.pod(51, uidB)
		w.send("ADDED", podNamed("huge", uidA, "2147483647"))
		w.told("Warning CaptureWaiting: 2147483647 files")
		w.send("ADDED", podNamed("web", uidB, "2"))
		w.runs("capture-web.pcap 2")
	})
}

// C5: N changes faster than tcpdump starts and stops. At any time there is one child at most, and in the end the
// right one.
func TestQuickChanges(t *testing.T) {
	const ms = time.Millisecond
	for _, b := range []behaviour{
		{}, {shutdown: 300 * ms}, {startup: 300 * ms, shutdown: 500 * ms}, {startup: 50 * ms, deaf: true},
	} {
		for _, pause := range []time.Duration{0, 40 * ms, 350 * ms} {
			for last, want := range map[int][]string{0: {"capture-web.pcap 3"}, 2: {}} {
				simulate(t, 0, func(w *world) {
					w.kids.behave(b)
					w.proc.pod(50, uidA)
					for i := range 100 {
						p := podNamed("web", uidA, strconv.Itoa(3+(i+last)%3))
						p.annotated = p.value != "5"
						w.c.changes <- change{"MODIFIED", []pod{p}}
						time.Sleep(pause)
					}
					w.pass(termGrace + 2*time.Second)
					w.runs(want...)
				})
			}
		}
	}
}

// C5: what is removed while its tcpdump starts leaves nothing, and was never told to have started.
func TestRemovedWhileStarting(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{startup: time.Second, shutdown: 100 * time.Millisecond})
		w.proc.pod(50, uidA)
		w.send("ADDED", podNamed("web", uidA, "3"))
		w.send("DELETED", podNamed("web", uidA, "3"))
		w.runs("capture-web.pcap 3")
		w.pass(100 * time.Millisecond)
		w.runs()
		w.pass(time.Minute)
		w.told()
	})
}

// C5: the same, when "listening on" comes between SIGTERM and the end.
func TestListeningAfterTheStop(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{startup: time.Second, shutdown: 1500 * time.Millisecond})
		w.proc.pod(50, uidA)
		w.send("ADDED", podNamed("web", uidA, "3"))
		w.send("DELETED", podNamed("web", uidA, "3"))
		w.pass(time.Minute)
		w.told()
		w.runs()
	})
}

// C5: removed and annotated again before the exit: the old child ends first, then a new one starts.
func TestAnnotatedAgainBeforeTheExit(t *testing.T) {
	for _, value := range []string{"3", "4"} {
		simulate(t, 0, func(w *world) {
			w.kids.behave(behaviour{shutdown: time.Second})
			w.proc.pod(50, uidA)
			w.send("ADDED", podNamed("web", uidA, "3"))
			w.send("DELETED", podNamed("web", uidA, "3"))
			w.pass(100 * time.Millisecond)
			w.send("ADDED", podNamed("web", uidA, value))
			w.runs("capture-web.pcap 3")
			if n := w.kids.started(); n != 1 {
				t.Errorf("%d children before the first has ended", n)
			}
			w.pass(900 * time.Millisecond)
			w.runs("capture-web.pcap " + value)
			if n := w.kids.started(); n != 2 {
				t.Errorf("%d children were started, want 2", n)
			}
			w.told("Normal CaptureStarted", "Normal CaptureStopped", "Normal CaptureStarted")
		})
	}
}

// C5: what an old child still has to say does not touch its successor.
func TestLateReports(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		w.send("ADDED", podNamed("web", uidA, "3"))
		var p *capture
		var old *exec.Cmd
		w.inside(func() { p = w.c.captures[uidA]; old = p.cmd })
		w.send("MODIFIED", podNamed("web", uidA, "4"))
		w.events()
		w.inside(func() { w.c.exited(p, old, errKilled) })
		w.inside(func() { w.c.listening(p, old) })
		w.pass(time.Minute)
		w.runs("capture-web.pcap 4")
		w.told()
		if n := w.kids.started(); n != 2 {
			t.Errorf("%d children were started, want 2", n)
		}
	})
}

// C5: SIGTERM, and SIGKILL after two seconds; the files stay until the end, and then nothing is left.
func TestDeafChild(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{deaf: true})
		w.proc.pod(50, uidA)
		w.send("ADDED", podNamed("web", uidA, "3"))
		w.send("DELETED", podNamed("web", uidA, "3"))
		w.pass(2*time.Second - time.Millisecond)
		w.runs("capture-web.pcap 3")
		if got := w.kids.signals(); !slices.Equal(got, []string{"terminated"}) {
			t.Errorf("signals %q", got)
		}
		w.pass(time.Millisecond)
		w.runs()
		if got := w.kids.signals(); !slices.Equal(got, []string{"terminated", "killed"}) {
			t.Errorf("signals %q", got)
		}
		w.told("Normal CaptureStarted", "Normal CaptureStopped: an unknown number of packets")
	})
}

// C5: what can't be started is tried again, with growing pauses, until it can.
func TestStartFails(t *testing.T) {
	for _, refusal := range []error{syscall.EAGAIN, &exec.Error{Name: "nsenter", Err: exec.ErrNotFound}, syscall.EMFILE} {
		simulate(t, 0, func(w *world) {
			w.kids.behave(behaviour{refusal: refusal})
			w.proc.pod(50, uidA)
			w.send("ADDED", podNamed("web", uidA, "3"))
			w.told("Warning CaptureFailed: " + refusal.Error())
			w.pass(5 * time.Minute)
			w.checkPauses(w.kids.attempts)
			w.events()
			w.kids.behave(behaviour{})
			w.pass(backoffMax)
			w.runs("capture-web.pcap 3")
			w.told("Normal CaptureStarted")
		})
	}
}

// checkPauses checks that the pauses between attempts double, give or take their jitter, up to backoffMax.
func (w *world) checkPauses(at []time.Time) {
	w.Helper()
	for i, most := 1, restartBackoff.most; i < len(at); i, most = i+1, min(2*most, backoffMax) {
		if pause := at[i].Sub(at[i-1]); pause < most/2 || pause > most {
			w.Errorf("pause %d was %v, want %v to %v", i, pause, most/2, most)
		}
	}
	if len(at) < 10 {
		w.Errorf("only %d attempts", len(at))
	}
}

// C5: a tcpdump that ends by itself is started again, and its last words are told, once each time.
func TestExitsByItself(t *testing.T) {
	const words = "tcpdump: pcap_loop: The interface disappeared\n"
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		w.send("ADDED", podNamed("web", uidA, "3"))
		w.told("Normal CaptureStarted")
		w.kids.last().exit(words, errStatus)
		w.pass(restartBackoff.most)
		w.runs("capture-web.pcap 3")
		w.told("Warning CaptureFailed: The interface disappeared", "Normal CaptureStarted")
		w.kids.last().exit("", errKilled)
		w.pass(2 * restartBackoff.most)
		w.told("Warning CaptureFailed: signal: killed", "Normal CaptureStarted")
		w.pass(time.Minute) // it has proved itself: the next pause is short again
		w.kids.last().exit(closing, nil)
		w.pass(restartBackoff.most)
		w.told("Warning CaptureFailed: ended by itself", "Normal CaptureStarted")
		w.runs("capture-web.pcap 3")
	})
}

// C5: one that ended and can't be started again: each of the two is told as what it is.
func TestExitsAndStartFails(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		w.send("ADDED", podNamed("web", uidA, "3"))
		w.kids.behave(behaviour{refusal: syscall.EAGAIN})
		w.kids.last().exit("", errKilled)
		w.pass(restartBackoff.most)
		w.told("Normal CaptureStarted", "Warning CaptureFailed: signal: killed", "Warning CaptureFailed: can't be started")
		w.pass(2 * restartBackoff.most)
		w.told("Warning CaptureFailed: can't be started")
		w.kids.behave(behaviour{})
		w.pass(backoffMax)
		w.told("Normal CaptureStarted")
		w.runs("capture-web.pcap 3")
	})
}

// C5: one that ends at once each time waits ever longer.
func TestExitsAgainAndAgain(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{words: "tcpdump: eth0: No such device exists (No such device exists)\n"})
		w.proc.pod(50, uidA)
		w.send("ADDED", podNamed("web", uidA, "3"))
		w.pass(5 * time.Minute)
		w.checkPauses(w.kids.attempts)
		for _, e := range w.events() {
			if e.reason != "CaptureFailed" || !strings.Contains(e.message, "No such device") {
				t.Errorf("Event %v", e)
			}
		}
		w.kids.behave(behaviour{})
		w.send("MODIFIED", podNamed("web", uidA, "4")) // a change does not wait
		w.runs("capture-web.pcap 4")
	})
}

// C5: one that is released while it waits for its restart leaves nothing.
func TestRemovedBetweenRestarts(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		w.send("ADDED", podNamed("web", uidA, "3"))
		w.kids.last().exit("", errKilled)
		synctest.Wait()
		w.send("DELETED", podNamed("web", uidA, "3"))
		w.runs()
		w.pass(time.Minute)
		w.runs()
	})
}

// C5: a Pod that finished keeps its files, until the annotation or the Pod goes.
func TestFinishedPod(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		w.send("ADDED", podNamed("web", uidA, "3"))
		w.proc.end(50)
		w.kids.last().exit("tcpdump: pcap_loop: The interface disappeared\n"+closing, errStatus)
		w.pass(time.Minute)
		w.told("Normal CaptureStarted", "Normal CaptureStopped: 7 packets captured, 2 dropped by the kernel; the Pod's network "+
			"is gone, the files stay")
		w.send("MODIFIED", podNamed("web", uidA, "3"))
		w.send("LISTED", podNamed("web", uidA, "3"))
		if files := w.files(); len(files) != 3 || w.kids.last().lives() {
			t.Errorf("files %q, want 3", files)
		}
		w.send("DELETED", podNamed("web", uidA, "3"))
		w.runs()
		w.told("Normal CaptureStopped: its files (300 bytes) are deleted")
	})
}

// C5: a Pod whose sandbox is made anew under the same UID (the node was restarted) is captured again.
func TestSandboxMadeAnew(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		w.send("ADDED", podNamed("web", uidA, "3"))
		w.proc.end(50)
		w.kids.last().exit("tcpdump: pcap_loop: The interface disappeared\n", errStatus)
		w.pass(time.Minute)
		w.proc.pod(60, uidA)
		w.pass(slowPoll)
		w.runs("capture-web.pcap 3")
	})
}

// C5: a Pod recreated under its name is another Pod: the old child ends first, then the new Pod is captured.
func TestRecreated(t *testing.T) {
	old, recreated := podNamed("web", uidA, "3"), podNamed("web", uidB, "3")
	for name, changes := range map[string][]change{
		"in a gap":         {{"LISTED", []pod{recreated}}},
		"in one MODIFIED":  {{"MODIFIED", []pod{recreated}}},
		"in one ADDED":     {{"ADDED", []pod{recreated}}},
		"properly":         {{"DELETED", []pod{old}}, {"ADDED", []pod{recreated}}},
		"and deleted late": {{"ADDED", []pod{recreated}}, {"DELETED", []pod{old}}},
	} {
		t.Run(name, func(t *testing.T) {
			simulate(t, 0, func(w *world) {
				w.kids.behave(behaviour{shutdown: 300 * time.Millisecond})
				w.proc.pod(50, uidA)
				w.proc.pod(60, uidB)
				w.send("LISTED", old)
				for _, change := range changes {
					w.send(change.kind, change.pods...)
				}
				if n := w.kids.started(); n != 1 {
					t.Errorf("%d children before the first has ended", n)
				}
				w.pass(300 * time.Millisecond)
				w.runs("capture-web.pcap 3")
				if got, _ := filepath.EvalSymlinks(w.kids.last().network); filepath.Base(got) != "net-"+uidB {
					t.Errorf("captured %s", got)
				}
				w.told("Normal CaptureStarted", "Normal CaptureStopped", "Normal CaptureStarted")
			})
		})
	}
}

// C5: a Pod that is recreated without the annotation is not captured.
func TestRecreatedWithout(t *testing.T) {
	for _, kind := range []string{"ADDED", "MODIFIED"} {
		simulate(t, 0, func(w *world) {
			w.proc.pod(50, uidA)
			w.send("LISTED", podNamed("web", uidA, "3"))
			w.send(kind, pod{namespace: "default", name: "web", uid: uidB, kubeletUID: uidB})
			w.runs()
		})
	}
}

// C5: a Pod of another namespace that has the same name changes nothing.
func TestNamesakeGoes(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		w.send("LISTED", podNamed("web", uidA, "3"))
		for _, kind := range []string{"ADDED", "MODIFIED", "DELETED"} {
			w.send(kind, pod{namespace: "other", name: "web", uid: uidB, kubeletUID: uidB})
		}
		w.runs("capture-web.pcap 3")
	})
}

// C5: told to end, the program stops all captures side by side, in whatever state they are.
func TestEnd(t *testing.T) {
	t.Run("side by side", func(t *testing.T) {
		simulate(t, 0, func(w *world) {
			w.kids.behave(behaviour{shutdown: time.Second})
			for i := range 5 {
				name := fmt.Sprint("web-", i)
				w.proc.pod(50+i, name)
				w.send("ADDED", podNamed(name, name, "3"))
			}
			w.events()
			w.finish(time.Second)
			w.runs()
			if events := w.events(); len(events) != 5 || events[0].reason != "CaptureStopped" {
				t.Errorf("told %v", events)
			}
		})
	})
	t.Run("deaf children", func(t *testing.T) {
		simulate(t, 0, func(w *world) {
			w.kids.behave(behaviour{deaf: true})
			for i := range 3 {
				name := fmt.Sprint("web-", i)
				w.proc.pod(50+i, name)
				w.send("ADDED", podNamed(name, name, "3"))
			}
			w.finish(termGrace)
			w.runs()
		})
	})
	t.Run("in the middle of it all", func(t *testing.T) {
		simulate(t, 30, func(w *world) {
			for i, b := range []behaviour{{}, {startup: time.Minute}, {deaf: true}, {shutdown: time.Second}, {}, {refusal: syscall.EAGAIN}} {
				name := fmt.Sprint("web-", i)
				w.kids.behave(b)
				w.proc.pod(50+i, name)
				w.send("ADDED", podNamed(name, name, "3"))
			}
			w.kids.at(4).exit("", errKilled)                    // waits for its restart
			w.send("DELETED", podNamed("web-2", "web-2", "3"))  // is being stopped
			w.send("MODIFIED", podNamed("web-3", "web-3", "4")) // is being changed
			w.send("ADDED", podNamed("no-sandbox", "no-sandbox", "1"), podNamed("no-room", "no-room", "100"), podNamed("bad", "bad", "x"))
			time.Sleep(time.Second)
			w.finish(termGrace)
			w.runs()
		})
	})
	t.Run("while changes go on", func(t *testing.T) {
		simulate(t, 0, func(w *world) {
			w.proc.pod(50, uidA)
			w.send("ADDED", podNamed("web", uidA, "3"))
			w.kids.behave(behaviour{shutdown: time.Second})
			w.send("MODIFIED", podNamed("web", uidA, "4"))
			w.end()
			synctest.Wait()
			w.c.changes <- change{"MODIFIED", []pod{podNamed("web", uidA, "5")}} // nobody reads it any more
			w.finish(time.Second)
			w.runs()
		})
	})
	t.Run("nothing runs", func(t *testing.T) {
		simulate(t, 0, func(w *world) { w.finish(0) })
	})
}

// C5: the program ends within five seconds also when a child never does.
func TestEndWithImmortalChild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 0)
		w.kids.behave(behaviour{deaf: true, immortal: true})
		w.proc.pod(50, uidA)
		w.send("ADDED", podNamed("web", uidA, "3"))
		w.finish(5*time.Second - flushGrace)
		if got := w.kids.signals(); !slices.Equal(got, []string{"terminated", "killed"}) {
			t.Errorf("signals %q", got)
		}
		w.kids.last().exit("", errKilled) // so that its goroutine ends: what it says reaches nobody, and blocks nobody
		synctest.Wait()
	})
}

// C7: ready means that the first list is reconciled.
func TestReady(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.probe("/readyz", 503)
		w.probe("/healthz", 200)
		w.send("ADDED", podNamed("web", uidA, "3"))
		w.probe("/readyz", 503)
		w.send("LISTED")
		w.probe("/readyz", 200)
	})
}

// C7: alive means that the loop turns.
func TestAlive(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.c.inbox <- func() { time.Sleep(10 * time.Second) }
		w.probe("/healthz", 503)
		w.pass(10 * time.Second)
		w.probe("/healthz", 200)
	})
}

func (w *world) probe(path string, want int) {
	w.Helper()
	answer := httptest.NewRecorder()
	w.c.health().ServeHTTP(answer, httptest.NewRequest("GET", path, nil))
	if answer.Code != want {
		w.Errorf("%s answers %d, want %d", path, answer.Code, want)
	}
	synctest.Wait()
}

// C7: Events that nobody takes away never delay a capture.
func TestEventsNeverDelay(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		for i := range 2000 {
			w.send("MODIFIED", podNamed("web", uidA, fmt.Sprint("x", i)))
		}
		w.send("MODIFIED", podNamed("web", uidA, "3"))
		w.runs("capture-web.pcap 3")
	})
}

// C7: an Event is about its Pod, a static one's by the UID that the kubelet uses.
func TestEventIsOfItsPod(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, hash)
		p := podNamed("web", uidA, "3")
		p.kubeletUID = hash
		w.send("LISTED", p)
		events := w.events()
		if e := events[0]; len(events) != 1 || e.namespace != "default" || e.name != "web" || e.uid != hash ||
			!strings.HasSuffix(e.message, "in kube-system/packetcapture-x") {
			t.Errorf("told %v", events)
		}
	})
}

// C9: a changed or removed filter starts the capture again.
func TestFilterChanges(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.proc.pod(50, uidA)
		for i, filter := range []string{"tcp", "udp", "", "udp"} {
			p := podNamed("web", uidA, "3")
			p.filter = filter
			w.send("MODIFIED", p)
			w.send("MODIFIED", p)
			w.runs("capture-web.pcap 3")
			if n := w.kids.started(); n != i+1 {
				t.Errorf("%d children were started, want %d", n, i+1)
			}
			if got := w.kids.last().arguments; slices.Contains(got[2:], "--") != (filter != "") || filter != "" && got[len(got)-1] != filter {
				t.Errorf("arguments %q", got)
			}
		}
	})
}

// C9: a filter that tcpdump refuses is told once, in its words, and nothing is tried until the annotation changes.
func TestRefusedFilter(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{words: "tcpdump: can't parse filter expression: syntax error\n"})
		w.proc.pod(50, uidA)
		p := podNamed("web", uidA, "3")
		p.filter = "tcp prot 80"
		w.send("ADDED", p)
		w.pass(10 * time.Minute)
		w.send("MODIFIED", p)
		w.send("LISTED", p)
		w.pass(10 * time.Minute)
		w.runs()
		w.told(`Warning CaptureFailed: "tcp prot 80" (tcpdump: can't parse filter expression: syntax error)`)
		if n := w.kids.started(); n != 1 {
			t.Errorf("%d children were started, want 1", n)
		}
		w.kids.behave(behaviour{})
		p.filter = "tcp port 80"
		w.send("MODIFIED", p)
		w.runs("capture-web.pcap 3")
		w.told("Normal CaptureStarted: tcp port 80")
	})
}

// C9: room that a refused filter had is another's.
func TestRefusedFilterGivesItsRoomBack(t *testing.T) {
	simulate(t, 5, func(w *world) {
		w.kids.behave(behaviour{words: "tcpdump: syntax error\n", startup: time.Second})
		w.proc.pod(50, uidA)
		w.proc.pod(60, uidB)
		p := podNamed("web", uidA, "5")
		p.filter = "x y"
		w.send("ADDED", p)
		w.kids.behave(behaviour{})
		w.send("ADDED", podNamed("db", uidB, "5"))
		w.pass(time.Second)
		w.runs("capture-db.pcap 5")
	})
}

// C9: only what tcpdump says of the filter refuses it; all else is tried again.
func TestRefusesFilter(t *testing.T) {
	const stem = "/capture-web.pcap"
	for words, want := range map[string]bool{
		"tcpdump: can't parse filter expression: syntax error\n":                                           true,
		"tcpdump: syntax error in filter expression: syntax error\n":                                       true,
		"tcpdump: unknown host 'nowhere'\n":                                                                true,
		"tcpdump: data link type LINUX_SLL2\ntcpdump: unknown port 'x'\n":                                  true,
		"tcpdump: eth0: No such device exists\n(No such device exists)\n":                                  false,
		"tcpdump: eth0: You don't have permission to perform this capture on that device\n(socket: ...)\n": false,
		"tcpdump: any: You don't have permission to perform this capture on that device\n":                 false,
		"tcpdump: /capture-web.pcap0: No space left on device\n":                                           false,
		"tcpdump: /capture-web.pcap: Permission denied\n":                                                  false,
		"tcpdump: data link type LINUX_SLL2\n":                                                             false, // killed then
		"nsenter: failed to execute tcpdump: No such file or directory\n":                                  false,
		"nsenter: reassociate to namespace 'ns/net' failed: Operation not permitted\n":                     false,
		"tcpdump: listening on eth0, link-type EN10MB\ntcpdump: pcap_loop: The interface disappeared\n":    false,
		"": false,
	} {
		o := &output{onListen: func() {}}
		o.Write([]byte(words))
		if got := o.refusesFilter(stem); got != want {
			t.Errorf("refusesFilter of %q: %v", words, got)
		}
	}
}

// C7: of what a child says its last words and its counts are kept, however it comes and however much it is.
func TestOutput(t *testing.T) {
	const listening = "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n"
	for _, test := range []struct{ text, complaint, counts string }{
		{"", "", "an unknown number of packets captured, an unknown number dropped by the kernel"},
		{listening + closing, "", "7 packets captured, 2 dropped by the kernel"},
		{listening + "\n1 packet captured\n1 packet received by filter\n0 packets dropped by kernel\n", "", "1 packets captured, 0 dropped by the kernel"},
		{listening + "tcpdump: pcap_loop: The interface disappeared\n" + closing, "tcpdump: pcap_loop: The interface disappeared", "7 packets captured, 2 dropped by the kernel"},
		{listening + strings.Repeat("noise\n", 10_000) + closing, "", "7 packets captured, 2 dropped by the kernel"},
		{"tcpdump: data link type LINUX_SLL2\n" + listening, "", "an unknown number of packets captured, an unknown number dropped by the kernel"},
		{"nsenter: failed to execute tcpdump: No such file or directory\n", "nsenter: failed to execute tcpdump: No such file or directory", "an unknown number of packets captured, an unknown number dropped by the kernel"},
	} {
		for _, size := range []int{1, 7, 1 << 20} {
			listened := 0
			o := &output{onListen: func() { listened++ }}
			for chunk := range slices.Chunk([]byte(test.text), size) {
				if n, err := o.Write(chunk); n != len(chunk) || err != nil {
					t.Errorf("Write = %d, %v", n, err)
				}
			}
			if got := o.complaint(); got != test.complaint {
				t.Errorf("complaint of %.100q: %q", test.text, got)
			}
			if got := o.counts(); got != test.counts {
				t.Errorf("counts of %.100q: %q", test.text, got)
			}
			if want := strings.Count(test.text, "listening on"); listened != want {
				t.Errorf("%.100q: heard %d times that it listens, want %d", test.text, listened, want)
			}
			if len(o.text) > 4096 {
				t.Errorf("%d bytes are kept", len(o.text))
			}
		}
	}
}

// C2, C5: files that were kept once, when the Pod's network went away, are not kept when N changes later.
func TestKeptOnce(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{shutdown: 300 * time.Millisecond})
		w.proc.add(process{50, cgroupOf(uidA), host, "pod", 500})
		w.send("LISTED", podNamed("web", uidA, "3"))
		w.proc.end(50)
		w.pass(3 * slowPoll)
		w.told("Warning CaptureStarted", "Normal CaptureStopped: the files stay")
		w.proc.add(process{60, cgroupOf(uidA), host, "pod", 900})
		w.proc.newest(60)
		w.pass(3 * slowPoll)
		w.told("Warning CaptureStarted")
		w.send("MODIFIED", podNamed("web", uidA, "4"))
		w.send("MODIFIED", podNamed("web", uidA, "3")) // back before the child has ended
		w.pass(3 * slowPoll)
		w.told("Normal CaptureStopped: are deleted", "Warning CaptureStarted")
		w.runs("capture-web.pcap 3")
	})
}
