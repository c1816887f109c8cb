# Cross-compile on the builder's own architecture, so that nothing is emulated.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod main.go ./
ARG TARGETOS TARGETARCH
# A static binary runs whatever libc the final stage has.
RUN --mount=type=cache,target=/go/pkg/mod \
    --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags "-s -w" -o /packetcapture .

# nsenter is already there, because util-linux is an essential package. So is bash, but people call it by name.
FROM ubuntu:24.04
# tcpdump is moved because AppArmor attaches a profile by path, even in a container. The node's profile for
# /usr/bin/tcpdump accepts signals only from unconfined processes. Where the node has a profile for runc (Debian 13,
# Ubuntu 24.04), no container is unconfined, so nothing could stop tcpdump. /usr/local/bin is in every shell's PATH too.
#
# Then tcpdump copies a pcap of one packet, as a test: Ubuntu's 4.99.4-3ubuntu4 crashes on that (Launchpad 2071891). The
# fix is in noble-updates, which a mirror with only security updates lacks.
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
# No USER: opening another pod's network namespace takes root and the capabilities listed in daemonset.yaml.
ENTRYPOINT ["/usr/local/bin/packetcapture"]
