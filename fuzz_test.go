package main

import (
	"bytes"
	"encoding/json"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// The fuzz targets are about what comes from outside: `go test -fuzz FuzzAnnotation` and so on.

// C2, C8, C9: what is accepted is a plain number and a line of text, and what is refused is said in a bounded one.
func FuzzAnnotation(f *testing.F) {
	for _, value := range []string{"1", "5", "10", "2147483647", "2147483648", "", "0", "-1", "+1", "01", " 1", "1 ", "5abc", "1M",
		"1e3", "0x10", "1_000", "٣", "９", "99999999999999999999", "\x00", "\xff", strings.Repeat("9", 300)} {
		f.Add(value, "")
	}
	for _, filter := range []string{"tcp port 80", "-w /etc/passwd", "host é", "a\nb", "\x00", "\xff", strings.Repeat("x", 4096),
		strings.Repeat("x", 4097)} {
		f.Add("5", filter)
	}
	number := regexp.MustCompile(`^[1-9][0-9]*$`)
	f.Fuzz(func(t *testing.T, value, filter string) {
		r, err := parseRequest(value, filter)
		n, numberErr := strconv.ParseUint(value, 10, 64)
		isNumber := number.MatchString(value) && numberErr == nil && n <= math.MaxInt32
		isFilter := len(filter) <= 4096 && !strings.ContainsAny(filter, "\x00\n\r\t\x1b\x7f")
		if err == nil {
			if !isNumber || !isFilter || uint64(r.n) != n || r.filter != filter {
				t.Fatalf("%q, %q is taken for %+v", value, filter, r)
			}
			return
		}
		isPlain := strings.Trim(filter, "abcdefghijklmnopqrstuvwxyz0123456789 -./()[]&|!=<>:") == ""
		if isNumber && isFilter && isPlain {
			t.Fatalf("%q, %q is refused: %v", value, filter, err)
		}
		if r != (request{}) {
			t.Fatalf("%q, %q is refused and asks for %+v", value, filter, r)
		}
		text := err.Error()
		if !utf8.ValidString(text) || len(text) > 600 || strings.ContainsAny(text, "\x00\n\r\x1b") {
			t.Fatalf("%q, %q is refused with %q", value, filter, text)
		}
	})
}

// reply is an http.RoundTripper that answers 200 with a body.
type reply string

func (a reply) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(string(a))), Request: r}, nil
}

// answered is a watch that is answered that, and which gets on with any number of changes.
func answered(account, body string) (*podWatch, chan change) {
	changes := make(chan change, len(body)+1)
	k := &kube{api: "https://kubernetes.test", account: account}
	k.http.Transport = reply(body)
	return &podWatch{kube: k, node: "node-1", changes: changes, version: "v1", fresh: true, known: map[string]pod{}, retry: requestBackoff}, changes
}

// account makes a service account's folder with a token.
func account(f testing.TB) string {
	dir := f.TempDir()
	must(f, os.WriteFile(filepath.Join(dir, "token"), []byte("token"), 0o600))
	return dir
}

// C6: whatever a watch says, its version is the one of the last whole event before the first trouble, of an ERROR never.
func FuzzWatchFrames(f *testing.F) {
	web := fakePod{"default", "web", "uid-web", map[string]string{annotation: "5"}, 7}.object()
	added, deleted := string(watchFrame("ADDED", web)), string(watchFrame("DELETED", web))
	for _, body := range []string{"", "\n", added, added + deleted, added[:len(added)/2], added + deleted[:len(deleted)-2],
		string(bookmarkFrame(9)), added + string(errorFrame(410, "too old")), added + "garbage", `{"type":"ADDED","object":null}`,
		`{"type":"ADDED","object":{"metadata":{"resourceVersion":""}}}`, `{"type":7}`, `[]`, "null", "{}", "\x00\xff",
		`{"type":"ERROR","object":{"code":"x","metadata":{"resourceVersion":"v9"}}}`,
		`{"type":"ADDED","object":{"metadata":{"name":"../x","uid":"u","resourceVersion":"v9","annotations":{"tcpdump.antrea.io":"5"}}}}`,
		added + strings.Repeat(" ", 5000) + deleted, strings.Repeat("[", 20000)} {
		f.Add(body)
	}
	dir := account(f)
	f.Fuzz(func(t *testing.T, body string) {
		w, got := answered(dir, body)
		err := w.watch(t.Context())
		version, changes, known := "v1", 0, map[string]pod{}
		for decoder := json.NewDecoder(strings.NewReader(body)); ; {
			var raw json.RawMessage
			var e watchEvent
			if decoder.Decode(&raw) != nil || json.Unmarshal(raw, &e) != nil || e.Type == "ERROR" ||
				e.Object.Metadata.ResourceVersion == "" {
				break
			}
			version = e.Object.Metadata.ResourceVersion
			p := e.Object.pod()
			name := p.namespace + "/" + p.name
			if before := known[name]; e.Type == "BOOKMARK" || before == p && e.Type != "DELETED" {
				continue
			} else if p.annotated && e.Type != "DELETED" {
				known[name] = p
			} else if before == (pod{}) {
				continue
			} else {
				delete(known, name)
			}
			changes++
		}
		if w.version != version {
			t.Errorf("the version is %q, not %q: %v", w.version, version, err)
		}
		if len(got) != changes {
			t.Errorf("%d changes, not %d", len(got), changes)
		}
		for len(got) > 0 {
			checkPods(t, <-got)
		}
	})
}

// checkPods: an annotated Pod has a UID, and its name is part of no path (C8).
func checkPods(t *testing.T, c change) {
	for _, p := range c.pods {
		if p.annotated && (p.uid == "" || strings.Contains(p.name, "/") || p.kubeletUID == "") {
			t.Errorf("a Pod is taken: %+v", p)
		}
	}
}

// C6: a list is taken whole and with a version, or not at all.
func FuzzList(f *testing.F) {
	pod := `{"metadata":{"namespace":"default","name":"web","uid":"u","annotations":{"tcpdump.antrea.io":"5"}}}`
	for _, body := range []string{"", "{}", "null", `{"items":[]}`, `{"metadata":{"resourceVersion":"v9"}}`,
		`{"metadata":{"resourceVersion":"v9"},"items":[` + pod + `]}`, `{"metadata":{"resourceVersion":"v9"},"items":[` + pod + `,`,
		`{"metadata":{"resourceVersion":"v9"},"items":{"a":1}}`, `{"metadata":{"resourceVersion":9},"items":[` + pod + `]}`,
		`{"items":[` + pod + `]}`, `{"metadata":{"resourceVersion":"v9"},"items":[null,{}]}`, "<html>", "\x00\xff"} {
		f.Add(body)
	}
	dir := account(f)
	f.Fuzz(func(t *testing.T, body string) {
		take := func(body string) (w *podWatch, got chan change) {
			w, got = answered(dir, body)
			w.fresh = false
			err := w.list(t.Context())
			if w.fresh != (err == nil) || w.fresh != (len(got) == 1) || !w.fresh && w.version != "v1" || w.version == "" {
				t.Fatalf("fresh: %v, version %q, %d changes, error: %v, of %q", w.fresh, w.version, len(got), err, body)
			}
			return w, got
		}
		var page struct {
			Metadata listMetadata `json:"metadata"`
			Items    []object     `json:"items"`
		}
		if strings.Contains(strings.ToLower(body), "continue") || strings.Contains(body, `\u`) {
			return // it would go on for ever
		}
		isList := json.NewDecoder(strings.NewReader(body)).Decode(&page) == nil
		if w, got := take(body); w.fresh {
			checkPods(t, <-got)
			if !json.Valid([]byte(body)) && json.NewDecoder(strings.NewReader(body)).Decode(new(map[string]any)) != nil {
				t.Errorf("%q is taken", body)
			}
		}
		// The same in the API server's own spelling: each key once, in lower case.
		if body, err := json.Marshal(page); isList && err == nil && page.Metadata.ResourceVersion != "" {
			w, got := take(string(body))
			if !w.fresh || w.version != page.Metadata.ResourceVersion {
				t.Fatalf("%q is not taken: version %q", body, w.version)
			}
			want := slices.DeleteFunc(page.Items, func(o object) bool { return !o.pod().annotated })
			if c := <-got; c.kind != "LISTED" || len(c.pods) != len(want) {
				t.Errorf("%d Pods of %d in %q", len(c.pods), len(want), body)
			}
		}
	})
}

// C3: a process that is noted for a Pod is found to be in that Pod when it is looked at again.
func FuzzCgroup(f *testing.F) {
	const uid = "12345678-90ab-cdef-1234-567890abcdef"
	for _, cgroup := range []string{"", "\n", cgroupOf(uid), "11:memory:/kubepods/besteffort/pod" + uid + "/cafe\n", "0::/init.scope\n",
		"0::/kubepods/pod" + uid + "/1234", "0::/podpod" + uid, "0::/pod", "0::/-pod.slice", "0::/x-pod_.slice", "0::/.slice", "0::/a.slice/pod-pod-x",
		"0::/kubepods.slice/kubepods-pod1_2.slice/crio-1.scope/kubepods.slice/kubepods-pod3_4.slice", "0::/pod_x", "0::/pod\xff\n\n//"} {
		f.Add(cgroup)
	}
	dir := f.TempDir()
	must(f, os.MkdirAll(filepath.Join(dir, "7"), 0o755))
	f.Fuzz(func(t *testing.T, cgroup string) {
		must(t, os.WriteFile(filepath.Join(dir, "7", "cgroup"), []byte(cgroup), 0o644))
		s := &sandboxes{proc: dir, pids: map[string]map[int]bool{}}
		s.note(7)
		text := readFile(filepath.Join(dir, "7", "cgroup"))
		for noted, pids := range s.pids {
			if strings.Contains(noted, "_") { // no UID has one: it is never asked for
				continue
			}
			if !inPod(text, noted) || !pids[7] || len(pids) != 1 {
				t.Errorf("%q is noted for %q, and is not found in it", cgroup, noted)
			}
		}
	})
}

// C3: a /proc/<pid>/stat that has no field 22 is the youngest, so that it is never preferred.
func FuzzStat(f *testing.F) {
	for _, command := range []string{"pause", "a b", "x) S 1 (y", "", ")", "((", "\n", "\xff"} {
		f.Add(command, uint64(42), "1 (pause) S 1 2 3")
	}
	f.Add("pause", uint64(math.MaxUint64), "")
	f.Add("pause", uint64(0), "1 (pause) S"+strings.Repeat(" x", 30))
	f.Fuzz(func(t *testing.T, command string, born uint64, any string) {
		line := "12 (" + command + ") S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 " + strconv.FormatUint(born, 10) + " 1000 2000\n"
		if ticks := startTime(line); ticks != born {
			t.Errorf("%q started at %d, not %d", line, ticks, born)
		}
		if ticks := startTime(any); len(strings.Fields(any)) < 20 && ticks != math.MaxUint64 {
			t.Errorf("%q started at %d", any, ticks)
		}
	})
}

// C7: what tcpdump says is read the same however it arrives, and takes no memory to speak of.
func FuzzOutput(f *testing.F) {
	const listening = "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n"
	for _, text := range []string{"", "\n", listening, listening + closing, closing, "tcpdump: syntax error\n", "tcpdump: eth0: No such device exists\n",
		"nsenter: failed to execute tcpdump: No such file or directory\n", "1 packet captured\n", " packets captured\n", "x packets captured",
		listening + "tcpdump: pcap_loop: The interface disappeared\n" + closing, "99999999999999999999999999 packets captured\r\n", "\x00\xff: ",
		"tcpdump: /capture-web.pcap: Permission denied\n", strings.Repeat("x", 5000) + listening} {
		f.Add([]byte(text), []byte{1, 7, 255})
	}
	f.Fuzz(func(t *testing.T, text, sizes []byte) {
		read := func(o *output) string {
			return o.complaint() + "|" + o.counts() + "|" + strconv.FormatBool(o.refusesFilter("/capture-web.pcap")) +
				"|" + strconv.FormatBool(o.listens)
		}
		whole, told := &output{}, 0
		whole.onListen = func() { told++ }
		whole.Write(text)
		parts, toldParts := &output{}, 0
		parts.onListen = func() { toldParts++ }
		rest := text
		for i := 0; len(rest) > 0; i++ {
			size := 1
			if len(sizes) > 0 {
				size += int(sizes[i%len(sizes)])
			}
			size = min(size, len(rest))
			if n, err := parts.Write(bytes.Clone(rest[:size])); n != size || err != nil {
				t.Fatalf("Write returns %d, %v", n, err)
			}
			if rest = rest[size:]; cap(parts.text) > 64<<10 || len(parts.text) > 4096 {
				t.Fatalf("%d of %d bytes are kept", len(parts.text), cap(parts.text))
			}
		}
		if told > 1 || toldParts > 1 || told == 1 != bytes.Contains(text, []byte("listening on ")) {
			t.Errorf("that it listens is told %d and %d times", told, toldParts)
		}
		if len(text) <= 4096 && read(whole) != read(parts) {
			t.Errorf("%q is %q, and in parts %q", text, read(whole), read(parts))
		}
	})
}

// TestOutputMemory: a child that talks without end takes no memory.
func TestOutputMemory(t *testing.T) {
	o := &output{onListen: func() {}}
	line := []byte(strings.Repeat("tcpdump: noise ", 100) + "\n")
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range 10_000 {
		o.Write(line)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if after.HeapAlloc > before.HeapAlloc+1<<20 || len(o.text) > 4096 {
		t.Errorf("%d bytes after 15 MB, %d before", after.HeapAlloc, before.HeapAlloc)
	}
	runtime.KeepAlive(o)
}
