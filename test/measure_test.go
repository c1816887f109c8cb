//go:build e2e

package test

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
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
	"sync"
	"syscall"
	"testing"
	"time"
)

// What the program costs and how fast it is, beside the floor that nothing can beat on the same machine in the same run.
// It must run as root on the machine whose Docker runs the nodes, to see their processes and files without asking anybody.

// metadata is what the program's watch accepts.
const metadata = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"

// admin speaks to the API server as kubectl does, without its start-up time.
type admin struct {
	server string
	http   *http.Client
}

const viewConfig = "config view --raw --minify -o json"

func newAdmin(kubeconfig string) *admin {
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
	return &admin{config.Clusters[0].Cluster.Server, &http.Client{Transport: &http.Transport{
		ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}}}}
}

// do returns the answer's body.
func (a *admin) do(ctx context.Context, method, path, kind, body string) io.ReadCloser {
	request := check(http.NewRequestWithContext(ctx, method, a.server+"/api/v1/"+path, strings.NewReader(body)))
	request.Header.Set("Content-Type", kind)
	request.Header.Set("Accept", kind)
	response := check(a.http.Do(request))
	if response.StatusCode != http.StatusOK {
		panic(fmt.Sprintf("%s %s: %s", method, path, response.Status))
	}
	return response.Body
}

// patch changes a pod's metadata and returns when it began.
func (a *admin) patch(namespace, pod, body string) (began time.Time) {
	began = time.Now()
	request := check(http.NewRequest("PATCH", a.server+"/api/v1/namespaces/"+namespace+"/pods/"+pod,
		strings.NewReader(`{"metadata":{`+body+`}}`)))
	request.Header.Set("Content-Type", "application/merge-patch+json")
	response := check(a.http.Do(request))
	defer response.Body.Close()
	if text := check(io.ReadAll(response.Body)); response.StatusCode != http.StatusOK {
		panic(fmt.Sprintf("PATCH of %s: %s", pod, text))
	}
	return began
}

// files is an annotation that asks for a number of files, "null" for none.
func files(n string) string { return `"annotations":{"` + annotation + `":` + n + `}` }

// rawEvent is when an event came, and how many bytes it has.
type rawEvent struct {
	time.Time
	bytes int
}

// watch returns each event of a pod, as raw as it comes, until ctx ends.
func (a *admin) watch(ctx context.Context, namespace, pod string) chan rawEvent {
	body := a.do(ctx, "GET", "namespaces/"+namespace+"/pods?watch=true&fieldSelector=metadata.name%3D"+pod, metadata, "")
	events := make(chan rawEvent, 10_000)
	go func() {
		defer body.Close()
		for d := json.NewDecoder(body); ; {
			var e json.RawMessage
			if d.Decode(&e) != nil {
				return
			}
			events <- rawEvent{time.Now(), len(e)}
		}
	}()
	return events
}

// The test binary is also the reader that the program's CPU is compared with: it reads the same watch as the program,
// with the same library, and throws away what it reads.
func init() {
	if kubeconfig := os.Getenv("TEST_READER"); kubeconfig != "" {
		a := newAdmin(kubeconfig)
		io.Copy(io.Discard, a.do(context.Background(), "GET", "pods?watch=true&fieldSelector=spec.nodeName%3D"+os.Getenv("TEST_READER_NODE"), metadata, ""))
		os.Exit(1) // it is killed before
	}
}

// ---- What the machine says of processes ----

func readFile(path string) string { text, _ := os.ReadFile(path); return string(text) }

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

// hostPIDs are the PIDs on this machine of a node's processes with a command and an argument, by their host names.
func (c *cluster) hostPIDs(command, argument string) map[string]int {
	id := strings.TrimSpace(string(check(exec.Command("docker", "inspect", "--format", "{{.Id}}", c.node).Output())))
	pids := map[string]int{}
	for _, dir := range check(filepath.Glob("/proc/[0-9]*")) {
		if strings.TrimSpace(readFile(dir+"/comm")) == command && strings.Contains(readFile(dir+"/cgroup"), id) &&
			strings.Contains(readFile(dir+"/cmdline"), argument) {
			pids[strings.TrimSpace(readFile(dir+"/root/etc/hostname"))], _ = strconv.Atoi(filepath.Base(dir))
		}
	}
	return pids
}

// field is the first number behind a name in a file of a process.
func field(pid int, file, name string) float64 {
	_, rest, _ := strings.Cut(readFile(fmt.Sprintf("/proc/%d/%s", pid, file)), name)
	number, _ := strconv.ParseFloat(strings.Fields(rest + " 0")[0], 64)
	return number
}

// cpu is the CPU time that all threads of a process have used.
func cpu(pid int) (spent time.Duration) {
	for _, path := range check(filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))) {
		ns, _ := strconv.ParseInt(strings.Fields(readFile(path) + " 0")[0], 10, 64)
		spent += time.Duration(ns)
	}
	return spent
}

// closely polls often: what is measured are milliseconds.
func closely(t testing.TB, what string, done func() bool) time.Time {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
	return time.Now()
}

// quietly lets time pass for what is then measured to begin from rest.
func quietly(d time.Duration) { time.Sleep(d) }

func median[T cmp.Ordered](values []T) T {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

// plain is the floor of a capture: nsenter and tcpdump, as the program starts them.
func plain(pid int, stem string) *exec.Cmd {
	cmd := exec.Command("nsenter", "-t", strconv.Itoa(pid), "-n", "tcpdump", "-C", "1", "-W", "2", "-w", stem, "-U", "-Z", "root",
		"-p", "-i", "eth0", "-B", "4096")
	check(0, cmd.Start())
	return cmd
}

// ---- The measurements ----

// measurement collects figures, each beside its floor or its bound.
type measurement struct {
	*cluster
	*admin
	program   int // PID
	root      string
	arguments string // that the program gives tcpdump, without -W and -w
}

// compare is a row of the table. Machines are noisy: half above its goal fails.
func (m *measurement) compare(what, here, beside string, ratio, goal float64) {
	*m.table = append(*m.table, []string{what, here, beside, fmt.Sprintf("%.2f", ratio), fmt.Sprintf("%.2f", goal)})
	if ratio > 1.5*goal {
		m.Errorf("%s: the ratio is %.2f, the goal %.2f", what, ratio, goal)
	}
}

// below compares a figure with the most that it should be.
func (m *measurement) below(what, format string, measured, most float64) {
	m.compare(what, fmt.Sprintf(format, measured), fmt.Sprintf(format, most), measured/most, 1)
}

// times compares medians. The ratio is the median of the single ones, each beside its own floor, a sum of two:
// so the machine's changes of pace don't count.
func (m *measurement) times(what, floor string, goal float64, measured, first, second []time.Duration) {
	var ratios []float64
	for i := range measured {
		ratios = append(ratios, float64(measured[i])/float64(first[i]+second[i]))
	}
	m.compare(what, ms(median(measured)), ms(median(first)+median(second))+" ("+floor+")", median(ratios), goal)
}

func (m *measurement) memory(when string, goal float64) {
	m.below("Memory "+when, "%.1f MiB", field(m.program, "status", "VmRSS:")/1024, goal)
}

func TestMeasure(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("make measure must run as root")
	}
	c := newCluster(t)
	*c.table = [][]string{{"what", "measured", "beside", "ratio (median of pairs)", "goal"}}
	m := &measurement{cluster: c, admin: newAdmin(c.kubectl(strings.Fields(viewConfig)...))}
	c.kubectl("-n", "kube-system", "rollout", "restart", "daemonset/packetcapture") // what it did before is no idleness
	c.kubectl("-n", "kube-system", "rollout", "status", "daemonset/packetcapture", "--timeout=3m")
	for _, pid := range c.hostPIDs("packetcapture", "") {
		m.program, m.root = pid, fmt.Sprintf("/proc/%d/root", pid)
	}
	if m.program == 0 {
		t.Fatal("no packetcapture on " + c.node)
	}
	m.memory("idle", 8.2)
	c.create(c.manifest("web", options{command: "exec sleep infinity"}))
	c.wait(ready, "web")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	raw := m.watch(ctx, c.namespace, "web")
	<-raw // ADDED
	m.one(raw)
	m.another(raw)
	m.changes(raw)
	m.live()
	m.waiting()
	m.hundred()
	info := check(os.Stat(fmt.Sprintf("/proc/%d/exe", m.program)))
	m.below("The program", "%.2f MB", float64(info.Size())/1e6, 7)
	packages, added := installed(c.image), layers(c.image)
	m.compare("The image, above its base", fmt.Sprintf("%.1f MB", added),
		fmt.Sprintf("%.1f MB (7 MB, tcpdump and its libraries)", 7+packages), added/(7+packages), 1.1)
	c.write("measure.txt", *c.table, loss(t, m.arguments), load(t))
}

// one starts and stops the capture of one pod, twenty times, each beside its floor.
func (m *measurement) one(raw chan rawEvent) {
	sleeper := m.hostPIDs("sleep", "infinity")["web"]
	file, floorFile := m.root+"/capture-web.pcap0", m.TempDir()+"/floor.pcap"
	var start, started, run, stop, stopped, end []time.Duration
	for range 20 {
		drain(raw)
		began := m.patch(m.namespace, "web", files(`"2"`))
		start = append(start, closely(m, "a file", func() bool { return exists(file) }).Sub(began))
		started = append(started, (<-raw).Sub(began))

		began = time.Now()
		floor := plain(sleeper, floorFile)
		run = append(run, closely(m, "the floor's file", func() bool { return exists(floorFile + "0") }).Sub(began))
		quietly(200 * time.Millisecond)
		for _, pid := range m.hostPIDs("tcpdump", "/capture-web.pcap") {
			words := strings.Split(readFile(fmt.Sprintf("/proc/%d/cmdline", pid)), "\x00")
			for _, option := range []string{"-W", "-w"} {
				i := slices.Index(words, option)
				words = slices.Delete(words, i, i+2)
			}
			m.arguments, _, _ = strings.Cut(strings.Join(words[1:], " "), " -- ") // an empty filter follows
		}

		began = m.patch(m.namespace, "web", files("null"))
		stop = append(stop, closely(m, "no file", func() bool { return !exists(file) }).Sub(began))
		stopped = append(stopped, (<-raw).Sub(began))
		began = time.Now()
		floor.Process.Signal(syscall.SIGTERM)
		floor.Wait()
		end = append(end, time.Since(began))
		os.Remove(floorFile + "0")
	}
	m.times("Start: PATCH to the first file", "raw event + nsenter tcpdump", 1.10, start, started, run)
	m.times("Stop: PATCH to tcpdump and files gone", "raw event + SIGTERM to exit", 1.10, stop, stopped, end)
}

func drain(raw chan rawEvent) {
	for len(raw) > 0 {
		<-raw
	}
}

// another changes N twenty times, each time beside a plain tcpdump that is ended and started again. The names
// of the files differ with N.
func (m *measurement) another(raw chan rawEvent) {
	var took, seen, floors []time.Duration
	sleeper, floorFile := m.hostPIDs("sleep", "infinity")["web"], m.TempDir()+"/floor.pcap"
	m.patch(m.namespace, "web", files(`"2"`))
	last, floor := m.root+"/capture-web.pcap0", plain(sleeper, floorFile)
	for i := range 20 {
		closely(m, "a file", func() bool { return exists(last) && exists(floorFile+"0") })
		quietly(300 * time.Millisecond)
		last = m.root + []string{"/capture-web.pcap00", "/capture-web.pcap0"}[i%2]
		drain(raw)
		began := m.patch(m.namespace, "web", files([]string{`"12"`, `"2"`}[i%2]))
		took = append(took, closely(m, "the new file", func() bool { return exists(last) }).Sub(began))
		seen = append(seen, (<-raw).Sub(began))

		began = time.Now()
		floor.Process.Signal(syscall.SIGTERM)
		floor.Wait()
		os.Remove(floorFile + "0")
		floor = plain(sleeper, floorFile)
		floors = append(floors, closely(m, "the floor's new file", func() bool { return exists(floorFile + "0") }).Sub(began))
	}
	floor.Process.Kill()
	floor.Wait()
	m.patch(m.namespace, "web", files("null"))
	closely(m, "no file", func() bool { return !exists(last) })
	m.below("N changed: PATCH to the new tcpdump's first file", "%.1f ms", float64(median(took))/1e6, 45)
	m.times("the same", "raw event + SIGTERM to the first file of nsenter tcpdump", 1.10, took, seen, floors)
}

// live measures how late `make live` is: from a packet's own time to its arrival on stdout.
func (m *measurement) live() {
	m.annotate("web", "=2", "/filter=udp port 4444")
	closely(m, "a file", func() bool { return exists(m.root + "/capture-web.pcap0") })
	cmd, _, said := m.make("live", "POD=web")
	cmd.Stdout = nil
	stdout := check(cmd.StdoutPipe())
	check(0, cmd.Start())
	defer func() { cmd.Process.Signal(syscall.SIGTERM); cmd.Wait() }()
	header := make([]byte, 24) // it listens
	check(io.ReadFull(stdout, header))
	const packets = 300
	sender := m.command("exec", "web", "--", "bash", "-c",
		fmt.Sprintf("for ((i = 0; i < %d; i++)); do echo hello >/dev/udp/192.0.2.1/4444; sleep 0.02; done", packets))
	check(0, sender.Start())
	var late []float64 // milliseconds
	for range packets {
		head := make([]byte, 16)
		if _, err := io.ReadFull(stdout, head); err != nil {
			m.Fatalf("make live ended after %d packets: %v: %s", len(late), err, said)
		}
		check(io.ReadFull(stdout, make([]byte, binary.LittleEndian.Uint32(head[8:]))))
		sent := time.Unix(int64(binary.LittleEndian.Uint32(head)), int64(binary.LittleEndian.Uint32(head[4:]))*1000)
		late = append(late, float64(time.Since(sent).Microseconds())/1000)
	}
	check(0, sender.Wait())
	slices.Sort(late)
	m.below("`make live`: from a packet's time to stdout, median", "%.1f ms", median(late), 5)
	m.below("the same, of 95 % of the packets", "%.1f ms", late[packets*95/100], 5)
	m.annotate("web", "-", "/filter-")
	closely(m, "no file", func() bool { return !exists(m.root + "/capture-web.pcap0") })
}

// waiting has five pods wait for an interface that is not there, and five that do not run because of a
// volume that is missing.
func (m *measurement) waiting() {
	var manifests []map[string]any
	for i := range 10 {
		o := options{command: "exec sleep infinity", annotations: []string{"=1", "/interface=net9"}}
		if i >= 5 {
			o = options{volume: "missing", annotations: []string{"=1"}}
		}
		manifests = append(manifests, m.manifest(fmt.Sprint("waits-", i), o))
	}
	m.create(manifests...)
	for i := range 10 {
		m.told(fmt.Sprint("waits-", i), "CaptureWaiting")
	}
	const during = 20 * time.Second
	before := cpu(m.program)
	quietly(during)
	m.below("CPU with ten pods that wait", "%.1f %% of a core", 100*(cpu(m.program)-before).Seconds()/during.Seconds(), 3)
	m.kubectl("delete", "pod", "-l", "app=waits")
}

// changes makes 3,000 changes that need nothing done: what do they cost?
func (m *measurement) changes(raw chan rawEvent) {
	const changes = 3000
	reader := exec.Command(os.Args[0])
	reader.Env = append(os.Environ(), "GOMAXPROCS=1", "TEST_READER="+m.kubectl(strings.Fields(viewConfig)...), "TEST_READER_NODE="+m.node)
	check(0, reader.Start())
	defer func() { reader.Process.Kill(); reader.Wait() }()
	received := func() float64 { return field(m.program, "net/dev", "eth0:") }
	closely(m, "the reader runs", func() bool { return cpu(reader.Process.Pid) > 0 })
	quietly(2 * time.Second) // it watches, and both are idle
	drain(raw)
	spent, readers, bytes := cpu(m.program), cpu(reader.Process.Pid), received()
	for i := range changes {
		m.patch(m.namespace, "web", fmt.Sprintf(`"labels":{"change":"%d"}`, i))
	}
	size := 0
	for range changes {
		size += (<-raw).bytes
	}
	each := func(d time.Duration) float64 { return float64(d.Microseconds()) / changes / 1000 }
	ours, floor := each(cpu(m.program)-spent), each(cpu(reader.Process.Pid)-readers)
	m.compare("CPU for a change that needs nothing, one by one", fmt.Sprintf("%.3f ms", ours),
		fmt.Sprintf("%.3f ms (a Go program that only reads the watch)", floor), ours/floor, 1.6)
	wire, json := (received()-bytes)/changes, float64(size)/changes
	m.compare("Bytes for a change, on the wire", fmt.Sprintf("%.0f", wire), fmt.Sprintf("%.0f (its metadata as JSON)", json), wire/json, 1.15)
	m.memory(fmt.Sprintf("after %d changes", changes), 12)
}

// hundred has 100 pods annotated and released at once, beside as many plain tcpdumps. A node takes 110.
func (m *measurement) hundred() {
	const many = 100
	var manifests []map[string]any
	var names []string
	for i := range many {
		names = append(names, fmt.Sprintf("many-%d", i))
		manifests = append(manifests, m.manifest(names[i], options{command: "exec sleep infinity"}))
	}
	m.create(manifests...)
	m.wait(ready, "-l", "app=many")
	sleepers, folder := m.hostPIDs("sleep", "infinity"), m.TempDir()
	all := func(prefix string, want bool) func() bool {
		left := slices.Clone(names)
		return func() bool {
			left = slices.DeleteFunc(left, func(name string) bool { return exists(prefix+name+".pcap0") == want })
			return len(left) == 0
		}
	}
	patchAll := func(body string) time.Time {
		began := time.Now()
		var group sync.WaitGroup
		for _, name := range names {
			group.Go(func() { m.patch(m.namespace, name, body) })
		}
		group.Wait()
		return began
	}
	var start, stop, plainStart, plainStop, patches []time.Duration
	for round := range 5 {
		began := time.Now()
		var children []*exec.Cmd
		for _, name := range names {
			children = append(children, plain(sleepers[name], folder+"/"+name+".pcap"))
		}
		plainStart = append(plainStart, closely(m, "all plain files", all(folder+"/", true)).Sub(began))
		quietly(time.Second)
		began = time.Now()
		for _, child := range children {
			child.Process.Signal(syscall.SIGTERM)
		}
		for i, child := range children {
			child.Wait()
			os.Remove(folder + "/" + names[i] + ".pcap0")
		}
		plainStop = append(plainStop, time.Since(began))
		began = patchAll(fmt.Sprintf(`"annotations":{"other":"%d"}`, round))
		patches = append(patches, time.Since(began)) // the API server's share: as many changes that need nothing done
		began = patchAll(files(`"2"`))
		start = append(start, closely(m, "all files", all(m.root+"/capture-", true)).Sub(began))
		quietly(time.Second)
		if round == 0 {
			m.memory(fmt.Sprintf("with %d captures", many), 13)
		}
		began = patchAll(files("null"))
		stop = append(stop, closely(m, "no file", all(m.root+"/capture-", false)).Sub(began))
	}
	m.times(fmt.Sprintf("%d pods annotated at once: all captured", many), "plain tcpdumps + PATCHes", 1.3, start, plainStart, patches)
	m.times(fmt.Sprintf("%d pods released at once: all gone", many), "SIGTERM to exits + PATCHes", 1.3, stop, plainStop, patches)
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

func check[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
