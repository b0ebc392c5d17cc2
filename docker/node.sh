#!/bin/sh
# What a container of a cluster runs.
#
#   node.sh worker              take jobs from the launcher, over ssh
#   node.sh launcher [COMMAND]  make the launcher's key, then run COMMAND, or wait
#   node.sh health              is this node ready?
#   node.sh COMMAND ...         anything else
#
# Keys are made here, when a container starts, and their private halves never leave it. The public ones meet in
# /cluster, a volume that launcher and workers share. SSH_PORT is sshd's port, 2222 if unset; on all nodes the same.
set -eu

port=${SSH_PORT:-2222}
keys=$HOME/.cluster
role=${1:-}

fail() {
    echo "node.sh $role: $1" >&2
    echo "  try: $2" >&2
    exit 1
}

make_key() {
    rm -f "$1" "$1.pub"
    ssh-keygen -q -t ed25519 -N '' -C "$(hostname)" -f "$1"
}

writable() {
    [ -w /cluster ] || fail "/cluster is not writable for user $(id -u)" \
        "mount a new volume there, as docker/compose.yaml does; user 1000 is to own it"
}

umask 077
case $role in
worker)
    [ -z "$(ss -Hltn "sport = :$port")" ] ||
        fail "port $port is in use on $(hostname)" "SSH_PORT=2223, or another one that is free, on all nodes"
    mkdir -p "$keys"
    make_key "$keys/host"
    if ! [ -f "$HOME/.ssh/authorized_keys" ]; then # Kubernetes' MPI operator brings keys of its own
        writable
        echo "* $(cat "$keys/host.pub")" >> /cluster/known_hosts
    fi
    echo "worker $(hostname) takes jobs on port $port"
    exec /usr/sbin/sshd -D -e -f /etc/ssh/cluster_sshd.conf -h "$keys/host" -p "$port"
    ;;
launcher)
    shift
    writable
    mkdir -p "$HOME/.ssh"
    make_key "$HOME/.ssh/id_ed25519"
    echo "Port $port" > "$HOME/.ssh/config"
    cp "$HOME/.ssh/id_ed25519.pub" /cluster/authorized_keys.new
    mv /cluster/authorized_keys.new /cluster/authorized_keys
    echo "launcher $(hostname) is ready"
    [ $# -gt 0 ] || set -- sleep infinity
    exec "$@"
    ;;
health)
    if [ -f "$keys/host" ]; then
        ssh-keyscan -T 4 -p "$port" 127.0.0.1 2> /dev/null | grep -q ed25519
    else
        [ -f "$HOME/.ssh/id_ed25519" ]
    fi
    ;;
'') fail "nothing to do" "worker, launcher, or a command" ;;
*) exec "$@" ;;
esac
