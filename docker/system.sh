#!/bin/sh
# Make sure that a base image has the programs that a stage of ours needs; installs only what is missing.
#
#   system.sh run|build|build-cuda  in the image; build-cuda also takes a CUDA toolkit, which only the base can bring
#   system.sh run|build --packages  print the Debian packages, for debian_base.sh
#
# A base that has them all needs no network here.
set -eu

case ${1:-} in
run | build | build-cuda) stage=$1 ;;
*) echo "usage: system.sh run|build|build-cuda [--packages]" >&2 && exit 2 ;;
esac

fail() {
    echo "docker/system.sh: $1" >&2
    echo "  try: $2" >&2
    exit 1
}

packages="python3 openssh-server openssh-client iproute2 tini ca-certificates"
[ "$stage" = run ] || packages="$packages python3-venv python3-dev gcc g++ make cmake"
if [ "${2:-}" = --packages ]; then
    echo "$packages"
    exit
fi

# The Python that is first in PATH is used, Debian's or the base's own; so it is asked, not the package manager.
has() {
    case $1 in
    python3-venv) python3 -c 'import ensurepip, venv' ;;
    python3-dev) python3 -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' ;;
    openssh-server) test -x /usr/sbin/sshd ;;
    openssh-client) command -v ssh-keygen ;;
    iproute2) command -v tc || test -x /sbin/tc || test -x /usr/sbin/tc ;;
    ca-certificates) test -d /etc/ssl/certs ;;
    *) command -v "$1" ;;
    esac > /dev/null 2>&1
}

if [ "$stage" = build-cuda ] && ! command -v nvcc > /dev/null; then
    fail "the base image lacks nvcc, the compiler of the CUDA toolkit" \
        "pass --build-arg BUILD_IMAGE with a base that has it, such as CUDA=FOLDER docker/debian_base.sh makes"
fi

missing=
for package in $packages; do
    has "$package" || missing="$missing $package"
done
if [ -n "$missing" ]; then
    lacks="the base image lacks$missing"
    base="pass --build-arg BASE_IMAGE (and BUILD_IMAGE) with a base that has them, such as docker/debian_base.sh makes"
    command -v apt-get > /dev/null || fail "$lacks, and has no apt-get to install them with" "$base"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086  # a list of words
    if ! { apt-get update && apt-get install -y --no-install-recommends $missing; }; then
        fail "$lacks, and apt-get could not install them (no network?)" "$base"
    fi
    rm -rf /var/lib/apt/lists/*
    for package in $missing; do
        has "$package" || fail "the base image lacks $package, and apt-get did not change that" "$base"
    done
fi
python3 -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 13), sys.version' ||
    fail "the base image's Python is too old or too new: $(python3 --version)" "use a base with Python 3.10 to 3.13"
# Keys of a server that every copy of an image shares are no secret: they are made when a container starts.
rm -f /etc/ssh/ssh_host_*
