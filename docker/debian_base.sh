#!/bin/bash
# Make the base images from a Debian mirror, where no image registry can be reached. Needs root, debootstrap, an engine.
#
#   docker/debian_base.sh [MIRROR]     pqasgd_horovod-base:run and pqasgd_horovod-base:build
#   CUDA=FOLDER docker/debian_base.sh  and pqasgd_horovod-base:cuda, which is :build with the CUDA toolkit of FOLDER
#
#   make cluster-demo BASE_IMAGE=pqasgd_horovod-base:run BUILD_IMAGE=pqasgd_horovod-base:build
#   make image-gpu BASE_IMAGE=pqasgd_horovod-base:run BUILD_IMAGE=pqasgd_horovod-base:cuda
#
# MIRROR is debootstrap's own default if not given, SUITE (bookworm) is Debian's release; TMPDIR needs 1.5 GB. The
# toolkit (/usr/local/cuda, say) has to be of the CUDA that torch was built with, and takes its own size twice.
set -euo pipefail

mirror=${1:-}
suite=${SUITE:-bookworm}
cuda=${CUDA:-}
here=$(dirname "${BASH_SOURCE[0]}")

fail() {
    echo "debian_base.sh: $1" >&2
    echo "  try: $2" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || fail "debootstrap has to be root" "sudo docker/debian_base.sh"
for tool in debootstrap docker; do
    command -v "$tool" > /dev/null || fail "$tool is not there" "apt-get install debootstrap docker.io"
done
[ -z "$cuda" ] || [ -x "$cuda/bin/nvcc" ] ||
    fail "CUDA=$cuda is no CUDA toolkit: it has no bin/nvcc" "CUDA=/usr/local/cuda, or where nvcc is"
docker version > /dev/null || fail "the engine does not answer" "start it, or set DOCKER_HOST"

work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for stage in run build; do
    packages=$(sh "$here/system.sh" "$stage" --packages)
    root=${work:?}/$stage
    if ! debootstrap --variant=minbase --include="${packages// /,}" "$suite" "$root" ${mirror:+"$mirror"} \
        > "$work/log" 2>&1; then
        tail -n 20 "$work/log" >&2
        fail "debootstrap failed" "see whether ${mirror:-its default mirror} can be reached, or name another one"
    fi
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/etc/ssh/ssh_host_*
    tar -C "$root" --one-file-system -c . |
        docker import --change 'CMD ["/bin/bash"]' - "pqasgd_horovod-base:$stage"
    rm -rf --one-file-system "$root"
done
if [ -n "$cuda" ]; then
    docker build --quiet --tag pqasgd_horovod-base:cuda --file - "$(cd -P "$cuda" && pwd)" << 'END'
FROM pqasgd_horovod-base:build
COPY . /usr/local/cuda
ENV PATH=/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
END
fi
docker image ls pqasgd_horovod-base
