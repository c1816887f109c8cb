package main

import (
	"debug/elf"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// read is a file of the repository.
func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	must(t, err)
	return string(text)
}

// C1: the repository holds the program, what it is delivered with, its tests, and nothing else. Hidden files are tools'.
func TestLayout(t *testing.T) {
	known := strings.Fields("main.go go.mod Dockerfile daemonset.yaml rbac.yaml test-pod.yaml kind-config.yaml Makefile README.md LICENSE " +
		"outputs test packetcapture") // the last is what `make build` leaves
	for _, name := range namesIn(t, ".") {
		isTest, _ := filepath.Match("main_*_test.go", name)
		if !isTest && !strings.HasPrefix(name, ".") && !slices.Contains(known, name) {
			t.Errorf("%s has no place in the repository", name)
		}
	}
	for _, name := range append(known[:len(known)-1], ".ci", ".github", ".gitignore", ".dockerignore") {
		if _, err := os.Stat(name); err != nil {
			t.Error(err)
		}
	}
	if module := read(t, "go.mod"); !strings.HasPrefix(module, "module packetcapture\n") || strings.Contains(module, "require") {
		t.Errorf("go.mod is %q", module)
	}
	for _, pattern := range []string{"*.go", "test/*.go"} {
		files, _ := filepath.Glob(pattern)
		for _, file := range files {
			parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
			must(t, err)
			for _, imported := range parsed.Imports {
				if first, _, _ := strings.Cut(strings.Trim(imported.Path.Value, `"`), "/"); strings.Contains(first, ".") {
					t.Errorf("%s imports %s, which is not of the standard library", file, imported.Path.Value)
				}
			}
		}
	}
}

// C1: main.go is read from top to bottom and once: it is short, its functions are, and none is deep.
func TestShape(t *testing.T) {
	files := token.NewFileSet()
	program, err := parser.ParseFile(files, "main.go", nil, parser.ParseComments)
	must(t, err)
	lineOf := func(at token.Pos) int { return files.Position(at).Line }
	if lines := lineOf(program.FileEnd); lines > 1700 { // 1,200 are meant to be: it must not grow
		t.Errorf("main.go has %d lines", lines)
	}
	var lengths []int
	for _, declared := range program.Decls {
		f, ok := declared.(*ast.FuncDecl)
		if !ok {
			continue
		}
		length, depth := lineOf(f.End())-lineOf(f.Pos())+1, nesting(f.Body)
		if lengths = append(lengths, length); length > 40 || depth > 2 {
			t.Errorf("%s has %d lines, at most 40 are meant to be; if and for are nested %d deep, at most 2", f.Name.Name, length, depth)
		}
	}
	slices.Sort(lengths)
	if median := lengths[len(lengths)/2]; median > 12 {
		t.Errorf("the median function of %d has %d lines, 12 are meant to be", len(lengths), median)
	}
	// The doc comment is the manual.
	for _, name := range regexp.MustCompile(`"([A-Z]+_[A-Z_]+)"`).FindAllStringSubmatch(read(t, "main.go"), -1) {
		if isAPI := strings.HasPrefix(name[1], "LINUX_"); !isAPI && !strings.Contains(program.Doc.Text(), name[1]) {
			t.Errorf("the doc comment does not tell of %s", name[1])
		}
	}
}

// nesting is how deep if and for are within each other. An "else if" is no deeper than its "if".
func nesting(within ast.Node) (deepest int) {
	ast.Inspect(within, func(node ast.Node) bool {
		inner := []ast.Node{}
		switch n := node.(type) {
		case *ast.IfStmt:
			inner = append(inner, n.Body)
			if n.Else != nil {
				deepest = max(deepest, nesting(n.Else))
			}
		case *ast.ForStmt:
			inner = append(inner, n.Body)
		case *ast.RangeStmt:
			inner = append(inner, n.Body)
		}
		for _, n := range inner {
			deepest = max(deepest, 1+nesting(n))
		}
		return len(inner) == 0
	})
	return deepest
}

// C1: the program is small, and needs nothing of the image that it is in.
func TestSize(t *testing.T) {
	program := filepath.Join(t.TempDir(), "packetcapture")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	info, err := os.Stat(program)
	must(t, err)
	if info.Size() > 7_000_000 {
		t.Errorf("the program has %d bytes", info.Size())
	}
	file, err := elf.Open(program)
	must(t, err)
	defer file.Close()
	if libraries, err := file.ImportedLibraries(); err != nil || len(libraries) > 0 || file.Section(".interp") != nil {
		t.Errorf("it is linked to %q, %v", libraries, err)
	}
}

// C1, C4, C8: the names, the knobs and the rights are those of the contract and no more.
func TestManifests(t *testing.T) {
	comments := regexp.MustCompile(` *#.*`)
	daemonSet, rbac := comments.ReplaceAllString(read(t, "daemonset.yaml"), ""), comments.ReplaceAllString(read(t, "rbac.yaml"), "")
	for _, want := range []string{
		"kind: DaemonSet\n", "name: packetcapture\n  namespace: kube-system\n", "app: packetcapture\n", "serviceAccountName: packetcapture\n",
		"- name: packetcapture\n        image: packetcapture:dev\n", "hostPID: true\n", "drop: [ALL]\n", "allowPrivilegeEscalation: false\n",
		"type: RuntimeDefault\n", "type: Unconfined\n", "type: spc_t\n", "- operator: Exists\n", "priorityClassName: system-node-critical\n",
		"resource: limits.ephemeral-storage\n", "name: DISK_LIMIT\n", "name: DISK_FREE\n", "name: NODE_NAME\n", "name: POD_NAME\n",
		"dnsPolicy: None\n", "dnsConfig:\n",
	} {
		if !strings.Contains(daemonSet, want) {
			t.Errorf("daemonset.yaml lacks %q", want)
		}
	}
	for _, never := range []string{"privileged", "hostNetwork", "hostPath", "hostIPC"} {
		if strings.Contains(daemonSet, never) {
			t.Errorf("daemonset.yaml asks for %s", never)
		}
	}
	_, added, _ := strings.Cut(read(t, "daemonset.yaml"), "            add:\n")
	var capabilities []string // each with its reason
	for line := range strings.Lines(added) {
		capability := regexp.MustCompile(`^ +- ([A-Z_]+) +# .`).FindStringSubmatch(line)
		if capability == nil {
			break
		}
		capabilities = append(capabilities, capability[1])
	}
	if got := strings.Join(capabilities, " "); got != "SYS_PTRACE SYS_ADMIN NET_RAW SETGID" || strings.Count(daemonSet, "            - ") != 4 {
		t.Errorf("the added capabilities are %s", got)
	}
	rules := regexp.MustCompile(`resources: (\[.*\])\n  verbs: (\[.*\])`).FindAllStringSubmatch(rbac, -1)
	if len(rules) != 2 || rules[0][1]+rules[0][2] != "[pods][list, watch]" || rules[1][1]+rules[1][2] != "[events][create]" || strings.Count(rbac, "verbs:") != 2 {
		t.Errorf("the rules are %q", rules)
	}
	for _, name := range regexp.MustCompile(`name: (.*)`).FindAllStringSubmatch(rbac, -1) {
		if name[1] != "packetcapture" {
			t.Errorf("rbac.yaml has the name %s", name[1])
		}
	}
	if !strings.Contains(read(t, "test-pod.yaml"), "name: traffic-pod\n") {
		t.Error("the test pod is not traffic-pod")
	}
}
