package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

const hash = "0123456789abcdef0123456789abcdef" // a static pod's

func newProcessesOf(t testing.TB, proc *fakeProc) *processes {
	t.Helper()
	ps, err := newProcesses(config{proc: proc.dir, podNamespace: "kube-system", podName: "packetcapture-x"})
	must(t, err)
	return ps
}

// networkOf is the name of the network that is found for a pod, "" if there is none. open opens it.
func networkOf(ps *processes, p pod) (name string, isHost bool, open func() error) {
	s, ok := ps.find(p)
	if ok {
		name = strings.TrimPrefix(filepath.Base(filepath.Dir(s.network)), "net-")
	}
	return name, s.isHost, func() error {
		file, err := ps.open(s, p)
		return errors.Join(err, file.Close())
	}
}

// finds checks which network is found for the pod of a UID.
func finds(t testing.TB, ps *processes, uid, want string) {
	t.Helper()
	got, _, _ := networkOf(ps, podNamed("web", uid, "3"))
	is(t, "network of "+uid, got, want)
}

// noneOpen waits until no descriptor of a folder's files is left: a test's own goroutine may be about to close one.
func noneOpen(t *testing.T, dir string) {
	t.Helper()
	isIn := func(link string) bool {
		target, _ := os.Readlink(link)
		return strings.HasPrefix(target, dir)
	}
	until(t, "no file of "+dir+" is open", func() bool {
		links, err := filepath.Glob("/proc/self/fd/*")
		must(t, err)
		return !slices.ContainsFunc(links, isIn)
	})
}

// C3: a pod is found by the names of its cgroups, whatever runtime, cgroup version and driver there is. The first pod that is
// named counts.
func TestCgroupNames(t *testing.T) {
	under, other := strings.ReplaceAll(uidA, "-", "_"), strings.ReplaceAll(uidB, "-", "_")
	for _, test := range []struct{ name, cgroup, want string }{
		{"cgroupfs v1", "12:pids:/\n11:memory:/kubepods/burstable/pod" + uidA + "/cafe\n1:name=systemd:/kubepods/burstable/pod" + uidA + "/cafe\n", uidA},
		{"cgroupfs v2 from a private namespace", "0::/../../pod" + uidA + "/cafe\n", uidA},
		{"systemd v1", "4:cpu:/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/cri-containerd-cafe.scope\n", uidA},
		{"kind", "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable-pod" + under + ".slice/cri-containerd-cafe.scope\n", uidA},
		{"CRI-O with a cgroup within", "0::/kubepods.slice/kubepods-pod" + under + ".slice/crio-cafe.scope/container\n", uidA},
		{"static", "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + hash + ".slice/crio-cafe.scope\n", hash},
		{"below what only looks like a pod", "0::/pod/.slice/-pod.slice/podman/pods.slice/podruntime/kubepods-pod" + under + ".slice/crio-cafe.scope\n", uidA},
		{"a folder of a container, named after another pod", "0::/kubepods/pod" + uidA + "/cafe/pod" + uidB + "/x\n", uidA},
		{"the same with systemd", "0::/kubepods-pod" + under + ".slice/cri-containerd-cafe.scope/kubepods-pod" + other + ".slice\n", uidA},
		{"a longer name", "0::/kubepods/burstable/pod" + uidA + "0/cafe\n", uidA + "0"},
		{"the UID without pod", "0::/kubepods/burstable/" + uidA + "/cafe\n", ""},
		{"a folder of another name", "0::/kubepods/mypod" + uidA + "/cafe\n", ""},
		{"the UID in another place", "0::/system.slice/podx-" + uidA + ".scope\n", ""},
		{"the host's", "0::/init.scope\n", ""},
		{"of a process that has ended", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			proc := newProc(t)
			proc.add(fakeProcess{50, test.cgroup, "pod", "pod", 500})
			for _, uid := range []string{uidA, uidB, uidA + "0", hash} {
				finds(t, newProcessesOf(t, proc), uid, map[bool]string{uid == test.want: "pod"}[true])
			}
		})
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
	}{
		{"nobody", nil, ""},
		{"the sandbox", []fakeProcess{{50, cgroup, "pod", "pod", 500}}, "pod"},
		{"another pod's", []fakeProcess{{50, cgroupOf(uidB), "pod", "pod", 500}}, ""},
		{"CRI-O's monitor is older", []fakeProcess{{50, conmon, host, host, 500}, {51, cgroup, "pod", "pod", 501}}, "pod"},
		{"the runtime is still to join", []fakeProcess{{50, cgroup, host, host, 500}}, ""},
		{"it has the network and not yet its files", []fakeProcess{{50, cgroup, "pod", host, 500}}, "pod"},
		{"hostNetwork, where nothing is called eth0", []fakeProcess{{50, cgroup, host, "pod", 500}}, host},
		{"hostNetwork under CRI-O", []fakeProcess{{50, conmon, host, host, 500}, {51, cgroup, host, "pod", 501}}, host},
		{"a container has a namespace within", []fakeProcess{{50, cgroup, "pod", "pod", 500}, {51, cgroup, "nested", "web", 501}}, "pod"},
		{"after the PIDs went round", []fakeProcess{{7, cgroup, "nested", "web", 10_000}, {50, cgroup, "pod", "pod", 9_999}, {51, cgroup, "n2", "web", 10_001}}, "pod"},
		{"gVisor's gofer is older", []fakeProcess{{50, cgroup, "empty", "gofer", 500}, {51, cgroup, "pod", "pod", 501}}, "pod"},
		{"a network that is being set up", []fakeProcess{{50, cgroup, "empty", "pod", 500}}, ""},
		{"it holds eth0, among others", []fakeProcess{{50, cgroup, "multus", "pod", 500}}, "multus"},
	} {
		t.Run(test.name, func(t *testing.T) {
			proc := newProc(t)
			proc.interfaces("empty", "lo")
			proc.interfaces("multus", "lo", "net1", "eth0", "eth00")
			for _, ps := range test.processes {
				proc.add(ps)
			}
			got, isHost, _ := networkOf(newProcessesOf(t, proc), web)
			is(t, "network", got, test.want)
			is(t, "is the host's", isHost, test.want == host)
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
		{"still the pod's", fakeProcess{50, cgroupOf(uidA), uidA, uidA, 500}, true},
		{"another pod's, in the same network", fakeProcess{50, cgroupOf(uidB), uidA, "other", 900}, false},
		{"the pod's, with another network", fakeProcess{50, cgroupOf(uidA), "new", uidA, 900}, false},
		{"the host's", fakeProcess{50, "0::/init.scope\n", host, host, 900}, false},
		{"ended", fakeProcess{51, cgroupOf(uidB), "other", "other", 900}, false},
	} {
		proc := newProc(t)
		proc.pod(50, uidA)
		_, _, open := networkOf(newProcessesOf(t, proc), web)
		proc.end(50)
		proc.add(test.then)
		is(t, test.name+", and it is opened", open() == nil, test.ok)
		noneOpen(t, proc.dir)
	}
}

// C3: it is checked after the network's file is open. Both files are FIFOs, so that open waits at each of them until the test
// has said what it reads.
func TestOpenChecksLast(t *testing.T) {
	for cgroup, want := range map[string]bool{cgroupOf(uidA): true, cgroupOf(uidB): false, "": false} {
		proc := newProc(t)
		proc.pod(50, uidA)
		_, _, open := networkOf(newProcessesOf(t, proc), web)
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
				if file, err := os.OpenFile(files[i], os.O_WRONLY, 0); err == nil {
					file.WriteString(text)
					file.Close()
				}
			}
		}()
		is(t, "opened, with the cgroup "+cgroup, open() == nil, want)
		wrong.Stop()
		noneOpen(t, proc.dir)
	}
}

// C3: its own pod is found by /proc/self, since the path of its own cgroup is cut on cgroup v2. A namesake is not.
func TestFindItself(t *testing.T) {
	proc := newProc(t)
	proc.add(fakeProcess{60, "0::/\n", "mine", "mine", 500})
	must(t, os.Symlink("60", filepath.Join(proc.dir, "self")))
	for namespace, want := range map[string]string{"kube-system": "mine", "default": ""} {
		own := podNamed("packetcapture-x", uidA, "3")
		own.namespace = namespace
		got, _, open := networkOf(newProcessesOf(t, proc), own)
		is(t, "network", got, want)
		is(t, "opened", open() == nil, want != "")
	}
}

// C3: however many processes start at once, and whenever one enters its cgroup, it is found at the next look, and after more
// than two seconds some seconds later. Other processes are not read again all the time.
func TestFindLate(t *testing.T) {
	for _, late := range []time.Duration{0, 25 * time.Millisecond, 1990 * time.Millisecond, 2500 * time.Millisecond, 9 * time.Second} {
		for _, waiting := range []time.Duration{0, 3 * time.Second, 9900 * time.Millisecond} { // since the first look
			synctest.Test(t, func(t *testing.T) {
				proc := newProc(t)
				ps := newProcessesOf(t, proc)
				found := func(within time.Duration) string {
					for began := time.Now(); ; time.Sleep(birthPoll) {
						if name, _, _ := networkOf(ps, web); name != "" || time.Since(began) >= within {
							return name
						}
					}
				}
				found(waiting)
				for pid := 2000; late == 0 && pid < 3100; pid++ { // a burst, of which most have ended
					must(t, os.Mkdir(proc.path(pid, ""), 0o755))
				}
				proc.add(fakeProcess{3100, "0::/system.slice/containerd.service\n", host, host, 500})
				is(t, "found before it was there", found(late), "")
				proc.add(fakeProcess{3100, cgroupOf(uidA), "pod", "pod", 500})
				limit := birthPoll
				if late > 2*time.Second {
					is(t, "found by reading all processes at each look", found(birthPoll), "")
				}
				if late > 2*time.Second-birthPoll {
					limit = 10*time.Second + birthPoll
				}
				is(t, fmt.Sprintf("found %v late, after %v of waiting", late, waiting), found(limit), "pod")
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
		finds(t, ps, uidA, "")
		first := ps.looked
		time.Sleep(birthPoll - 1)
		finds(t, ps, hash, "")
		time.Sleep(time.Hour)
		finds(t, ps, uidB, uidB) // as captures do every second
		is(t, "time of the look", ps.looked, first)
		finds(t, ps, uidA, "")
		is(t, "another look", ps.looked, time.Now())
		proc.add(fakeProcess{50, cgroupOf(uidA), "other", "other", 900}) // the PID went to another pod's process meanwhile
		time.Sleep(10 * time.Second)
		finds(t, ps, uidB, "")
		finds(t, ps, uidA, "other")
		proc.add(fakeProcess{60, "0::/system.slice/containerd.service\n", host, host, 500})
		time.Sleep(birthPoll)
		finds(t, ps, hash, "") // it is seen before it enters its cgroup, and then nobody looks for three seconds
		proc.add(fakeProcess{60, cgroupOf("c0"), "late", "late", 500})
		time.Sleep(3 * time.Second)
		finds(t, ps, "c0", "late")
	})
}

// C8: without the host's /proc the program does not begin, and says what is needed.
func TestNoHostProc(t *testing.T) {
	_, err := newNode(testConfig(t, t.TempDir(), t.TempDir()))
	for _, word := range []string{"hostPID", "CAP_SYS_PTRACE", "AppArmor", "Unconfined", "ns/net"} {
		is(t, word+" is named", strings.Contains(fmt.Sprint(err), word), true)
	}
}
