"""preflight: everything that can be known to be wrong before a model is loaded, in one list.

It runs before every stage that loads a model, on the process that speaks for the job, and alone as
`nemo-pivotrl preflight RECIPE [STAGE]`. Each check is the stage's own or a pure function of `plan`; what fails would have
stopped the stage later, one error at a time. What another machine or a later moment decides (whether a server answers yet)
is not asked.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from nemo_pivotrl.backends.base import require_checkpoint
from nemo_pivotrl.backends.hub import is_hub_id, remedy_for
from nemo_pivotrl.backends.installed import probe
from nemo_pivotrl.backends.loading import REMEDIES
from nemo_pivotrl.backends.megatron.lora_mapping import lora_problems
from nemo_pivotrl.components.lineage import check_headers
from nemo_pivotrl.components.rollout import judged_candidates, load_chat, load_recipe_verifier, unrenderable_lines
from nemo_pivotrl.config import Patient, Policy, Recipe, TrainedModel
from nemo_pivotrl.core.artifacts import MADE_BY, read_header
from nemo_pivotrl.core.errors import InputError, Problem, UnrenderableState, short
from nemo_pivotrl.core.types import Verdict
from nemo_pivotrl.data.chat_template import Chat, load_tokenizer
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.sizing.architecture import Architecture, read_architecture
from nemo_pivotrl.sizing.layout_rules import fp8_dimensions, layout_problems, model_problems, training_problems
from nemo_pivotrl.sizing.precision import Probe, check_fp8
from nemo_pivotrl.tools.plan import training
from nemo_pivotrl.verifiers.base import verdicts

ROLES: dict[str, tuple[str, ...]] = {
    "profile": ("policy",),
    "sft": ("policy",),
    "train": ("policy",),
    "rank": ("patient",),
    "reward": ("patient",),
    "tfpo": ("doctor",),
    "decode": ("patient",),
    "assess": ("patient",),
}
"""Stages that are checked -> the sections whose model they load."""
TRAINS = ("sft", "train", "tfpo")
VERIFIED = 16
"""Candidates whose own expert action is shown to the verifier."""
NOTHING: Mapping[str, str] = MappingProxyType({})
ROOM = 1 << 28
"""Bytes that any stage may write."""


def preflight(
    recipe: Recipe, stage: str, world: int, machine: Callable[[], Probe] = probe, coming: Mapping[str, str] = NOTHING
) -> None:
    """Raise InputError with all problems of a stage on `world` processes; nothing is loaded but tokenizers.

    coming: files and folders that an earlier stage will have made by then; what they say is not asked.
    """
    problems: list[Problem] = []
    for check in (addresses, disk, installed):
        problems += check(recipe, stage)
    for role in ROLES[stage]:
        if recipe.model(role).model_name not in coming:
            problems += of_model(recipe, stage, role, world, machine)
    if not (coming and not_made_yet(recipe, stage)):
        problems += of_data(recipe, stage)
    if stage in ("profile", "train"):
        problems += of_verifier(recipe, stage)
    distinct = list(dict.fromkeys(problems))
    if distinct:
        raise InputError(distinct)


def not_made_yet(recipe: Recipe, stage: str) -> dict[str, str]:
    """What a stage needs and an earlier stage of the recipe has yet to make -> that stage."""
    found = {}
    for role in ROLES[stage]:
        folder, maker = recipe.model(role).model_name, recipe.maker(role)
        if maker and not Path(folder, "config.json").exists():
            found[folder] = maker
    if stage not in ("decode", "rank", "assess"):
        path, kinds = source(recipe, stage)
        if not path.exists():
            found[str(path)] = MADE_BY[kinds if isinstance(kinds, str) else kinds[0]]
    return found


def caught(check: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, list[Problem]]:
    """(what `check` returns, no problems), or (None, the problems that it raises)."""
    try:
        return check(*arguments, **named), []
    except InputError as error:
        return None, list(error.problems)


# ---- models, layout, precision, memory ----


def of_model(recipe: Recipe, stage: str, role: str, world: int, machine: Callable[[], Probe]) -> list[Problem]:
    """The folder, its tokenizer and template, the context, and for Megatron the layout, precision and memory."""
    model = recipe.model(role)
    maker = recipe.maker(role)
    name = model.model_name
    remedy = (
        f"`nemo-pivotrl {maker} RECIPE` makes it" if maker else remedy_for(name) if is_hub_id(name) else REMEDIES[role]
    )
    problems = caught(require_checkpoint, f"{role}.model_name", model.model_name, remedy)[1]
    if problems:
        return problems
    problems = caught(load_tokenizer, model.model_name, model.chat_template, role)[1]
    if model.backend == "megatron":
        shape, found = caught(read_architecture, model.model_name)
        problems += found
        problems += layout_problems(recipe.megatron, world)
        if shape is not None:
            problems += _on_megatron(recipe, stage, role, model, shape, world, machine)
    elif model.device == "cuda" and machine().capability is None:
        problems.append(
            Problem("recipe", None, f"{role}.device", "cuda, and torch sees no GPU", "set it to auto or cpu")
        )
    return problems


def _on_megatron(
    recipe: Recipe,
    stage: str,
    role: str,
    model: Policy | Patient,
    shape: Architecture,
    world: int,
    machine: Callable[[], Probe],
) -> list[Problem]:
    m, found = recipe.megatron, machine()
    problems = model_problems(shape, m) + check_fp8(m, found, fp8_dimensions(shape, m))
    if not m.cpu and found.capability is None:
        remedy = "start it on a machine with GPUs, or set megatron.cpu to run small models on CPUs"
        problems.append(Problem("recipe", None, "megatron.cpu", "false, and no CUDA device", remedy))
    if model.max_total_sequence_length > shape.max_position_embeddings and shape.rope_theta is not None:
        remedy = f"the model has positions up to {shape.max_position_embeddings}"
        said = str(model.max_total_sequence_length)
        problems.append(Problem("recipe", None, f"{role}.max_total_sequence_length", said, remedy))
    if stage not in TRAINS or not isinstance(model, Policy):
        return problems
    anchored = recipe.tfpo.anchor == "reference" if role == "doctor" else stage == "train" and _anchored(recipe)
    problems += training_problems(model, m, anchored)
    problems += lora_problems(shape, model.lora, m.tensor_model_parallel_size)
    if not problems and not m.cpu:
        problems += _memory(recipe, stage, role, model, shape, world, anchored)
    return problems


def _anchored(recipe: Recipe) -> bool:
    return recipe.loss_fn.reference_policy_kl_penalty > 0 or (recipe.grpo.val_kl and recipe.grpo.val_period > 0)


def _memory(
    recipe: Recipe, stage: str, role: str, model: Policy, shape: Architecture, world: int, anchored: bool
) -> list[Problem]:
    """Whether the arithmetic of `plan` fits this machine's GPUs."""
    import torch

    gib = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**30
    here = replace(recipe.cluster, num_nodes=1, generation_nodes=0, gpus_per_node=world)
    room = gib - recipe.plan.reserve_gib
    need = training(replace(recipe, cluster=here), stage, model, shape, anchored, head=role == "doctor", limit=room)
    if need.fits:
        return []
    remedy = "; ".join(need.remedies[:3]) or "`nemo-pivotrl plan` shows what takes it"
    return [Problem("recipe", None, "memory", f"{need.peak:.1f} GiB on GPUs with {room:.1f}", remedy)]


# ---- data ----


def of_data(recipe: Recipe, stage: str) -> list[Problem]:
    """The stage's input: there, of the right kind, and of this tokenizer and template."""
    if stage in ("decode", "rank", "assess"):
        path = {"decode": recipe.decode, "rank": recipe.rank, "assess": recipe.assess}[stage].prompts
        if path and Path(path).exists():
            return []
        return [
            Problem("recipe", None, f"{stage}.prompts", path or "nothing", "name a JSONL file with one prompt a line")
        ]
    path, kinds = source(recipe, stage)
    header, problems = caught(read_header, path, kinds)
    if header is None or stage not in ("profile", "sft", "train"):
        return problems
    if not Path(recipe.policy.model_name, "config.json").exists():
        return problems  # `of_model` says it
    chat, unreadable = caught(load_chat, recipe.policy, recipe.verifier.limits)
    if unreadable:
        return problems + unreadable
    problems += of_states(path, chat)
    if stage != "train":
        return problems
    names = {"tokenizer": chat.fingerprint, "chat_template": chat.template_digest}
    return problems + caught(check_headers, path, header, recipe.told("policy"), **names)[1]


def trajectory_problems(recipe: Recipe) -> list[Problem]:
    """Files that `extract` would read and that are not there; the embedded world writes its own."""
    paths, remedy = recipe.extract.trajectories, "name your trajectory files, as paths from this folder or whole ones"
    if not paths:
        return [Problem("recipe", None, "extract.trajectories", "nothing", remedy)]
    missing = [
        path for path in paths if not Path(path).exists() and Path(path) != recipe.path("world/trajectories.jsonl")
    ]
    return [Problem("recipe", None, "extract.trajectories", path, f"no such file: {remedy}") for path in missing]


def of_states(path: Path, chat: Chat) -> list[Problem]:
    """The template renders the first states. It warns of a few that are refused; most of them, or a part left out, is a problem."""
    states, problems = caught(lambda: list(islice(candidates_of(path), VERIFIED)))
    refused = []
    for state in states or ():
        try:
            chat.prompt_ids(state.messages, state.tools)
        except UnrenderableState as error:
            refused.append((state.candidate_id, f"{error.kind}: {error.found}"))
        except InputError as error:
            return problems + error.problems
    if not refused:
        return problems
    told = f"{len(refused)} of the first {len(states)} states cannot be rendered: {refused[0][1]}"
    if 2 * len(refused) > len(states):
        remedy = "they would be left out; see policy.chat, or set another policy.chat_template"
        return [*problems, Problem(str(path), None, "states", told, remedy)]
    print("\n".join([f"{told}; they are left out", *unrenderable_lines(refused, path)]))
    return problems


def source(recipe: Recipe, stage: str) -> tuple[Path, str | tuple[str, ...]]:
    """The artefact that a stage reads, and its kind."""
    if stage == "train":
        return recipe.path(recipe.grpo.pivots), "pivots"
    if stage == "sft":
        name = "candidates.jsonl" if recipe.sft.source == "candidates" else recipe.grpo.pivots
        return recipe.path(name), ("candidates", "pivots")
    kind = {"profile": "candidates", "reward": "preferences", "tfpo": "token_rewards"}[stage]
    return recipe.path(f"{kind}.jsonl"), kind


def of_verifier(recipe: Recipe, stage: str) -> list[Problem]:
    """The verifier loads, and accepts the experts of the first rows that it judges. One that asks a judge is only loaded."""
    loaded, problems = caught(load_recipe_verifier, recipe)
    path, kinds = source(recipe, stage)
    if loaded is None or loaded[0].asks_judge or caught(read_header, path, kinds)[1]:
        return problems
    judged = (c for c in candidates_of(path) if not loaded[0].excludes(c.case))
    candidates, unreadable = caught(lambda: list(islice(judged, VERIFIED)))
    if unreadable:
        return problems + unreadable
    if not candidates:
        return problems + caught(judged_candidates, candidates_of(path), loaded[0], path)[1]
    said = verdicts(loaded[0], [(c.case, c.expected) for c in candidates], recipe.profile.max_retries)
    lost = [(c, v) for c, v in zip(candidates, said, strict=True) if not isinstance(v, Verdict) or v.reward != 1.0]
    if len(lost) <= max(recipe.audit.max_gold_failures * len(candidates), 1):
        return problems
    first, verdict = lost[0]
    why = short(f"{verdict.category} {verdict.detail}" if isinstance(verdict, Verdict) else str(verdict))
    found = f"{len(lost)} of the first {len(candidates)} experts do not score 1, {first.candidate_id} by {why}"
    remedy = "`nemo-pivotrl audit` lists them all: mend the rows, or use a verifier that accepts them"
    return [*problems, Problem(str(path), None, "verifier", found, remedy)]


# ---- machine ----


def addresses(recipe: Recipe, stage: str) -> list[Problem]:
    """Servers and a judge whose addresses cannot be one."""
    problems = []
    asked = "vllm" in (recipe.policy.sampler, recipe.patient.backend)
    named = [("vllm.servers", url) for url in recipe.vllm.servers if asked]
    if recipe.verifier.judge.base_url and stage in ("profile", "train"):
        named.append(("verifier.judge.base_url", recipe.verifier.judge.base_url))
    if recipe.assess.judge.base_url and stage == "assess":
        named.append(("assess.judge.base_url", recipe.assess.judge.base_url))
    for field, url in named:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            problems.append(Problem("recipe", None, field, url, "write it as http://HOST:PORT"))
    return problems


def port_problems(environment: Any = os.environ) -> list[Problem]:
    """MASTER_PORT, where this process would be the one to serve it, is taken."""
    port = environment.get("MASTER_PORT", "")
    if not port.isdigit() or "TORCHELASTIC_RUN_ID" in environment or environment.get("RANK", "0") != "0":
        return []
    with socket.socket() as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind(("", int(port)))
        except OSError as error:
            return [Problem("environment", None, "MASTER_PORT", f"{port}: {error.strerror}", "name a free port")]
    return []


def disk(recipe: Recipe, stage: str) -> list[Problem]:
    """No room in the run folder for what the stage writes: checkpoints and the final weights, or artefacts."""
    folder = next(p for p in (Path(recipe.run_dir).resolve(), *Path(recipe.run_dir).resolve().parents) if p.exists())
    free, need = shutil.disk_usage(folder).free, ROOM
    if stage in TRAINS:
        role = ROLES[stage][0]
        model = recipe.model(role)
        assert isinstance(model, TrainedModel)
        weights = sum(p.stat().st_size for p in _weights(model.model_name))
        state = 1 if model.lora.enabled else 7 if model.backend == "megatron" and recipe.megatron.bf16 else 3
        kept = 0 if stage == "sft" else recipe.checkpointing.keep_top_k + 2  # the latest, and one being written
        need += weights * (1 + state * kept if not model.lora.enabled else 2)
    if free >= need:
        return []
    found = f"{free / 2**30:.1f} GiB free in {folder}"
    remedy = f"{stage} may write {need / 2**30:.1f} GiB: free some, move run_dir, or lower checkpointing.keep_top_k"
    return [Problem("recipe", None, "run_dir", found, remedy)]


def _weights(folder: str) -> Iterator[Path]:
    if folder and Path(folder).is_dir():
        yield from Path(folder).glob("*.safetensors")


def installed(recipe: Recipe, stage: str) -> list[Problem]:
    """Packages that the recipe's backends need and that are not here, by the module that they bring; nothing is imported."""
    needs: list[tuple[str, str, str]] = []
    for role in ROLES[stage]:
        model = recipe.model(role)
        if model.backend == "megatron":
            needs.append((f"{role}.backend", "megatron", "megatron"))
        sampled = isinstance(model, Policy) and model.sampler == "vllm" and stage in ("profile", "train")
        if (sampled or model.backend == "vllm") and not recipe.vllm.servers:
            needs.append((f"{role}.{'sampler' if sampled else 'backend'}", "vllm", "vllm"))
        if isinstance(model, TrainedModel) and model.lora.enabled and stage in TRAINS:
            needs.append((f"{role}.lora.enabled", "peft", "reference"))
    return [
        Problem("environment", None, field, f"no module {module}", f"pip install 'nemo-pivotrl[{extra}]'")
        for field, module, extra in needs
        if importlib.util.find_spec(module) is None
    ]


def stages_of(recipe: Recipe) -> Sequence[str]:
    """The stages of the recipe's algorithm that are checked, in their order."""
    return ("profile", "train") if recipe.algorithm == "pivotrl" else ("reward", "tfpo")
