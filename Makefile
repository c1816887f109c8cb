# The cluster's name for kind; kubectl only ever talks to this cluster.
CLUSTER ?= kind
# The image of kind's nodes; empty: the one that kind has by default. Kubernetes 1.31 or later (appArmorProfile).
KIND_IMAGE ?=
# antrea, or none: then nothing waits for a network, and you install one between `kind-up` and `deploy`.
CNI ?= antrea
ANTREA_VERSION ?= 2.5.2
IMAGE ?= packetcapture:dev
# Of `make soak`.
STEPS ?= 100000
# More flags for `go test`, like -v.
TESTFLAGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# `make -j kind-up deploy verify` keeps its order.
.NOTPARALLEL:

KIND := $(or $(shell command -v kind 2>/dev/null),go run sigs.k8s.io/kind@v0.33.0)
HELM := $(or $(shell command -v helm 2>/dev/null),go run helm.sh/helm/v3/cmd/helm@v3.20.2)
KUBECTL := kubectl --context kind-$(CLUSTER)

.PHONY: help build test image kind-up deploy verify soak bench e2e measure undeploy kind-down

help: ## Show this
	@echo 'make kind-up deploy verify   the whole job on a new kind cluster'
	@echo 'make test                    the tests'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'CLUSTER=$(CLUSTER) KIND_IMAGE=$(KIND_IMAGE) CNI=$(CNI) ANTREA_VERSION=$(ANTREA_VERSION) IMAGE=$(IMAGE)'

build: ## Compile ./packetcapture
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o packetcapture .

# -count=1: what is tested is the machine as well (tcpdump, namespaces), of which go's cache of results knows nothing.
test: ## gofmt, go vet and the tests; as root, with tcpdump, the real captures too
	@unformatted=$$(gofmt -l .); [[ -z $$unformatted ]] || { echo "gofmt would change: $$unformatted" >&2; exit 1; }
	go vet ./...
	go test -race -count=1 $(TESTFLAGS) ./...

# Docker before 23 does not use BuildKit, and with it cache mounts, unless it is told to.
image: ## Build the image IMAGE
	DOCKER_BUILDKIT=1 docker build -t $(IMAGE) .

kind-up: ## Create the kind cluster CLUSTER if it is not there, with Antrea, and wait until it is ready
	@case '$(CNI)' in antrea | none) ;; *) echo 'CNI is antrea or none, not $(CNI)' >&2; exit 1 ;; esac
	@if $(KIND) get clusters 2>/dev/null | grep -x -- '$(CLUSTER)' >/dev/null; then \
	  echo 'the cluster $(CLUSTER) is there'; \
	else \
	  $(KIND) create cluster --name $(CLUSTER) --config kind-config.yaml $(if $(KIND_IMAGE),--image $(KIND_IMAGE)); \
	fi
ifeq ($(CNI),antrea)
	$(HELM) upgrade --install antrea antrea --repo https://charts.antrea.io --version $(ANTREA_VERSION) \
	  --kube-context kind-$(CLUSTER) --namespace kube-system
	$(KUBECTL) -n kube-system rollout status daemonset/antrea-agent --timeout=10m
	$(KUBECTL) wait --for=condition=Ready nodes --all --timeout=5m
endif

# The tag stays the same when the image changes, so the image's ID goes into the Pods' template: the rollout begins
# exactly when there is something new to run, and the captures of an unchanged program go on.
deploy: image ## Build the image, load it into the nodes, and roll it out
	$(KIND) load docker-image $(IMAGE) --name $(CLUSTER)
	$(KUBECTL) apply -f rbac.yaml
	id=$$(docker image inspect --format '{{.Id}}' $(IMAGE)); \
	sed 's|image: packetcapture:dev|image: $(IMAGE)|' daemonset.yaml \
	| kubectl patch --local -o yaml -f - \
	  -p '{"spec":{"template":{"metadata":{"annotations":{"packetcapture/image-id":"'"$$id"'"}}}}}' \
	| $(KUBECTL) apply -f -
	$(KUBECTL) -n kube-system rollout status daemonset/packetcapture --timeout=3m

verify: ## Capture a test Pod on the cluster, check everything about it, and write outputs/
	CLUSTER='$(CLUSTER)' IMAGE='$(IMAGE)' test/verify.sh

# In fake time: hours of faults take minutes. STEPS of a random walk, in walks of 400 with a seed each.
soak: ## The property test for STEPS steps, and the simulation of 5,000 nodes
	go test -run TestSoak -soak.steps=$(STEPS) -count=1 -timeout 60m .
	go test -run TestHerd -count=1 -v .

bench: ## Benchmarks, ready for benchstat
	go test -run '^$$' -bench . -benchmem -count=6 .

# It restarts the worker's container and the API server, so it is for a cluster made for it.
e2e: ## Break what can break on the cluster, and count from outside what is left
	CLUSTER='$(CLUSTER)' IMAGE='$(IMAGE)' go test -tags e2e -run TestE2E -v -count=1 -timeout 30m .

# As root on the machine whose Docker runs the nodes. It makes 100 Pods.
measure: ## Measure start, stop, CPU, memory and lost packets, beside what nothing can beat
	CLUSTER='$(CLUSTER)' IMAGE='$(IMAGE)' go test -tags e2e -run TestMeasure -v -count=1 -timeout 30m .
	go test -tags e2e -run 'TestLoad|TestLoss' -v -count=1 -timeout 30m .

undeploy: ## Remove what deploy has applied, and with it all captures
	$(KUBECTL) delete --ignore-not-found -f daemonset.yaml -f rbac.yaml

kind-down: ## Delete the cluster CLUSTER
	$(KIND) delete cluster --name $(CLUSTER)
