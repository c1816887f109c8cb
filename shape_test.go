package main

import (
	"debug/elf"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// C1: one file of Go, with the standard library alone.
func TestShape(t *testing.T) {
	files, err := filepath.Glob("*.go")
	must(t, err)
	for _, file := range files {
		if file != "main.go" && !strings.HasSuffix(file, "_test.go") {
			t.Errorf("%s: the program is main.go alone", file)
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		must(t, err)
		for _, imported := range parsed.Imports {
			if first, _, _ := strings.Cut(strings.Trim(imported.Path.Value, `"`), "/"); strings.Contains(first, ".") {
				t.Errorf("%s imports %s, which is not of the standard library", file, imported.Path.Value)
			}
		}
	}
	module, err := os.ReadFile("go.mod")
	must(t, err)
	if !strings.HasPrefix(string(module), "module packetcapture\n") || strings.Contains(string(module), "require") {
		t.Errorf("go.mod is %q", module)
	}
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

// C1 and C8: the names, and the rights that are asked for, are those of the contract and no more.
func TestManifests(t *testing.T) {
	read := func(file string) string {
		text, err := os.ReadFile(file)
		must(t, err)
		return regexp.MustCompile(` *#.*`).ReplaceAllString(string(text), "")
	}
	daemonSet, rbac := read("daemonset.yaml"), read("rbac.yaml")
	for _, want := range []string{
		"name: packetcapture\n  namespace: kube-system\n", "app: packetcapture\n", "image: packetcapture:dev\n",
		"hostPID: true\n", "drop: [ALL]\n", "allowPrivilegeEscalation: false\n", "type: RuntimeDefault\n",
		"- operator: Exists\n", "priorityClassName: system-node-critical\n", "resource: limits.ephemeral-storage\n",
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
	_, capabilities, _ := strings.Cut(daemonSet, "add:\n")
	capabilities, _, _ = strings.Cut(capabilities, "seccompProfile")
	if got := strings.Join(strings.Fields(strings.ReplaceAll(capabilities, "- ", "")), " "); got != "SYS_PTRACE SYS_ADMIN NET_RAW SETGID" {
		t.Errorf("the added capabilities are %s", got)
	}
	rules := regexp.MustCompile(`resources: (\[.*\])\n  verbs: (\[.*\])`).FindAllStringSubmatch(rbac, -1)
	if len(rules) != 2 || rules[0][1]+rules[0][2] != "[pods][list, watch]" || rules[1][1]+rules[1][2] != "[events][create]" {
		t.Errorf("the rules are %q", rules)
	}
}
