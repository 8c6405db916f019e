# syntax=docker/dockerfile:1
#     docker build -t nemo-pivotrl .                          # over NVIDIA's NeMo-RL image; the tools of that image stay usable
#     docker build -t nemo-pivotrl:aligner --target aligner . # over the last NeMo image that holds NeMo-Aligner
# Both install the project and what the base lacks, and nothing that the base brings: torch, Transformer Engine and apex are its own.
ARG BASE_IMAGE=nvcr.io/nvidia/nemo-rl:v0.7.0
ARG ALIGNER_BASE_IMAGE=nvcr.io/nvidia/nemo:25.02

FROM python:3.13.14-slim-bookworm AS wheel
WORKDIR /source
COPY setup.py pyproject.toml README.md LICENSE ./
COPY nemo_pivotrl nemo_pivotrl
COPY hydra_plugins hydra_plugins
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${ALIGNER_BASE_IMAGE} AS aligner
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="nemo-pivotrl (NeMo-Aligner)" \
      org.opencontainers.image.description="PivotRL and LLMdoctor as NeMo-Aligner components" \
      org.opencontainers.image.version="${VERSION}"
COPY requirements/aligner.lock deploy/docker/locked.sh /opt/pivotrl-build/
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    /opt/pivotrl-build/locked.sh /opt/pivotrl-build/aligner.lock jsonschema jsonschema-specifications referencing rpds-py attrs \
        httpx httpcore h11 anyio sniffio >/tmp/requirements.lock \
    && pip install --no-cache-dir --no-deps --require-hashes -r /tmp/requirements.lock \
    && pip install --no-cache-dir --no-deps /wheel/*.whl \
    && rm /tmp/requirements.lock \
    && useradd --create-home --uid 10001 --shell /bin/bash pivotrl
WORKDIR /workspace
RUN chown pivotrl: /workspace
USER 10001
RUN nemo-pivotrl --version
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["nemo-pivotrl", "--version"]
CMD ["nemo-pivotrl", "env"]

FROM ${BASE_IMAGE} AS release
ARG VERSION=0.1.0
# NeMo-RL keeps an environment for each kind of worker; this one has Transformer Engine, flash-attn and mamba-ssm
ARG BASE_PYTHON=/opt/ray_venvs/nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker/bin/python
# the image's own vLLM is older than the one we are tested with; 0 leaves ours out, several GB
ARG WITH_VLLM=1
LABEL org.opencontainers.image.title="nemo-pivotrl" \
      org.opencontainers.image.description="PivotRL and LLMdoctor on megatron-core and vLLM" \
      org.opencontainers.image.version="${VERSION}"
COPY deploy/docker /opt/pivotrl-build
# hadolint ignore=DL3059
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    /opt/pivotrl-build/overlay.sh "${BASE_PYTHON}" /opt/pivotrl --require-hashes -r /opt/pivotrl-build/requirements.lock \
    && "${BASE_PYTHON}" -m pip --python /opt/pivotrl/bin/python install --no-cache-dir --no-deps /wheel/*.whl
# hadolint ignore=DL3059
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    if [ "${WITH_VLLM}" = 1 ]; then \
        "${BASE_PYTHON}" -m venv --without-pip /opt/pivotrl-vllm \
        && "${BASE_PYTHON}" -m pip --python /opt/pivotrl-vllm/bin/python install --no-cache-dir --no-deps \
            --require-hashes -r /opt/pivotrl-build/vllm.lock \
        && "${BASE_PYTHON}" -m pip --python /opt/pivotrl-vllm/bin/python install --no-cache-dir --no-deps /wheel/*.whl; \
    fi
# Python itself and linked packages lie under /root there, which is closed to others; nothing in it is made writable
RUN for folder in /root /root/.local /root/.local/share /root/.cache; do \
        if [ -d "${folder}" ]; then chmod a+x "${folder}"; fi; \
    done \
    && useradd --create-home --uid 10001 --shell /bin/bash pivotrl \
    && mkdir -p /workspace && chown pivotrl: /workspace
ENV PATH="/opt/pivotrl/bin:${PATH}"
WORKDIR /workspace
COPY recipes recipes
COPY deploy deploy
USER 10001
# fails here, not on a cluster, when the user cannot run it or a package shadows another badly
RUN nemo-pivotrl --version && python -c "import megatron.core, peft, torch, transformers; print(torch.__version__, torch.__file__)"
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["nemo-pivotrl", "--version"]
CMD ["nemo-pivotrl", "env"]
