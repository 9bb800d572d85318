# The service in a container, in two targets:
#   docker build -t stepwise .                    for CUDA; slow without a GPU
#   docker build -t stepwise:cpu --target cpu .   for CPUs, with OpenVINO; small
# To use your own package index: --secret id=pip,src=pip.conf. No layer keeps the secret.

# A base image needs Python 3.11 to 3.13 in its package lists. To pin it by digest: --build-arg BASE_IMAGE=name@sha256:…
ARG BASE_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
# Debian 12 has Python 3.11, like the tests.
ARG CPU_BASE_IMAGE=debian:12-slim


FROM ${CPU_BASE_IMAGE} AS cpu-python
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/log/alternatives.log \
    && useradd --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin stepwise \
    && install --directory --owner stepwise --group stepwise /cache \
    && mkdir /weights

FROM cpu-python AS cpu-build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-pip \
    && python3 -m venv --without-pip /opt/venv
WORKDIR /app
COPY requirements /requirements
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --no-deps --only-binary :all: --require-hashes \
    -r /requirements/service.lock -r /requirements/cpu.lock
# The lock's hashes are for PyPI's CUDA build, so the CPU build has none. The suffix +cpu excludes other builds.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --no-deps --only-binary :all: \
    --index-url "${TORCH_INDEX}" "$(grep -o '^torch==[0-9.]*' /requirements/cuda.lock)+cpu" \
    && pip --python /opt/venv/bin/python check
# Remove torch's headers and C++ tests. Compile bytecode now, because the container is read-only later. Unchecked hashes
# make it independent of file times. Like pip, ignore files that do not compile (those for other Python versions).
RUN cd /opt/venv/lib/python3*/site-packages/torch && rm -rf include test bin/test_* bin/*Test bin/protoc* \
    && { python3 -I -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv || true; }
# The code comes last, so that a change does not reinstall packages. Everyone may read it, whatever the umask was.
COPY LICENSE ./
COPY stepwise stepwise
COPY service service
COPY model model
COPY weights weights
RUN chmod -R u=rwX,go=rX . && python3 -I -m compileall -q --invalidation-mode unchecked-hash .


FROM ${BASE_IMAGE} AS cuda-python
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/log/alternatives.log \
    && useradd --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin stepwise \
    && install --directory --owner stepwise --group stepwise /cache \
    && mkdir /weights

FROM cuda-python AS cuda-locked
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-pip \
    && python3 -m venv --without-pip /opt/venv
WORKDIR /app
COPY requirements /requirements
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --no-deps --only-binary :all: --require-hashes \
    -r /requirements/service.lock

FROM cuda-locked AS cuda-build
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --no-deps --only-binary :all: --require-hashes \
    -r /requirements/cuda.lock \
    && pip --python /opt/venv/bin/python check
RUN cd /opt/venv/lib/python3*/site-packages/torch && rm -rf include test bin/test_* bin/*Test bin/protoc* \
    && { python3 -I -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv || true; }
COPY LICENSE ./
COPY stepwise stepwise
COPY service service
COPY model model
COPY weights weights
RUN chmod -R u=rwX,go=rX . && python3 -I -m compileall -q --invalidation-mode unchecked-hash .


# From here on, the two targets differ only in the stages they copy from; tests/test_image.py checks that.
FROM cpu-python AS cpu
COPY --from=cpu-build /opt/venv /opt/venv
COPY --from=cpu-build /app /app
WORKDIR /app
# The service writes only to the cache, which is also the user's home. Mount a tmpfs or a volume there, or nothing.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    STEPWISE_HOST=0.0.0.0 \
    STEPWISE_CACHE_DIR=/cache
# A number, because Kubernetes' runAsNonRoot cannot check a name.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=600s \
    CMD ["/opt/venv/bin/python", "-c", "import os, sys, http.client as h; c = h.HTTPConnection('127.0.0.1', int(os.environ.get('STEPWISE_PORT') or 8000), timeout=5); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
# With tini, because process 1 ignores SIGTERM until it installs a handler, and the imports before that take seconds.
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/venv/bin/python", "-m", "service"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="stepwise" \
    org.opencontainers.image.description="Diffusion U-Nets over HTTP: continuous batching of mixed rows, the same bytes for the same seed" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

FROM cuda-python AS cuda
COPY --from=cuda-build /opt/venv /opt/venv
COPY --from=cuda-build /app /app
WORKDIR /app
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    STEPWISE_HOST=0.0.0.0 \
    STEPWISE_CACHE_DIR=/cache
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=600s \
    CMD ["/opt/venv/bin/python", "-c", "import os, sys, http.client as h; c = h.HTTPConnection('127.0.0.1', int(os.environ.get('STEPWISE_PORT') or 8000), timeout=5); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/venv/bin/python", "-m", "service"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="stepwise" \
    org.opencontainers.image.description="Diffusion U-Nets over HTTP: continuous batching of mixed rows, the same bytes for the same seed" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
