package main

import (
	"context"
	"fmt"
	"io"
	"math"
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

const (
	uidA = "1b2c3d4e-0000-4000-8000-00000000000a"
	uidB = "1b2c3d4e-0000-4000-8000-00000000000b"
)

// web sees the pod web, which has a network, with this value of its annotation.
func (w *world) web(value string) pod {
	w.proc.pod(50, uidA)
	p := podNamed("web", uidA, value)
	w.see(p)
	return p
}

// born sees a pod that has just got a network, and waits until that is found.
func (w *world) born(pid int, name, uid, value string) pod {
	w.proc.pod(pid, uid)
	p := podNamed(name, uid, value)
	w.see(p)
	w.pass(birthPoll)
	return p
}

// on is a pod whose interface annotation is iface, "" for none.
func (p pod) on(iface string) pod {
	p.iface, p.hasIface = iface, iface != ""
	return p
}

// value sees a pod with another value of its annotation, "" for none.
func (w *world) value(p pod, value string) {
	p.value, p.annotated = value, value != ""
	w.see(p)
}

// started checks how many children there were so far.
func (w *world) started(want int) {
	w.Helper()
	if n := w.kids.started(); n != want {
		w.Errorf("%d children were started, want %d", n, want)
	}
}

// keeps checks that no child lives, and how many files there are.
func (w *world) keeps(want int) {
	w.Helper()
	if files := w.fileNames(); len(files) != want || w.kids.last().lives() {
		w.Errorf("files %q, want %d that no child writes", files, want)
	}
}

// network is the folder of the network that the last child captures.
func (w *world) network(want string) {
	w.Helper()
	if got := filepath.Base(w.kids.last().network); got != "net-"+want {
		w.Errorf("captured %s, want net-%s", got, want)
	}
}

// sent checks the signals that the last child was sent.
func (w *world) sent(want ...string) {
	w.Helper()
	if got := w.kids.signals(); !slices.Equal(got, want) {
		w.Errorf("signals %q, want %q", got, want)
	}
}

// ---- What is asked for ----

// badValues are no N. tcpdump's own atoi would take some of them.
var badValues = []string{"0", "-1", "+5", "5abc", " 5 ", "05", "1e3", "5.0", "٣", "", "99999999999999999999",
	"5\n", "5\x00", "0x5", "5_0", "$(reboot)", "-w /etc/passwd", strings.Repeat("5", 100<<10), strings.Repeat("\x00", 100<<10)}

var badFilters = []string{"tcp\nport 80", "\x00", "tcp\tport 80", "\x1b[2J", "tcp\u202eport", strings.Repeat("a", maxFilter+1)}

// typos are what tcpdump refuses.
var typos = []string{"tcp.port == 80", "“tcp port 80”"}

var badInterfaces = []string{"", "-i", "--", "a/b", "..//", "eth 0", " eth0", "eth0\n", "ü", "a:b", "a@b", "sixteen-letters-", "$(reboot)"}

// C2, C9, C10: what is accepted. Of a filter only tcpdump knows what it means.
func TestAccepted(t *testing.T) {
	simulate(t, 0, func(w *world) {
		accept := func(p pod, want request) {
			if got, err := w.check(w.ctx, p); err != nil || got != want {
				t.Errorf("check(%.20q %.20q %.20q) = %v, %v", p.value, p.filter, p.iface, got, err)
			}
		}
		for value, n := range map[string]int{"1": 1, "5": 5, "10": 10, "2147483647": math.MaxInt32} {
			accept(pod{value: value}, request{n: n})
		}
		for _, filter := range []string{"tcp port 80", "-w /etc/passwd", "--", "'; reboot", `"quoted"`, "host ü", strings.Repeat("a", maxFilter)} {
			accept(pod{value: "5", filter: filter}, request{5, filter, ""})
			accept(pod{value: "5", filter: " \n" + filter + "\n"}, request{5, filter, ""})
		}
		accept(pod{value: "5", filter: " "}, request{n: 5})
		for _, iface := range []string{"lo", "any", "net1", "tun0", "eth0.100", "_", ".x", "2", "fifteen-letters"} {
			accept(pod{value: "5"}.on(iface), request{5, "", iface})
		}
	})
}

// C2, C7, C9, C10: a mistake is told once, with what was read and what is accepted. It starts nothing, and a capture that
// runs goes on with its files, also when the mistake is mended by going back.
func TestMistakes(t *testing.T) {
	type mistake struct {
		pod
		annotation, read string
	}
	var mistakes []mistake
	for _, value := range append(badValues, "6", "50000", "2147483647", "2147483648") {
		mistakes = append(mistakes, mistake{podNamed("web", uidA, value), annotation, value})
	}
	for _, filter := range append(badFilters, typos...) {
		p := podNamed("web", uidA, "5")
		p.filter = filter
		mistakes = append(mistakes, mistake{p, filterAnnotation, filter})
	}
	for _, iface := range badInterfaces {
		p := podNamed("web", uidA, "5")
		p.iface, p.hasIface = iface, true
		mistakes = append(mistakes, mistake{p, interfaceAnnotation, iface})
	}
	for _, running := range []bool{false, true} {
		simulate(t, 5, func(w *world) {
			good, want := podNamed("web", uidA, ""), []string{}
			good.annotated = running
			end := "; nothing is captured"
			if running {
				good, want, end = w.web("5"), []string{"capture-web.pcap 5"}, "; the capture that runs goes on as it was"
				w.told("Normal CaptureStarted")
			}
			for _, m := range mistakes {
				w.kids.behave(behaviour{})
				if slices.Contains(typos, m.filter) {
					w.kids.behave(behaviour{syntax: "tcpdump: can't parse filter expression: syntax error\n"})
				}
				w.see(m.pod)
				w.pass(time.Minute)
				w.see(m.pod)
				begin := "the annotation " + m.annotation + " is " + quote(m.read)
				if news := w.news(); len(news) != 1 || news[0].kind+news[0].reason != "WarningCaptureInvalid" || len(news[0].message) > 1024 ||
					!strings.HasPrefix(news[0].message, begin) || !strings.Contains(news[0].message, "accepted is") || !strings.HasSuffix(news[0].message, end) {
					t.Errorf("told of %s %.20q: %v", m.annotation, m.read, news)
				}
				w.runs(want...)
				w.see(good)
				w.runs(want...)
				w.started(len(want))
			}
			w.told()
			w.see(mistakes[0].pod)
			w.lose(good)
			w.runs()
		})
	}
}

// C2: the same again, and whatever else changes of a pod, leaves its child alone; also what others do. A change starts it
// again with its old files gone, as soon as its predecessor has ended; its removal stops it.
func TestLifeOfAnAnnotation(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{shutdown: 37 * time.Millisecond})
		p := w.web("11")
		for range 3 {
			w.see(p, podNamed("db", uidB, "5"))
			w.lose(podNamed("db", uidB, "5"), podNamed("web", "e", "5"))
			w.pass(10*time.Second + 300*time.Millisecond)
			w.see(pod{namespace: "other", name: "web", uid: "c"}, pod{namespace: "default", name: "web", uid: "d"}) // not annotated
		}
		w.runs("capture-web.pcap 11")
		w.told("Normal CaptureStarted: Capturing into 11 files, " + w.root + "/capture-web.pcap00 to " + w.root + "/capture-web.pcap10, rotated at 1 MB, in kube-system/packetcapture-x")
		w.value(p, "2")
		w.runs("capture-web.pcap 11") // until it has ended
		w.pass(37*time.Millisecond - 1)
		w.started(1)
		w.pass(1)
		w.runs("capture-web.pcap 2")
		w.told("Normal CaptureStopped: Stopped: 7 packets captured, 2 dropped by the kernel; its files (300 bytes) are deleted", "Normal CaptureStarted: 2 files")
		w.value(p, "")
		w.runs("capture-web.pcap 2")
		w.pass(37 * time.Millisecond)
		w.runs()
		w.told("Normal CaptureStopped: its files (200 bytes) are deleted")
	})
}

// C3, C8, C9: tcpdump's arguments are the promised ones, a filter is one of them whatever it says, behind "--", and
// descriptor 3 is the pod's network, of which nothing stays open. A filter that changes or goes starts the capture again.
func TestArguments(t *testing.T) {
	simulate(t, 0, func(w *world) {
		p := w.web("7")
		for i, filter := range []string{"", "tcp port 80", "-w /etc/passwd", "", "--", `'"; $(reboot) \`} {
			p.filter = filter
			w.see(p, p)
			p.filter += " "
			w.see(p)
			w.started(i + 1)
			w.runs("capture-web.pcap 7")
			want := []string{"--net=/proc/self/fd/3", "--", "tcpdump", "-C", "1", "-W", "7",
				"-w", filepath.Join(w.root, "capture-web.pcap"), "-U", "-Z", "root", "-p", "-i", "eth0", "-B", "4096"}
			if filter != "" {
				want = append(want, "--", filter)
			}
			if got := w.kids.last().arguments; !slices.Equal(got, want) {
				t.Errorf("arguments\n%q, want\n%q", got, want)
			}
			w.network(uidA)
		}
		for _, fd := range namesIn(t, "/proc/self/fd") {
			if path, _ := os.Readlink("/proc/self/fd/" + fd); strings.HasPrefix(path, w.proc.dir) {
				t.Errorf("%s is open", path)
			}
		}
	})
}

// C9: a filter is refused only by what tcpdump says of it; it is compiled once for all pods that have it, as the interface
// has it. One that takes too long is refused, and one whose compilation the program's end cuts short is not told.
func TestCompile(t *testing.T) {
	simulate(t, 0, func(w *world) {
		for words, refused := range map[string]bool{
			"tcpdump: can't parse filter expression: syntax error\n":                true,
			"tcpdump: syntax error in filter expression: syntax error\n":            true,
			"tcpdump: data link type LINUX_SLL2\ntcpdump: unknown host 'nowhere'\n": true,
			"tcpdump: data link type LINUX_SLL2\n":                                  false, // and then it was killed
			"":                                                                      false,
			"runtime/cgo: pthread_create failed: Resource temporarily unavailable\n": false,
		} {
			w.kids.behave(behaviour{syntax: words + " "})
			if err := w.compile(w.ctx, request{1, "x", ""}); (err != nil) != refused {
				t.Errorf("compile, with %q: %v", words, err)
			}
		}
		w.kids.behave(behaviour{})
		w.kids.compiled = nil
		for i := range 14 {
			p := podNamed(fmt.Sprint("web-", i), fmt.Sprint("a", i), "5")
			p.filter = "tcp"
			w.see(p)
		}
		if !slices.Equal(w.kids.compiled, []string{"tcp"}) {
			t.Errorf("compiled %q", w.kids.compiled)
		}
		w.start = func(ctx context.Context, stderr io.Writer, network *os.File, arguments ...string) (*child, error) {
			if want := []string{"tcpdump", "-y", "LINUX_SLL2", "-d", "--", "tcp"}; !slices.Equal(arguments, want) {
				t.Errorf("compiled with %q, want %q", arguments, want)
			}
			return nil, syscall.EAGAIN
		}
		if _, err := w.check(w.ctx, pod{value: "1", filter: "tcp"}.on("any")); err != nil {
			t.Errorf("tcpdump can't run, and the filter is refused: %v", err)
		}
		w.start = w.kids.start
		w.news()
		p := w.web("5")
		w.kids.behave(behaviour{compile: time.Minute})
		p.filter = "udp"
		w.see(p)
		w.told("Normal CaptureStarted", `Warning CaptureInvalid: is "udp", which is refused (it takes longer than 5s to compile)`)
		w.runs("capture-web.pcap 5")
		time.AfterFunc(time.Second, w.end)
		p.filter = "icmp"
		w.see(p)
		w.told("Normal CaptureStopped")
	})
}

// C10: the device that tcpdump captures on. None is what tcpdump would make of a number or of a device that is none.
func TestInterfaces(t *testing.T) {
	for _, test := range []struct{ net, iface, device string }{
		{uidA, "", "eth0"}, {uidA, "lo", "lo"}, {uidA, "net1", "net1"}, {uidA, "any", "any"}, {host, "", "any"}, {host, "ens3", "ens3"},
		{uidA, "2", ""}, {uidA, "nflog", ""}, {host, "eth0", ""},
	} {
		simulate(t, 5, func(w *world) {
			w.proc.interfaces(uidA, "lo", "eth0", "net1")
			w.proc.add(fakeProcess{pid: 50, cgroup: cgroupOf(uidA), net: test.net, root: "pod", born: 50})
			w.see(podNamed("web", uidA, "5").on(test.iface))
			if test.device != "" {
				w.runs("capture-web.pcap 5")
				if got := w.kids.last().option("-i"); got != test.device {
					t.Errorf("%v: -i %s", test, got)
				}
				return
			}
			w.told("Warning CaptureFailed: the pod has no interface " + test.iface + ", but lo, ")
			w.pass(10 * time.Minute)
			w.told("Warning CaptureFailed: no interface")
			w.started(0)
			w.born(60, "db", uidB, "5") // meanwhile the room is another's
			w.runs("capture-db.pcap 5")
			w.lose(podNamed("db", uidB, "5"))
			w.proc.interfaces(test.net, "lo", "eth0", test.iface)
			w.pass(30 * time.Second)
			w.runs("capture-web.pcap 5") // when the interface comes
		})
	}
}

// ---- The pod's network ----

// C3, C4: a pod that is annotated before it runs is captured from its birth: its network is looked for every 25 ms, after 5
// minutes every second. Without one it takes no room, and however many wait, they look together.
func TestBirth(t *testing.T) {
	for waiting, poll := range map[time.Duration]time.Duration{7 * time.Millisecond: birthPoll, birthTime - 2*time.Second: birthPoll, birthTime + time.Minute: time.Second} {
		simulate(t, 40, func(w *world) {
			for i := range 6 { // each at its own time
				w.see(podNamed(fmt.Sprint("web-", i), fmt.Sprint("a", i), "40"))
				time.Sleep(777 * time.Microsecond)
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
			w.pass(poll + birthPoll)
			w.runs("capture-web-5.pcap 40")
			w.told("Normal CaptureStarted")
		})
	}
	simulate(t, 0, func(w *world) {
		w.see(podNamed("web", uidA, "3"))
		w.pass(waitingTime - birthPoll)
		w.told()
		w.pass(time.Hour)
		w.told("Warning CaptureWaiting: network")
	})
}

// C5, C7: a pod whose network goes keeps its files until the annotation or the pod goes, or it has a new network. That is told
// when the pod is still there some seconds later: a plain deletion is one CaptureStopped.
func TestFinishedPod(t *testing.T) {
	for _, plain := range []bool{true, false} {
		simulate(t, 5, func(w *world) {
			p := w.web("3")
			w.proc.end(50)
			w.kids.last().exit("tcpdump: pcap_loop: The interface disappeared\n"+closing, errStatus)
			w.pass(goneTime - time.Second)
			w.told("Normal CaptureStarted")
			if !plain {
				w.pass(10 * time.Minute)
				w.see(p)
				w.told("Normal CaptureStopped: Stopped: 7 packets captured, 2 dropped by the kernel; the pod's network is gone, the files stay")
				w.keeps(3)
				w.born(51, "db", uidB, "3") // its files take room
				w.told("Warning CaptureWaiting: 3 of the 5")
				w.lose(podNamed("db", uidB, "3"))
				w.proc.pod(60, uidA) // as after a restart of the node
				w.pass(time.Second)
				w.runs("capture-web.pcap 3")
				w.told("Warning CaptureStarted: tcpdump began again at the first file")
				w.value(p, "2")
				w.runs("capture-web.pcap 2")
				w.told("Normal CaptureStopped: are deleted", "Normal CaptureStarted")
				w.proc.end(60)
				w.kids.last().exit(closing, errStatus)
				w.pass(time.Minute)
				w.told("Normal CaptureStopped: the files stay")
			}
			w.lose(p)
			w.runs()
			w.told("Normal CaptureStopped: are deleted")
		})
	}
}

// C3, C5: between two runs of a container a pod of CRI-O may have no process for 5 minutes, and its capture goes on. After 6 it
// has ended, also where its CNI leaves the interface; the files stay, and go if the annotation changes or goes meanwhile.
func TestNoProcess(t *testing.T) {
	for _, network := range []string{uidA, host} {
		for _, value := range []string{"3", "", "2"} {
			simulate(t, 0, func(w *world) {
				w.kids.behave(behaviour{shutdown: time.Second})
				ps := fakeProcess{50, cgroupOf(uidA), network, "pod", 500}
				w.proc.add(ps)
				p := podNamed("web", uidA, "3")
				w.see(p)
				for ps.pid = 51; ps.pid < 54; ps.pid++ {
					w.proc.end(ps.pid - 1)
					w.pass(5 * time.Minute)
					w.proc.add(ps)
					w.pass(10 * time.Second)
				}
				w.runs("capture-web.pcap 3")
				w.started(1)
				w.sent()
				if news := w.news(); len(news) != 1 || strings.HasSuffix(news[0].message, "the files hold the whole node's traffic") != (network == host) {
					t.Errorf("told %v", news)
				}
				w.proc.end(53)
				w.pass(6 * time.Minute)
				w.sent("terminated")
				w.value(p, value)
				w.pass(10 * time.Second)
				switch value {
				case "3":
					w.keeps(3)
					w.told("Normal CaptureStopped: the files stay")
				default:
					w.runs()
					w.told("Normal CaptureStopped: its files (300 bytes) are deleted")
				}
			})
		}
	}
}

// C3: a new sandbox of the pod ends the capture of the old one, although that lives on, and is captured within a second.
func TestNewSandbox(t *testing.T) {
	for _, iface := range []string{"", "any"} {
		simulate(t, 0, func(w *world) {
			w.proc.pod(50, uidA)
			w.see(podNamed("web", uidA, "3").on(iface))
			w.pass(time.Minute + 300*time.Millisecond)
			w.proc.end(50)
			w.proc.add(fakeProcess{60, cgroupOf(uidA), "new", "new", 600})
			w.pass(time.Second)
			w.runs("capture-web.pcap 3")
			w.network("new")
			w.told("Normal CaptureStarted", "Normal CaptureStopped: 7 packets captured, 2 dropped by the kernel; the pod has a new network",
				"Warning CaptureStarted: tcpdump began again at the first file, and the packets in that one are lost")
		})
	}
}

// C10: on any and on lo tcpdump never notices that the pod's network is gone. It gets two more seconds to read its ring,
// in which a pod's very last packets are; then it ends, and the files stay.
func TestRingIsRead(t *testing.T) {
	for _, iface := range []string{"any", "lo"} {
		for _, at := range []time.Duration{1, 500 * time.Millisecond, time.Second - 1} {
			simulate(t, 0, func(w *world) {
				w.proc.pod(50, uidA)
				w.see(podNamed("web", uidA, "3").on(iface))
				w.pass(time.Minute + at)
				w.proc.interfaces(uidA, "lo")
				w.pass(2 * time.Second)
				w.runs("capture-web.pcap 3")
				w.pass(time.Second)
				w.sent("terminated")
				w.pass(goneTime)
				w.told("Normal CaptureStarted: the interface is "+iface, "Normal CaptureStopped: the files stay")
				w.keeps(3)
			})
		}
	}
}

// ---- Names and files ----

// C4: the files have the names that tcpdump gives them, and a capture's own are matched exactly.
func TestFileNames(t *testing.T) {
	for n, want := range map[int]string{
		1: "/capture-web.pcap", 2: "2 files, /capture-web.pcap0 to /capture-web.pcap1",
		10: "10 files, /capture-web.pcap0 to /capture-web.pcap9", 11: "11 files, /capture-web.pcap00 to /capture-web.pcap10",
		100: "100 files, /capture-web.pcap00 to /capture-web.pcap99", 101: "101 files, /capture-web.pcap000 to /capture-web.pcap100",
	} {
		if got := fileNames("/capture-web.pcap", n); got != want {
			t.Errorf("N=%d: %q, want %q", n, got, want)
		}
	}
	for pod, names := range map[string][2]string{ // its own, and others'
		"web": {"web.pcap web.pcap0 web.pcap099", "web-2.pcap web.pcap0.pcap web.pcap0.pcap1 web.pcap.pcap0 web_12345678.pcap0 " +
			"web.pcapng web.pcap0.gz my-web.pcap web.pcap0~"},
		"web.pcap0":    {"web.pcap0.pcap web.pcap0.pcap3", "web.pcap0 web.pcap"},
		"web_12345678": {"web_12345678.pcap web_12345678.pcap1", "web.pcap1 web_12345679.pcap1"},
	} {
		for i, list := range names {
			for _, name := range strings.Fields(list) {
				if owns := ownsFile("/capture-"+pod+".pcap", "capture-"+name); owns != (i == 0) {
					t.Errorf("the capture of %s owns capture-%s: %v", pod, name, owns)
				}
			}
		}
	}
}

// C4: captures with similar names side by side; each one's end leaves the others' files.
func TestSimilarNames(t *testing.T) {
	names := []string{"web", "web-2", "web.pcap0", "web.pcap", "we"}
	for gone := range names {
		simulate(t, 0, func(w *world) {
			var want []string
			for i, name := range names {
				w.born(50+i, name, fmt.Sprint(i), "3")
				if i != gone {
					want = append(want, "capture-"+name+".pcap 3")
				}
			}
			w.lose(podNamed(names[gone], fmt.Sprint(gone), "3"))
			w.runs(want...)
		})
	}
}

// C4: the same name in another namespace gets the UID behind it, for as long as it is captured.
func TestSameNameInTwoNamespaces(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{shutdown: time.Second})
		a, b := w.web("3"), podNamed("web", uidB, "3")
		w.proc.pod(51, uidB)
		b.namespace = "other"
		w.see(b)
		w.pass(birthPoll)
		w.runs("capture-web.pcap 3", "capture-web_1b2c3d4e.pcap 3")
		w.lose(a)
		w.pass(time.Second)
		w.runs("capture-web_1b2c3d4e.pcap 3")
		w.born(52, "web", "c", "2")
		w.runs("capture-web_1b2c3d4e.pcap 3", "capture-web.pcap 2")
		w.lose(b)
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
	_, err := newNode(testConfig(t, newProc(t).dir, root))
	must(t, err)
	if got := namesIn(t, root); !slices.Equal(got, stay) {
		t.Errorf("%q stay, want %q", got, stay)
	}
}

// ---- Room ----

// C4: the sum of N is bounded by 5. What does not fit waits, and holds up nobody.
func TestRoom(t *testing.T) {
	type step struct {
		name, value string // "" removes the annotation
		runs        string // names and values that run a second later
		told        string // the reasons of the Events, sorted
	}
	const failed, invalid, started, stopped, waits = "CaptureFailed ", "CaptureInvalid ", "CaptureStarted ", "CaptureStopped ", "CaptureWaiting "
	for name, steps := range map[string][]step{
		"up to the bound":           {{"a", "3", "a3", started}, {"b", "2", "a3 b2", started}, {"c", "1", "a3 b2", waits}, {"c", "1", "a3 b2", ""}},
		"one that goes makes room":  {{"a", "3", "a3", started}, {"b", "3", "a3", waits}, {"a", "", "b3", started + stopped}},
		"a smaller one as well":     {{"a", "5", "a5", started}, {"b", "3", "a5", waits}, {"a", "2", "b3 a2", started + started + stopped}},
		"one grows into its own":    {{"a", "3", "a3", started}, {"a", "5", "a5", started + stopped}},
		"one that grows waits":      {{"a", "3", "a3", started}, {"b", "2", "a3 b2", started}, {"a", "4", "b2", stopped + waits}, {"b", "", "a4", started + stopped}},
		"whoever fits goes first":   {{"a", "3", "a3", started}, {"b", "5", "a3", waits}, {"c", "1", "a3 c1", started}, {"d", "1", "a3 c1 d1", started}, {"a", "", "c1 d1", stopped}, {"c", "", "d1", stopped}, {"d", "", "b5", started + stopped}},
		"more than there ever is":   {{"a", "6", "", invalid}, {"b", "5", "b5", started}, {"b", "6", "b5", invalid}, {"b", "", "", stopped}},
		"one that waits goes":       {{"a", "3", "a3", started}, {"b", "4", "a3", waits}, {"b", "", "a3", ""}, {"c", "2", "a3 c2", started}, {"a", "", "c2", stopped}},
		"one that waits changes":    {{"a", "3", "a3", started}, {"b", "4", "a3", waits}, {"b", "2", "a3 b2", started}},
		"one that waits is no more": {{"a", "5", "a5", started}, {"b", "4", "a5", waits}, {"b", "x", "a5", invalid}, {"a", "", "b4", started + stopped}},
	} {
		t.Run(name, func(t *testing.T) {
			simulate(t, 5, func(w *world) {
				for i, name := range []string{"a", "b", "c", "d"} {
					w.proc.pod(50+i, name)
				}
				for _, step := range steps {
					w.value(podNamed(step.name, step.name, ""), step.value)
					w.pass(time.Second)
					var want, reasons []string
					for _, one := range strings.Fields(step.runs) {
						want = append(want, "capture-"+one[:1]+".pcap "+one[1:])
					}
					w.runs(want...)
					for _, e := range w.news() {
						reasons = append(reasons, e.reason+" ")
					}
					if slices.Sort(reasons); strings.Join(reasons, "") != step.told {
						t.Errorf("%v: told %q", step, reasons)
					}
				}
				w.pass(10 * time.Second)
				w.told() // who waits does not say so again
			})
		})
	}
}

// C4: pods that come and change at once, and fit, are never told to wait.
func TestManyAtOnce(t *testing.T) {
	simulate(t, 60, func(w *world) {
		w.kids.behave(behaviour{startup: 20 * time.Millisecond, shutdown: 30 * time.Millisecond})
		for _, value := range []string{"2", "1", "2", "1"} {
			var want []string
			for i := range 30 {
				w.proc.pod(50+i, fmt.Sprint("a", i))
				w.apply(w.ctx, podNamed(fmt.Sprint("web-", i), fmt.Sprint("a", i), value))
				want = append(want, fmt.Sprint("capture-web-", i, ".pcap ", value))
			}
			w.pass(100 * time.Millisecond)
			w.runs(want...)
			for _, e := range w.news() {
				if e.kind == "Warning" {
					t.Errorf("told %v", e)
				}
			}
		}
	})
}

// C4: when there is room at last, the pod's network is found by another process, or gone: nothing is told that is not so.
func TestWaitedForRoom(t *testing.T) {
	for _, gone := range []bool{false, true} {
		simulate(t, 5, func(w *world) {
			a := w.web("5")
			w.born(60, "db", uidB, "5")
			w.proc.end(60)
			if !gone {
				w.proc.pod(61, uidB)
			}
			w.told("Normal CaptureStarted", "Warning CaptureWaiting")
			w.lose(a)
			w.pass(time.Second)
			if gone {
				w.runs()
				w.told("Normal CaptureStopped")
				w.proc.pod(61, uidB)
				w.pass(birthPoll)
			} else {
				w.told("Normal CaptureStopped", "Normal CaptureStarted")
			}
			w.runs("capture-db.pcap 5")
		})
	}
}

// C4: a part of the file system stays free, and what captures may still write is not promised twice.
func TestDiskFree(t *testing.T) {
	simulate(t, 0, func(w *world) {
		free, total := space(w.root)
		keepFree := func(percent int64) {
			w.disk.mu.Lock()
			defer w.disk.mu.Unlock()
			w.disk.freePercent = percent
		}
		percent := free / (total / 100)
		keepFree(percent) // less than 1 % of it is left for captures, and this one needs 2 %
		a := w.web(strconv.FormatInt(total/50/fileBytes, 10))
		w.told(fmt.Sprintf("Warning CaptureWaiting: with %d %% of it left free; the capture starts by itself", percent))
		keepFree(0)
		w.pass(time.Second)
		w.runs("capture-web.pcap " + a.value)
		w.value(a, strconv.FormatInt(free/10*6/fileBytes, 10)) // 60 % of what is free
		w.told("Normal CaptureStarted", "Normal CaptureStopped", "Normal CaptureStarted")
		b := w.born(60, "db", uidB, w.kids.last().option("-W"))
		w.told("Warning CaptureWaiting: can take")
		w.lose(a)
		w.pass(time.Second)
		w.runs("capture-db.pcap " + b.value)
		w.told("Normal CaptureStopped", "Normal CaptureStarted")
	})
}

// ---- tcpdump's life ----

// C5: annotations change faster than tcpdump starts and stops. At any time there is one child at most, and in the end the
// right one.
func TestQuickChanges(t *testing.T) {
	const ms = time.Millisecond
	for _, b := range []behaviour{{}, {shutdown: 300 * ms}, {startup: 300 * ms, shutdown: 500 * ms}, {startup: 50 * ms, deaf: true}} {
		for _, pause := range []time.Duration{0, 40 * ms, 350 * ms} {
			for last, want := range map[int][]string{0: {"capture-web.pcap 3"}, 2: {}} {
				simulate(t, 5, func(w *world) {
					w.kids.behave(b)
					w.proc.pod(50, uidA)
					for i := range 31 {
						p := podNamed("web", uidA, strconv.Itoa(3+(i+last)%3))
						p.annotated = p.value != "5"
						w.apply(w.ctx, p)
						time.Sleep(pause)
					}
					w.pass(termGrace + 2*time.Second)
					w.runs(want...)
				})
			}
		}
	}
}

// C5: removed and annotated again before the exit, or recreated as another pod: the old child ends first, then a new one
// starts.
func TestAgainBeforeTheExit(t *testing.T) {
	for _, next := range []pod{podNamed("web", uidA, "3"), podNamed("web", uidA, "4"), podNamed("web", uidB, "3")} {
		for _, late := range []bool{false, true} { // that the old pod is gone comes after the new one
			simulate(t, 0, func(w *world) {
				w.kids.behave(behaviour{shutdown: time.Second})
				w.proc.pod(60, uidB)
				old := w.web("3")
				if late && next.uid != old.uid {
					w.see(next)
					w.lose(old)
				} else {
					w.lose(old)
					w.pass(100 * time.Millisecond)
					w.see(next)
				}
				w.runs("capture-web.pcap 3")
				w.started(1)
				w.pass(time.Second)
				w.runs("capture-web.pcap " + next.value)
				w.started(2)
				w.network(next.uid)
				w.told("Normal CaptureStarted", "Normal CaptureStopped", "Normal CaptureStarted")
			})
		}
	}
}

// C5: what is removed while its tcpdump starts leaves nothing, and was never told to have started, also when "listening on"
// comes between SIGTERM and the end.
func TestRemovedWhileStarting(t *testing.T) {
	for _, shutdown := range []time.Duration{100 * time.Millisecond, 1500 * time.Millisecond} {
		simulate(t, 0, func(w *world) {
			w.kids.behave(behaviour{startup: time.Second, shutdown: shutdown})
			w.lose(w.web("3"))
			w.runs("capture-web.pcap 3")
			w.pass(shutdown)
			w.runs()
			w.pass(time.Minute)
			w.told()
		})
	}
}

// C5, C7: a tcpdump that can't be ended is told once, with what was tried and what the system said. Its successor waits.
func TestImmortalChild(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{deaf: true, immortal: true})
		p := w.web("3")
		child := w.kids.last()
		w.kids.behave(behaviour{})
		w.value(p, "4")
		w.pass(time.Hour)
		w.runs("capture-web.pcap 3")
		w.sent("terminated", "killed")
		w.told("Normal CaptureStarted", fmt.Sprintf("Warning CaptureFailed: tcpdump (PID %d) can't be ended: SIGTERM and SIGKILL were sent, and "+
			"it still runs (permission denied); its files stay", child.pid))
		child.exit(closing, errKilled)
		w.pass(0)
		w.runs("capture-web.pcap 4")
		w.told("Normal CaptureStopped", "Normal CaptureStarted")
	})
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
			p := w.web("3")
			began := time.Now()
			news := w.news()
			if len(news) != 1 || news[0].kind+news[0].reason != "WarningCaptureFailed" || !strings.Contains(news[0].message, words) {
				t.Fatalf("told %v, want %s", news, words)
			}
			_, again, _ := strings.Cut(news[0].message, "; it is tried again in ")
			told, err := time.ParseDuration(again)
			must(t, err)
			w.pass(repeatTime - time.Second)
			w.told()
			w.pass(time.Minute)
			w.told("Warning CaptureFailed: " + words)
			at := w.kids.attempts
			if wait := at[1].Sub(began); (wait - told).Abs() > 50*time.Millisecond {
				t.Errorf("it was tried again after %v, and %q was told", wait, again)
			}
			for i, least := 1, 125*time.Millisecond; i < len(at); i, least = i+1, min(2*least, 15*time.Second) {
				if pause := at[i].Sub(at[i-1]); pause < least || pause > 2*least {
					t.Errorf("pause %d was %v, want %v to %v", i, pause, least, 2*least)
				}
			}
			if len(at) < 15 {
				t.Errorf("only %d attempts", len(at))
			}
			w.runs()
			w.kids.behave(behaviour{})
			if w.kids.started()%2 == 0 {
				w.value(p, "4")
				w.runs("capture-web.pcap 4")
			} else {
				w.pass(30 * time.Second)
				w.runs("capture-web.pcap 3")
			}
			w.told("Normal CaptureStarted")
		})
	}
}

// C5, C7: a tcpdump that ends by itself is started again, and its last words are told. Packets are lost only when it has begun
// again. One that has proved itself does not wait long.
func TestEndsByItself(t *testing.T) {
	simulate(t, 0, func(w *world) {
		p := w.web("3")
		w.told("Normal CaptureStarted")
		w.kids.behave(behaviour{refusal: syscall.EAGAIN})
		w.kids.last().exit("tcpdump: pcap_loop: The interface disappeared\n", errStatus)
		w.pass(0)
		w.told("Warning CaptureFailed: The interface disappeared); it is tried again in ")
		w.pass(time.Minute)
		w.told("Warning CaptureFailed: can't be started")
		w.kids.behave(behaviour{})
		w.pass(30 * time.Second)
		w.told("Warning CaptureStarted: tcpdump began again at the first file, and the packets in that one are lost")
		for range 3 {
			w.pass(time.Minute)
			w.kids.last().exit("", errKilled)
			w.pass(250 * time.Millisecond)
			w.runs("capture-web.pcap 3")
		}
		w.told("Warning CaptureFailed: signal: killed")
		w.kids.last().exit("", errKilled)
		w.pass(0)
		w.lose(p) // before it is started again
		w.runs()
		w.pass(time.Minute)
		w.started(5)
		w.told("Normal CaptureStopped")
	})
	for range 10 { // it has begun also when it ends in the same moment
		simulate(t, 0, func(w *world) {
			w.kids.behave(behaviour{words: "tcpdump: listening on eth0\ntcpdump: eth0: gone\n", startup: time.Second})
			w.web("3") // at a second, so that its capture is looking at the pod when it ends
			w.pass(time.Second)
			w.told("Normal CaptureStarted", "Warning CaptureFailed: gone")
		})
	}
}

// C7: an interface that is renamed is told as what it is, and the files stay as they are.
func TestRenamedInterface(t *testing.T) {
	for _, iface := range []string{"eth0", "net1"} {
		simulate(t, 0, func(w *world) {
			w.proc.interfaces(uidA, "lo", "eth0", "net1")
			w.proc.pod(50, uidA)
			w.see(podNamed("web", uidA, "3").on(iface))
			w.proc.interfaces(uidA, "lo", map[string]string{"eth0": "net1", "net1": "eth0"}[iface])
			w.kids.last().exit("tcpdump: pcap_loop: The interface disappeared\n"+closing, errStatus)
			w.pass(time.Minute)
			if iface == "eth0" {
				w.told("Normal CaptureStarted", "Normal CaptureStopped: the pod's network is gone, the files stay")
			} else {
				w.told("Normal CaptureStarted", "Warning CaptureFailed: The interface disappeared); it is tried again in ",
					"Warning CaptureFailed: the pod has no interface net1, but lo, eth0; it is tried again in ")
			}
			w.keeps(3)
			w.proc.interfaces(uidA, "lo", "eth0", "net1")
			w.pass(30 * time.Second)
			w.runs("capture-web.pcap 3")
			w.told("Warning CaptureStarted: are lost")
		})
	}
}

// ---- The program's end ----

// C5: told to end, the program stops all captures side by side, in whatever state they are.
func TestEnd(t *testing.T) {
	simulate(t, 0, func(w *world) {
		w.kids.behave(behaviour{shutdown: time.Second})
		for i := range 5 {
			w.born(50+i, fmt.Sprint("web-", i), fmt.Sprint(i), "3")
		}
		w.news()
		w.finish(time.Second)
		w.runs()
		w.told(slices.Repeat([]string{"Normal CaptureStopped"}, 5)...)
	})
	simulate(t, 30, func(w *world) {
		for i, b := range []behaviour{{}, {startup: time.Minute}, {deaf: true}, {shutdown: time.Second}, {}, {refusal: syscall.EAGAIN}} {
			w.kids.behave(b)
			w.born(50+i, fmt.Sprint("web-", i), fmt.Sprint(i), "3")
		}
		w.kids.at(4).exit("", errKilled)         // waits for its restart
		w.lose(podNamed("web-2", "2", "3"))      // is being stopped
		w.value(podNamed("web-3", "3", ""), "4") // is being changed
		w.proc.pod(60, "b")
		w.see(podNamed("no-network", "a", "1"), podNamed("no-room", "b", "30"), podNamed("bad", "c", "x"))
		w.pass(time.Second)
		w.finish(termGrace)
		w.runs()
	})
	simulate(t, 0, func(w *world) { w.finish(0) })
}

// C5: the program ends within 5 seconds also when a child never does, and tells that.
func TestEndWithImmortalChild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api, w := newFakeAPI(t), newWorld(t, 0)
		w.kube.http.Transport = api
		api.accept("token")
		api.put(fakePod{namespace: "default", name: "web", uid: uidA, annotations: map[string]string{annotation: "3"}})
		w.proc.pod(50, uidA)
		w.kids.behave(behaviour{deaf: true, immortal: true})
		time.AfterFunc(time.Minute, w.end)
		began := time.Now()
		w.node.run(w.ctx)
		if took := time.Since(began); took < time.Minute || took > time.Minute+5*time.Second {
			t.Errorf("the program took %v to end", took-time.Minute)
		}
		w.runs("capture-web.pcap 3")
		if events := api.posted(); len(events) != 2 || events[1]["reason"] != "CaptureFailed" {
			t.Errorf("posted %v", events)
		}
		w.kids.last().exit("", errKilled) // as the runtime does
		w.alive.Wait()
		synctest.Wait()
		w.runs()
	})
}

// ---- Words ----

// C7: Events that nobody takes away never delay a capture.
func TestEventsNeverDelay(t *testing.T) {
	simulate(t, 0, func(w *world) {
		p := w.web("x")
		for i := range 2000 {
			w.value(p, fmt.Sprint("x", i))
		}
		w.value(p, "3")
		w.runs("capture-web.pcap 3")
	})
}

// C7: what is cut shows it, and a warning of tcpdump's is told.
func TestWordsOfTheStart(t *testing.T) {
	simulate(t, 0, func(w *world) {
		p := w.web("1")
		w.told("Normal CaptureStarted: Capturing into " + w.root + "/capture-web.pcap, rotated at 1 MB")
		w.kids.behave(behaviour{warning: "Warning: Kernel filter failed: Invalid argument\n"})
		p.filter = strings.Repeat("tcp or ", 30) + "udp"
		w.see(p)
		w.told("Normal CaptureStopped", `Warning CaptureStarted: tcp or tcp or tc"…; tcpdump says: Warning: Kernel filter failed: Invalid argument`)
	})
	for text, want := range map[string]string{"": `""`, "a\x00": `"a\x00"`, strings.Repeat("ü", 128): `"` + strings.Repeat("ü", 128) + `"`,
		strings.Repeat("ü", 129): `"` + strings.Repeat("ü", 128) + `"…`, strings.Repeat("…", 200): `"` + strings.Repeat("…", 128) + `"…`} {
		if got := quote(text); got != want {
			t.Errorf("quote(%.20q) = %s, want %s", text, got, want)
		}
	}
}

// C5, C7: of what a child says its warning, its last words and its counts are kept, however it comes and however much it is.
func TestStderr(t *testing.T) {
	const listening = "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n"
	const none, all = "an unknown number of packets captured, an unknown number dropped by the kernel", "7 packets captured, 2 dropped by the kernel"
	const gone, failed = "tcpdump: pcap_loop: The interface disappeared", "nsenter: failed to execute tcpdump: No such file or directory"
	const long = "tcpdump: a very long complaint, which is longer than what is told of it, since it goes on and on and on, and who reads it has other things to do"
	for _, test := range []struct{ text, warning, complaint, counts string }{
		{"", "", "", none},
		{listening + closing, "", "", all},
		{listening + "\n1 packet captured\n1 packet received by filter\n0 packets dropped by kernel\n", "", "", "1 packet captured, 0 dropped by the kernel"},
		{listening + gone + "\n" + closing, "", gone, all},
		{listening + strings.Repeat("noise\n", 10_000) + closing, "", "", all},
		{"tcpdump: data link type LINUX_SLL2\n" + listening, "", "", none},
		{"Warning: Kernel filter failed: x\n" + listening + "Warning: late\n", "Warning: Kernel filter failed: x", "", none},
		{"tcpdump: WARNING: eth0: no IPv4\n" + listening, "tcpdump: WARNING: eth0: no IPv4", "tcpdump: WARNING: eth0: no IPv4", none},
		{failed + "\n", "", failed, none},
		{long + "\n", "", long[:128] + "…", none},
	} {
		for _, size := range []int{1, 7, 1 << 20} {
			said := newStderr()
			for chunk := range slices.Chunk([]byte(test.text), size) {
				if n, err := said.Write(chunk); n != len(chunk) || err != nil {
					t.Errorf("Write = %d, %v", n, err)
				}
			}
			got, want := []string{said.warning, said.complaint(), said.counts()}, []string{test.warning, test.complaint, test.counts}
			if !slices.Equal(got, want) || said.listens() != strings.Contains(test.text, listening) {
				t.Errorf("of %.100q in pieces of %d: %q, listens %v, want %q", test.text, size, got, said.listens(), want)
			}
			if len(said.text) > 4096 {
				t.Errorf("%d bytes are kept", len(said.text))
			}
		}
	}
}

// C5: how a real child's end is told: by the signal's name, by its complaint, or by its status.
func TestLastWords(t *testing.T) {
	for script, want := range map[string]string{
		"echo tcpdump: x >&2; kill -SEGV $$": "signal: segmentation fault",
		"kill -KILL $$":                      "signal: killed",
		"echo tcpdump: x >&2; exit 1":        "tcpdump: x",
		"exit 3":                             "exit status 3",
		"exit 0":                             "exit status 0",
	} {
		said := newStderr()
		child, err := start(t.Context(), said, nil, "sh", "-c", "ulimit -c 0; "+script)
		must(t, err)
		if got := said.lastWords(child.wait()); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
}
