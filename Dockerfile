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
RUN apt-get update \
 && apt-get install -y --no-install-recommends bash tcpdump \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
COPY --from=build /packetcapture /usr/local/bin/packetcapture
LABEL org.opencontainers.image.title="packetcapture" \
      org.opencontainers.image.description="Captures the packets of annotated Pods with tcpdump, on every node of a Kubernetes cluster" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/ubuntu:24.04"
# No USER: opening another Pod's network namespace takes root, with the capabilities that daemonset.yaml lists.
ENTRYPOINT ["/usr/local/bin/packetcapture"]
