# syntax=docker/dockerfile:1
# The server and everything it needs, for `moesaic serve` alone and for every pod of a Ray cluster (docs/deploy.md).
#
#   docker build -t moesaic .
#   docker build -t moesaic:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --rm --shm-size=1g -p 8000:8000 -p 50051:50051 moesaic

ARG PYTHON_VERSION=3.12

# The wheel has the compiled kernels; the compiler stays behind.
FROM python:${PYTHON_VERSION}-slim-bookworm AS wheel
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml README.md ./
COPY models/moesaic-demo models/moesaic-demo
COPY models/prompts.jsonl models/prompts.jsonl
COPY cluster cluster
COPY actors actors
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && python -m zipfile --list /wheels/moesaic-*.whl | grep --quiet 'actors/kernels/_native'

FROM python:${PYTHON_VERSION}-slim-bookworm
# Packages for NVIDIA GPUs are the `cu` indexes; the first of them has the requirement that pyproject.toml states.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# libgomp1: threads of the kernels. tini: as process 1, ends what Ray's processes leave behind. wget: KubeRay's probes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --create-home moesaic
# What changes rarely, and is large, in layers of its own: they depend on pyproject.toml alone.
WORKDIR /opt/moesaic
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && grep '^torch[^a-z]' requirements.txt > torch.txt \
    && pip install --no-cache-dir --index-url "${TORCH_INDEX}" --requirement torch.txt
RUN pip install --no-cache-dir --requirement requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/moesaic-*.whl

# HF_HUB_CACHE is not set: give a volume at /home/moesaic/.cache if models are named by hub id.
# The second is for the proxies of Ray Serve: their own answers (no application yet, or any more) take our form.
ENV PYTHONUNBUFFERED=1 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=cluster.frontend.serve_proxy.answers:middlewares \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/moesaic
# HTTP, gRPC, Ray's own metrics.
EXPOSE 8000 50051 8080
HEALTHCHECK --start-period=30m --interval=15s --timeout=5s \
    CMD ["wget", "--quiet", "--output-document=-", "http://127.0.0.1:8000/health"]
# KubeRay puts its own command (`ray start`) in the place of both.
ENTRYPOINT ["tini", "--"]
CMD ["moesaic", "serve", "--host", "0.0.0.0"]
