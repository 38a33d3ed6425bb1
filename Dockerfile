# The service as an image. How to build and run it: docs/container.md.
ARG BASE_IMAGE=python:3.11-slim-bookworm


# What the project needs, in a layer that stays the same while only its own code changes
FROM ${BASE_IMAGE} AS dependencies

# The package index: pip reads these by themselves; without them, its own defaults
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# A folder of wheels in the build context to choose from as well; it may be empty or absent
ARG WHEELS=wheels
# Of the project, as pyproject.toml names them: gpu has Triton and the GPU's metrics, trace has OpenTelemetry
ARG EXTRAS=server

WORKDIR /build
COPY pyproject.toml constraints.txt ${WHEELS}/*.whl ./
# An empty project of the same needs is installed with them, then taken away. Secrets are optional.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.pem \
    mkdir system proto model server client \
    && touch README.md LICENSE \
    && python -m venv --without-pip /opt/bilm \
    && pip --python /opt/bilm/bin/python install --no-cache-dir --find-links . -c constraints.txt ".[${EXTRAS}]" \
    && pip --python /opt/bilm/bin/python uninstall --yes bilm-serve


FROM dependencies AS project

COPY README.md LICENSE ./
COPY system system
COPY proto proto
COPY model model
COPY server server
COPY client client
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.pem \
    pip wheel --no-cache-dir --no-deps --find-links . --wheel-dir /wheel . \
    && pip --python /opt/bilm/bin/python install --no-cache-dir --no-index --no-deps --root /project /wheel/*.whl

# Kernels, compiled for AVX2 and for AVX-512, where a server looks for them
RUN PYTHONPATH="$(echo /project/opt/bilm/lib/python3*/site-packages)" PYTHONDONTWRITEBYTECODE=1 \
    /opt/bilm/bin/python -m bilm_model.shipped_kernels /project/opt/bilm/share/bilm-serve/kernels


FROM ${BASE_IMAGE} AS runtime

LABEL org.opencontainers.image.title="bilm-serve" \
      org.opencontainers.image.description="Contextual word embeddings (ELMo's biLM) as a gRPC service" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN groupadd --gid 10001 bilm \
    && useradd --uid 10001 --gid bilm --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin bilm

COPY --from=dependencies /opt/bilm /opt/bilm
COPY --from=project /project/opt/bilm /opt/bilm

# Where the host has the NVIDIA runtime, it mounts the driver; CUDA's libraries come with torch
ENV PATH=/opt/bilm/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    BILM_LISTEN=0.0.0.0:50051

# By number, so that Kubernetes' runAsNonRoot can tell
USER 10001:10001
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["bilm-health", "--timeout-s", "3"]
ENTRYPOINT ["bilm-serve"]


# For a GPU: `docker build --target gpu`. Triton compiles a launcher at run time, with a C compiler and Python's headers,
# which the base image has; it needs a temporary folder and a cache that can be written to, which are mounted.
FROM runtime AS gpu

USER 0:0
RUN command -v gcc > /dev/null \
    || { apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; }
# Triton's kernels, for the GPUs from an A100 on; their cache names these files by their paths, so they are compiled here
RUN PYTHONDONTWRITEBYTECODE=1 python -m bilm_model.engine.cuda.compile_kernels /opt/bilm/share/bilm-serve/kernels/triton
USER 10001:10001
ENV CC=gcc \
    BILM_KERNEL_CACHE=/var/cache/bilm/kernels


# Built where no target is named
FROM runtime
