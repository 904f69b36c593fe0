# GPU image (CUDA, x86-64): docker build -f deploy/containers/gpu.Dockerfile -t prefillshare:0.1.0-gpu .
# CUDA's libraries come with torch (requirements/gpu.lock). The base image brings the compilers for kernels that are built at their
# first use.
ARG CUDA=nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${CUDA} AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3.12-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/prefillshare
ENV PATH=/opt/prefillshare/.venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3.12 -m venv .venv
# The lock file is copied separately, because it changes less often than the code.
COPY requirements/gpu.lock requirements/gpu.lock
RUN pip install --no-deps --require-hashes -r requirements/gpu.lock
COPY . src/
RUN pip install --no-deps --no-build-isolation ./src && rm -rf src

FROM ${CUDA}
# python3.12-dev, gcc: Triton's launchers. The ib and rdma libraries: KV over RDMA, which UCX finds by itself.
# wget: KubeRay's probes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-dev gcc iproute2 ibverbs-providers libibverbs1 \
        librdmacm1t64 libnuma1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && (userdel --remove ubuntu || true) \
    && useradd --uid 1000 --gid 100 --create-home prefillshare
COPY --from=build /opt/prefillshare /opt/prefillshare
ENV PATH=/opt/prefillshare/.venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:100
WORKDIR /home/prefillshare
EXPOSE 8000 9000
ENTRYPOINT []
CMD ["prefillshare", "--help"]
