# The cluster's name for kind.
CLUSTER ?= kind
# kubectl's context: everything talks to this cluster alone. Empty: the current one.
CONTEXT ?= kind-$(CLUSTER)
KUBECTL ?= kubectl
# The image of kind's nodes; empty: the one that kind has by default. Kubernetes 1.31 or later (appArmorProfile).
KIND_IMAGE ?=
KIND_CONFIG ?= kind-config.yaml
# antrea, or none: then nothing waits for a network, and you install one between `kind-up` and `deploy`.
CNI ?= antrea
ANTREA_VERSION ?= 2.7.0
IMAGE ?= packetcapture:dev
# Of `make verify`, e2e and measure: the folder they write what they saw to.
OUTPUTS ?= outputs
# Of `make verify`: the node of the test pod; empty: any. SLOW multiplies the deadlines, for a slow node.
NODE ?=
SLOW ?= 1
# Of `make soak`.
STEPS ?= 100000
# More flags for `go test`, like -v.
TESTFLAGS ?=
# Of `make pcap` and `make live`.
NAMESPACE ?= default

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# `make -j kind-up deploy verify` keeps its order.
.NOTPARALLEL:

KIND := $(or $(shell command -v kind 2>/dev/null),go run sigs.k8s.io/kind@v0.33.0)
HELM := $(or $(shell command -v helm 2>/dev/null),go run helm.sh/helm/v3/cmd/helm@v3.22.0)
kubectl = $(KUBECTL) $(if $(CONTEXT),--context '$(CONTEXT)')
cluster_test = CLUSTER='$(CLUSTER)' CONTEXT='$(CONTEXT)' IMAGE='$(IMAGE)' OUTPUTS='$(abspath $(OUTPUTS))' NODE='$(NODE)' SLOW='$(SLOW)'

.PHONY: help build test image kind-up deploy deploy-to verify pcap live soak bench e2e node measure undeploy kind-down

help: ## Show this
	@echo 'make kind-up deploy verify   the whole job on a new kind cluster'
	@echo 'make test                    the tests'
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "CLUSTER=$(CLUSTER) CONTEXT=$(CONTEXT) KUBECTL='$(KUBECTL)' IMAGE=$(IMAGE) NAMESPACE=$(NAMESPACE) OUTPUTS=$(OUTPUTS)"
	@echo 'KIND_IMAGE=$(KIND_IMAGE) KIND_CONFIG=$(KIND_CONFIG) CNI=$(CNI) ANTREA_VERSION=$(ANTREA_VERSION) NODE=$(NODE) SLOW=$(SLOW) STEPS=$(STEPS)'

build: ## Compile ./packetcapture
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o packetcapture .

# -count=1: what is tested is the machine as well (tcpdump, namespaces), of which go's cache of results knows nothing.
test: ## gofmt, go vet and the tests; as root, with tcpdump, the real captures too
	@unformatted=$$(gofmt -l .); [[ -z $$unformatted ]] || { echo "gofmt would change: $$unformatted" >&2; exit 1; }
	for tags in '' e2e measure; do go vet -tags "$$tags" ./...; done
	go test -race -count=1 $(TESTFLAGS) ./...

# Docker before 23 does not use BuildKit, and with it cache mounts, unless it is told to.
image: ## Build the image IMAGE
	DOCKER_BUILDKIT=1 docker build -t $(IMAGE) .

kind-up: ## Create the kind cluster CLUSTER if it is not there, with Antrea, and wait until it is ready
	@case '$(CNI)' in antrea | none) ;; *) echo 'CNI is antrea or none, not $(CNI)' >&2; exit 1 ;; esac
	@if $(KIND) get clusters 2>/dev/null | grep -x -- '$(CLUSTER)' >/dev/null; then \
	  echo 'the cluster $(CLUSTER) is there'; \
	else \
	  $(KIND) create cluster --name $(CLUSTER) --config $(KIND_CONFIG) $(if $(KIND_IMAGE),--image $(KIND_IMAGE)); \
	fi
ifeq ($(CNI),antrea)
	$(HELM) upgrade --install antrea antrea --repo https://charts.antrea.io --version $(ANTREA_VERSION) \
	  --kube-context kind-$(CLUSTER) --namespace kube-system
	$(kubectl) -n kube-system rollout status daemonset/antrea-agent --timeout=10m
	$(kubectl) wait --for=condition=Ready nodes --all --timeout=5m
endif

# Applies the manifests with $$image. The tag may stay the same when the image changes, so the image's ID goes into the pods'
# template: the rollout begins exactly when there is something new to run, and the captures of an unchanged program go on.
define apply
id=$$(docker image inspect --format '{{.Id}}' '$(IMAGE)'); \
$(kubectl) apply -f rbac.yaml; \
$(KUBECTL) patch --local -o yaml -f daemonset.yaml -p '{"spec": {"template": { \
  "metadata": {"annotations": {"packetcapture/image-id": "'"$$id"'"}}, \
  "spec": {"containers": [{"name": "packetcapture", "image": "'"$$image"'", "env": [$(env)]}]}}}}' \
| $(kubectl) apply -f -; \
$(kubectl) -n kube-system rollout status daemonset/packetcapture --timeout=$$((180 * $(SLOW)))s
endef

# kind's kubelets evict nobody, so the captures need not leave a part of the disk free.
deploy: env = {"name": "DISK_FREE", "value": "0"}
deploy: image ## Build the image, load it into the nodes of the kind cluster, and roll it out
	$(KIND) load docker-image $(IMAGE) --name $(CLUSTER)
	@image='$(IMAGE)'; $(apply)

deploy-to: ## The same for a cluster that is not kind, through REGISTRY: make deploy-to REGISTRY=reg.io/me CONTEXT=prod
	@[[ '$(REGISTRY)' ]] || { echo 'Which registry? make deploy-to REGISTRY=registry.example.com/me CONTEXT=...' >&2; exit 1; }
	@[[ '$(origin CONTEXT)' != file ]] || { echo 'Which cluster? CONTEXT= is one of:' $$($(KUBECTL) config get-contexts -o name) >&2; exit 1; }
	@[[ ! '$(CONTEXT)' ]] || $(KUBECTL) config get-contexts '$(CONTEXT)' >/dev/null
	@$(MAKE) --no-print-directory image
	docker tag $(IMAGE) $(REGISTRY)/$(IMAGE)
	docker push $(REGISTRY)/$(IMAGE)
	@image=$$(docker image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' '$(REGISTRY)/$(IMAGE)' | grep -F '$(REGISTRY)/' | tail -1); $(apply)

verify: ## Capture a test pod on the cluster, check everything about it, and write OUTPUTS
	$(cluster_test) test/verify.sh

# Finds the packetcapture pod of the pod's node, and has it write to stdout, where nothing else goes. Where two pods of the
# node have the same name, the files of the second have its UID in theirs.
define cat
@fail() { echo "$$*" >&2; exit 1; }; \
[[ '$(POD)' ]] || fail 'Which pod? make $@ POD=web NAMESPACE=$(NAMESPACE)'; \
[[ ! -t 1 ]] || fail 'The packets go to stdout, which must be a file or a pipe, not a terminal.'; \
found=$$($(kubectl) get pod '$(POD)' -n '$(NAMESPACE)' --ignore-not-found \
  -o jsonpath='{.metadata.uid}|{.spec.nodeName}|{.metadata.annotations.tcpdump\.antrea\.io}'); \
IFS='|' read -r uid node n <<<"$$found"; \
[[ $$uid ]] || fail 'There is no pod $(POD) in the namespace $(NAMESPACE).'; \
[[ $$n ]] || fail 'The pod $(POD) is not captured: kubectl annotate pod -n $(NAMESPACE) $(POD) tcpdump.antrea.io="5"'; \
[[ $$node ]] || fail 'The pod $(POD) is on no node yet.'; \
capture=$$($(kubectl) get pod -n kube-system -l app=packetcapture --sort-by=.metadata.creationTimestamp \
  --field-selector "spec.nodeName=$$node,status.phase=Running" -o name | tail -1); \
[[ $$capture ]] || fail "No packetcapture pod runs on $$node, the node of $(POD)."; \
exec $(kubectl) exec $(if $(follow),-i) -n kube-system "$$capture" -c packetcapture -- bash -c \
  'stem=/capture-$$1_$$2.pcap; compgen -G "$$stem*" >/dev/null || stem=/capture-$$1.pcap; exec packetcapture cat $(follow) "$$stem"' \
  bash '$(POD)' "$${uid:0:8}"
endef

pcap: ## The capture of the pod POD so far: make pcap POD=web NAMESPACE=default >web.pcap
	$(cat)

live: follow = -f
live: ## The capture of the pod POD as it comes: make live POD=web | wireshark -k -i -
	$(cat)

# In fake time: hours of faults take minutes. STEPS of a random walk, in walks of 400 with a seed each.
soak: ## The property test for STEPS steps
	go test -run TestSoak -soak.steps=$(STEPS) -count=1 -timeout 60m .

bench: ## Benchmarks, ready for benchstat
	go test -run '^$$' -bench . -benchmem -count=6 .

# It restarts the worker's container and the API server, so it is for a cluster made for it.
e2e: ## Break what can break on the cluster, and count from outside what is left
	$(cluster_test) go test -tags e2e -run TestE2E -v -count=1 -timeout 40m $(TESTFLAGS) ./test

node: ## The same for the node NODE, as far as it is about nodes: the program, its captures and the kernel
	$(cluster_test) go test -tags e2e -run TestNode -v -count=1 -timeout 40m $(TESTFLAGS) ./test

# As root on the machine whose Docker runs the nodes. It makes 100 pods.
measure: ## Measure start, stop, CPU, memory and lost packets, beside what nothing can beat
	$(cluster_test) go test -tags e2e -run TestMeasure -v -count=1 -timeout 40m $(TESTFLAGS) ./test
	$(cluster_test) go test -tags measure -run 'TestLoad|TestLoss' -v -count=1 -timeout 40m $(TESTFLAGS) .

# First the pods, which tell their last Events as they end, and then the rights to do so.
undeploy: ## Remove what deploy has applied, and with it all captures
	$(kubectl) delete --ignore-not-found --cascade=foreground --timeout=2m -f daemonset.yaml
	$(kubectl) delete --ignore-not-found -f rbac.yaml

kind-down: ## Delete the cluster CLUSTER
	$(KIND) delete cluster --name $(CLUSTER)
