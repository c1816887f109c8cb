# The kind cluster's name.
CLUSTER ?= kind
# The kubectl context; empty: the current one. kind and Helm always use that of CLUSTER.
CONTEXT ?= kind-$(CLUSTER)
KUBECTL ?= kubectl
# The image of kind's nodes; empty: kind's default. appArmorProfile needs Kubernetes 1.31 or later.
KIND_IMAGE ?=
KIND_CONFIG ?= kind-config.yaml
# antrea or none. With none, install a CNI yourself between kind-up and deploy.
CNI ?= antrea
ANTREA_VERSION ?= 2.7.0
IMAGE ?= packetcapture:dev
# The folder that verify, e2e and measure write to.
OUTPUTS ?= outputs
# The node under test; empty: any node for verify, the worker for the others. SLOW multiplies all deadlines.
NODE ?=
SLOW ?= 1
# How many random steps soak takes.
STEPS ?= 100000
# Extra flags for go test, such as -v.
TESTFLAGS ?=
# The captured pod for pcap and live, and the file that pcap writes.
POD ?=
NAMESPACE ?= default
OUT ?= $(POD).pcap

SHELL := /bin/bash
.DELETE_ON_ERROR:
# Keeps kind-up, deploy and verify in order under make -j.
.NOTPARALLEL:
# macOS ships Make 3.81, which has no .SHELLFLAGS. So each recipe that needs these options begins with this.
strict := set -euo pipefail;

KIND := $(or $(shell command -v kind 2>/dev/null),go run sigs.k8s.io/kind@v0.33.0)
HELM := $(or $(shell command -v helm 2>/dev/null),go run helm.sh/helm/v3/cmd/helm@v3.22.0)
kubectl = $(KUBECTL) $(if $(CONTEXT),--context '$(CONTEXT)')
cluster_test = CLUSTER='$(CLUSTER)' CONTEXT='$(CONTEXT)' KUBECTL='$(KUBECTL)' IMAGE='$(IMAGE)' \
  OUTPUTS='$(abspath $(OUTPUTS))' NODE='$(NODE)' SLOW='$(SLOW)'

.PHONY: help build test image kind-up deploy deploy-to verify where pcap live soak e2e node measure undeploy kind-down

help: ## Show this
	@echo 'make kind-up deploy verify   everything, on a new kind cluster'
	@echo 'make test                    the tests'
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "CLUSTER=$(CLUSTER) CONTEXT=$(CONTEXT) KUBECTL='$(KUBECTL)' IMAGE=$(IMAGE) NAMESPACE=$(NAMESPACE) OUTPUTS=$(OUTPUTS)"
	@echo 'KIND_IMAGE=$(KIND_IMAGE) KIND_CONFIG=$(KIND_CONFIG) CNI=$(CNI) ANTREA_VERSION=$(ANTREA_VERSION) NODE=$(NODE) SLOW=$(SLOW) STEPS=$(STEPS)'

build: ## Compile ./packetcapture
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o packetcapture .

# -count=1: the results also depend on the machine (tcpdump, namespaces), which Go's test cache ignores.
test: ## Run gofmt, go vet and the tests, on Linux; as root and with tcpdump, make real captures too
	@unformatted=$$(gofmt -l .); [[ -z $$unformatted ]] || { echo "gofmt would change: $$unformatted" >&2; exit 1; }
	go vet ./... && go vet -tags e2e ./...
	go test -race -count=1 $(TESTFLAGS) ./...

# Docker before 23 uses BuildKit, which the Dockerfile's cache mounts need, only if told to.
image: ## Build IMAGE
	DOCKER_BUILDKIT=1 docker build -t $(IMAGE) .

kind-up: ## Create the kind cluster CLUSTER unless it exists, install Antrea, and wait until it is ready
	@case '$(CNI)' in antrea | none) ;; *) echo 'CNI must be antrea or none, not $(CNI)' >&2; exit 1 ;; esac
	@if $(KIND) get clusters 2>/dev/null | grep -x -- '$(CLUSTER)' >/dev/null; then \
	  echo 'the cluster $(CLUSTER) already exists'; \
	else \
	  $(KIND) create cluster --name $(CLUSTER) --config $(KIND_CONFIG) $(if $(KIND_IMAGE),--image $(KIND_IMAGE)); \
	fi
ifeq ($(CNI),antrea)
	$(HELM) upgrade --install antrea antrea --repo https://charts.antrea.io --version $(ANTREA_VERSION) \
	  --kube-context kind-$(CLUSTER) --namespace kube-system
	$(kubectl) -n kube-system rollout status daemonset/antrea-agent --timeout=10m
	$(kubectl) wait --for=condition=Ready nodes --all --timeout=5m
endif

# Applies the manifests with $$image, and the image's ID as an annotation of the pod template. So a new image is
# rolled out even if its tag stays the same, and an unchanged one does not interrupt any capture.
define apply
id=$$(docker image inspect --format '{{.Id}}' '$(IMAGE)'); \
$(kubectl) apply -f rbac.yaml; \
$(KUBECTL) patch --local -o yaml -f daemonset.yaml -p '{"spec": {"template": { \
  "metadata": {"annotations": {"packetcapture/image-id": "'"$$id"'"}}, \
  "spec": {"containers": [{"name": "packetcapture", "image": "'"$$image"'", "env": [$(env)]}]}}}}' \
| $(kubectl) apply -f -; \
$(kubectl) -n kube-system rollout status daemonset/packetcapture --timeout=$$((180 * $(SLOW)))s
endef

# kind's kubelets do not evict pods when the disk is full, so captures may fill it.
deploy: env = {"name": "DISK_FREE", "value": "0"}
deploy: image ## Build the image, load it into the kind cluster's nodes, and roll it out
	$(KIND) load docker-image $(IMAGE) --name $(CLUSTER)
	@$(strict) image='$(IMAGE)'; $(apply)

deploy-to: ## Deploy to any cluster through a registry: make deploy-to REGISTRY=reg.io/me CONTEXT=prod
	@[[ '$(REGISTRY)' ]] || { echo 'Which registry? make deploy-to REGISTRY=registry.example.com/me CONTEXT=...' >&2; exit 1; }
	@[[ '$(origin CONTEXT)' != file ]] || { echo 'Which cluster? CONTEXT= is one of:' $$($(KUBECTL) config get-contexts -o name) >&2; exit 1; }
	@[[ ! '$(CONTEXT)' ]] || $(KUBECTL) config get-contexts '$(CONTEXT)' >/dev/null
	@$(MAKE) --no-print-directory image
	docker tag $(IMAGE) $(REGISTRY)/$(IMAGE)
	docker push $(REGISTRY)/$(IMAGE)
	@$(strict) image=$$(docker image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' '$(REGISTRY)/$(IMAGE)' \
	  | awk -v repository='$(REGISTRY)/' 'index($$0, repository) == 1 { last = $$0 } END { print last }'); $(apply)

verify: ## Capture a test pod on the cluster, check everything, and write what was seen to OUTPUTS
	$(cluster_test) test/verify.sh

# Sets $$capture to the packetcapture pod on POD's node.
define find
$(strict) fail() { echo "$$*" >&2; exit 1; }; \
[[ '$(POD)' ]] || fail 'Which pod? make $@ POD=web NAMESPACE=$(NAMESPACE)'; \
found=$$($(kubectl) get pod '$(POD)' -n '$(NAMESPACE)' --ignore-not-found -o jsonpath='found {.spec.nodeName}'); \
[[ $$found ]] || fail 'There is no pod $(POD) in the namespace $(NAMESPACE).'; \
read -r _ node <<<"$$found"; [[ $$node ]] || fail 'The pod $(POD) is not on a node yet.'; \
capture=$$($(kubectl) get pod -n kube-system -l app=packetcapture --sort-by=.metadata.creationTimestamp \
  --field-selector "spec.nodeName=$$node,status.phase=Running" -o name | tail -1); \
[[ $$capture ]] || fail "No packetcapture pod runs on $$node, the node of $(POD)."
endef

where: ## Print the packetcapture pod on POD's node
	@$(find); echo "$$capture"

pcap: ## Save POD's packets so far to OUT: make pcap POD=web NAMESPACE=default OUT=web.pcap
	@$(find); trap 'rm -f "$(OUT).part"' EXIT; \
	$(kubectl) exec -n kube-system "$$capture" -c packetcapture -- packetcapture cat '$(NAMESPACE)/$(POD)' >"$(OUT).part"; \
	mv "$(OUT).part" "$(OUT)"

# live ends when its stdin closes. This pipe stays open as long as kubectl runs, whatever make's own stdin is.
live: ## Write POD's packets to stdout as they arrive: make live POD=web | wireshark -k -i -
	@$(find); [[ ! -t 1 ]] || fail 'Redirect stdout to a file or a pipe: the packets are binary.'; \
	folder=$$(mktemp -d); mkfifo "$$folder/pipe"; exec <>"$$folder/pipe"; rm -r "$$folder"; \
	exec $(kubectl) exec -i -n kube-system "$$capture" -c packetcapture -- packetcapture live '$(NAMESPACE)/$(POD)'

# The clock is fake, so hours of faults take minutes. Every 400 steps have their own seed.
soak: ## Test STEPS random faults and changes
	go test -run TestSoak -soak.steps=$(STEPS) -count=1 -timeout 60m .

# This restarts the worker and the API server, so use a throwaway cluster.
e2e: ## Break what can break on the cluster, and write what happened to OUTPUTS
	$(cluster_test) go test -tags e2e -run TestE2E -v -count=1 -timeout 40m $(TESTFLAGS) ./test

node: ## Run the part of e2e that works on any node, on NODE
	$(cluster_test) go test -tags e2e -run TestNode -v -count=1 -timeout 40m $(TESTFLAGS) ./test

# Run this as root on the machine whose Docker runs the nodes. It creates 100 pods.
measure: ## Measure start, stop, CPU, memory and packet loss, and compare them with the least possible
	$(cluster_test) go test -tags e2e -run TestMeasure -v -count=1 -timeout 40m $(TESTFLAGS) ./test

# Deletes the pods first: they need their permissions to post their last Events.
undeploy: ## Remove what deploy applied, and with it all captures
	$(kubectl) delete --ignore-not-found --cascade=foreground --timeout=2m -f daemonset.yaml
	$(kubectl) delete --ignore-not-found -f rbac.yaml

kind-down: ## Delete the cluster CLUSTER
	$(KIND) delete cluster --name $(CLUSTER)
