package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const fileHeader, packetHead = 24, 16 // bytes of the headers of a file and of a packet

// pcap is a file of packets, of which each holds its number; their times are in their numbers' order.
func pcap(magic uint32, numbers ...int) []byte {
	var b bytes.Buffer
	binary.Write(&b, binary.NativeEndian, []uint32{magic, 2 | 4<<16, 0, 0, 262144, 1})
	for _, n := range numbers {
		data := fmt.Sprintf("packet %d", n)
		binary.Write(&b, binary.NativeEndian, []uint32{uint32(1_700_000_000 + n/10), uint32(n % 10), uint32(len(data)), uint32(len(data))})
		b.WriteString(data)
	}
	return b.Bytes()
}

func micro(numbers ...int) []byte { return pcap(0xa1b2c3d4, numbers...) }

// numbersIn are the packets of a pcap, which must be whole. It may be what was written so far.
func numbersIn(t *testing.T, text []byte) (numbers []int) {
	t.Helper()
	for rest := text[min(len(text), fileHeader):]; len(rest) > 0; {
		var n, size int
		if len(rest) >= packetHead {
			size = packetHead + int(binary.NativeEndian.Uint32(rest[8:]))
		}
		if size == 0 || size > len(rest) {
			t.Fatalf("the last packet is torn: %q", rest)
		}
		if _, err := fmt.Sscanf(string(rest[packetHead:size]), "packet %d", &n); err != nil {
			t.Fatalf("%q is no packet", rest[packetHead:size])
		}
		numbers, rest = append(numbers, n), rest[size:]
	}
	return numbers
}

// write writes a capture's file over the same inode, as tcpdump does; its digits are those behind .pcap.
func write(t *testing.T, root, digits string, text []byte) {
	t.Helper()
	must(t, os.WriteFile(root+"/capture-web.pcap"+digits, text, 0o644))
}

func removeAll(t *testing.T, root string) {
	t.Helper()
	for _, name := range namesIn(t, root) {
		must(t, os.Remove(filepath.Join(root, name)))
	}
}

// C11: the rotated files as one pcap, the oldest packet first, and nothing that is torn, with times in micro- or
// nanoseconds. 1,600 files, which is what the node's limit holds, are read in seconds: each is looked at once.
func TestCat(t *testing.T) {
	type files = map[string][]byte // by their digits
	torn, many, all := micro(1, 2, 3), files{}, []int{}
	for i := range 1600 {
		many[fmt.Sprintf("%04d", i)], all = micro(i), append(all, i)
	}
	const nano = 0xa1b23c4d
	for _, test := range []struct {
		name    string
		files   files
		packets string
		want    []byte
	}{
		{"one file", files{"": micro(1, 2)}, "2 packets", micro(1, 2)},
		{"in order", files{"0": micro(1, 2), "1": micro(3), "2": micro(4)}, "4 packets", micro(1, 2, 3, 4)},
		{"the ring has turned", files{"0": micro(7, 8), "1": micro(3, 4), "2": micro(5, 6)}, "6 packets", micro(3, 4, 5, 6, 7, 8)},
		{"two digits", files{"09": micro(30), "10": micro(1), "00": micro(12)}, "3 packets", micro(1, 12, 30)},
		{"a torn packet", files{"0": torn[:len(torn)-1], "1": micro(4)}, "3 packets", micro(1, 2, 4)},
		{"a torn header", files{"0": append(micro(1), 1, 2, 3)}, "1 packet", micro(1)},
		{"a length that can't be", files{"0": append(micro(1), bytes.Repeat([]byte{0xff}, 16)...)}, "1 packet", micro(1)},
		{"packets without data", files{"0": append(micro(1), make([]byte, 40)...)}, "3 packets", append(micro(1), make([]byte, 32)...)},
		{"just begun", files{"0": micro(1, 2), "1": micro(), "2": nil, "3": micro()[:23]}, "2 packets", micro(1, 2)},
		{"no packet yet", files{"0": micro()}, "0 packets", micro()},
		{"not even a header", files{"0": nil}, "0 packets", nil},
		{"nanoseconds", files{"0": pcap(nano, 5, 6), "1": pcap(nano, 3)}, "3 packets", pcap(nano, 3, 5, 6)},
		{"many", many, "1600 packets", micro(all...)},
	} {
		root, began := t.TempDir(), time.Now()
		for digits, text := range test.files {
			write(t, root, digits, text)
		}
		must(t, os.WriteFile(root+"/capture-web-2.pcap0", micro(99), 0o644))
		var out, said bytes.Buffer
		must(t, command(t.Context(), []string{"cat", "web"}, root, &out, &said))
		if !bytes.Equal(out.Bytes(), test.want) {
			t.Errorf("%s: %.100q, want %.100q", test.name, out.Bytes(), test.want)
		}
		if want := fmt.Sprintf("%s, %d bytes\n", test.packets, len(test.want)); said.String() != want {
			t.Errorf("%s: it says %q, want %q", test.name, said.String(), want)
		}
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("%s: it took %v", test.name, took)
		}
	}
}

// C11: which capture is meant, and what is said if none is, or if what is meant is none.
func TestCatNames(t *testing.T) {
	root, none := t.TempDir(), t.TempDir()
	for i, name := range []string{"web.pcap0", "web.pcap1", "web_1b2c3d4e.pcap", "db.pcap00", "web.pcap0.pcap", "capture-x.pcap",
		"api_0a0b0c0d.pcap"} {
		must(t, os.WriteFile(root+"/capture-"+name, micro(i), 0o644))
	}
	must(t, os.WriteFile(root+"/other.pcap0", micro(8), 0o644))
	for _, test := range []struct {
		root, arguments string
		want            []byte
		err             string
	}{
		{root, "cat db", micro(3), ""},
		{root, "cat web.pcap0", micro(4), ""}, // a pod's name comes first
		{root, "cat capture-x", micro(5), ""},
		{root, "cat api", micro(6), ""},
		{root, "cat capture-web.pcap", micro(0, 1), ""},
		{root, "cat /capture-web.pcap1", micro(0, 1), ""},
		{root, "cat /capture-web_1b2c3d4e.pcap", micro(2), ""},
		{root, "cat web", nil, "say which file: " + root + "/capture-web.pcap " + root + "/capture-web_1b2c3d4e.pcap"},
		{root, "cat nobody", nil, `"nobody" is not captured here; what is: ` + root + "/capture-api_0a0b0c0d.pcap "},
		{none, "cat web", nil, `"web" is not captured here; what is: nothing`},
		{root, "cat", nil, `"cat" is no command: accepted is cat [-f] <pod name or file>`},
		{root, "cat ", nil, "accepted is"},
		{root, "cat -f", nil, "accepted is"},
		{root, "cat -x web", nil, `"cat -x web" is no command`},
		{root, "cat -f -f", nil, "accepted is"},
		{root, "cat web db", nil, "accepted is"},
		{root, "dog web", nil, "accepted is"},
	} {
		var out bytes.Buffer
		err := command(t.Context(), strings.Split(test.arguments, " "), test.root, &out, io.Discard)
		if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
			t.Errorf("%q: error %v, want %q", test.arguments, err, test.err)
		}
		if !bytes.Equal(out.Bytes(), test.want) {
			t.Errorf("%q: %q, want %q", test.arguments, out.Bytes(), test.want)
		}
	}
}

// writerFunc is what happens when something is written.
type writerFunc func(text []byte) (int, error)

func (w writerFunc) Write(text []byte) (int, error) { return w(text) }

// C11: what happens to the files while they are read. One that is overwritten or deleted before it is read is not mistaken for
// what it was, and that is said. Files of a capture that has begun under the same name are not put behind a header that is not
// theirs. A reader that goes away ends it, with its error, and so does the end of the program.
func TestCatChanges(t *testing.T) {
	other, broken := micro(9), error(nil)
	other[20] = 113 // the link type of any
	ctx, cancel := context.WithCancel(t.Context())
	for _, test := range []struct {
		name, arguments string
		at              int // the write, of which the first is the header and the second the first file's packets
		change          func(root string)
		want            []int
		missing         bool
		err             string
	}{
		{"nothing", "cat web", 2, func(root string) {}, []int{1, 2, 3, 4, 5, 6}, false, ""},
		{"overwritten", "cat web", 2, func(root string) { write(t, root, "1", micro(9, 10)) }, []int{1, 2, 5, 6}, true, ""},
		{"cut to nothing", "cat web", 2, func(root string) { write(t, root, "1", nil) }, []int{1, 2, 5, 6}, true, ""},
		{"deleted", "cat web", 2, func(root string) { must(t, os.Remove(root+"/capture-web.pcap1")) }, []int{1, 2, 5, 6}, true, ""},
		{"all deleted", "cat -f web", 1, func(root string) { removeAll(t, root) }, nil, true, ""},
		{"the capture ends", "cat -f web", 4, func(root string) {
			must(t, os.Remove(root+"/capture-web.pcap2")) // and the others some time later
			time.AfterFunc(200*time.Millisecond, func() { removeAll(t, root) })
		}, []int{1, 2, 3, 4, 5, 6}, false, ""},
		{"another capture", "cat -f web", 2, func(root string) { write(t, root, "1", other) }, []int{1, 2}, true, "not of the same capture"},
		{"the reader goes", "cat -f web", 2, func(root string) { broken = errors.New("gone") }, nil, false, "gone"},
		{"the program ends", "cat -f web", 1, func(root string) { cancel() }, nil, false, ""},
	} {
		root := t.TempDir()
		for digits, text := range map[string][]byte{"0": micro(1, 2), "1": micro(3, 4), "2": micro(5, 6)} {
			write(t, root, digits, text)
		}
		var out, said bytes.Buffer
		writes := 0
		broken = nil
		err := command(ctx, strings.Split(test.arguments, " "), root, writerFunc(func(text []byte) (int, error) {
			if writes++; writes == test.at {
				test.change(root)
			}
			if broken != nil {
				return 0, broken
			}
			return out.Write(text)
		}), &said)
		if got := fmt.Sprint(err); got != "<nil>" && test.err == "" || !strings.Contains(got, test.err) {
			t.Errorf("%s: error %v, want %q", test.name, err, test.err)
		}
		if got := numbersIn(t, out.Bytes()); !slices.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
		if isSaid := strings.Contains(said.String(), "packets may be missing: "+root+"/capture-web.pcap"); isSaid != test.missing {
			t.Errorf("%s: it says %q", test.name, said.String())
		}
	}
}

// C11: -f goes on over rotations, with files that are filled, cut to nothing and filled again, until they are deleted.
// Everything that is written is whole and in order; a reader that keeps up misses nothing, and a slow one says that it did.
func TestCatFollow(t *testing.T) {
	for _, test := range []struct {
		digits  []string
		pause   time.Duration // of the reader, at each write
		missing []bool        // what it may say of packets that are missing
	}{
		{[]string{"0", "1", "2"}, 0, []bool{false}},
		{[]string{"0", "1", "2"}, 2 * time.Second, []bool{true}},
		{[]string{""}, 0, []bool{false, true}}, // it can't know what was there
		{[]string{""}, 2 * time.Second, []bool{true}},
	} {
		synctest.Test(t, func(t *testing.T) {
			root, done := t.TempDir(), make(chan error)
			var out, said bytes.Buffer
			write(t, root, test.digits[0], nil)
			go func() {
				done <- command(t.Context(), []string{"cat", "-f", "web"}, root, writerFunc(func(text []byte) (int, error) {
					time.Sleep(test.pause)
					return out.Write(text)
				}), &said)
			}()
			var want []int
			for turn := range 10 {
				file, err := os.Create(root + "/capture-web.pcap" + test.digits[turn%len(test.digits)])
				must(t, err)
				file.Write(micro())
				for n := 10*turn + 1; n <= 10*turn+5; n++ {
					packet := micro(n)[fileHeader:]
					file.Write(packet[:len(packet)-3])
					time.Sleep(60 * time.Millisecond) // it is torn meanwhile
					file.Write(packet[len(packet)-3:])
					time.Sleep(60 * time.Millisecond)
					want = append(want, n)
				}
				must(t, file.Close())
			}
			time.Sleep(10 * time.Second)
			synctest.Wait()
			noneOpen(t, root)
			removeAll(t, root)
			must(t, <-done)
			got := numbersIn(t, out.Bytes())
			isNew := func(n int) bool { return !slices.Contains(want, n) }
			isAll := slices.Equal(got, want)
			if isAll != (test.pause == 0) || !slices.IsSorted(got) || slices.ContainsFunc(got, isNew) || len(got) < 10 {
				t.Errorf("%+v: %v, of %v", test, got, want)
			}
			isMissing, sum := strings.Contains(said.String(), "missing"), fmt.Sprintf("%d packets, %d bytes\n", len(got), out.Len())
			if !strings.HasSuffix(said.String(), sum) || !slices.Contains(test.missing, isMissing) {
				t.Errorf("%+v: it says %q", test, said.String())
			}
		})
	}
}

// C11: what the real tcpdump rotates is joined, and the real tcpdump reads it.
func TestCatTcpdump(t *testing.T) {
	if _, err := exec.LookPath("tcpdump"); err != nil && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	root, numbers := t.TempDir(), make([]int, 150_000) // 4 MB: the ring of three turns
	for i := range numbers {
		numbers[i] = i
	}
	tcpdump := func(input []byte, arguments ...string) string {
		cmd := exec.CommandContext(t.Context(), "tcpdump", arguments...)
		cmd.Stdin = bytes.NewReader(input)
		said, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("tcpdump %q: %v: %s", arguments, err, said)
		}
		return string(said)
	}
	tcpdump(micro(numbers...), "-r", "-", "-Z", "root", "-C", "1", "-W", "3", "-w", root+"/capture-web.pcap")
	var out bytes.Buffer
	must(t, command(t.Context(), []string{"cat", "web"}, root, &out, io.Discard))
	got := numbersIn(t, out.Bytes())
	if len(got) < 70_000 || !slices.Equal(got, numbers[len(numbers)-len(got):]) {
		t.Fatalf("%d packets, which are not the last", len(got))
	}
	if said := tcpdump(out.Bytes(), "-r", "-", "--count"); !strings.Contains(said, fmt.Sprintf("%d packets", len(got))) {
		t.Errorf("tcpdump reads %q, want %d packets", said, len(got))
	}
}

// C11: cat -f of a client that has gone ends, also while it waits to write; a stdin that ends at once is no client that goes.
func TestCatStdin(t *testing.T) {
	if root := os.Getenv("CAT_ROOT"); root != "" { // the child
		command(untilStdinEnds(t.Context()), []string{"cat", "-f", "web"}, root, os.Stdout, os.Stderr)
		return
	}
	for _, atOnce := range []bool{true, false} {
		root := t.TempDir()
		write(t, root, "0", micro(make([]int, 10_000)...)) // more than a pipe holds
		theirs, stdin, err := os.Pipe()
		must(t, err)
		if atOnce {
			stdin.Close()
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCatStdin$")
		cmd.Env, cmd.Stdin = append(os.Environ(), "CAT_ROOT="+root), theirs
		stdout, err := cmd.StdoutPipe()
		must(t, err, cmd.Start(), theirs.Close())
		defer cmd.Process.Kill()
		_, err = io.ReadFull(stdout, make([]byte, fileHeader)) // it runs, and nobody reads the rest
		must(t, err)
		ended := make(chan struct{})
		go func() { cmd.Process.Wait(); close(ended) }()
		endsWithin := func(limit time.Duration) bool {
			select {
			case <-ended:
				return true
			case <-time.After(limit):
				return false
			}
		}
		if endsWithin(termGrace + 1500*time.Millisecond) {
			t.Errorf("it ends while its client is there; stdin ended at once: %v", atOnce)
		}
		if stdin.Close(); !atOnce && !endsWithin(20*time.Second) {
			t.Error("it goes on although its client has gone")
		}
	}
}
