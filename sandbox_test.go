package main

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	uidA = "1b2c3d4e-0000-4000-8000-00000000000a"
	uidB = "1b2c3d4e-0000-4000-8000-00000000000b"
	hash = "0123456789abcdef0123456789abcdef" // a static Pod's
)

// C3: a Pod is found by the names of its cgroups, whatever runtime, cgroup version and driver there is.
func TestCgroupNames(t *testing.T) {
	under := strings.ReplaceAll(uidA, "-", "_")
	for _, test := range []struct{ name, cgroup, want string }{
		{"cgroupfs v1", "12:pids:/kubepods/burstable/pod" + uidA + "/cafe\n1:name=systemd:/kubepods/burstable/pod" + uidA + "/cafe\n", uidA},
		{"cgroupfs v1, in one line of many", "12:pids:/\n11:memory:/kubepods/pod" + uidA + "/cafe\n1:name=systemd:/\n", uidA},
		{"cgroupfs v2", "0::/kubepods/besteffort/pod" + uidA + "/cafe\n", uidA},
		{"systemd v1", "4:cpu:/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/cri-containerd-cafe.scope\n", uidA},
		{"systemd v2, guaranteed", "0::/kubepods.slice/kubepods-pod" + under + ".slice/cri-containerd-cafe.scope\n", uidA},
		{"from a private cgroup namespace", "0::/../../kubepods-besteffort-pod" + under + ".slice/cri-containerd-cafe.scope\n", uidA},
		{"kind", "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" +
			under + ".slice/cri-containerd-cafe.scope\n", uidA},
		{"CRI-O", "0::/kubepods.slice/kubepods-pod" + under + ".slice/crio-cafe.scope\n", uidA},
		{"CRI-O with a cgroup within", "0::/kubepods.slice/kubepods-pod" + under + ".slice/crio-cafe.scope/container\n", uidA},
		{"static", "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + hash + ".slice/crio-cafe.scope\n", hash},
		{"static, cgroupfs", "0::/kubepods/burstable/pod" + hash + "/cafe\n", hash},
		{"a root of its own", "0::/my-pods.slice/my-pods-kubepods-burstable-pod" + under + ".slice/crio-cafe.scope\n", uidA},
		{"another Pod", "0::/kubepods/burstable/pod" + uidB + "/cafe\n", ""},
		{"a longer name", "0::/kubepods/burstable/pod" + uidA + "0/cafe\n", ""},
		{"a shorter name", "0::/kubepods/burstable/pod" + uidA[:35] + "/cafe\n", ""},
		{"the UID without pod", "0::/kubepods/burstable/" + uidA + "/cafe\n", ""},
		{"a folder of another name", "0::/kubepods/mypod" + uidA + "/cafe\n", ""},
		{"the UID in another place", "0::/system.slice/podx-" + uidA + ".scope\n", ""},
		{"a folder pod", "0::/pod/.slice/-pod.slice\n", ""},
		{"the host's", "0::/init.scope\n", ""},
		{"of a process that has ended", "", ""},
	} {
		proc := newProc(t)
		proc.add(process{50, test.cgroup, "pod", "pod", 500})
		s, err := newSandboxes(proc.dir)
		must(t, err)
		got := ""
		for uid, b := range s.find(map[string]bool{uidA: true, hash: true}, time.Now()) {
			got += uid
			b.network.Close()
		}
		if got != test.want {
			t.Errorf("%s: found %q by %q, want %q", test.name, got, test.cgroup, test.want)
		}
	}
}

// C3: of a Pod's processes the one is taken that holds the sandbox, and never one of the runtime.
func TestFind(t *testing.T) {
	cgroup := cgroupOf(uidA)
	conmon := strings.Replace(cgroup, "cri-containerd-", "crio-conmon-", 1)
	for _, test := range []struct {
		name      string
		processes []process
		want      string // name of the network namespace that is found
		isHost    bool
	}{
		{"nobody", nil, "", false},
		{"the sandbox", []process{{50, cgroup, "pod", "pod", 500}}, "pod", false},
		{"another Pod's", []process{{50, cgroupOf(uidB), "pod", "pod", 500}}, "", false},
		{"CRI-O's monitor alone", []process{{50, conmon, host, host, 500}}, "", false},
		{"CRI-O's monitor is older", []process{{50, conmon, host, host, 500}, {51, cgroup, "pod", "pod", 501}}, "pod", false},
		{"the runtime is still to join", []process{{50, cgroup, host, host, 500}}, "", false},
		{"it has the network and not yet its files", []process{{50, cgroup, "pod", host, 500}}, "pod", false},
		{"hostNetwork", []process{{50, cgroup, host, "pod", 500}}, host, true},
		{"hostNetwork under CRI-O", []process{{50, conmon, host, host, 500}, {51, cgroup, host, "pod", 501}}, host, true},
		{"a container has a namespace within", []process{{50, cgroup, "pod", "pod", 500}, {51, cgroup, "nested", "web", 501}}, "pod", false},
		{"the same after the PIDs went round", []process{{50, cgroup, "nested", "web", 501}, {51, cgroup, "pod", "pod", 500}}, "pod", false},
		{"and with more of them", []process{{7, cgroup, "nested", "web", 10_000}, {50, cgroup, "pod", "pod", 9_999}, {51, cgroup, "n2", "web", 10_001}}, "pod", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			proc := newProc(t)
			for _, ps := range test.processes {
				proc.add(ps)
			}
			s, err := newSandboxes(proc.dir)
			must(t, err)
			found := s.find(map[string]bool{uidA: true}, time.Now())
			got, isHost := "", false
			if b := found[uidA]; b != nil {
				got, isHost = networkOf(t, b), b.isHost
				b.network.Close()
			}
			if got != test.want || isHost != test.isHost || len(found) > 1 {
				t.Errorf("found %q (isHost %v), want %q (%v)", got, isHost, test.want, test.isHost)
			}
			noneOpen(t, proc.dir)
		})
	}
}

// networkOf is the name of a fake namespace.
func networkOf(t *testing.T, b *sandbox) string {
	target, err := filepath.EvalSymlinks(b.network.Name())
	must(t, err)
	return strings.TrimPrefix(filepath.Base(target), "net-")
}

// noneOpen checks that no descriptor of a folder's files is left.
func noneOpen(t *testing.T, dir string) {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	must(t, err)
	for _, link := range links {
		if target, _ := os.Readlink(link); strings.HasPrefix(target, dir) {
			t.Errorf("%s is still open", target)
		}
	}
}

// C3: several Pods are found in one look, a static one by its hash.
func TestFindSeveral(t *testing.T) {
	proc := newProc(t)
	proc.pod(50, uidA)
	proc.pod(60, hash)
	proc.pod(70, uidB)
	s, err := newSandboxes(proc.dir)
	must(t, err)
	found := s.find(map[string]bool{uidA: true, hash: true, "unknown": true}, time.Now())
	if len(found) != 2 || networkOf(t, found[uidA]) != uidA || networkOf(t, found[hash]) != hash {
		t.Errorf("found %v", found)
	}
	for _, b := range found {
		b.network.Close()
	}
}

// C3: a PID that went to another process while its namespace was opened is never captured. The files are FIFOs, so
// that find waits at each of them until the test has said what it reads.
func TestFindReusedPID(t *testing.T) {
	for _, test := range []struct {
		name, before, after string
		found               bool
	}{
		{"still the Pod's", cgroupOf(uidA), cgroupOf(uidA), true},
		{"another Pod's", cgroupOf(uidA), cgroupOf(uidB), false},
		{"another wanted Pod's", cgroupOf(uidA), cgroupOf(hash), false},
		{"the host's", cgroupOf(uidA), "0::/init.scope\n", false},
		{"ended", cgroupOf(uidA), "", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			proc := newProc(t)
			proc.add(process{50, "", "pod", "pod", 500})
			cgroup, network := proc.path(50, "cgroup"), proc.path(50, "ns/net")
			must(t, os.Remove(cgroup), os.Remove(network), syscall.Mkfifo(cgroup, 0o600), syscall.Mkfifo(network, 0o600))
			done := make(chan struct{})
			go func() { // an open waits for find's; find's next one waits for the next of these
				defer close(done)
				for _, step := range []struct{ path, text string }{{cgroup, test.before}, {network, ""}, {cgroup, test.after}} {
					if file, err := os.OpenFile(step.path, os.O_WRONLY, 0); err == nil {
						file.WriteString(step.text)
						file.Close()
					}
				}
			}()
			s, err := newSandboxes(proc.dir)
			must(t, err)
			found := s.find(map[string]bool{uidA: true, hash: true}, time.Now())
			if (found[uidA] != nil) != test.found || found[hash] != nil {
				t.Errorf("found %v", found)
			}
			for _, b := range found {
				b.network.Close()
			}
			file, err := os.OpenFile(cgroup, os.O_RDWR, 0) // for a find that looks only once
			must(t, err)
			<-done
			file.Close()
			noneOpen(t, proc.dir)
		})
	}
}

// C3: while a Pod is waited for, only PIDs are looked at that are new; now and then they are all the same.
func TestCandidates(t *testing.T) {
	const old, newest = 100, 50_000
	start := time.Now()
	type look struct {
		after  time.Duration
		wanted string
		newest int  // the last PID that was given out
		found  bool // the old process, which is the Pod's by now
	}
	for _, test := range []struct {
		name string
		look
	}{
		{"at once", look{birthPoll, uidA, newest, false}},
		{"a little later, with others started", look{slowPoll / 2, uidA, newest + 100, false}},
		{"at the next sweep", look{sweepPoll, uidA, newest, true}},
		{"as another Pod's", look{birthPoll, uidB, newest, false}},
		{"the PIDs went round", look{birthPoll, uidA, 300, true}},
		{"very many were started", look{birthPoll, uidA, newest + 10_000, true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			proc := newProc(t)
			proc.add(process{old, "0::/init.scope\n", "pod", "pod", 500})
			proc.newest(newest)
			s, err := newSandboxes(proc.dir)
			must(t, err)
			if found := s.find(map[string]bool{uidA: true}, start); len(found) > 0 {
				t.Fatalf("found %v before it was there", found)
			}
			proc.add(process{old, cgroupOf(test.wanted), "pod", "pod", 500})
			proc.newest(test.look.newest)
			found := s.find(map[string]bool{test.wanted: true}, start.Add(test.after))
			if (found[test.wanted] != nil) != test.found {
				t.Errorf("found %v, want %v", found, test.found)
			}
			for _, b := range found {
				b.network.Close()
			}
		})
	}
}

// C3: a Pod that runs is found at once, also while another is waited for.
func TestFindWhileAnotherIsAwaited(t *testing.T) {
	proc := newProc(t)
	proc.pod(50, uidB)
	proc.newest(50_000)
	s, err := newSandboxes(proc.dir)
	must(t, err)
	now := time.Now()
	for _, wanted := range []map[string]bool{{uidA: true}, {uidB: true}, {uidA: true, uidB: true}, {uidB: true}} {
		found := s.find(wanted, now)
		if (found[uidB] != nil) != wanted[uidB] || found[uidA] != nil {
			t.Errorf("of %v found %v", wanted, found)
		}
		for _, b := range found {
			b.network.Close()
		}
		now = now.Add(birthPoll)
	}
	proc.add(process{50, cgroupOf("x"), "x", "x", 900}) // the PID is another Pod's now
	if found := s.find(map[string]bool{uidB: true}, now); len(found) > 0 {
		t.Errorf("found %v, which has ended", found)
	}
	noneOpen(t, proc.dir)
}

// C3: a process that was made right before a sweep and enters its cgroup right after it is found at the next look.
func TestFindOnTheEdgeOfASweep(t *testing.T) {
	proc := newProc(t)
	proc.newest(50_000)
	s, err := newSandboxes(proc.dir)
	must(t, err)
	now := time.Now()
	s.find(map[string]bool{uidA: true}, now)
	proc.add(process{50_001, "0::/system.slice/containerd.service\n", host, host, 500}) // the runtime's child
	proc.newest(50_001)
	now = now.Add(sweepPoll)
	s.find(map[string]bool{uidA: true}, now) // the sweep
	proc.add(process{50_001, cgroupOf(uidA), "pod", "pod", 500})
	found := s.find(map[string]bool{uidA: true}, now.Add(birthPoll))
	if found[uidA] == nil {
		t.Fatal("not found")
	}
	found[uidA].network.Close()
}

// C3: whenever a process starts, before, at or after a sweep, and enters its cgroup within a second, it is found then.
func TestFindAroundASweep(t *testing.T) {
	const tick = 100 * time.Millisecond
	for start := time.Duration(0); start < sweepPoll+2*slowPoll; start += tick {
		proc := newProc(t)
		proc.newest(50_000)
		s, err := newSandboxes(proc.dir)
		must(t, err)
		begin := time.Now()
		for now := time.Duration(0); now <= start+slowPoll-tick; now += tick {
			if now == start {
				proc.add(process{50_001, "0::/system.slice/containerd.service\n", host, host, 500})
				proc.newest(50_001)
			}
			if found := s.find(map[string]bool{uidA: true}, begin.Add(now)); len(found) > 0 {
				t.Fatal("found before it was there")
			}
		}
		proc.add(process{50_001, cgroupOf(uidA), "pod", "pod", 500})
		found := s.find(map[string]bool{uidA: true}, begin.Add(start+slowPoll))
		if found[uidA] == nil {
			t.Errorf("a process that starts %s after a sweep is not found", start)
			continue
		}
		found[uidA].network.Close()
	}
}

// C3: between two sweeps no process is forgotten, however slowly it enters its cgroup: it has a second. And those that
// are older are not looked at again.
func TestFindBetweenSweeps(t *testing.T) {
	proc := newProc(t)
	proc.newest(50_000)
	s, err := newSandboxes(proc.dir)
	must(t, err)
	now, pid := time.Now(), 50_000
	find := func() map[string]*sandbox {
		now = now.Add(birthPoll)
		return s.find(map[string]bool{uidA: true}, now)
	}
	find()
	swept := s.swept
	for range 7 {
		pid++
		proc.add(process{pid, "0::/system.slice/containerd.service\n", host, host, 500})
		proc.newest(pid)
		for began := now; now.Sub(began) < slowPoll; {
			find()
		}
		proc.add(process{pid, cgroupOf(uidA), "pod", "pod", 500})
		found := find()[uidA]
		if found == nil {
			t.Fatalf("process %d is not found", pid)
		}
		found.network.Close()
		proc.end(pid)
		find()
	}
	if s.swept != swept {
		t.Fatal("all processes were looked at: the test shows nothing")
	}
	if s.since < pid-3 {
		t.Errorf("%d processes are looked at each time, of %d", pid-s.since, pid-50_000)
	}
}

// C3: the first process of a Pod that is waited for is found as soon as it is there.
func TestCandidatesNew(t *testing.T) {
	proc := newProc(t)
	proc.newest(50_000)
	s, err := newSandboxes(proc.dir)
	must(t, err)
	now := time.Now()
	wanted := map[string]bool{uidA: true}
	for range 10 { // none of which may move the mark behind the process that comes
		now = now.Add(birthPoll)
		if found := s.find(wanted, now); len(found) > 0 {
			t.Fatal("found before it was there")
		}
		proc.newest(50_001)
	}
	proc.add(process{50_001, cgroupOf(uidA), host, host, 500}) // the runtime, on its way
	if found := s.find(wanted, now.Add(birthPoll)); len(found) > 0 {
		t.Fatal("the runtime is captured")
	}
	proc.add(process{50_001, cgroupOf(uidA), "pod", "pod", 500})
	found := s.find(wanted, now.Add(2*birthPoll))
	if found[uidA] == nil {
		t.Fatal("not found")
	}
	found[uidA].network.Close()
}

// C3: field 22 is found whatever the command is called.
func TestStartTime(t *testing.T) {
	for _, command := range []string{"pause", "a b", ")", "x) S 1 (y", "((("} {
		if got := startTime(statLine(50, command, 4711)); got != 4711 {
			t.Errorf("startTime with command %q = %d", command, got)
		}
	}
	for _, stat := range []string{"", "50 (pause) S 1 1", "50"} { // an ended process is never the oldest
		if got := startTime(stat); got != math.MaxUint64 {
			t.Errorf("startTime(%q) = %d", stat, got)
		}
	}
}

// C3: without the host's /proc the program does not begin.
func TestNoHostProc(t *testing.T) {
	if _, err := newSandboxes(t.TempDir()); err == nil {
		t.Error("no error")
	}
}
