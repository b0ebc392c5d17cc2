# The image of a cluster's nodes: PyTorch, TensorFlow, Horovod and this package, and sshd, which they are launched by.
#
#   make image [BASE_IMAGE=.. BUILD_IMAGE=..]
#
# Everything but Debian's packages comes from build/docker/cache, which `make image` fills; a base that has those
# packages (docker/debian_base.sh makes one from a Debian mirror) needs no network. gpu.Dockerfile is the same with CUDA
# and NCCL.
ARG BASE_IMAGE=python:3.11.9-slim-bookworm
ARG BUILD_IMAGE=${BASE_IMAGE}

# First, so that a base that does not fit is told before anything is compiled. Ubuntu's has a user 1000 already.
FROM ${BASE_IMAGE} AS base
COPY docker/system.sh /tmp/
RUN sh /tmp/system.sh run && rm /tmp/system.sh \
    && { owner=$(getent passwd 1000 | cut -d: -f1) && [ -z "$owner" ] || userdel --remove "$owner"; } \
    && useradd --create-home --uid 1000 --shell /bin/sh trainer \
    && install -d -o trainer -g trainer -m 755 /cluster

FROM ${BUILD_IMAGE} AS system
COPY docker/system.sh /tmp/
RUN sh /tmp/system.sh build

FROM system AS build
WORKDIR /opt/pqasgd_horovod
ENV PQASGD_CACHE=/tmp/cache
COPY build/docker/cache /tmp/cache
COPY scripts/setup_env.py scripts/apply_patch.py scripts/*.txt scripts/*.patch scripts/
RUN python3 scripts/setup_env.py --until horovod
COPY setup.py setup.cfg pyproject.toml README.md LICENSE ./
COPY pqasgd_horovod pqasgd_horovod
COPY scripts scripts
# Headers are for building only. Users of the image cannot write bytecode, and without it each rank compiles for itself;
# packages have some files that are no Python 3.
RUN python3 scripts/setup_env.py \
    && rm -rf build .venv/lib/python3*/site-packages/*/include .venv/lib/python3*/site-packages/nvidia/*/include \
    && { .venv/bin/python -m compileall -qq -j 2 .venv/lib pqasgd_horovod scripts || true; }

FROM base AS run
COPY --from=build /opt/pqasgd_horovod /opt/pqasgd_horovod
COPY docker/node.sh /usr/local/bin/node.sh
COPY docker/ssh.conf /etc/ssh/ssh_config.d/cluster.conf
COPY docker/sshd.conf /etc/ssh/cluster_sshd.conf
ENV PATH=/opt/pqasgd_horovod/.venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \
    TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0
USER trainer
WORKDIR /home/trainer
RUN horovodrun --check-build \
    && python -c "import pqasgd_horovod.torch as t, pqasgd_horovod.tensorflow.keras as k; t.init(); print(t.size(), k)"
LABEL org.opencontainers.image.title="pqasgd_horovod" \
      org.opencontainers.image.description="Horovod with PQASGD for PyTorch and TensorFlow, on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
EXPOSE 2222
HEALTHCHECK --interval=5s --timeout=5s --start-period=5s CMD ["node.sh", "health"]
ENTRYPOINT ["tini", "-g", "--", "node.sh"]
CMD ["worker"]
