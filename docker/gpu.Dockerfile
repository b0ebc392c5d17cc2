# cpu.Dockerfile with CUDA and NCCL: the CUDA build of torch, a Horovod that takes CUDA tensors to NCCL, and the kernels
# for GPUs. Built on docker/debian_base.sh's bases, and tried there without a GPU; not on the bases named below.
#
#   make image-gpu [BASE_IMAGE=.. BUILD_IMAGE=..]
#
# BUILD_IMAGE has the CUDA toolkit that torch was built with. torch brings what a run needs, NCCL too, but not the
# driver, which comes from the host (nvidia-container-toolkit). A test holds the two files together.
ARG BASE_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04
ARG BUILD_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04

# First, so that a base that does not fit is told before anything is compiled. Ubuntu's has a user 1000 already.
FROM ${BASE_IMAGE} AS base
COPY docker/system.sh /tmp/
RUN sh /tmp/system.sh run && rm /tmp/system.sh \
    && { owner=$(getent passwd 1000 | cut -d: -f1) && [ -z "$owner" ] || userdel --remove "$owner"; } \
    && useradd --create-home --uid 1000 --shell /bin/sh trainer \
    && install -d -o trainer -g trainer -m 755 /cluster

FROM ${BUILD_IMAGE} AS system
COPY docker/system.sh /tmp/
RUN sh /tmp/system.sh build-cuda

FROM system AS build
WORKDIR /opt/pqasgd_horovod
ENV PQASGD_CACHE=/tmp/cache HOROVOD_GPU_OPERATIONS=NCCL
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
    TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER trainer
WORKDIR /home/trainer
RUN horovodrun --check-build \
    && python -c "import pqasgd_horovod.torch as t, pqasgd_horovod.tensorflow.keras as k; t.init(); print(t.size(), k)" \
    && python -c "import horovod.tensorflow as f, horovod.torch as t; assert f.nccl_built() and t.nccl_built()" \
    && python -c "import pqasgd_horovod.native.cuda as c; print('kernels for', c.load().architectures)"
LABEL org.opencontainers.image.title="pqasgd_horovod" \
      org.opencontainers.image.description="Horovod with PQASGD for PyTorch and TensorFlow, on GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
EXPOSE 2222
HEALTHCHECK --interval=5s --timeout=5s --start-period=5s CMD ["node.sh", "health"]
ENTRYPOINT ["tini", "-g", "--", "node.sh"]
CMD ["worker"]
