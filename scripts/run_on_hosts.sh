#!/bin/bash
# Train on hosts that ssh reaches, without a scheduler.
#
#   scripts/run_on_hosts.sh HOSTFILE PROGRAM [ARGUMENTS]
#   scripts/run_on_hosts.sh hosts scripts/train.py --bits 4 --period 8
#
# HOSTFILE has a line for each host, `name slots=N` with N ranks; # begins a comment. All hosts need the checkout under
# the same path, after `make setup`, and keys that let ssh in without a question. Each is asked first, so that a host
# that is missing, or has another version of the package, is named before anything starts. PQASGD_INTERFACE names the
# network (eth0, or 10.0.0.0/8); PQASGD_LAUNCHER is mpi or gloo (mpi). SSH_PORT is the port if it is not what ssh's
# configuration says.
set -euo pipefail

fail() {
    echo "run_on_hosts.sh: $1" >&2
    echo "  try: $2" >&2
    exit 1
}

[ $# -ge 2 ] || fail "a hostfile and a program are needed" "scripts/run_on_hosts.sh hosts scripts/train.py --bits 4"
hostfile=$1
shift
[ -r "$hostfile" ] || fail "$hostfile cannot be read" "a file with lines such as: node1 slots=1"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=$root/.venv/bin
[ -x "$bin/horovodrun" ] || fail "$bin/horovodrun is not there" "make setup"
launcher=${PQASGD_LAUNCHER:-mpi}
[[ $launcher =~ ^(mpi|gloo)$ ]] || fail "PQASGD_LAUNCHER=$launcher is neither mpi nor gloo" "PQASGD_LAUNCHER=mpi"

hosts=()
ranks=0
number=0
while read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%%#*}
    [[ $line =~ [^[:space:]] ]] || continue
    [[ $line =~ ^[[:space:]]*([A-Za-z0-9._-]+)([[:space:]]+slots=([1-9][0-9]*))?[[:space:]]*$ ]] ||
        fail "$hostfile, line $number: '$line' is not a host" "name slots=N, with N at least 1"
    hosts+=("${BASH_REMATCH[1]}:${BASH_REMATCH[3]:-1}")
    ranks=$((ranks + ${BASH_REMATCH[3]:-1}))
done < "$hostfile"
[ ${#hosts[@]} -gt 0 ] || fail "$hostfile names no host" "a line for each host: name slots=N"

# What has to be the same everywhere: the package's version, and that it loads.
ask="$bin/python -c 'import pqasgd_horovod; print(pqasgd_horovod.__version__)'"
version=$(bash -c "$ask") || fail "pqasgd_horovod does not load on this host" "make setup"
for host in "${hosts[@]}"; do
    name=${host%:*}
    # shellcheck disable=SC2029  # the path is this host's on purpose
    answer=$(ssh -n ${SSH_PORT:+-p "$SSH_PORT"} -o BatchMode=yes -o ConnectTimeout=10 "$name" "$ask" 2>&1) &&
        status=0 || status=$?
    case $status in
    0) [ "$answer" = "$version" ] ||
        fail "$name has pqasgd_horovod $answer, and this host $version" "the same checkout on all hosts" ;;
    255) fail "ssh does not reach $name: $answer" "ssh -v $name; a key without a passphrase, or ssh-agent" ;;
    *) fail "pqasgd_horovod does not load on $name: $answer" "make setup there, in $root" ;;
    esac
done

options=(--"$launcher" -np "$ranks" -H "$(IFS=, && echo "${hosts[*]}")" ${SSH_PORT:+--ssh-port "$SSH_PORT"})
[ -z "${PQASGD_INTERFACE:-}" ] || options+=(--network-interfaces "$PQASGD_INTERFACE")
export PATH=$bin:$PATH TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
exec horovodrun "${options[@]}" python "$@"
