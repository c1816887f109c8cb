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
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// pcap is a file of packets, of which each holds its number; their times are in their numbers' order.
func pcap(order binary.ByteOrder, magic uint32, numbers ...int) []byte {
	var b bytes.Buffer
	binary.Write(&b, order, []uint32{magic, 2 | 4<<16, 0, 0, 262144, 1})
	for _, n := range numbers {
		data := fmt.Sprintf("packet %d", n)
		binary.Write(&b, order, []uint32{uint32(1_700_000_000 + n/10), uint32(n % 10), uint32(len(data)), uint32(len(data))})
		b.WriteString(data)
	}
	return b.Bytes()
}

func little(numbers ...int) []byte { return pcap(binary.LittleEndian, 0xa1b2c3d4, numbers...) }

// numbersIn are the packets of a pcap, which must be whole. It may be what was written so far.
func numbersIn(t *testing.T, order binary.ByteOrder, text []byte) (numbers []int) {
	t.Helper()
	for rest := text[min(len(text), pcapHeader):]; len(rest) > 0; {
		if len(rest) < packetHeader || len(rest) < packetHeader+int(order.Uint32(rest[8:])) {
			t.Fatalf("the last packet is torn: %q", rest)
		}
		var n int
		size := packetHeader + int(order.Uint32(rest[8:]))
		if _, err := fmt.Sscanf(string(rest[packetHeader:size]), "packet %d", &n); err != nil {
			t.Fatalf("%q is no packet", rest[packetHeader:size])
		}
		numbers, rest = append(numbers, n), rest[size:]
	}
	return numbers
}

func write(t *testing.T, root, name string, text []byte) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(root, name), text, 0o644)) // over the same inode, as tcpdump does it
}

func extend(t *testing.T, root, name string, text []byte) {
	t.Helper()
	file, err := os.OpenFile(filepath.Join(root, name), os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	_, err = file.Write(text)
	must(t, err, file.Close())
}

// C11: the rotated files as one pcap, the oldest packet first, and nothing that is torn.
func TestCat(t *testing.T) {
	torn := little(1, 2, 3)
	for _, test := range []struct {
		name  string
		files map[string][]byte // digits and content
		want  []int
		bytes int // 0: whatever
	}{
		{"one file", map[string][]byte{"": little(1, 2)}, []int{1, 2}, 24 + 2*24},
		{"in order", map[string][]byte{"0": little(1, 2), "1": little(3), "2": little(4)}, []int{1, 2, 3, 4}, 0},
		{"the ring has turned", map[string][]byte{"0": little(7, 8), "1": little(3, 4), "2": little(5, 6)}, []int{3, 4, 5, 6, 7, 8}, 0},
		{"two digits", map[string][]byte{"09": little(30), "10": little(1), "00": little(12)}, []int{1, 12, 30}, 0},
		{"a torn packet", map[string][]byte{"0": torn[:len(torn)-1], "1": little(4)}, []int{1, 2, 4}, 0},
		{"a torn header", map[string][]byte{"0": append(little(1), 1, 2, 3)}, []int{1}, 0},
		{"just begun", map[string][]byte{"0": little(1, 2), "1": little(), "2": nil}, []int{1, 2}, 0},
		{"no packet yet", map[string][]byte{"0": little()}, nil, 24},
		{"not even a header", map[string][]byte{"0": nil}, nil, 0},
	} {
		root := t.TempDir()
		for digits, text := range test.files {
			write(t, root, "capture-web.pcap"+digits, text)
		}
		write(t, root, "capture-web-2.pcap0", little(99))
		var out, said bytes.Buffer
		must(t, command(t.Context(), []string{"cat", "web"}, root, &out, &said))
		if got := numbersIn(t, binary.LittleEndian, out.Bytes()); !slices.Equal(got, test.want) || test.bytes > 0 && out.Len() != test.bytes {
			t.Errorf("%s: %v (%d bytes), want %v", test.name, got, out.Len(), test.want)
		}
		if want := fmt.Sprintf("%s, %d bytes\n", count(len(test.want), "packet"), out.Len()); said.String() != want {
			t.Errorf("%s: it says %q, want %q", test.name, said.String(), want)
		}
	}
}

// C11: both byte orders, and times in nanoseconds.
func TestCatOrders(t *testing.T) {
	for _, order := range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		for _, magic := range []uint32{0xa1b2c3d4, 0xa1b23c4d} {
			root := t.TempDir()
			write(t, root, "capture-web.pcap0", pcap(order, magic, 5, 6))
			write(t, root, "capture-web.pcap1", pcap(order, magic, 3, 4))
			var out bytes.Buffer
			must(t, command(t.Context(), []string{"cat", "web"}, root, &out, io.Discard))
			if want := pcap(order, magic, 3, 4, 5, 6); !bytes.Equal(out.Bytes(), want) {
				t.Errorf("%v, %x: % x, want % x", order, magic, out.Bytes(), want)
			}
		}
	}
}

// C11: which capture is meant, and what is said if none is.
func TestCatNames(t *testing.T) {
	root := t.TempDir()
	none := t.TempDir()
	for _, name := range []string{"capture-web.pcap0", "capture-web.pcap1", "capture-web_1b2c3d4e.pcap", "capture-db.pcap00",
		"capture-web.pcap0.pcap", "capture-capture-x.pcap", "capture-api_0a0b0c0d.pcap", "other.pcap0"} {
		write(t, root, name, little(len(name)))
	}
	write(t, root, "capture-bad.pcap", []byte("this is no pcap file, it is a text"))
	for _, test := range []struct {
		root, arguments string
		want            []int
		err             string
	}{
		{root, "cat db", []int{17}, ""},
		{root, "cat web.pcap0", []int{22}, ""}, // a pod's name comes first
		{root, "cat capture-x", []int{22}, ""},
		{root, "cat api", []int{25}, ""},
		{root, "cat capture-web.pcap", []int{17}, ""},
		{root, "cat /capture-web.pcap1", []int{17}, ""},
		{root, "cat /capture-web_1b2c3d4e.pcap", []int{25}, ""},
		{root, "cat web", nil, "say which file: " + root + "/capture-web.pcap " + root + "/capture-web_1b2c3d4e.pcap"},
		{root, "cat nobody", nil, `"nobody" is not captured here; what is: ` + root + "/capture-api_0a0b0c0d.pcap "},
		{none, "cat web", nil, `"web" is not captured here; what is: nothing`},
		{root, "cat bad", nil, "is no pcap file: it begins with 74 68 69 73"},
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
		if got := numbersIn(t, binary.LittleEndian, out.Bytes()); !slices.Equal(got, test.want) {
			t.Errorf("%q: %v, want %v", test.arguments, got, test.want)
		}
	}
}

// writerFunc is what happens when something is written.
type writerFunc func(text []byte) (int, error)

func (w writerFunc) Write(text []byte) (int, error) { return w(text) }

// C11: a file that is overwritten, or deleted, before it is read is not mistaken for what it was, and that is said.
func TestCatOverwritten(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(root string)
		want   []int
		gap    string
	}{
		{"overwritten", func(root string) { write(t, root, "capture-web.pcap1", little(9, 10)) }, []int{1, 2, 5, 6}, "capture-web.pcap1"},
		{"just cut to nothing", func(root string) { write(t, root, "capture-web.pcap1", nil) }, []int{1, 2, 5, 6}, "capture-web.pcap1"},
		{"deleted", func(root string) { must(t, os.Remove(root+"/capture-web.pcap1")) }, []int{1, 2, 5, 6}, "capture-web.pcap1"},
		{"all overwritten", func(root string) {
			write(t, root, "capture-web.pcap1", little(9, 10))
			write(t, root, "capture-web.pcap2", little(11, 12))
		}, []int{1, 2}, "capture-web.pcap1"},
		{"nothing", func(root string) {}, []int{1, 2, 3, 4, 5, 6}, ""},
	} {
		root := t.TempDir()
		write(t, root, "capture-web.pcap0", little(1, 2))
		write(t, root, "capture-web.pcap1", little(3, 4))
		write(t, root, "capture-web.pcap2", little(5, 6))
		var out, said bytes.Buffer
		writes := 0
		must(t, command(t.Context(), []string{"cat", "web"}, root, writerFunc(func(text []byte) (int, error) {
			if writes++; writes == 2 { // the packets of the first file
				test.change(root)
			}
			return out.Write(text)
		}), &said))
		if got := numbersIn(t, binary.LittleEndian, out.Bytes()); !slices.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
		if gap := strings.Contains(said.String(), "packets may be missing"); gap != (test.gap != "") || !strings.Contains(said.String(), test.gap) {
			t.Errorf("%s: it says %q", test.name, said.String())
		}
	}
}

// C11: -f goes on over rotations, with files that are filled, cut to nothing and filled again, until they are deleted.
func TestCatFollow(t *testing.T) {
	for _, names := range [][]string{{"0", "1", "2"}, {""}} {
		synctest.Test(t, func(t *testing.T) {
			root := t.TempDir()
			var out, said bytes.Buffer
			done := make(chan error)
			write(t, root, "capture-web.pcap"+names[0], nil)
			go func() { done <- command(t.Context(), []string{"cat", "-f", "web"}, root, &out, &said) }()
			var want []int
			for turn := range 10 {
				name, numbers := "capture-web.pcap"+names[turn%len(names)], []int{}
				write(t, root, name, nil)
				for i := range 5 {
					before := len(little(numbers...))
					if i == 0 {
						before = 0
					}
					numbers = append(numbers, 10*turn+i+1)
					text := little(numbers...)
					extend(t, root, name, text[before:len(text)-3]) // in the middle of a packet
					time.Sleep(60 * time.Millisecond)
					extend(t, root, name, text[len(text)-3:])
					time.Sleep(60 * time.Millisecond)
				}
				want = append(want, numbers...)
			}
			time.Sleep(time.Second)
			synctest.Wait()
			if got := numbersIn(t, binary.LittleEndian, out.Bytes()); !slices.Equal(got, want) {
				t.Errorf("%v, want %v", got, want)
			}
			noneOpen(t, root)
			paths, _ := findFiles(root, isCapture)
			must(t, removeFiles(paths))
			must(t, <-done)
			if !strings.HasSuffix(said.String(), fmt.Sprintf("50 packets, %d bytes\n", out.Len())) || len(names) > 1 && strings.Contains(said.String(), "missing") {
				t.Errorf("it says %q", said.String())
			}
		})
	}
}

// C11: a reader that goes away ends it, with its error; the end of the program does as well.
func TestCatFollowEnds(t *testing.T) {
	root := t.TempDir()
	write(t, root, "capture-web.pcap0", little(1))
	gone := errors.New("gone")
	err := command(t.Context(), []string{"cat", "-f", "web"}, root, writerFunc(func([]byte) (int, error) { return 0, gone }), io.Discard)
	if !errors.Is(err, gone) {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	must(t, command(ctx, []string{"cat", "-f", "web"}, root, writerFunc(func(text []byte) (int, error) {
		cancel()
		return len(text), nil
	}), io.Discard))
}

// C11: while 5 MB/s rotate through 3 files of 1 MB, everything that is written is whole and in order; a reader that keeps up
// misses nothing, and a slow one says that it did.
func TestCatUnderLoad(t *testing.T) {
	root := t.TempDir()
	padding := strings.Repeat("x", 1400)
	ctx, stop := context.WithCancel(t.Context())
	var written atomic.Int64
	filled := make(chan error, 1)
	go func() { // as tcpdump: the files in turn, each cut to nothing first
		n := 0
		for turn := 0; ctx.Err() == nil; turn++ {
			file, err := os.Create(filepath.Join(root, fmt.Sprintf("capture-web.pcap%d", turn%3)))
			if err != nil {
				filled <- err
				return
			}
			file.Write(little())
			for size := 0; size < 1_000_000 && ctx.Err() == nil; n++ {
				data := fmt.Sprintf("packet %d %s", n, padding)
				var b bytes.Buffer
				binary.Write(&b, binary.LittleEndian, []uint32{uint32(1_700_000_000 + n/1_000_000), uint32(n % 1_000_000), uint32(len(data)), uint32(len(data))})
				file.Write(append(b.Bytes(), data...))
				size += b.Len() + len(data)
				written.Store(int64(n))
				if n%18 == 0 {
					time.Sleep(5 * time.Millisecond) // 5 MB/s
				}
			}
			file.Close()
		}
		filled <- nil
	}()
	for deadline := time.Now().Add(10 * time.Second); written.Load() < 3000; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing is written")
		}
	}
	read := func(ctx context.Context, pause time.Duration, arguments ...string) (numbers []int, said string) {
		var out, errors bytes.Buffer
		must(t, command(ctx, append([]string{"cat"}, arguments...), root, writerFunc(func(text []byte) (int, error) {
			time.Sleep(pause)
			return out.Write(text)
		}), &errors))
		return numbersIn(t, binary.LittleEndian, out.Bytes()), errors.String()
	}
	for range 2 {
		if numbers, said := read(ctx, 0, "web"); len(numbers) < 700 || !slices.IsSorted(numbers) {
			t.Errorf("%d packets, in order: %v; it says %q", len(numbers), slices.IsSorted(numbers), said)
		}
	}
	for _, pause := range []time.Duration{0, 700 * time.Millisecond} {
		limited, cancel := context.WithTimeout(ctx, 3*time.Second)
		numbers, said := read(limited, pause, "-f", "web")
		cancel()
		whole := len(numbers) > 0 && numbers[len(numbers)-1]-numbers[0] == len(numbers)-1
		isTold := strings.Contains(said, "packets may be missing")
		if !slices.IsSorted(numbers) || len(numbers) < 1000 || !whole && !isTold || pause > 0 && !isTold {
			t.Errorf("-f with pauses of %v: %d packets, in order: %v, all: %v, and it says %q", pause, len(numbers), slices.IsSorted(numbers), whole, said)
		}
	}
	stop()
	must(t, <-filled)
}

// C11: 1,600 files, which is what the node's limit holds, are read in seconds: each is looked at once.
func TestCatManyFiles(t *testing.T) {
	root := t.TempDir()
	var want []int
	for i := range 1600 {
		write(t, root, fmt.Sprintf("capture-web.pcap%04d", i), little(i))
		want = append(want, i)
	}
	var out bytes.Buffer
	began := time.Now()
	must(t, command(t.Context(), []string{"cat", "web"}, root, &out, io.Discard))
	if took := time.Since(began); took > 15*time.Second || !slices.Equal(numbersIn(t, binary.LittleEndian, out.Bytes()), want) {
		t.Errorf("%v for %d bytes", took, out.Len())
	}
}

// C11: files of another capture, which has begun under the same name, are not put behind a header that is not theirs.
func TestCatOtherHeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := t.TempDir()
		var out bytes.Buffer
		done := make(chan error)
		write(t, root, "capture-web.pcap0", little(1))
		go func() { done <- command(t.Context(), []string{"cat", "-f", "web"}, root, &out, io.Discard) }()
		time.Sleep(time.Second)
		other := little(2)
		other[20] = 113 // the link type of any
		must(t, os.Remove(root+"/capture-web.pcap0"))
		write(t, root, "capture-web.pcap0", other)
		if err := <-done; err == nil || !strings.Contains(err.Error(), "not of the same capture") || !bytes.Equal(out.Bytes(), little(1)) {
			t.Errorf("error %v, % x", err, out.Bytes())
		}
	})
}

// C11: a capture that ends before a slow reader has read its files: that is said.
func TestCatFollowDeletedUnread(t *testing.T) {
	root := t.TempDir()
	write(t, root, "capture-web.pcap0", little(1))
	write(t, root, "capture-web.pcap1", little(2))
	var said bytes.Buffer
	must(t, command(t.Context(), []string{"cat", "-f", "web"}, root, writerFunc(func(text []byte) (int, error) {
		paths, _ := findFiles(root, isCapture)
		return len(text), removeFiles(paths)
	}), &said))
	if !strings.Contains(said.String(), "packets may be missing") {
		t.Errorf("it says %q", said.String())
	}
}

// C11: what the real tcpdump rotates is joined, and the real tcpdump reads it.
func TestCatTcpdump(t *testing.T) {
	if _, err := exec.LookPath("tcpdump"); err != nil && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	root := t.TempDir()
	numbers := make([]int, 150_000) // 4 MB: the ring of three turns
	for i := range numbers {
		numbers[i] = i
	}
	tcpdump := func(input []byte, arguments ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "tcpdump", arguments...)
		cmd.Stdin = bytes.NewReader(input)
		said, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("tcpdump %q: %v: %s", arguments, err, said)
		}
		return string(said)
	}
	tcpdump(little(numbers...), "-r", "-", "-Z", "root", "-C", "1", "-W", "3", "-w", root+"/capture-web.pcap")
	var out bytes.Buffer
	must(t, command(t.Context(), []string{"cat", "web"}, root, &out, io.Discard))
	got := numbersIn(t, binary.LittleEndian, out.Bytes())
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
		write(t, root, "capture-web.pcap0", little(make([]int, 10_000)...)) // more than a pipe holds
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
		_, err = io.ReadFull(stdout, make([]byte, pcapHeader)) // it runs, and nobody reads the rest
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
