# The service in a container, in two targets:
#   docker build -t stepwise .                    on CUDA; or slowly on the CPU, where there is no GPU
#   docker build -t stepwise:cpu --target cpu .   on the CPU, with OpenVINO; small
# For a package index of your own: --secret id=pip,src=pip.conf. No layer keeps it.

# Bases need Python 3.11 to 3.13 in their package lists. By digest: --build-arg BASE_IMAGE=name@sha256:…
ARG BASE_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
# Debian 12 has Python 3.11, with which the tests run.
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
# The lock's hashes are those of PyPI's build, which is for CUDA; this one is known by its version. +cpu: nothing else will do.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --no-deps --only-binary :all: \
    --index-url "${TORCH_INDEX}" "$(grep -o '^torch==[0-9.]*' /requirements/cuda.lock)+cpu" \
    && pip --python /opt/venv/bin/python check
# torch's headers and C++ tests are of no use here. Bytecode is made now, because nothing can be written later, and holds
# whatever a layer does to a file's time. As with pip, what does not compile (Python of other versions) does not matter.
RUN cd /opt/venv/lib/python3*/site-packages/torch && rm -rf include test bin/test_* bin/*Test bin/protoc* \
    && { python3 -I -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv || true; }
# The code comes last: a change of it then installs nothing again. Readable for all, whatever the umask was.
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


# From here on, the two targets differ in nothing but the stages that they come from; tests/test_image.py holds them to it.
FROM cpu-python AS cpu
COPY --from=cpu-build /opt/venv /opt/venv
COPY --from=cpu-build /app /app
WORKDIR /app
# Nothing but the cache is written, which is also the user's home: a tmpfs or a volume, or nothing at all.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    STEPWISE_HOST=0.0.0.0 \
    STEPWISE_CACHE_DIR=/cache
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=600s \
    CMD ["/opt/venv/bin/python", "-c", "import os, sys, http.client as h; c = h.HTTPConnection('127.0.0.1', int(os.environ.get('STEPWISE_PORT') or 8000), timeout=5); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
# tini, because a process that is number 1 does not hear SIGTERM before it has a handler, which takes seconds of imports.
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
