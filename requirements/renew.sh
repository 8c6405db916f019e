#!/usr/bin/env bash
# Renew the locks: every version and the hashes of its files, for each environment. `UPGRADE=1` takes the newest that the constraints
# allow; without it, what a lock names already stays. Needs uv on PATH, and the network.
#
# torch is in no lock but that of the image's vLLM. It has a build for each accelerator, under one version and with other hashes and other dependencies, and NVIDIA's
# containers bring their own; constraints.txt pins its version. The locks are resolved against the CPU build, so they hold no CUDA
# packages; LOCK_TORCH says where that build comes from (default: PyTorch's own index).
set -euo pipefail
cd "$(dirname "$0")/.."
here=requirements
read -ra torch <<<"${LOCK_TORCH:---torch-backend cpu}"

lock() { # PYTHON LOCK ARGUMENT...
    local python=$1 target=$2
    shift 2
    uv pip compile -q --python-version "$python" --generate-hashes --no-annotate --custom-compile-command "make locks" \
        --no-emit-package torch --no-emit-package nemo-pivotrl --no-emit-package torchvision --no-emit-package torchaudio \
        --no-emit-package torchcodec --no-emit-package triton ${UPGRADE:+--upgrade} -o "$target" "$@"
}

extras=(--extra reference --extra megatron --extra verifiers --extra serve --extra report --extra dev)
lock 3.11 $here/main.lock setup.py "${extras[@]}" -c constraints.txt "${torch[@]}"
lock 3.11 $here/vllm.lock tests/vllm/requirements.txt -c tests/vllm/constraints.txt "${torch[@]}"
lock 3.11 $here/aligner.lock tests/aligner/requirements.txt -c tests/aligner/constraints.txt "${torch[@]}"
lock 3.11 $here/aligner-packages.lock --no-deps tests/aligner/packages.txt
lock 3.11 $here/conformance.lock benchmarks/conformance-requirements.txt
lock 3.11 $here/bfcl.lock --no-deps benchmarks/bfcl-requirements.txt
lock 3.11 $here/view.lock tests/view/requirements.txt
lock 3.13 deploy/docker/requirements.lock --no-deps deploy/docker/requirements.txt
# the image's vLLM: on GPUs, so with the torch of PyPI and its CUDA
uv pip compile -q --python-version 3.13 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate \
    --custom-compile-command "make locks" --no-emit-package nemo-pivotrl ${UPGRADE:+--upgrade} -o deploy/docker/vllm.lock \
    deploy/docker/vllm.txt setup.py --extra reference --extra verifiers
