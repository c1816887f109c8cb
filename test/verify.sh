#!/bin/bash
# Does on a cluster what a careful person would do by hand, through kubectl alone: captures a test pod, reads the capture,
# removes the annotation, and looks at what is left. It ends at the first thing that is not so, with a sentence that says
# what. When all is well, what it saw goes to OUTPUTS. The C numbers are the clauses of the contract that the checks prove:
# C2 annotation, C3 what is captured, C4 files, C5 state, C6 watch, C7 Events, C11 reading.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

context=${CONTEXT-kind-${CLUSTER:-kind}} # kubectl's; empty: the current one
outputs=${OUTPUTS:-outputs}
slow=${SLOW:-1} # multiplies every deadline
image=${IMAGE:-packetcapture:dev}
annotation=tcpdump.antrea.io
pod=traffic-pod
n=5
stem=/capture-$pod.pcap
identity='{.metadata.uid} {.status.phase} {.status.containerStatuses[0].restartCount}'
node='' uid='' capture='' created='' before='' labelled=''
temp=$(mktemp -d)

# Every call ends, so that every wait does. A -n in the arguments comes later, and counts.
kubectl() {
  timeout --foreground $((60 * slow)) kubectl ${context:+--context "$context"} -n default "$@"
}

say() { # what is being done, on its way
  echo "verify: $*"
}

fail() { # SENTENCE: ends, after what helps to see why
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

told() { # what the program says of a failure, if it does
  local message
  message=$(kubectl get events --field-selector "involvedObject.uid=$uid,reason=CaptureFailed" -o jsonpath='{.items[*].message}' 2>/dev/null)
  [[ ! $message ]] || echo " The program tells the pod: $message."
}

await() { # SECONDS SENTENCE COMMAND...: polls the command until it succeeds; fails with the sentence when time is up
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
    # What ended well has shown that the capture is gone; one that was there before begins again.
    kubectl annotate --overwrite pod "$pod" "$annotation${before:+=}${before:--}" >/dev/null
  fi
  rm -rf "$temp"
  exit "$status"
}
trap cleanup EXIT
trap 'echo "verify failed: line $LINENO: $BASH_COMMAND" >&2' ERR
trap 'exit 130' INT TERM

in_pod() { # POD SCRIPT [ARGUMENT]: runs bash in a capture pod
  kubectl exec -n kube-system "$1" -- bash -c "$2" bash "${3:-}"
}

# The tcpdump processes that a capture pod sees, those of its whole node: PID and command line, a line each. The image
# has no ps. A zombie counts too: its name stays.
tcpdumps() { # POD
  # shellcheck disable=SC2016 # expanded in the pod
  in_pod "$1" 'for process in /proc/[0-9]*; do
    { read -r name <"$process/comm" && mapfile -d "" -t words <"$process/cmdline"; } 2>/dev/null || continue
    [[ $name != tcpdump ]] || echo "${process#/proc/} ${words[*]}"
  done'
}

files() { # POD: the names of all capture files in it
  in_pod "$1" 'shopt -s nullglob; printf "%s\n" /capture-*'
}

# The packets of a copied pcap that match a filter. Any capture pod has a tcpdump to read it, and another node may be the
# faster one. -Z root: to become another user takes a capability that the pod does not have.
packets() { # PCAP [FILTER]
  kubectl exec -i -n kube-system "$reader" -- tcpdump -nn -Z root -r - "${@:2}" <"$1" 2>"$temp/stderr"
}

field() { # JSONPATH: of the test pod
  kubectl get pod "$pod" -o jsonpath="$1"
}

# Each of these is polled, so that a kubectl that fails once is tried again; set -e does not reach into them.
has_files() { names=$(files "$capture") && [[ $names == *"$stem"* ]]; }
has_no_files() { names=$(files "$capture") && [[ -z $names ]]; }
has_tcpdump() { running=$(tcpdumps "$capture") && [[ $running == *"-w $stem"* ]]; }
has_first() { running=$(tcpdumps "$capture") && [[ $running == "$first "* ]]; }
has_no_tcpdump() { running=$(tcpdumps "$capture") && [[ -z $running ]]; }

# The first packets come a second after the start. The file grows between the list and the copy, of which as much counts as
# the list says.
has_traffic() {
  local look_ups connections
  listed=$(in_pod "$capture" 'ls -l /capture-*') && size=$(awk '{ print $5 }' <<<"$listed") &&
    kubectl cp "kube-system/$capture:${stem}0" "$temp/copy" >/dev/null 2>"$temp/stderr" &&
    head -c "$size" "$temp/copy" >"$temp/pcap" &&
    look_ups=$(packets "$temp/pcap" "($own) and port 53" | wc -l) &&
    connections=$(packets "$temp/pcap" "($own) and tcp port 443" | wc -l) &&
    ((look_ups > 0 && connections > 0))
}

# C11: a pcap of as many packets and bytes as it says, the first one first.
can_be_read() {
  local count bytes
  kubectl exec -n kube-system "$capture" -- packetcapture cat "$pod" >"$temp/cat" 2>"$temp/stderr" &&
    read -r count _ bytes _ < <(tail -1 "$temp/stderr") && ((count > 0 && bytes == $(wc -c <"$temp/cat"))) &&
    [[ $(packets "$temp/cat" | wc -l) == "$count" ]] &&
    cmp -s -n "$size" "$temp/cat" "$temp/pcap"
}

has_event() { # REASON
  local reasons
  reasons=$(kubectl get events --field-selector "involvedObject.uid=$uid,reason=$1" -o name) && [[ $reasons ]]
}

show() { # COMMAND...: a transcript of the command, which may fail
  local word line='$'
  for word; do
    [[ $word =~ ^[a-zA-Z0-9_.:,=/-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "$line"
  "$@" 2>&1 || true
  echo
}

# ---- Where everything begins ----

others=$(kubectl get pods -A -o jsonpath='{range .items[*]}{.metadata.namespace}/{.metadata.name} {.metadata.annotations.tcpdump\.antrea\.io}{"\n"}{end}' |
  awk -v own="default/$pod" 'NF > 1 && $1 != own { print $1 }')
[[ -z $others ]] || fail "Other pods are annotated (${others//$'\n'/ }): verify counts all files and processes, so it wants to be alone."

say "the test pod $pod${NODE:+ on $NODE}"
existing=$(kubectl get pod "$pod" --ignore-not-found -o jsonpath='{.metadata.annotations.tcpdump\.antrea\.io}{"present"}')
before=${existing%present}
if [[ ! $existing ]]; then
  created=yes
  sed -e "s|image: packetcapture:dev|image: $image|" -e "${NODE:+s|^spec:|&\n  nodeName: $NODE|}" test-pod.yaml |
    kubectl apply -f - >/dev/null
fi
kubectl wait --for=condition=Ready "pod/$pod" --timeout=$((55 * slow))s >/dev/null ||
  fail "The pod $pod did not become ready within $((55 * slow)) s."
node=$(field '{.spec.nodeName}') uid=$(field '{.metadata.uid}')
[[ -z ${NODE:-} || $node == "$NODE" ]] || fail "The pod $pod is there already, on $node and not on $NODE: delete it."
running_as=$(field "$identity")
own=$(field '{range .status.podIPs[*]} or host {.ip}{end}')
own=${own# or } # the filter for the pod's own packets, of all its addresses

captures=$(kubectl get pods -n kube-system -l app=packetcapture --field-selector "spec.nodeName=$node,status.phase=Running" -o jsonpath='{.items[*].metadata.name}')
[[ $captures && $captures != *' '* ]] || fail "The node $node should run one packetcapture pod, and runs: ${captures:-none}."
capture=$captures
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
[[ $(wc -l <<<"$running") == 1 ]] || fail "There should be one tcpdump on $node, and there are: $running"
[[ $running == *" -C 1 "* && $running == *" -W $n "* ]] || fail "tcpdump runs without -C 1 and -W $n: $running" # C3
[[ $names == "${stem}0" ]] || fail "With N=$n the first file should be ${stem}0 alone, and there is: $names"    # C4
await 40 "The capture in ${stem}0 does not show the name look-ups and connections of $pod within $((40 * slow)) s." has_traffic

# C3: the pod's packets, and none between two others. Link-local addresses are of the pod's own link.
strangers=$(packets "$temp/pcap" "not ($own) and not ether multicast and not net fe80::/10") || fail "The copied pcap can't be read: $(cat "$temp/stderr")"
[[ -z $strangers ]] || fail "The pcap holds packets that are not of $pod: $strangers"

for other in $elsewhere; do # C6: a node captures its own pods
  names=$(files "$other")
  [[ -z $names ]] || fail "$other is on another node than $pod, and has files: $names"
done
[[ $elsewhere ]] || say 'there is one node only, so there is no other one to look at'
await 15 "packetcapture cat $pod does not write what is in ${stem}0." can_be_read
await 15 "$pod has no Event CaptureStarted." has_event CaptureStarted # C7

mkdir "$temp/outputs"
kubectl describe pod "$pod" >"$temp/outputs/pod-describe.txt"
kubectl get pods -A -o wide >"$temp/outputs/pods.txt"
echo "$listed" >"$temp/outputs/capture-files.txt"
packets "$temp/pcap" >"$temp/outputs/capture-output.txt"
cp "$temp/pcap" "$temp/outputs/${stem#/}0"

# ---- What must leave it alone: the same value again, another change of the pod, a value that is no number (C2) ----

say 'annotated again, labelled, annotated with 5M, and back'
first=${running%% *}
kubectl annotate --overwrite pod "$pod" "$annotation=$n" >/dev/null
labelled=yes
kubectl label --overwrite pod "$pod" verify=yes >/dev/null
kubectl annotate --overwrite pod "$pod" "$annotation=5M" >/dev/null
await 15 "$pod was annotated with 5M, and has no Event CaptureInvalid." has_event CaptureInvalid # so all three were seen
await 15 "tcpdump should have kept the PID $first through changes that it should not mind." has_first
kubectl annotate --overwrite pod "$pod" "$annotation=$n" >/dev/null

# ---- The end ----

say 'annotation removed'
kubectl annotate pod "$pod" "$annotation-" >/dev/null
await 15 "tcpdump still runs $((15 * slow)) s after the annotation was removed." has_no_tcpdump                  # C5
await 15 "Files of $pod are still in $capture $((15 * slow)) s after the annotation was removed." has_no_files # C4
await 15 "$pod has no Event CaptureStopped." has_event CaptureStopped                              # C7
[[ $(field "$identity") == "$running_as" ]] || fail "The capture should have left $pod alone, and it has restarted or ended."
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
