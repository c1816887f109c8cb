//go:build e2e

// What the program costs and how fast it is, beside the floor that nothing can beat on the same machine in the same run:
// `make measure`, on a cluster after `make deploy`. It must run as root on the machine whose engine runs the nodes, to
// see their processes and files without asking anybody.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// admin speaks to the API server as kubectl does, without its start-up time.
type admin struct {
	t      *testing.T
	server string
	http   *http.Client
}

func newAdmin(t *testing.T, c *cluster) *admin {
	var config struct {
		Clusters []struct {
			Cluster struct {
				Server string
				CA     string `json:"certificate-authority-data"`
			}
		}
		Users []struct {
			User struct {
				Cert string `json:"client-certificate-data"`
				Key  string `json:"client-key-data"`
			}
		}
	}
	if err := json.Unmarshal([]byte(c.kubectl("config", "view", "--raw", "--minify", "-o", "json")), &config); err != nil {
		t.Fatal(err)
	}
	decode := func(s string) []byte {
		b, err := base64.StdEncoding.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	pair, err := tls.X509KeyPair(decode(config.Users[0].User.Cert), decode(config.Users[0].User.Key))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(decode(config.Clusters[0].Cluster.CA))
	return &admin{t, config.Clusters[0].Cluster.Server, &http.Client{Transport: &http.Transport{
		ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}}}}
}

// patch changes a Pod's metadata and returns when it began.
func (a *admin) patch(namespace, pod, body string) time.Time {
	a.t.Helper()
	request, err := http.NewRequest("PATCH", a.server+"/api/v1/namespaces/"+namespace+"/pods/"+pod, strings.NewReader(body))
	if err != nil {
		a.t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/merge-patch+json")
	began := time.Now()
	response, err := a.http.Do(request)
	if err != nil {
		a.t.Fatal(err)
	}
	defer response.Body.Close()
	if text, _ := io.ReadAll(response.Body); response.StatusCode != 200 {
		a.t.Fatalf("PATCH of %s: %s: %s", pod, response.Status, text)
	}
	return began
}

func annotated(n string) string {
	if n == "" {
		return `{"metadata":{"annotations":{"` + annotation + `":null}}}`
	}
	return `{"metadata":{"annotations":{"` + annotation + `":"` + n + `"}}}`
}

// watch returns the time of each event of a Pod, as raw as it comes.
func (a *admin) watch(ctx context.Context, namespace, pod string) <-chan time.Time {
	a.t.Helper()
	request, _ := http.NewRequestWithContext(ctx, "GET", a.server+"/api/v1/namespaces/"+namespace+"/pods?watch=true&fieldSelector=metadata.name%3D"+pod, nil)
	request.Header.Set("Accept", metadata)
	response, err := a.http.Do(request)
	if err != nil {
		a.t.Fatal(err)
	}
	times := make(chan time.Time, 1000)
	go func() {
		defer response.Body.Close()
		defer close(times)
		for d := json.NewDecoder(response.Body); ; {
			var e json.RawMessage
			if d.Decode(&e) != nil {
				return
			}
			times <- time.Now()
		}
	}()
	return times
}

// hostPID is the PID on this machine of the first process of a node whose command is name and whose command line
// holds what; 0 if there is none.
func hostPID(t *testing.T, nodeName, name, what string) int {
	t.Helper()
	id, err := exec.Command("docker", "inspect", "--format", "{{.Id}}", nodeName).Output()
	if err != nil {
		t.Fatal(err)
	}
	entries, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range entries {
		if strings.TrimSpace(readFile(dir+"/comm")) == name && strings.Contains(readFile(dir+"/cgroup"), strings.TrimSpace(string(id))) &&
			strings.Contains(strings.ReplaceAll(readFile(dir+"/cmdline"), "\x00", " "), what) {
			pid, _ := strconv.Atoi(filepath.Base(dir))
			return pid
		}
	}
	return 0
}

// until polls, at once and closely: what is measured are milliseconds.
func until(t *testing.T, what string, done func() bool) time.Time {
	t.Helper()
	for deadline := time.Now().Add(settle); !done(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, settle)
		}
	}
	return time.Now()
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

// status reads a number of kB of /proc/<pid>/status.
func status(pid int, field string) float64 {
	_, rest, _ := strings.Cut(readFile(fmt.Sprintf("/proc/%d/status", pid)), field+":")
	kb, _ := strconv.ParseFloat(strings.Fields(rest + " 0")[0], 64)
	return kb / 1024
}

// cpu is the CPU time that a process has used, in ticks of 10 ms.
func cpu(pid int) time.Duration {
	stat := readFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(stat[strings.LastIndex(stat, ")")+1:])
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

func TestMeasure(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("make measure must run as root")
	}
	c := newCluster(t)
	a := newAdmin(t, c)
	program := hostPID(t, c.worker, "packetcapture", "packetcapture")
	if program == 0 {
		t.Fatal("no packetcapture on " + c.worker + ": make deploy comes first")
	}
	root := fmt.Sprintf("/proc/%d/root", program)
	var rows [][4]string
	row := func(what, here, floor string, ratio float64, goal string) {
		rows = append(rows, [4]string{what, here, floor, fmt.Sprintf("%.2f (goal %s)", ratio, goal)})
	}
	idle := status(program, "VmRSS")

	// One Pod, twenty times: start and stop, each beside its floor.
	c.create(c.manifest("web", podOptions{}))
	c.waitReady("web")
	sleeper := hostPID(t, c.worker, "sleep", "infinity")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	raw := a.watch(ctx, c.space, "web")
	<-raw // ADDED
	file, folder := root+"/capture-web.pcap0", t.TempDir()
	var start, stop, event, event2, run, end []time.Duration
	for range 20 {
		for len(raw) > 0 {
			<-raw
		}
		began := a.patch(c.space, "web", annotated("2"))
		start = append(start, until(t, "a file", func() bool { return exists(file) }).Sub(began))
		event = append(event, (<-raw).Sub(began))

		began = time.Now()
		floor := exec.Command("nsenter", "-t", strconv.Itoa(sleeper), "-n", "tcpdump", "-C", "1", "-W", "2", "-w", folder+"/floor.pcap",
			"-U", "-Z", "root", "-p", "-i", "eth0")
		if err := floor.Start(); err != nil {
			t.Fatal(err)
		}
		run = append(run, until(t, "the floor's file", func() bool { return exists(folder + "/floor.pcap0") }).Sub(began))
		time.Sleep(200 * time.Millisecond) // both are to capture quietly when they are stopped

		began = a.patch(c.space, "web", annotated(""))
		stop = append(stop, until(t, "no file", func() bool { return !exists(file) }).Sub(began))
		event2 = append(event2, (<-raw).Sub(began))
		began = time.Now()
		floor.Process.Signal(syscall.SIGTERM)
		floor.Wait()
		end = append(end, time.Since(began))
		os.Remove(folder + "/floor.pcap0")
	}
	floorStart, floorStop := median(event)+median(run), median(event2)+median(end)
	row("Start: PATCH to the first file", ms(median(start)), ms(floorStart)+" (raw event + nsenter tcpdump)",
		float64(median(start))/float64(floorStart), "1.15")
	row("Stop: PATCH to tcpdump and files gone", ms(median(stop)), ms(floorStop)+" (raw event + SIGTERM to exit)",
		float64(median(stop))/float64(floorStop), "1.15")

	// 3,000 changes that need nothing done: CPU and memory.
	before := cpu(program)
	const changes = 3000
	for i := range changes {
		a.patch(c.space, "web", fmt.Sprintf(`{"metadata":{"labels":{"change":"%d"}}}`, i))
	}
	time.Sleep(time.Second) // the last of them arrive
	each := float64((cpu(program) - before).Microseconds()) / changes / 1000
	row("CPU for a change that needs nothing", fmt.Sprintf("%.3f ms", each), "0.12 ms", each/0.12, "1.00")
	row("Memory, idle", fmt.Sprintf("%.1f MiB", idle), "10 MiB", idle/10, "1.00")
	after := status(program, "VmRSS")
	row(fmt.Sprintf("Memory after %d changes", changes), fmt.Sprintf("%.1f MiB", after), "12 MiB", after/12, "1.00")

	measureMany(t, c, a, root, row)
	memory := status(program, "VmRSS")
	row("Memory after that, with 90 Pods", fmt.Sprintf("%.1f MiB", memory), "12 MiB", memory/12, "1.00")

	var table bytes.Buffer
	fmt.Fprintln(&table, "| what | measured | floor or goal | ratio |\n|---|---|---|---|")
	for _, r := range rows {
		fmt.Fprintf(&table, "| %s | %s | %s | %s |\n", r[0], r[1], r[2], r[3])
	}
	fmt.Print(table.String())
}

// measureMany has 90 Pods annotated at once and released at once, beside as many plain tcpdumps.
func measureMany(t *testing.T, c *cluster, a *admin, root string, row func(what, here, floor string, ratio float64, goal string)) {
	const many = 90 // with its own Pods a node takes no more than 110
	var manifests, names []string
	for i := range many {
		name := fmt.Sprintf("many-%d", i)
		manifests = append(manifests, c.manifest(name, podOptions{labels: map[string]string{"app": "many"}, command: "sleep infinity"}))
		names = append(names, name)
	}
	c.create(manifests...)
	c.waitReady(names...)
	pids := map[string]int{}
	folder := t.TempDir()
	for _, dir := range check(filepath.Glob("/proc/[0-9]*")) {
		if strings.TrimSpace(readFile(dir+"/comm")) == "sleep" && strings.Contains(readFile(dir+"/cmdline"), "infinity") {
			host := readFile("/proc/" + filepath.Base(dir) + "/root/etc/hostname")
			pids[strings.TrimSpace(host)], _ = strconv.Atoi(filepath.Base(dir))
		}
	}
	all := func(path func(name string) string, want bool) func() bool {
		left := slices.Clone(names)
		return func() bool {
			left = slices.DeleteFunc(left, func(name string) bool { return exists(path(name)) == want })
			return len(left) == 0
		}
	}
	ours := func(name string) string { return root + "/capture-" + name + ".pcap0" }
	plain := func(name string) string { return folder + "/" + name + ".pcap0" }
	patchAll := func(n string) time.Time {
		began := time.Now()
		done := make(chan bool)
		for _, name := range names {
			go func() { a.patch(c.space, name, annotated(n)); done <- true }()
		}
		for range names {
			<-done
		}
		return began
	}
	began := time.Now()
	var children []*exec.Cmd
	for _, name := range names {
		child := exec.Command("nsenter", "-t", strconv.Itoa(pids[name]), "-n", "tcpdump", "-C", "1", "-W", "2", "-w", folder+"/"+name+".pcap",
			"-U", "-Z", "root", "-p", "-i", "eth0")
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		children = append(children, child)
	}
	startFloor := until(t, "all plain files", all(plain, true)).Sub(began)
	began = time.Now()
	for _, child := range children {
		child.Process.Signal(syscall.SIGTERM)
	}
	for _, child := range children {
		child.Wait()
	}
	stopFloor := time.Since(began)
	began = patchAll("")
	patching := time.Since(began) // the API server's share, measured with changes that change nothing
	began = patchAll("2")
	start := until(t, "all files", all(ours, true)).Sub(began)
	began = patchAll("")
	stop := until(t, "no file", all(ours, false)).Sub(began)
	row(fmt.Sprintf("%d Pods annotated at once: all captured", many), ms(start), ms(startFloor+patching)+" (plain tcpdumps + PATCHes)",
		float64(start)/float64(startFloor+patching), "1.50")
	row(fmt.Sprintf("%d Pods released at once: all gone", many), ms(stop), ms(stopFloor+patching)+" (SIGTERM to exits + PATCHes)",
		float64(stop)/math.Max(1, float64(stopFloor+patching)), "1.50")
}

func check[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
