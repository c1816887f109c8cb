//go:build e2e

package test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What is lost of a flood of packets, and of a pod's last ones, with the arguments that the program gives
// tcpdump and with others. This takes place on the test's own machine, in network namespaces.

// The test binary is also a sender of packets.
func init() {
	if rate, err := strconv.Atoi(os.Getenv("TEST_FLOOD")); err == nil {
		fmt.Println(flood(rate, 2*time.Second))
		os.Exit(0)
	}
}

// flood sends packets of 200 bytes for a time, and returns how many. What a pause of the machine has delayed
// is sent at once. A machine that can't send as fast sends fewer.
func flood(rate int, during time.Duration) (sent int) {
	conn := check(net.Dial("udp", "10.99.0.9:4000"))
	packet := make([]byte, 200-42) // behind the headers of Ethernet, IPv4 and UDP
	began := time.Now()
	for now := began; now.Sub(began) < during; now = time.Now() {
		due := int(now.Sub(began).Seconds() * float64(rate))
		for stop := min(due, sent+1000); sent < stop; sent++ {
			conn.Write(packet)
		}
		if sent >= due {
			time.Sleep(100 * time.Microsecond)
		}
	}
	return sent
}

// A link joins two network namespaces. What is sent to 10.99.0.9 passes it, and nobody answers.
const linkScript = `
ip netns add $0; ip netns add $0-peer
ip link add eth0 netns $0 type veth peer name eth0 netns $0-peer
for ns in $0 $0-peer; do
	ip -n $ns link set eth0 addrgenmode none # IPv6 would send by itself
	ip -n $ns link set eth0 up
	ip -n $ns address add 10.99.0.$((++i))/24 dev eth0
	ip -n $ns neighbour add 10.99.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent
done
until [[ $(ip -n $0 -o link show eth0) == *" state UP "* ]]; do sleep 0.01; done`

// way is how tcpdump could be called: with other arguments than the program's, and some added.
type way struct{ name, replace, by, add string }

var ways = []way{
	{"the program's arguments", "", "", ""},
	{"the program's, interface any", "-i eth0", "-i any", ""},
	{"tcpdump's own buffer", "-B 4096", "", ""},
	{"tcpdump's own buffer, --immediate-mode", "-B 4096", "", "--immediate-mode"},
	{"the program's, --immediate-mode, as in live", "", "", "--immediate-mode"},
}

// sniffed is a link, with a tcpdump that captures on it into a folder.
type sniffed struct {
	*testing.T
	name, folder string
	tcpdump      *exec.Cmd
}

// sniff begins to capture in one of the ways. The program's arguments are all but tcpdump's -W and -w.
func sniff(t *testing.T, program string, w way) *sniffed {
	s := &sniffed{T: t, name: fmt.Sprintf("loss-%d", time.Now().UnixNano()), folder: t.TempDir()}
	t.Cleanup(func() { exec.Command("bash", "-c", "ip netns delete $0; ip netns delete $0-peer", s.name).Run() })
	s.bash(linkScript)
	arguments := strings.Fields(strings.Replace(program, w.replace, w.by, 1) + " " + w.add)
	arguments = append([]string{"--net=/run/netns/" + s.name, "tcpdump", "-W", "400", "-w", s.folder + "/x.pcap"}, arguments...)
	s.tcpdump = exec.Command("nsenter", append(arguments, "udp port 4000")...)
	check(0, s.tcpdump.Start())
	for deadline := time.Now().Add(patience); s.count() < 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("tcpdump %q does not listen", arguments)
		}
	}
	return s
}

func (s *sniffed) bash(script string) {
	s.Helper()
	if out, err := exec.Command("bash", "-ec", script, s.name).CombinedOutput(); err != nil {
		s.Fatalf("%v: %s", err, out)
	}
}

func (s *sniffed) end() {
	s.tcpdump.Process.Signal(syscall.SIGTERM)
	s.tcpdump.Wait()
}

// count returns the number of packets in the files, -1 if there is no file yet.
func (s *sniffed) count() (count int) {
	paths := check(filepath.Glob(s.folder + "/x.pcap*"))
	if len(paths) == 0 {
		return -1
	}
	for _, path := range paths {
		text := check(os.ReadFile(path))
		for at := 24; at+16 <= len(text); count++ {
			at += 16 + int(binary.LittleEndian.Uint32(text[at+8:]))
		}
	}
	return count
}

// inFlood is how many of a flood's packets are in no file. The machine may hold up tcpdump for a time.
func (s *sniffed) inFlood(rate int, heldUp time.Duration) (lost, sent int) {
	defer s.end()
	sender, out := exec.Command("nsenter", "--net=/run/netns/"+s.name, os.Args[0]), new(bytes.Buffer)
	sender.Env, sender.Stdout = append(os.Environ(), "TEST_FLOOD="+strconv.Itoa(rate)), out
	check(0, sender.Start())
	if heldUp > 0 {
		time.Sleep(time.Second)
		s.tcpdump.Process.Signal(syscall.SIGSTOP)
		time.Sleep(heldUp)
		s.tcpdump.Process.Signal(syscall.SIGCONT)
	}
	check(0, sender.Wait())
	sent = check(strconv.Atoi(strings.TrimSpace(out.String())))
	seen := s.count()
	for before := -1; seen != before; seen = s.count() {
		before = seen
		time.Sleep(1500 * time.Millisecond) // the ring is read within a second
	}
	return sent - seen, sent
}

// atEnd is how many of the last packets of ten pods are in no file, when their networks go some time later.
func atEnd(t *testing.T, program string, w way, later time.Duration) (lost, sent int) {
	var group sync.WaitGroup
	var kept atomic.Int32
	for range 10 {
		s := sniff(t, program, w)
		group.Go(func() {
			s.bash(`exec nsenter --net=/run/netns/$0 bash -c 'for i in {1..40}; do echo last >/dev/udp/10.99.0.9/4000; done'`)
			time.Sleep(later)
			s.bash("ip -n $0 link delete eth0")
			if strings.Contains(w.by, "any") {
				time.Sleep(3 * time.Second) // as the program does
			}
			s.end()
			kept.Add(int32(s.count()))
		})
	}
	group.Wait()
	return 400 - int(kept.Load()), 400
}

// loss writes a table of what is lost in each way. No other may lose less than the program's.
func loss(t *testing.T, program string) (table [][]string) {
	head := []string{"packets lost of those sent"}
	for _, w := range ways {
		head = append(head, w.name)
	}
	table = [][]string{head}
	compare := func(what string, run func(t *testing.T, w way) (lost, sent int)) (share []float64) {
		cells := []string{what}
		for _, w := range ways {
			t.Run(what+", "+w.name, func(t *testing.T) { // after which its networks are gone
				lost, sent := run(t, w)
				cells, share = append(cells, fmt.Sprintf("%d of %d", lost, sent)), append(share, float64(lost)/float64(sent))
			})
		}
		table = append(table, cells)
		return share
	}
	for _, rate := range []int{5_000, 50_000, 200_000} {
		share := compare(fmt.Sprintf("2 s at %d a second, or what can be sent", rate),
			func(t *testing.T, w way) (lost, sent int) { return sniff(t, program, w).inFlood(rate, 0) })
		if share[0] > slices.Min(share)+0.001 {
			t.Errorf("with the program's arguments %.4f of all packets are lost, with others %.4f", share[0], slices.Min(share))
		}
	}
	compare("2 s at 30000 a second, and tcpdump gets no processor for 0.3 s",
		func(t *testing.T, w way) (lost, sent int) {
			return sniff(t, program, w).inFlood(30_000, 300*time.Millisecond)
		})
	for _, later := range []time.Duration{1300 * time.Millisecond, 0} {
		share := compare(fmt.Sprintf("the last 40 of ten pods each, whose network goes %v later", later),
			func(t *testing.T, w way) (lost, sent int) { return atEnd(t, program, w, later) })
		if later > 0 && share[0] > 0 || share[1] > 0 {
			t.Error("the last packets of a pod are lost")
		}
	}
	return table
}
