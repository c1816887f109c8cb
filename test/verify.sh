#!/bin/bash
# Does on a cluster what a careful person would do by hand with kubectl: it captures a test pod, reads the capture,
# removes the annotation and checks that nothing is left. It stops at the first problem, with a sentence that says
# what is wrong. If all is well, it writes what it saw to OUTPUTS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

context=${CONTEXT-kind-${CLUSTER:-kind}} # kubectl's; empty: the current one
outputs=${OUTPUTS:-outputs}
slow=${SLOW:-1} # multiplies every deadline
annotation=tcpdump.antrea.io
pod=traffic-pod
n=5
stem=/capture-$pod.pcap
identity='{.metadata.uid} {.status.phase} {.status.containerStatuses[0].restartCount}'
node='' uid='' capture='' linked='' created='' before='' labelled=''
temp=$(mktemp -d)

# The timeout ends every call, and so every wait. A later -n in the arguments wins.
kubectl() {
  timeout --foreground $((60 * slow)) ${KUBECTL:-kubectl} ${context:+--context "$context"} -n default "$@"
}

say() { # SENTENCE: prints what verify does now
  echo "verify: $*"
}

fail() { # SENTENCE: prints it and what helps to find the cause, and exits
  {
    if [[ $capture ]]; then
      echo "The Events of $pod and the end of the log of $capture:"
      kubectl get events --field-selector "involvedObject.uid=$uid" -o custom-columns=REASON:.reason,MESSAGE:.message
      kubectl logs -n kube-system "$capture" --tail=10
    fi
    echo "verify failed: $1"
  } >&2
  exit 1
}

told() { # prints the program's own CaptureFailed, if there is one
  local message
  message=$(kubectl get events --field-selector "involvedObject.uid=$uid,reason=CaptureFailed" -o jsonpath='{.items[*].message}' 2>/dev/null)
  [[ ! $message ]] || echo " Its Event says: $message."
}

await() { # SECONDS SENTENCE COMMAND...: polls the command until it succeeds, or fails with the sentence
  local deadline=$((SECONDS + $1 * slow)) sentence=$2
  shift 2
  until "$@"; do
    ((SECONDS < deadline)) || fail "$sentence$(told)"
    sleep 0.5
  done
}

cleanup() { # leaves the cluster as it was found
  local status=$?
  trap - EXIT ERR
  set +e
  if [[ $created ]]; then
    kubectl delete pod "$pod" --ignore-not-found --timeout=$((50 * slow))s >/dev/null
  elif [[ $node ]]; then
    [[ ! $labelled ]] || kubectl label pod "$pod" verify- >/dev/null
    # Starts a capture that was there before again.
    kubectl annotate --overwrite pod "$pod" "$annotation${before:+=}${before:--}" >/dev/null
  fi
  rm -rf "$temp"
  exit "$status"
}
trap cleanup EXIT
trap 'echo "verify failed: line $LINENO: $BASH_COMMAND" >&2' ERR
trap 'exit 130' INT TERM

in_pod() { # POD SCRIPT [ARGUMENT]: runs bash in a packetcapture pod
  kubectl exec -n kube-system "$1" -- bash -c "$2" bash "${3:-}"
}

# Prints the PID and command line of each tcpdump on a packetcapture pod's node, even of a zombie. The image has no ps.
tcpdumps() { # POD
  # shellcheck disable=SC2016 # expanded in the pod
  in_pod "$1" 'for process in /proc/[0-9]*; do
    { read -r name <"$process/comm" && mapfile -d "" -t words <"$process/cmdline"; } 2>/dev/null || continue
    [[ $name != tcpdump ]] || echo "${process#/proc/} ${words[*]}"
  done'
}

files() { # POD: prints the paths of all capture files in it
  in_pod "$1" 'shopt -s nullglob; printf "%s\n" /capture-*'
}

# Prints the packets in a copied pcap that match a filter, with the tcpdump of any packetcapture pod: another node may
# be faster. -Z root keeps tcpdump from switching to another user, which the pod does not allow.
packets() { # PCAP [FILTER]
  kubectl exec -i -n kube-system "$reader" -- tcpdump -nn -Z root -r - "${@:2}" <"$1" 2>"$temp/stderr"
}

field() { # JSONPATH: prints it for the test pod
  kubectl get pod "$pod" -o jsonpath="$1"
}

# These are polled, so a kubectl call that fails is repeated. set -e has no effect in them.
has_files() { names=$(files "$capture") && [[ $names == *"$stem"* ]]; }
has_no_files() { names=$(files "$capture") && [[ -z $names ]]; }
has_link() { linked=$(in_pod "$capture" 'readlink "/captures/$1"' "default_$pod") && [[ $linked == "$stem" ]]; }
has_no_links() { linked=$(in_pod "$capture" 'ls /captures') && [[ -z $linked ]]; }
has_tcpdump() { running=$(tcpdumps "$capture") && [[ $running == *"-w $stem"* ]]; }
has_first() { running=$(tcpdumps "$capture") && [[ $running == "$first "* ]]; }
has_no_tcpdump() { running=$(tcpdumps "$capture") && [[ -z $running ]]; }

# The first packets may appear a second after the start. The file may grow between ls and the copy, so the copy is cut
# to the size that ls gave.
has_traffic() {
  local look_ups connections
  listed=$(in_pod "$capture" 'ls -l /capture-*') && size=$(awk '{ print $5 }' <<<"$listed") &&
    kubectl cp "kube-system/$capture:${stem}0" "$temp/copy" >/dev/null 2>"$temp/stderr" &&
    head -c "$size" "$temp/copy" >"$temp/pcap" &&
    look_ups=$(packets "$temp/pcap" "($own) and port 53" | wc -l) &&
    connections=$(packets "$temp/pcap" "($own) and tcp port 443" | wc -l) &&
    ((look_ups > 0 && connections > 0))
}

# cat writes as many packets and bytes as it reports, and its output begins with the copy of the first file.
can_be_read() {
  local count bytes
  kubectl exec -n kube-system "$capture" -- packetcapture cat "default/$pod" >"$temp/cat" 2>"$temp/stderr" &&
    read -r count _ bytes _ < <(tail -1 "$temp/stderr") && ((count > 0 && bytes == $(wc -c <"$temp/cat"))) &&
    [[ $(packets "$temp/cat" | wc -l) == "$count" ]] &&
    cmp -s -n "$size" "$temp/cat" "$temp/pcap"
}

has_event() { # REASON
  local reasons
  reasons=$(kubectl get events --field-selector "involvedObject.uid=$uid,reason=$1" -o name) && [[ $reasons ]]
}

show() { # COMMAND...: prints a transcript of the command, which may fail
  local word line='$'
  for word; do
    [[ $word =~ ^[a-zA-Z0-9_.:,=/-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "$line"
  "$@" 2>&1 || true
  echo
}

# ---- Before the capture ----

others=$(kubectl get pods -A -o jsonpath='{range .items[*]}{.metadata.namespace}/{.metadata.name} {.metadata.annotations.tcpdump\.antrea\.io}{"\n"}{end}' |
  awk -v own="default/$pod" 'NF > 1 && $1 != own { print $1 }')
[[ -z $others ]] || fail "Other pods are annotated (${others//$'\n'/ }): verify needs to be alone, because it counts all files and processes."

say "the test pod $pod${NODE:+ on $NODE}"
existing=$(kubectl get pod "$pod" --ignore-not-found -o jsonpath='{.metadata.annotations.tcpdump\.antrea\.io}{"present"}')
before=${existing%present}
if [[ ! $existing ]]; then
  created=yes
  # The DaemonSet's image is on the cluster, wherever it came from.
  image=$(kubectl get daemonset packetcapture -n kube-system -o jsonpath='{.spec.template.spec.containers[0].image}')
  sed -e "s|image: packetcapture:dev|image: $image|" -e "${NODE:+s|^spec:|&\n  nodeName: $NODE|}" test-pod.yaml |
    kubectl apply -f - >/dev/null
fi
kubectl wait --for=condition=Ready "pod/$pod" --timeout=$((55 * slow))s >/dev/null ||
  fail "The pod $pod did not become ready within $((55 * slow)) s."
node=$(field '{.spec.nodeName}') uid=$(field '{.metadata.uid}')
[[ -z ${NODE:-} || $node == "$NODE" ]] || fail "The pod $pod already exists, on $node and not on $NODE: delete it."
running_as=$(field "$identity")
own=$(field '{range .status.podIPs[*]} or host {.ip}{end}')
own=${own# or } # a filter for the packets of all the pod's addresses

capture=$(timeout --foreground $((60 * slow)) make -s where "POD=$pod" NAMESPACE=default) ||
  fail "make where did not find the packetcapture pod of $pod."
capture=${capture#pod/}
elsewhere=$(kubectl get pods -n kube-system -l app=packetcapture --field-selector "spec.nodeName!=$node" -o jsonpath='{.items[*].metadata.name}')
reader=${elsewhere%% *} reader=${reader:-$capture}

kubectl annotate pod "$pod" "$annotation-" >/dev/null
await 15 "There are files in $capture although no pod is annotated." has_no_files
await 15 "There is a tcpdump on $node although no pod is annotated." has_no_tcpdump

# ---- The capture ----

say "annotated with $annotation=$n"
kubectl annotate pod "$pod" "$annotation=$n" >/dev/null
await 20 "No tcpdump runs on $node $((20 * slow)) s after $pod was annotated." has_tcpdump
await 20 "No file $stem* is in $capture $((20 * slow)) s after $pod was annotated." has_files
[[ $(wc -l <<<"$running") == 1 ]] || fail "There should be one tcpdump on $node, but there are: $running"
[[ $running == *" -C 1 "* && $running == *" -W $n "* ]] || fail "tcpdump runs without -C 1 and -W $n: $running"
[[ $names == "${stem}0" ]] || fail "With N=$n there should at first be one file, ${stem}0, but there are: $names"
await 5 "/captures/default_$pod should point to $stem, but points to ${linked:-nothing}." has_link
await 40 "The capture in ${stem}0 shows no name lookups and connections of $pod within $((40 * slow)) s." has_traffic

# The capture has only the pod's own packets. Link-local addresses belong to the pod's own link.
strangers=$(packets "$temp/pcap" "not ($own) and not ether multicast and not net fe80::/10") || fail "The copied pcap can't be read: $(cat "$temp/stderr")"
[[ -z $strangers ]] || fail "The pcap has packets that are not $pod's: $strangers"

for other in $elsewhere; do # each node captures only its own pods
  names=$(files "$other")
  [[ -z $names ]] || fail "$other is not on the node of $pod, but has files: $names"
done
[[ $elsewhere ]] || say 'there is only one node, so no other one was checked'
await 15 "packetcapture cat default/$pod does not write what is in ${stem}0." can_be_read
await 15 "$pod has no Event CaptureStarted." has_event CaptureStarted

mkdir "$temp/outputs"
kubectl describe pod "$pod" >"$temp/outputs/pod-describe.txt"
kubectl get pods -A -o wide >"$temp/outputs/pods.txt"
echo "$listed" >"$temp/outputs/capture-files.txt"
packets "$temp/pcap" >"$temp/outputs/capture-output.txt"
cp "$temp/pcap" "$temp/outputs/${stem#/}0"

# ---- What must not affect it: the same value again, another change to the pod, a value that is not a number ----

say 'annotated again, labelled, annotated with 5M and back'
first=${running%% *}
kubectl annotate --overwrite pod "$pod" "$annotation=$n" >/dev/null
labelled=yes
kubectl label --overwrite pod "$pod" verify=yes >/dev/null
kubectl annotate --overwrite pod "$pod" "$annotation=5M" >/dev/null
await 15 "$pod was annotated with 5M, but has no Event CaptureInvalid." has_event CaptureInvalid # so all three arrived
await 15 "tcpdump should still have the PID $first: nothing has changed for it." has_first
kubectl annotate --overwrite pod "$pod" "$annotation=$n" >/dev/null
await 15 "$pod has its annotation back, but has no Event CaptureContinued." has_event CaptureContinued

# ---- The end ----

say 'annotation removed'
kubectl annotate pod "$pod" "$annotation-" >/dev/null
await 15 "tcpdump still runs $((15 * slow)) s after the annotation was removed." has_no_tcpdump
await 15 "Files of $pod are still in $capture $((15 * slow)) s after the annotation was removed." has_no_files
await 15 "There are links in /captures of $capture after the annotation was removed." has_no_links
await 15 "$pod has no Event CaptureStopped." has_event CaptureStopped
[[ $(field "$identity") == "$running_as" ]] || fail "The capture should not affect $pod, but it has restarted or ended."
{
  show kubectl get pod "$pod" -o wide
  for each in $capture $elsewhere; do
    show kubectl exec -n kube-system "$each" -- bash -c 'ls -l /capture-*'
    show kubectl exec -n kube-system "$each" -- bash -c 'grep -lx tcpdump /proc/[0-9]*/comm 2>/dev/null || echo no tcpdump runs'
  done
  show kubectl get events --field-selector "involvedObject.uid=$uid"
} >"$temp/outputs/cleanup.txt"

mkdir -p "$outputs"
mv -f "$temp"/outputs/* "$outputs/"
say "all is as it should be; $outputs shows it: $(cd "$outputs" && echo *)"
