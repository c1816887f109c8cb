//go:build e2e

package test

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// How the program stands a flood of changes. No API server on this machine could make a thousand of them a
// second, so here the program runs by itself, beside a server that only sends a watch's events.

// loadScript makes the program's world in the folder $0, and becomes the program, as process 1 of its own. One
// pod has a process in the network namespace $1; its cgroup is $2.
const loadScript = `
cd $0
mkdir -p usr etc dev proc tmp sys/fs/cgroup/kubepods/$2
for folder in bin sbin lib lib64; do ln -s usr/$folder $folder; done
for folder in usr etc dev; do mount --rbind /$folder $folder; done
mount -t proc proc proc
touch sys/fs/cgroup/cgroup.controllers
nsenter --net=/run/netns/$1 sleep 3600 &
echo $! >sys/fs/cgroup/kubepods/$2/cgroup.procs
exec chroot . /packetcapture`

// loaded is the program, which captures the one pod web.
type loaded struct {
	*testing.T
	pid    int
	root   string
	frames chan []byte // what the open watch sends next
	begins chan bool   // a watch does
	isNew  atomic.Bool // the server has no history: a watch must begin anew
}

const loadUID = "1b2c3d4e-0000-4000-8000-00000000000a"

func newLoaded(t *testing.T) *loaded {
	l := &loaded{T: t, root: t.TempDir(), frames: make(chan []byte, 200_000), begins: make(chan bool, 100)}
	server := httptest.NewUnstartedServer(l)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.CloseClientConnections)
	account := l.root + "/var/run/secrets/kubernetes.io/serviceaccount"
	check(0, os.MkdirAll(account, 0o755))
	check(0, os.WriteFile(account+"/token", []byte("token"), 0o600))
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	check(0, os.WriteFile(account+"/ca.crt", ca, 0o600))
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", l.root+"/packetcapture", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}

	s := &sniffed{T: t, name: fmt.Sprintf("load-%d", time.Now().UnixNano())}
	t.Cleanup(func() { exec.Command("bash", "-c", "ip netns delete $0; ip netns delete $0-peer", s.name).Run() })
	s.bash(linkScript)
	program := exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-ec", loadScript, l.root, s.name, "pod"+loadUID)
	host, port, _ := strings.Cut(strings.TrimPrefix(server.URL, "https://"), ":")
	program.Env = append(os.Environ(), "NODE_NAME=node-1", "KUBERNETES_SERVICE_HOST="+host, "KUBERNETES_SERVICE_PORT="+port,
		"DISK_FREE=0", "GOMAXPROCS=1", "GOGC=25") // as in daemonset.yaml
	check(0, program.Start())
	t.Cleanup(func() { program.Process.Kill(); program.Wait() })
	select {
	case <-l.begins:
	case <-time.After(patience):
		t.Fatal("the program does not watch")
	}
	children := readFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", program.Process.Pid))
	l.pid = check(strconv.Atoi(strings.TrimSpace(children)))
	return l
}

// ServeHTTP answers a watch with frames as they come, and takes Events.
func (l *loaded) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == "POST" {
		w.WriteHeader(http.StatusCreated)
		return
	}
	if r.URL.Query().Get("resourceVersion") == "0" {
		l.isNew.Store(false)
	} else if l.isNew.Load() {
		http.Error(w, `{"kind":"Status","code":410,"message":"too old"}`, http.StatusGone)
		return
	}
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	l.begins <- true
	for {
		select {
		case frame := <-l.frames:
			if frame == nil { // the watch ends
				return
			}
			w.Write(frame)
			if len(l.frames) == 0 {
				w.(http.Flusher).Flush()
			}
		case <-r.Context().Done():
			return
		}
	}
}

// frame is an event of a pod with an annotation of some size, and that of the number of files if it has one.
func frame(kind, name, uid, files string, size int) []byte {
	annotations := map[string]string{"other": strings.Repeat("x", size)}
	if files != "" {
		annotations[annotation] = files
	}
	type object = map[string]any
	return append(check(json.Marshal(object{"type": kind, "object": object{"metadata": object{"namespace": "default", "name": name,
		"uid": uid, "resourceVersion": "7", "annotations": annotations}}})), '\n')
}

func (l *loaded) web(files string) { l.frames <- frame("MODIFIED", "web", loadUID, files, 3000) }

// stops is the median of how long after a stop was told the file of web is gone.
func (l *loaded) stops(times int, tell func()) time.Duration {
	var took []time.Duration
	for range times {
		l.web("1")
		isThere := func() bool { return exists(filepath.Join(l.root, "capture-web.pcap")) }
		closely(l, "a file", isThere)
		time.Sleep(300 * time.Millisecond) // it captures quietly
		began := time.Now()
		tell()
		took = append(took, closely(l, "no file", func() bool { return !isThere() }).Sub(began))
	}
	return median(took)
}

// memory is in MiB, and of the program alone: no pages of files.
func (l *loaded) memory() float64 { return field(l.pid, "status", "RssAnon:") / 1024 }

// load measures that no stop is delayed by more than 100 ms by 1,000 changes a second, and that memory does
// not grow.
func load(t *testing.T) (table [][]string) {
	l := newLoaded(t)
	row := func(cells ...string) { table = append(table, cells) }
	row("load", "measured", "beside")
	byEvent, other := func() { l.web("") }, frame("MODIFIED", "other", "uid", "", 3000)
	quiet, idle := l.stops(20, byEvent), l.memory()

	count, stop, done := 0, make(chan bool), make(chan bool)
	before, began := cpu(l.pid), time.Now()
	go func() {
		defer close(done)
		for tick := time.Tick(10 * time.Millisecond); ; count += 10 {
			select {
			case <-tick:
				for range 10 {
					l.frames <- other
				}
			case <-stop:
				return
			}
		}
	}()
	busy := l.stops(20, byEvent)
	close(stop)
	<-done
	row("A stop, at 1,000 changes a second", ms(busy), ms(quiet)+" without")
	row(fmt.Sprintf("CPU for a change, at %.0f a second", float64(count)/time.Since(began).Seconds()),
		fmt.Sprintf("%.3f ms", float64((cpu(l.pid)-before).Microseconds())/1000/float64(count)), "")

	var many [][]byte
	for i := range 500 {
		many = append(many, frame("ADDED", fmt.Sprint("other-", i), fmt.Sprint("uid-", i), "", 20_000))
	}
	anew := func(pods [][]byte) func() { // the watch ends, and begins again with all pods
		return func() {
			l.isNew.Store(true)
			l.frames <- nil
			for _, pod := range pods {
				l.frames <- pod
			}
			l.frames <- []byte(`{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"9"}}}` + "\n")
		}
	}
	short, long := l.stops(3, anew(nil)), l.stops(3, anew(many))
	row("A stop, by a watch that begins again with 500 pods of 20 kB and without the captured one", ms(long), ms(short)+" without pods")
	row("Memory after these", fmt.Sprintf("%.1f MiB anonymous", l.memory()), fmt.Sprintf("%.1f MiB before", idle))
	var grown [2]float64
	for i, changes := range []int{10_000, 90_000} {
		for range changes {
			l.frames <- other
		}
		l.stops(1, byEvent) // what comes behind them
		grown[i] = l.memory()
	}
	row("Memory after 100,000 changes", fmt.Sprintf("%.1f MiB anonymous", grown[1]), fmt.Sprintf("%.1f MiB after 10,000", grown[0]))
	if busy > quiet+100*time.Millisecond {
		t.Errorf("a stop takes %v at 1,000 changes a second, in quiet %v", busy, quiet)
	}
	if grown[1] > grown[0]+1 || grown[0] > idle+5 {
		t.Errorf("memory grows: %.1f MiB, after new watches and 10,000 changes %.1f, after 100,000 %.1f", idle, grown[0], grown[1])
	}
	return table
}
