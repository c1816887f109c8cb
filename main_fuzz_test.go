package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// The fuzz targets are about what comes from outside: `go test -fuzz FuzzAnnotations` and so on.

// C2, C8, C9, C10: what is accepted is a plain number, a line of text and a name, and what is refused is said in a bounded line.
func FuzzAnnotations(f *testing.F) {
	for _, value := range []string{"1", "10", "100", "101", "", "0", "-1", "+1", "01", " 1", "5abc", "1M", "1e3", "0x10", "1_0", "٣",
		"99999999999999999999", "\x00", "\xff", strings.Repeat("9", 300)} {
		f.Add(value, "", "", false)
	}
	for _, filter := range []string{"tcp port 80", " udp\n", "-w /etc/passwd", "host é", "a\nb", "\x00", "\xff", "\u2028", strings.Repeat("x", 1024),
		strings.Repeat("é", 513)} {
		f.Add("5", filter, "", false)
	}
	for _, iface := range []string{"lo", "any", "net1.100", "", "-i", "a/b", "interface-of-15", "interface-of-16c", "é", "..", "\n"} {
		f.Add("5", "", iface, true)
	}
	w := newPodWatch(&node{disk: newDisk(config{diskLimit: 100 * fileBytes})})
	w.start = func(context.Context, io.Writer, *os.File, ...string) (*child, error) {
		return nil, errors.New("no tcpdump")
	}
	number, name := regexp.MustCompile(`^([1-9][0-9]?|100)$`), regexp.MustCompile(`^[\w.][\w.-]{0,14}$`)
	f.Fuzz(func(t *testing.T, value, filter, iface string, hasIface bool) {
		p := pod{namespace: "default", name: "web", uid: "u", annotated: true, value: value, filter: filter, iface: iface, hasIface: hasIface}
		if !hasIface {
			p.iface = ""
		}
		asked, err := w.check(t.Context(), p)
		line := strings.TrimSpace(filter)
		isSimple := number.MatchString(value) && (!hasIface || name.MatchString(iface)) && len(line) <= 1024
		if err != nil {
			if text := err.Error(); !utf8.ValidString(text) || len(text) > 1000 || strings.ContainsAny(text, "\x00\n\r\x1b\x7f") {
				t.Fatalf("%+v is refused with %q", p, text)
			}
			if isSimple && strings.Trim(line, "abcdefghijklmnopqrstuvwxyz0123456789 -./()[]&|!=<>:") == "" {
				t.Fatalf("%+v is refused: %v", p, err)
			}
			return
		}
		if !isSimple || strings.ContainsAny(line, "\x00\n\r\t\x1b\x7f") || strconv.Itoa(asked.n) != value || asked.filter != line || asked.iface != p.iface {
			t.Fatalf("%+v is taken for %+v", p, asked)
		}
		arguments := (&capture{asked: asked, stem: "/capture-web.pcap"}).arguments("eth0")
		if end := arguments[len(arguments)-2:]; line != "" && (end[0] != "--" || end[1] != line) {
			t.Fatalf("the filter is no last argument behind --: %q", arguments)
		}
	})
}

// noTcpdump is a starter: a filter that can't be compiled is taken, and the capture tells.
func noTcpdump(context.Context, io.Writer, *os.File, ...string) (*child, error) {
	return nil, errors.New("no tcpdump")
}

// reply is an http.RoundTripper that answers 200 with a body.
type reply string

func (a reply) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(string(a))), Request: r}, nil
}

// answered is a watch of a node without processes, whose requests are all answered that. Its captures end with the test.
func answered(t testing.TB, cfg config, body string) (w *podWatch, ctx context.Context) {
	n, err := newNode(cfg)
	must(t, err)
	n.kube.http.Transport, n.start = reply(body), noTcpdump
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); n.alive.Wait() })
	w = newPodWatch(n)
	w.version = "v1"
	return w, ctx
}

// follows checks which pods a watch follows, by UID: annotated ones alone, whose names are part of no path (C8).
func follows(t *testing.T, w *podWatch, want map[string]pod) {
	t.Helper()
	for uid, f := range w.captures {
		if f.pod != want[uid] || uid == "" || f.kubeletUID == "" || !f.annotated || strings.Contains(f.name, "/") {
			t.Errorf("%q is followed as %+v, want %+v", uid, f.pod, want[uid])
		}
	}
	if len(w.captures) != len(want) {
		t.Errorf("%d pods are followed, want %d", len(w.captures), len(want))
	}
}

// C6: whatever a watch says, its version is the one of the last whole event before the first trouble, of an ERROR never,
// and what it follows are the pods of the events until then.
func FuzzWatch(f *testing.F) {
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
	cfg := testConfig(f, newProc(f).dir, f.TempDir())
	f.Fuzz(func(t *testing.T, body string) {
		w, ctx := answered(t, cfg, body)
		err := w.watch(ctx)
		version, want := "v1", map[string]pod{}
		for decoder := json.NewDecoder(strings.NewReader(body)); ; {
			var e watchEvent
			if decoder.Decode(&e) != nil || e.Type == "ERROR" || e.Object.Metadata.ResourceVersion == "" {
				break
			}
			version = e.Object.Metadata.ResourceVersion
			p := e.Object.pod()
			isNews := e.Type == "ADDED" || e.Type == "MODIFIED"
			if isNews && p.annotated {
				want[p.uid] = p
			} else if isNews || e.Type == "DELETED" {
				delete(want, p.uid)
			}
		}
		if w.version != version {
			t.Errorf("the version is %q, not %q: %v", w.version, version, err)
		}
		follows(t, w, want)
	})
}

// C6: a list is taken whole and with a version, or not at all.
func FuzzList(f *testing.F) {
	item := `{"metadata":{"namespace":"default","name":"web","uid":"u","annotations":{"tcpdump.antrea.io":"5"}}}`
	for _, body := range []string{"", "{}", "null", `{"items":[]}`, `{"metadata":{"resourceVersion":"v9"}}`,
		`{"metadata":{"resourceVersion":"v9"},"items":[` + item + `]}`, `{"metadata":{"resourceVersion":"v9"},"items":[` + item + `,`,
		`{"metadata":{"resourceVersion":"v9"},"items":{"a":1}}`, `{"metadata":{"resourceVersion":9},"items":[` + item + `]}`,
		`{"items":[` + item + `]}`, `{"metadata":{"resourceVersion":"v9"},"items":[null,{}]}`, "<html>", "\x00\xff"} {
		f.Add(body)
	}
	cfg := testConfig(f, newProc(f).dir, f.TempDir())
	f.Fuzz(func(t *testing.T, body string) {
		w, ctx := answered(t, cfg, body)
		before := podNamed("old", "o", "1")
		w.apply(ctx, before)
		err := w.list(ctx)
		var l podList
		version, want := "v1", map[string]pod{"o": before}
		if json.NewDecoder(strings.NewReader(body)).Decode(&l) == nil && l.Metadata.ResourceVersion != "" {
			version, want = l.Metadata.ResourceVersion, map[string]pod{}
			for _, o := range l.Items {
				delete(want, o.Metadata.UID)
				if p := o.pod(); p.annotated {
					want[p.uid] = p
				}
			}
		}
		if w.version != version || w.listed.Load() != (err == nil) {
			t.Errorf("the version is %q, not %q, after %v", w.version, version, err)
		}
		follows(t, w, want)
	})
}

// C3: a process belongs to the first pod that its cgroup names, whatever a container names its own folders.
func FuzzCgroup(f *testing.F) {
	const uid = "12345678-90ab-cdef-1234-567890abcdef"
	for _, cgroup := range []string{"", "\n", cgroupOf(uid), "11:memory:/kubepods/besteffort/pod" + uid + "/cafe\n", "0::/init.scope\n",
		"0::/podpod" + uid, "0::/pod", "0::/-pod.slice", "0::/x-pod_.slice", "0::/.slice", "0::/a.slice/pod-pod-x", "0::/pod_x", "0::/pod\xff\n\n//"} {
		f.Add(cgroup)
	}
	isUID := regexp.MustCompile(`^[0-9a-f-]*$`)
	f.Fuzz(func(t *testing.T, cgroup string) {
		found := podOf(cgroup)
		if !isUID.MatchString(found) || !strings.Contains(strings.ReplaceAll(cgroup, "_", "-"), "pod"+found) && found != "" {
			t.Errorf("%q is of pod %q", cgroup, found)
		}
		want := found
		if found == "" {
			want = uid
		}
		if next := podOf(cgroup + "/pod" + uid); next != want {
			t.Errorf("%q with another folder is of pod %q, not %q", cgroup, next, want)
		}
	})
}

// C3: a /proc/<pid>/stat that has no field 22 is the youngest, so that it is never preferred.
func FuzzStat(f *testing.F) {
	for _, command := range []string{"pause", "a b", "x) S 1 (y", "", ")", "((", "\n", "\xff"} {
		f.Add(command, 42, "1 (pause) S 1 2 3")
	}
	f.Add("pause", 0, "1 (pause) S"+strings.Repeat(" x", 30))
	f.Fuzz(func(t *testing.T, command string, born int, any string) {
		if ticks := startTime(statLine(12, command, born)); born >= 0 && ticks != uint64(born) {
			t.Errorf("%q started at %d, not %d", command, ticks, born)
		}
		if ticks := startTime(any); len(strings.Fields(any)) < 20 && ticks != math.MaxUint64 {
			t.Errorf("%q started at %d", any, ticks)
		}
	})
}

// C7: what tcpdump says is read the same however it arrives, and takes no memory to speak of.
func FuzzStderr(f *testing.F) {
	const listening = "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n"
	for _, text := range []string{"", "\n", listening, listening + closing, closing, "tcpdump: eth0: No such device exists\n", "1 packet captured\n",
		"nsenter: failed to execute tcpdump: No such file or directory\n", " packets captured\n", "Warning: Kernel filter failed\n" + listening,
		listening + "tcpdump: pcap_loop: The interface disappeared\n" + closing, "99999999999999999999999999 packets captured\r\n", "\x00\xff: ",
		strings.Repeat("x", 5000) + listening} {
		f.Add([]byte(text), []byte{1, 7, 255})
	}
	f.Fuzz(func(t *testing.T, text, sizes []byte) {
		whole, parts := newStderr(), newStderr()
		whole.Write(text)
		rest := text
		for i := 0; len(rest) > 0; i++ {
			size := 1
			if len(sizes) > 0 {
				size = min(len(rest), 1+int(sizes[i%len(sizes)]))
			}
			if n, err := parts.Write(bytes.Clone(rest[:size])); n != size || err != nil {
				t.Fatalf("Write returns %d, %v", n, err)
			}
			if rest = rest[size:]; cap(parts.text) > 64<<10 || len(parts.text) > 4096 {
				t.Fatalf("%d of %d bytes are kept", len(parts.text), cap(parts.text))
			}
		}
		if whole.listens() != bytes.Contains(text, []byte("listening on ")) {
			t.Errorf("%q: it listens: %v", text, whole.listens())
		}
		read := func(e *stderr) string { return fmt.Sprint(e.lastWords(nil), "|", e.counts(), "|", e.listens()) }
		if len(text) <= 4096 && read(whole) != read(parts) {
			t.Errorf("%q is %q, and in parts %q", text, read(whole), read(parts))
		}
	})
}

// C11: whatever the files hold, cat writes whole packets of theirs, and says how many.
func FuzzCat(f *testing.F) {
	nothing, big := little(), pcap(binary.BigEndian, 0xa1b23c4d, 1, 2)
	for _, text := range [][]byte{nil, nothing, nothing[:23], little(3), little(3, 4), little(5)[:60], big, []byte("no pcap, but long enough for a header of one"),
		append(little(6), bytes.Repeat([]byte{0xff}, 16)...), append(little(7), make([]byte, 40)...)} {
		f.Add(text, little(1, 2))
		f.Add(little(4), text)
	}
	root := f.TempDir()
	f.Fuzz(func(t *testing.T, a, b []byte) {
		files := [][]byte{a, b}
		for i, text := range files {
			must(t, os.WriteFile(filepath.Join(root, fmt.Sprintf("capture-web.pcap%d", i)), text, 0o644))
		}
		var out, said bytes.Buffer
		err := command(t.Context(), []string{"cat", "web"}, root, &out, &said)
		all, packets := out.Bytes(), 0
		if len(all) > 0 {
			var order binary.ByteOrder = binary.LittleEndian
			if all[0] == 0xa1 {
				order = binary.BigEndian
			}
			for rest := all[pcapHeader:]; len(rest) > 0; packets++ {
				if len(rest) < packetHeader || uint64(len(rest)) < packetHeader+uint64(order.Uint32(rest[8:])) {
					t.Fatalf("the last packet is torn: % x", rest)
				}
				packet := rest[:packetHeader+order.Uint32(rest[8:])]
				if !slices.ContainsFunc(files, func(text []byte) bool { return bytes.Contains(text, packet) }) {
					t.Fatalf("a packet is of no file: % x", packet)
				}
				rest = rest[len(packet):]
			}
		}
		if want := fmt.Sprintf("%s, %d bytes\n", count(packets, "packet"), len(all)); !strings.HasSuffix(said.String(), want) {
			t.Errorf("%v; it says %q, want %q", err, said.String(), want)
		}
	})
}
