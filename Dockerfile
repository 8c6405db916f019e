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
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --no-deps /wheel/*.whl jsonschema==4.26.0 jsonschema-specifications==2025.9.1 \
        referencing==0.37.0 rpds-py==2026.9.1 attrs==26.1.0 httpx==0.28.1 \
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
ARG VLLM_VERSION=0.32.0
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
        && "${BASE_PYTHON}" -m pip --python /opt/pivotrl-vllm/bin/python install --no-cache-dir --find-links /wheel \
            "vllm==${VLLM_VERSION}" "nemo-pivotrl[vllm,reference,verifiers]==${VERSION}"; \
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
