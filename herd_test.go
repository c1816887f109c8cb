package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"text/tabwriter"
	"time"
)

const (
	herdNodes = 5000
	herdPeak  = herdNodes / 10   // requests in any second stay below it
	herdWait  = 60 * time.Second // the most that a node may wait once the server is well
)

// outage is what happens to the API server while every node watches.
type outage struct {
	name       string
	away       time.Duration // at first nobody listens at its address
	busy       time.Duration // then every answer is 429
	retryAfter time.Duration // and says this
	isEvent    bool          // the watches end with an ERROR event of 410; else their connections are lost
	isGone     bool          // what was watched before is too old: 410 until there is a new list
}

// TestHerd has the programs of a large cluster lose their one API server, all in the same instant, in every way that
// it can be lost. (C6, rules 5 and 13)
//
// Of its table: requests are those that reach the server, their mean is from when it answers at all until all nodes
// watch, and the peak is the most in any second, wherever that begins. All watch is from when the server is well, and
// so is the longest wait of a node, but not from before the end of what the server had asked that node to wait.
func TestHerd(t *testing.T) {
	quiet(t)
	outages := []outage{
		{name: "restarts, is back at once"},
		{name: "is away for 30 s", away: 30 * time.Second},
		{name: "is away for 30 s, then 410 until a list", away: 30 * time.Second, isGone: true},
		{name: "sends ERROR 410 to every watch", isEvent: true, isGone: true},
		{name: "restarts, then 410 until a list", isGone: true},
		{name: "restarts, 30 s of 429, Retry-After: 1", busy: 30 * time.Second, retryAfter: time.Second},
		{name: "restarts, 30 s of 429, Retry-After: 30", busy: 30 * time.Second, retryAfter: 30 * time.Second},
	}
	if underRace() { // it makes all of this five times as slow
		outages = outages[2:4]
		t.Log("with -race, only the two hardest outages: go test -v -run Herd has all")
	}
	var table strings.Builder
	columns := tabwriter.NewWriter(&table, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(columns, "requests\ta second\tpeak\tall watch\tlongest wait\t  the API server")
	defer func() { // a bubble that fails does not return
		columns.Flush()
		t.Logf("%d nodes, in simulated time\n%s", herdNodes, &table)
	}()
	synctest.Test(t, func(t *testing.T) {
		h := newHerd(t)
		for _, o := range outages {
			all, longest := h.suffer(o)
			mean, peak := float64(len(h.requests))/(o.busy+all).Seconds(), h.peak()
			fmt.Fprintf(columns, "%d\t%.0f\t%d\t%.1f s\t%.1f s\t  %s\n",
				len(h.requests), mean, peak, all.Seconds(), longest.Seconds(), o.name)
			if peak >= herdPeak {
				t.Errorf("%s: %d requests in one second, want fewer than %d", o.name, peak, herdPeak)
			}
			if longest > herdWait {
				t.Errorf("%s: a node waited for %v, want at most %v", o.name, longest, herdWait)
			}
		}
	})
}

func underRace() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// herd is the nodes of a cluster, and their API server.
type herd struct {
	t     *testing.T
	nodes []*herdNode

	mu       sync.Mutex
	outage   outage        // that is or was the last
	began    time.Time     // when it did
	lost     chan struct{} // closed when the next one begins
	version  int           // of what is stored; later than before if that is gone
	requests []time.Time   // that the server got since began
}

// herdNode is one node's connection to the API server, and what the server knows of it.
type herdNode struct {
	*herd
	watched time.Time // when its last watch began
	asked   time.Time // until when it was asked to wait
}

// newHerd starts the nodes, which end with the bubble.
func newHerd(t *testing.T) *herd {
	account := t.TempDir()
	if err := os.WriteFile(filepath.Join(account, "token"), []byte("token"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := &herd{t: t, began: time.Now(), lost: make(chan struct{}), version: 1}
	for i := range herdNodes {
		n := &herdNode{herd: h}
		h.nodes = append(h.nodes, n)
		w := &podWatch{
			kube: &kube{api: "https://kubernetes.test", account: account, http: http.Client{Transport: n}},
			node: "node-" + strconv.Itoa(i), changes: make(chan change, 100), version: "0", retry: requestBackoff,
		}
		go w.run(t.Context())
	}
	return h
}

// suffer has an outage begin, and returns when all nodes watch again: how long that took from when the server was
// well, and the longest wait of a node.
func (h *herd) suffer(o outage) (all, longest time.Duration) {
	time.Sleep(time.Minute) // for watches that prove that the last outage is over, but have not come to their time limit
	if watching := h.watching(); watching < herdNodes {
		h.t.Fatalf("%d nodes watch before: %s", watching, o.name)
	}
	h.begin(o)
	well := h.began.Add(o.away + o.busy)
	for h.watching() < herdNodes {
		if time.Sleep(time.Second); time.Since(well) > 3*time.Minute {
			h.t.Fatalf("%d nodes watch after: %s", h.watching(), o.name)
		}
	}
	for _, n := range h.nodes {
		all = max(all, n.watched.Sub(well))
		longest = max(longest, min(n.watched.Sub(well), n.watched.Sub(n.asked)))
	}
	return all, longest
}

func (h *herd) begin(o outage) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.outage, h.began, h.requests = o, time.Now(), nil
	if o.isGone {
		h.version++
	}
	close(h.lost)
	h.lost = make(chan struct{})
}

// watching counts the nodes that watch.
func (h *herd) watching() (count int) {
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, n := range h.nodes {
		if !n.watched.Before(h.began) {
			count++
		}
	}
	return count
}

// peak is the most requests in any second.
func (h *herd) peak() (most int) {
	first := 0
	for i, at := range h.requests {
		for at.Sub(h.requests[first]) >= time.Second {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}

// RoundTrip is the API server.
func (n *herdNode) RoundTrip(r *http.Request) (*http.Response, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	since := now.Sub(n.began)
	if since < n.outage.away {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
	n.requests = append(n.requests, now)
	query, version := r.URL.Query(), strconv.Itoa(n.version)
	switch {
	case since < n.outage.away+n.outage.busy:
		n.asked = now.Add(n.outage.retryAfter)
		response := herdAnswer(http.StatusTooManyRequests, strings.NewReader("{}"))
		response.Header.Set("Retry-After", strconv.Itoa(int(n.outage.retryAfter.Seconds())))
		return response, nil
	case query.Get("watch") == "":
		return herdAnswer(http.StatusOK, strings.NewReader(`{"metadata":{"resourceVersion":"`+version+`"}}`)), nil
	case query.Get("resourceVersion") != version:
		return herdAnswer(http.StatusGone, strings.NewReader("{}")), nil
	}
	n.watched = now
	return herdAnswer(http.StatusOK, &herdStream{n.herd, r.Context(), n.lost}), nil
}

func herdAnswer(code int, body io.Reader) *http.Response {
	return &http.Response{StatusCode: code, Header: http.Header{}, Body: io.NopCloser(body)}
}

// herdStream is the body of a watch: nothing happens before it is lost.
type herdStream struct {
	*herd
	ctx  context.Context
	lost chan struct{}
}

func (s *herdStream) Read(p []byte) (int, error) {
	select {
	case <-s.ctx.Done():
		return 0, s.ctx.Err()
	case <-s.lost:
	}
	if s.outage.isEvent {
		return copy(p, `{"type":"ERROR","object":{"kind":"Status","code":410}}`), io.EOF
	}
	return 0, &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
}
