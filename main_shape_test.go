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

// fileText is a file of the repository.
func fileText(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	must(t, err)
	return string(text)
}

// C1: the repository holds the program, what it is delivered with, its tests, and nothing else, and needs the standard library
// alone. Hidden files are tools'; packetcapture is what `make build` leaves.
func TestLayout(t *testing.T) {
	known := strings.Fields("main.go go.mod Dockerfile daemonset.yaml rbac.yaml test-pod.yaml kind-config.yaml Makefile README.md LICENSE outputs test")
	for _, name := range namesIn(t, ".") {
		isTest, _ := filepath.Match("main_*_test.go", name)
		if !isTest && !strings.HasPrefix(name, ".") && name != "packetcapture" && !slices.Contains(known, name) {
			t.Errorf("%s has no place in the repository", name)
		}
	}
	for _, name := range append(known, ".ci", ".github", ".gitignore", ".dockerignore") {
		if _, err := os.Stat(name); err != nil {
			t.Error(err)
		}
	}
	if module := fileText(t, "go.mod"); !strings.HasPrefix(module, "module packetcapture\n") || strings.Contains(module, "require") {
		t.Errorf("go.mod is %q", module)
	}
	files, _ := filepath.Glob("*.go")
	more, _ := filepath.Glob("test/*.go")
	for _, file := range append(files, more...) {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		must(t, err)
		for _, imported := range parsed.Imports {
			if first, _, _ := strings.Cut(imported.Path.Value, "/"); strings.Contains(first, ".") {
				t.Errorf("%s imports %s, which is not of the standard library", file, imported.Path.Value)
			}
		}
	}
}

// C1: main.go is read from top to bottom and once: it is short, its functions are, and none is deep. Its doc comment is the
// manual.
func TestShape(t *testing.T) {
	files := token.NewFileSet()
	program, err := parser.ParseFile(files, "main.go", nil, parser.ParseComments)
	must(t, err)
	lineOf := func(at token.Pos) int { return files.Position(at).Line }
	if lines := lineOf(program.FileEnd); lines > 1460 { // 1,200 are meant to be: it must not grow
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
	for _, name := range regexp.MustCompile(`"([A-Z]+_[A-Z_]+)"`).FindAllStringSubmatch(fileText(t, "main.go"), -1) {
		if isLink := strings.HasPrefix(name[1], "LINUX_"); !isLink && !strings.Contains(program.Doc.Text(), name[1]) {
			t.Errorf("the doc comment does not tell of %s", name[1])
		}
	}
}

// nesting is how deep if and for are within each other. An "else if" is no deeper than its "if".
func nesting(within ast.Node) (deepest int) {
	ast.Inspect(within, func(node ast.Node) bool {
		var body *ast.BlockStmt
		switch n := node.(type) {
		case *ast.IfStmt:
			body = n.Body
			if n.Else != nil {
				deepest = max(deepest, nesting(n.Else))
			}
		case *ast.ForStmt:
			body = n.Body
		case *ast.RangeStmt:
			body = n.Body
		default:
			return true
		}
		deepest = max(deepest, 1+nesting(body))
		return false
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
	if size := len(fileText(t, program)); size > 7_000_000 {
		t.Errorf("the program has %d bytes", size)
	}
	file, err := elf.Open(program)
	must(t, err)
	defer file.Close()
	if libraries, err := file.ImportedLibraries(); err != nil || len(libraries) > 0 || file.Section(".interp") != nil {
		t.Errorf("it is linked to %q, %v", libraries, err)
	}
}

// C1, C4, C8: the names, the knobs and the rights are those of the contract and no more. Each capability has its reason.
func TestManifests(t *testing.T) {
	withReasons := fileText(t, "daemonset.yaml")
	manifests := regexp.MustCompile(` *#.*`).ReplaceAllString(withReasons+fileText(t, "rbac.yaml"), "")
	for count, texts := range map[int][]string{
		0: {"privileged", "hostNetwork", "hostPath", "hostIPC"},
		1: {"kind: DaemonSet\n", "serviceAccountName: packetcapture\n", "- name: packetcapture\n        image: packetcapture:dev\n",
			"hostPID: true\n", "drop: [ALL]\n", "allowPrivilegeEscalation: false\n", "type: RuntimeDefault\n", "type: Unconfined\n", "type: spc_t\n",
			"- operator: Exists\n", "priorityClassName: system-node-critical\n", "resource: limits.ephemeral-storage\n", "dnsPolicy: None\n",
			"dnsConfig:\n", "name: DISK_LIMIT\n", "name: DISK_FREE\n", "name: NODE_NAME\n",
			"resources: [pods]\n  verbs: [list, watch]\n", "resources: [events]\n  verbs: [create]\n"},
		2: {"verbs:"},
		3: {"name: packetcapture\n  namespace: kube-system\n"}, // the DaemonSet, the ServiceAccount, and where it is bound
		4: {"\n            - "},                                // capabilities
		6: {"app: packetcapture\n"},                            // on all objects, in the DaemonSet three times
	} {
		for _, text := range texts {
			if got := strings.Count(manifests, text); got != count {
				t.Errorf("%q stands %d times in the manifests, want %d", text, got, count)
			}
		}
	}
	for _, capability := range []string{"SYS_PTRACE", "SYS_ADMIN", "NET_RAW", "SETGID"} {
		if !regexp.MustCompile(`\n            - ` + capability + ` +# .`).MatchString(withReasons) {
			t.Errorf("the capability %s is not added with its reason", capability)
		}
	}
	for _, name := range regexp.MustCompile(`name: (.*)`).FindAllStringSubmatch(fileText(t, "rbac.yaml"), -1) {
		if name[1] != "packetcapture" {
			t.Errorf("rbac.yaml has the name %s", name[1])
		}
	}
	if !strings.Contains(fileText(t, "test-pod.yaml"), "\n  name: traffic-pod\n") {
		t.Error("the test pod is not traffic-pod")
	}
}
