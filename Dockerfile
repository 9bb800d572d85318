# The service on the CUDA runtime. Build: docker build -t stepwise .
# Any base with Python 3.11 or newer in its package list will do: --build-arg BASE_IMAGE=ubuntu:24.04 (CPU only).
ARG BASE_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
FROM ${BASE_IMAGE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 stepwise

# Dependencies first: a change of the code then installs nothing again.
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY service/__init__.py service/
RUN mkdir model weights \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir '.[cpu]' \
    && /opt/venv/bin/pip uninstall --yes stepwise

COPY service service
COPY model model
COPY weights weights

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    STEPWISE_HOST=0.0.0.0
USER stepwise
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s \
    CMD ["/opt/venv/bin/python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ.get('STEPWISE_PORT', 8000)}/health/ready\")"]
ENTRYPOINT ["/opt/venv/bin/python", "-m", "service"]
