package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

const (
	hash    = "0123456789abcdef0123456789abcdef" // a static pod's
	service = "0::/system.slice/containerd.service\n"
)

func newProcessesOf(t testing.TB, proc *fakeProc) *processes {
	t.Helper()
	ps, err := newProcesses(config{proc: proc.dir, podNamespace: "kube-system", podName: "packetcapture-x"})
	must(t, err)
	return ps
}

// networkOf is the name of the network that is found for a UID, "" if there is none.
func networkOf(ps *processes, uid string) string {
	s, ok := ps.find(podNamed("web", uid, "3"))
	if !ok {
		return ""
	}
	return strings.TrimPrefix(filepath.Base(filepath.Dir(s.network)), "net-")
}

// noneOpen checks that no descriptor of a folder's files is left.
func noneOpen(t *testing.T, dir string) {
	t.Helper()
	var open []string
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) { // a test's own goroutine may be about to close one
		open = nil
		links, err := filepath.Glob("/proc/self/fd/*")
		must(t, err)
		for _, link := range links {
			if target, _ := os.Readlink(link); strings.HasPrefix(target, dir) {
				open = append(open, target)
			}
		}
		if len(open) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%q are still open", open)
		}
	}
}

// C3: a pod is found by the names of its cgroups, whatever runtime, cgroup version and driver there is. The first pod that is
// named counts.
func TestCgroupNames(t *testing.T) {
	under, other := strings.ReplaceAll(uidA, "-", "_"), strings.ReplaceAll(uidB, "-", "_")
	for _, test := range []struct{ name, cgroup, want string }{
		{"cgroupfs v1", "12:pids:/kubepods/burstable/pod" + uidA + "/cafe\n1:name=systemd:/kubepods/burstable/pod" + uidA + "/cafe\n", uidA},
		{"cgroupfs v1, in one line of many", "12:pids:/\n11:memory:/kubepods/pod" + uidA + "/cafe\n1:name=systemd:/\n", uidA},
		{"cgroupfs v2", "0::/kubepods/besteffort/pod" + uidA + "/cafe\n", uidA},
		{"cgroupfs v2 from a private namespace", "0::/../../pod" + uidA + "/cafe\n", uidA},
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
		{"a root with pod in its name", "0::/pods.slice/podruntime/kubepods-pod" + under + ".slice/crio-cafe.scope\n", uidA},
		{"a folder of a container, named after another pod", "0::/kubepods/pod" + uidA + "/cafe/pod" + uidB + "/x\n", uidA},
		{"the same with systemd", "0::/kubepods-pod" + under + ".slice/cri-containerd-cafe.scope/kubepods-pod" + other + ".slice\n", uidA},
		{"a longer name", "0::/kubepods/burstable/pod" + uidA + "0/cafe\n", uidA + "0"},
		{"the UID without pod", "0::/kubepods/burstable/" + uidA + "/cafe\n", ""},
		{"a folder of another name", "0::/kubepods/mypod" + uidA + "/cafe\n", ""},
		{"the UID in another place", "0::/system.slice/podx-" + uidA + ".scope\n", ""},
		{"a folder pod", "0::/pod/.slice/-pod.slice\n", ""},
		{"podman, podruntime", "0::/podman/podruntime.slice/x\n", ""},
		{"the host's", "0::/init.scope\n", ""},
		{"of a process that has ended", "", ""},
	} {
		if got := podOf(test.cgroup); got != test.want {
			t.Errorf("%s: %q by %q, want %q", test.name, got, test.cgroup, test.want)
		}
	}
}

// C3: of a pod's processes the oldest counts whose network has eth0, and never one of the runtime.
func TestFind(t *testing.T) {
	cgroup := cgroupOf(uidA)
	conmon := strings.Replace(cgroup, "cri-containerd-", "crio-conmon-", 1)
	for _, test := range []struct {
		name      string
		processes []fakeProcess
		want      string // name of the network that is found
		isHost    bool
	}{
		{"nobody", nil, "", false},
		{"the sandbox", []fakeProcess{{50, cgroup, "pod", "pod", 500}}, "pod", false},
		{"another pod's", []fakeProcess{{50, cgroupOf(uidB), "pod", "pod", 500}}, "", false},
		{"CRI-O's monitor alone", []fakeProcess{{50, conmon, host, host, 500}}, "", false},
		{"CRI-O's monitor is older", []fakeProcess{{50, conmon, host, host, 500}, {51, cgroup, "pod", "pod", 501}}, "pod", false},
		{"the runtime is still to join", []fakeProcess{{50, cgroup, host, host, 500}}, "", false},
		{"it has the network and not yet its files", []fakeProcess{{50, cgroup, "pod", host, 500}}, "pod", false},
		{"hostNetwork, where nothing is called eth0", []fakeProcess{{50, cgroup, host, "pod", 500}}, host, true},
		{"hostNetwork under CRI-O", []fakeProcess{{50, conmon, host, host, 500}, {51, cgroup, host, "pod", 501}}, host, true},
		{"a container has a namespace within", []fakeProcess{{50, cgroup, "pod", "pod", 500}, {51, cgroup, "nested", "web", 501}}, "pod", false},
		{"after the PIDs went round", []fakeProcess{{50, cgroup, "nested", "web", 501}, {51, cgroup, "pod", "pod", 500}}, "pod", false},
		{"and with more of them", []fakeProcess{{7, cgroup, "nested", "web", 10_000}, {50, cgroup, "pod", "pod", 9_999}, {51, cgroup, "n2", "web", 10_001}}, "pod", false},
		{"gVisor's gofer is older", []fakeProcess{{50, cgroup, "empty", "gofer", 500}, {51, cgroup, "pod", "pod", 501}}, "pod", false},
		{"a network that is being set up", []fakeProcess{{50, cgroup, "empty", "pod", 500}}, "", false},
		{"it holds eth0, among others", []fakeProcess{{50, cgroup, "multus", "pod", 500}}, "multus", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			proc := newProc(t)
			proc.interfaces("empty", "lo")
			proc.interfaces("multus", "lo", "net1", "eth0", "eth00")
			for _, ps := range test.processes {
				proc.add(ps)
			}
			ps := newProcessesOf(t, proc)
			s, _ := ps.find(podNamed("web", uidA, "3"))
			if got := networkOf(ps, uidA); got != test.want || s.isHost != test.isHost {
				t.Errorf("found %q (isHost %v), want %q (%v)", got, s.isHost, test.want, test.isHost)
			}
			noneOpen(t, proc.dir)
		})
	}
}

// C3: between a look and the start the PID may go to another process, which is never captured.
func TestOpenReusedPID(t *testing.T) {
	for _, test := range []struct {
		name string
		then fakeProcess
		ok   bool
	}{
		{"still the pod's", fakeProcess{50, cgroupOf(uidA), "pod", "pod", 500}, true},
		{"another pod's", fakeProcess{50, cgroupOf(uidB), "other", "other", 900}, false},
		{"another pod's, in the same network", fakeProcess{50, cgroupOf(uidB), "pod", "other", 900}, false},
		{"the pod's, with another network", fakeProcess{50, cgroupOf(uidA), "new", "pod", 900}, false},
		{"the host's", fakeProcess{50, "0::/init.scope\n", host, host, 900}, false},
		{"ended", fakeProcess{51, cgroupOf(uidB), "other", "other", 900}, false},
	} {
		proc, p := newProc(t), podNamed("web", uidA, "3")
		proc.add(fakeProcess{50, cgroupOf(uidA), "pod", "pod", 500})
		ps := newProcessesOf(t, proc)
		s, ok := ps.find(p)
		if !ok {
			t.Fatal("not found")
		}
		proc.end(50)
		proc.add(test.then)
		file, err := ps.open(s, p)
		if (err == nil) != test.ok {
			t.Errorf("%s: opened: %v", test.name, err)
		}
		if err == nil {
			file.Close()
		}
		noneOpen(t, proc.dir)
	}
}

// C3: it is checked after the network's file is open. Both files are FIFOs, so that open waits at each of them until the test
// has said what it reads.
func TestOpenChecksLast(t *testing.T) {
	for cgroup, want := range map[string]bool{cgroupOf(uidA): true, cgroupOf(uidB): false, "": false} {
		proc, p := newProc(t), podNamed("web", uidA, "3")
		proc.pod(50, uidA)
		ps := newProcessesOf(t, proc)
		s, _ := ps.find(p)
		files := []string{filepath.Join(proc.dir, "net-"+uidA, "ns"), proc.path(50, "cgroup")}
		must(t, os.Remove(files[0]), os.Remove(files[1]), syscall.Mkfifo(files[0], 0o600), syscall.Mkfifo(files[1], 0o600))
		wrong := time.AfterFunc(patience, func() {
			t.Error("the process is checked before its network is open")
			for _, name := range files {
				os.OpenFile(name, os.O_RDWR, 0) // so that nobody waits any more
			}
		})
		go func() {
			for i, text := range []string{"", cgroup} { // the first is free when the program has opened it
				file, err := os.OpenFile(files[i], os.O_WRONLY, 0)
				if err == nil {
					file.WriteString(text)
					file.Close()
				}
			}
		}()
		file, err := ps.open(s, p)
		wrong.Stop()
		if file.Close(); (err == nil) != want {
			t.Errorf("a process whose cgroup is %q by then: %v", cgroup, err)
		}
		noneOpen(t, proc.dir)
	}
}

// C3: its own pod is found by /proc/self, since the path of its own cgroup is cut on cgroup v2.
func TestFindItself(t *testing.T) {
	proc := newProc(t)
	proc.add(fakeProcess{60, "0::/\n", "mine", "mine", 500})
	must(t, os.Symlink("60", filepath.Join(proc.dir, "self")))
	ps, p := newProcessesOf(t, proc), podNamed("packetcapture-x", uidA, "3")
	if s, ok := ps.find(p); ok {
		t.Errorf("a namesake in another namespace is found: %v", s)
	}
	p.namespace = "kube-system"
	s, ok := ps.find(p)
	if !ok || !strings.HasSuffix(s.network, "net-mine/ns") {
		t.Errorf("found %v, %v", s, ok)
	}
	file, err := ps.open(s, p)
	must(t, err, file.Close())
}

// C3: however many processes start at once, and whenever one enters its cgroup, it is found at the next look, and after more
// than a second some seconds later. Other processes are not read again all the time.
func TestFindLate(t *testing.T) {
	for _, late := range []time.Duration{0, 25 * time.Millisecond, 990 * time.Millisecond, 1500 * time.Millisecond, 9 * time.Second} {
		for _, waiting := range []time.Duration{0, 3 * time.Second, 9900 * time.Millisecond} { // since the first look
			synctest.Test(t, func(t *testing.T) {
				proc := newProc(t)
				ps := newProcessesOf(t, proc)
				look := func(during time.Duration) string {
					for began := time.Now(); time.Since(began) < during; time.Sleep(birthPoll) {
						if found := networkOf(ps, uidA); found != "" {
							return found
						}
					}
					return networkOf(ps, uidA)
				}
				look(waiting)
				for pid := 2000; late == 0 && pid < 3100; pid++ { // a burst, of which most have ended
					must(t, os.Mkdir(proc.path(pid, ""), 0o755))
				}
				proc.add(fakeProcess{3100, service, host, host, 500})
				if found := look(late); found != "" {
					t.Fatalf("found %s before it was there", found)
				}
				proc.add(fakeProcess{3100, cgroupOf(uidA), "pod", "pod", 500})
				limit := birthPoll
				if late > time.Second-birthPoll {
					limit = 10*time.Second + birthPoll
				}
				began := time.Now()
				if late > time.Second && networkOf(ps, uidA) != "" {
					t.Error("a process that is older than a second is read at each look")
				}
				if found := look(limit); found != "pod" || time.Since(began) > limit {
					t.Errorf("%v late, after %v of waiting: found %q after %v", late, waiting, found, time.Since(began))
				}
			})
		}
	}
}

// C3: one look serves all that look within 25 ms, and a pod that is known takes none.
func TestOneLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		proc := newProc(t)
		ps := newProcessesOf(t, proc)
		proc.pod(50, uidB)
		networkOf(ps, uidA)
		first := ps.looked
		time.Sleep(birthPoll - 1)
		for i := range 100 {
			networkOf(ps, fmt.Sprintf("%08x", i))
		}
		time.Sleep(time.Hour)
		for range 100 { // of captures, each of which asks every second
			if found := networkOf(ps, uidB); found != uidB || ps.looked != first {
				t.Errorf("found %q, looked again after %v", found, ps.looked.Sub(first))
			}
		}
		networkOf(ps, uidA)
		if ps.looked == first {
			t.Error("it does not look again")
		}
		proc.add(fakeProcess{50, cgroupOf(uidA), "other", "other", 900}) // the PID went to another pod's process meanwhile
		time.Sleep(10 * time.Second)
		if found := networkOf(ps, uidB); found != "" {
			t.Errorf("%q is found for a pod that has ended", found)
		}
		if found := networkOf(ps, uidA); found != "other" {
			t.Errorf("found %q for the pod that has the PID now", found)
		}
	})
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

// C8: without the host's /proc the program does not begin, and says what is needed.
func TestNoHostProc(t *testing.T) {
	_, err := newNode(testConfig(t, t.TempDir(), t.TempDir()))
	for _, word := range []string{"hostPID", "CAP_SYS_PTRACE", "AppArmor", "Unconfined", "ns/net"} {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%v does not name %s", err, word)
		}
	}
}
