# CPU image (x86-64): docker build -f deploy/containers/cpu.Dockerfile -t prefillshare:0.1.0-cpu .
# The same set-up as `make setup`. It is for trying prefillshare out (prefillshare model fetch smollm2-135m-instruct && prefillshare
# demo) and for tests in a cluster.
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/prefillshare
COPY . .
RUN requirements/install.sh

FROM ${PYTHON}
# iproute2: `prefillshare doctor` and Ray's addresses. wget: KubeRay's probes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends iproute2 libgomp1 libnuma1 libtcmalloc-minimal4 wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --gid 100 --create-home prefillshare \
    && ln -s /opt/prefillshare/deploy /opt/prefillshare/adapters /home/prefillshare/
COPY --from=build /opt/prefillshare /opt/prefillshare
ENV PATH=/opt/prefillshare/.venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 1000:100
WORKDIR /home/prefillshare
EXPOSE 8000 9000
ENTRYPOINT []
CMD ["prefillshare", "--help"]
