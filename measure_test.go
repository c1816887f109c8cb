//go:build e2e

// What the program costs and how fast it is, beside the floor that nothing can beat on the same machine in the same run:
// `make measure`, on a cluster after `make deploy`. It must run as root on the machine whose engine runs the nodes, to
// see their processes and files without asking anybody.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
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
	return adminOf(t, c.kubectl("config", "view", "--raw", "--minify", "-o", "json"))
}

func adminOf(t *testing.T, kubeconfig string) *admin {
	var config struct {
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
			}
		}
		Users []struct {
			User struct {
				Cert []byte `json:"client-certificate-data"`
				Key  []byte `json:"client-key-data"`
			}
		}
	}
	check(0, json.Unmarshal([]byte(kubeconfig), &config))
	pair := check(tls.X509KeyPair(config.Users[0].User.Cert, config.Users[0].User.Key))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(config.Clusters[0].Cluster.CA)
	return &admin{t, config.Clusters[0].Cluster.Server, &http.Client{Transport: &http.Transport{
		ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}}}}
}

// The test binary is also the reader that the program's CPU is compared with: it reads the same watch as the program,
// with the same library, and throws away what it reads.
func init() {
	kubeconfig, node := os.Getenv("TEST_READER"), os.Getenv("TEST_READER_NODE")
	if kubeconfig == "" {
		return
	}
	a := adminOf(nil, kubeconfig)
	request := check(http.NewRequest("GET", a.server+"/api/v1/pods?watch=true&fieldSelector=spec.nodeName%3D"+node, nil))
	request.Header.Set("Accept", metadata)
	io.Copy(io.Discard, check(a.http.Do(request)).Body)
	os.Exit(1) // it is killed before
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

// rawEvent is when an event came, and how many bytes it has.
type rawEvent struct {
	time.Time
	bytes int
}

// watch returns each event of a Pod, as raw as it comes.
func (a *admin) watch(ctx context.Context, namespace, pod string) <-chan rawEvent {
	a.t.Helper()
	request, _ := http.NewRequestWithContext(ctx, "GET", a.server+"/api/v1/namespaces/"+namespace+"/pods?watch=true&fieldSelector=metadata.name%3D"+pod, nil)
	request.Header.Set("Accept", metadata)
	response, err := a.http.Do(request)
	if err != nil {
		a.t.Fatal(err)
	}
	events := make(chan rawEvent, 10_000)
	go func() {
		defer response.Body.Close()
		defer close(events)
		for d := json.NewDecoder(response.Body); ; {
			var e json.RawMessage
			if d.Decode(&e) != nil {
				return
			}
			events <- rawEvent{time.Now(), len(e)}
		}
	}()
	return events
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

func median[T cmp.Ordered](values []T) T {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2]
}

// ratio is the median of what was measured, each beside its own floor: so the machine's changes of pace don't count.
func ratio(measured, floor, more []time.Duration) float64 {
	var ratios []float64
	for i := range measured {
		ratios = append(ratios, float64(measured[i])/float64(floor[i]+more[i]))
	}
	return median(ratios)
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

// status reads a number of kB of /proc/<pid>/status.
func status(pid int, field string) float64 {
	_, rest, _ := strings.Cut(readFile(fmt.Sprintf("/proc/%d/status", pid)), field+":")
	kb, _ := strconv.ParseFloat(strings.Fields(rest + " 0")[0], 64)
	return kb / 1024
}

// cpu is the CPU time that all threads of a process have used.
func cpu(pid int) (spent time.Duration) {
	for _, path := range check(filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))) {
		ns, _ := strconv.ParseInt(strings.Fields(readFile(path) + " 0")[0], 10, 64)
		spent += time.Duration(ns)
	}
	return spent
}

// received is how many bytes have come into a process's network.
func received(pid int) (bytes int) {
	_, rest, _ := strings.Cut(readFile(fmt.Sprintf("/proc/%d/net/dev", pid)), "eth0:")
	bytes, _ = strconv.Atoi(strings.Fields(rest + " 0")[0])
	return bytes
}

func TestMeasure(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("make measure must run as root")
	}
	c := newCluster(t)
	a := newAdmin(t, c)
	c.kubectl("-n", "kube-system", "rollout", "restart", "daemonset/packetcapture") // what it did before is no idleness
	c.kubectl("-n", "kube-system", "rollout", "status", "daemonset/packetcapture", "--timeout=120s")
	program := hostPID(t, c.worker, "packetcapture", "packetcapture")
	if program == 0 {
		t.Fatal("no packetcapture on " + c.worker)
	}
	root := fmt.Sprintf("/proc/%d/root", program)
	fmt.Println("| what | measured | beside | ratio | goal |\n|---|---|---|---|---|")
	// Machines are noisy: half above its goal fails.
	row := func(what, here, beside string, ratio, goal float64) {
		fmt.Printf("| %s | %s | %s | %.2f | %.2f |\n", what, here, beside, ratio, goal)
		if ratio > 1.5*goal {
			t.Errorf("%s: the ratio is %.2f, the goal %.2f", what, ratio, goal)
		}
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
		ratio(start, event, run), 1.15)
	row("Stop: PATCH to tcpdump and files gone", ms(median(stop)), ms(floorStop)+" (raw event + SIGTERM to exit)",
		ratio(stop, event2, end), 1.15)

	// 3,000 changes that need nothing done: CPU, memory and bytes.
	const changes = 3000
	reader := exec.Command(os.Args[0])
	reader.Env = append(os.Environ(), "GOMAXPROCS=1", "TEST_READER="+c.kubectl("config", "view", "--raw", "--minify", "-o", "json"),
		"TEST_READER_NODE="+c.worker)
	must(t, reader.Start())
	defer func() { reader.Process.Kill(); reader.Wait() }()
	until(t, "the reader runs", func() bool { return cpu(reader.Process.Pid) > 0 })
	time.Sleep(2 * time.Second) // it watches, and both are idle
	for len(raw) > 0 {
		<-raw
	}
	spent, readers, bytes := cpu(program), cpu(reader.Process.Pid), received(program)
	for i := range changes {
		a.patch(c.space, "web", fmt.Sprintf(`{"metadata":{"labels":{"change":"%d"}}}`, i))
	}
	size := 0
	for range changes {
		size += (<-raw).bytes
	}
	each := func(d time.Duration) float64 { return float64(d.Microseconds()) / changes / 1000 }
	ours, floor := each(cpu(program)-spent), each(cpu(reader.Process.Pid)-readers)
	row("CPU for a change that needs nothing, one by one", fmt.Sprintf("%.3f ms", ours), fmt.Sprintf("%.3f ms (a Go program that "+
		"only reads the watch)", floor), ours/floor, 2)
	perChange := float64(received(program)-bytes) / changes
	row("Bytes for a change, on the wire", fmt.Sprintf("%.0f", perChange), fmt.Sprintf("%d (its metadata as JSON)", size/changes),
		perChange/float64(size/changes), 1.15)
	memory := func(when string, goal float64) {
		rss := status(program, "VmRSS")
		row("Memory "+when, fmt.Sprintf("%.1f MiB", rss), fmt.Sprintf("%.0f MiB", goal), rss/goal, 1)
	}
	row("Memory idle", fmt.Sprintf("%.1f MiB", idle), "10 MiB", idle/10, 1)
	memory(fmt.Sprintf("after %d changes", changes), 12)
	measureMany(t, c, a, root, memory, row)
	info := check(os.Stat(fmt.Sprintf("/proc/%d/exe", program)))
	row("The program", fmt.Sprintf("%.2f MB", float64(info.Size())/1e6), "7 MB", float64(info.Size())/7e6, 1)
	packages := installed(c.image)
	added := layers(c.image)
	row("The image, above its base", fmt.Sprintf("%.1f MB", added), fmt.Sprintf("%.1f MB (7 MB, tcpdump and its libraries)", 7+packages),
		added/(7+packages), 1.1)
}

// layers is how many MB the program and the packages take in an image.
func layers(image string) (mb float64) {
	history := check(exec.Command("docker", "history", "--no-trunc", "--human=false", "--format", "{{.Size}} {{.CreatedBy}}", image).Output())
	for line := range strings.Lines(string(history)) {
		size, by, _ := strings.Cut(line, " ")
		if strings.Contains(by, "apt-get install") || strings.Contains(by, "COPY /packetcapture") {
			mb += check(strconv.ParseFloat(size, 64)) / 1e6
		}
	}
	return mb
}

// installed is how many MB the packages have that were installed last in an image, tcpdump and what it needs.
func installed(image string) (mb float64) {
	sizes := check(exec.Command("docker", "run", "--rm", "--entrypoint", "bash", image, "-c", `dpkg-query -W -f '${Installed-Size}\n' `+
		`$(sed -n 's/^Install: //p' /var/log/apt/history.log | tail -1 | grep -o '[a-z0-9.+-]*:[a-z0-9]* ' | cut -d: -f1)`).Output())
	for _, size := range strings.Fields(string(sizes)) {
		mb += check(strconv.ParseFloat(size, 64)) * 1024 / 1e6
	}
	return mb
}

// measureMany has 100 Pods annotated at once and released at once, beside as many plain tcpdumps.
func measureMany(t *testing.T, c *cluster, a *admin, root string, memory func(string, float64),
	row func(what, here, beside string, ratio, goal float64)) {
	const many = 100 // with its own Pods a node takes no more than 110
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
	patchAll := func(body string) time.Time {
		began := time.Now()
		done := make(chan bool)
		for _, name := range names {
			go func() { a.patch(c.space, name, body); done <- true }()
		}
		for range names {
			<-done
		}
		return began
	}
	var starts, stops, plainStarts, plainStops, patches []time.Duration
	for round := range 5 {
		began := time.Now()
		var children []*exec.Cmd
		for _, name := range names {
			child := exec.Command("nsenter", "-t", strconv.Itoa(pids[name]), "-n", "tcpdump", "-C", "1", "-W", "2", "-w", folder+"/"+name+".pcap",
				"-U", "-Z", "root", "-p", "-i", "eth0")
			must(t, child.Start())
			children = append(children, child)
		}
		plainStarts = append(plainStarts, until(t, "all plain files", all(plain, true)).Sub(began))
		time.Sleep(time.Second) // they capture quietly
		began = time.Now()
		for _, child := range children {
			child.Process.Signal(syscall.SIGTERM)
		}
		for _, child := range children {
			child.Wait()
			os.Remove(child.Args[10] + "0")
		}
		plainStops = append(plainStops, time.Since(began))
		began = patchAll(fmt.Sprintf(`{"metadata":{"annotations":{"other":"%d"}}}`, round))
		patches = append(patches, time.Since(began)) // the API server's share: as many changes that need nothing done
		began = patchAll(annotated("2"))
		starts = append(starts, until(t, "all files", all(ours, true)).Sub(began))
		time.Sleep(time.Second)
		if round == 0 {
			memory(fmt.Sprintf("with %d captures", many), 12)
		}
		began = patchAll(annotated(""))
		stops = append(stops, until(t, "no file", all(ours, false)).Sub(began))
	}
	startFloor, stopFloor := median(plainStarts)+median(patches), median(plainStops)+median(patches)
	row(fmt.Sprintf("%d Pods annotated at once: all captured", many), ms(median(starts)), ms(startFloor)+" (plain tcpdumps + PATCHes)",
		ratio(starts, plainStarts, patches), 1.5)
	row(fmt.Sprintf("%d Pods released at once: all gone", many), ms(median(stops)), ms(stopFloor)+" (SIGTERM to exits + PATCHes)",
		ratio(stops, plainStops, patches), 1.5)
}

func check[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
