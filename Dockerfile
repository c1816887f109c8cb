# The compiler runs on the builder's own architecture and compiles for the target's: no emulation.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod main.go ./
ARG TARGETOS TARGETARCH
# Static, so that it runs whatever libc the final stage has.
RUN --mount=type=cache,target=/go/pkg/mod \
    --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags "-s -w" -o /packetcapture .

# nsenter is there already: util-linux is an essential package. bash is too, but people rely on it by name.
FROM ubuntu:24.04
# tcpdump moves, because an AppArmor profile attaches by path, also in a container: under the node's profile of
# /usr/bin/tcpdump it takes signals from `unconfined` alone, which no container is where the node has a profile for runc
# (Debian 13, Ubuntu 24.04), and so it could never be ended. /usr/local/bin is in every shell's PATH, so that people find it.
#
# Then it reads a pcap of one packet and writes it, as it will: Ubuntu's 4.99.4-3ubuntu4 crashes there (Launchpad 2071891).
# What mends it is in noble-updates, which a mirror with security updates alone does not have.
RUN apt-get update \
 && apt-get install -y --no-install-recommends bash tcpdump \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && mv /usr/bin/tcpdump /usr/local/bin/ \
 && { printf '\324\303\262\241\2\0\4\0\0\0\0\0\0\0\0\0\0\0\4\0\1\0\0\0'; \
      printf '\0\0\0\0\0\0\0\0\16\0\0\0\16\0\0\0\377\377\377\377\377\377\2\0\0\0\0\1\210\265'; } \
    | tcpdump -Z root -r - -w /dev/null
COPY --from=build /packetcapture /usr/local/bin/packetcapture
LABEL org.opencontainers.image.title="packetcapture" \
      org.opencontainers.image.description="Captures the packets of annotated pods with tcpdump, on every node of a Kubernetes cluster" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/ubuntu:24.04"
# No USER: opening another pod's network namespace takes root, with the capabilities that daemonset.yaml lists.
ENTRYPOINT ["/usr/local/bin/packetcapture"]
