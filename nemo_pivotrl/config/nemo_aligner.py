"""A NeMo-Aligner config tree as the project's `Recipe`: the two dialects of one set of settings.

`nemo-pivotrl STAGE FILE` reads either of them, so that one file profiles, trains on NeMo-Aligner, and moves to
`backends/megatron` when NeMo-Aligner's models are too old. Nothing here needs NeMo-Aligner.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nemo_pivotrl import config
from nemo_pivotrl.config.nemo_aligner_blocks import (
    ChatBlock,
    LLMDoctorModelBlock,
    LLMDoctorTrainerBlock,
    PivotRLModelBlock,
    PivotRLTrainerBlock,
    read_block,
)
from nemo_pivotrl.core.errors import InputError, Problem, short

CONF = Path(__file__).parents[1] / "integrations/nemo_aligner/conf"
Model = TypeVar("Model", bound=config.TrainedModel)
ALGORITHMS = ("pivotrl", "llmdoctor")
TOP = ("name", "trainer", "exp_manager", "pretrained_checkpoint", "model", "hydra")
"""Sections of a config. Below `trainer` and `model` only our own blocks have a schema: the rest is NeMo's."""


BASE = {"model": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}}
"""What a config leaves to its checkpoint and the files' own interpolations read."""


def is_aligner(tree: Mapping[str, Any]) -> bool:
    """Whether a config tree is NeMo-Aligner's: no section of a recipe is called `trainer` or `model`."""
    return "trainer" in tree or "model" in tree


def register_resolvers() -> None:
    """The interpolations that NeMo-Aligner's launch scripts define for their YAML files."""
    register_resolver("multiply", lambda x, y: x * y)
    register_resolver("int_div", lambda x, y: x // y)
    register_resolver("subtract", lambda x, y: x - y)
    register_resolver("not", lambda x: not x)


def register_resolver(name: str, resolve: Callable[..., Any]) -> None:
    """Define an interpolation, in place of an older one of that name."""
    from omegaconf import OmegaConf

    # omegaconf 2.4 gives register_resolver, which was something older before, what register_new_resolver did
    renamed = "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    register = OmegaConf.register_resolver if renamed else OmegaConf.register_new_resolver
    register(name, resolve, replace=True)


def defaults_of(entries: Sequence[Any], folder: Path) -> list[Path]:
    """The files that a Hydra `defaults:` list means for one that lies in `folder`; ours are found from anywhere.

    `_self_` and optional entries of NeMo's own groups (communication overlap) say nothing that a recipe has.
    """
    names = [e for e in entries if isinstance(e, str) and e != "_self_"]
    ours = [CONF / f"{name}.yaml" for name in names]
    theirs = [folder / (name if (folder / name).exists() else f"{name}.yaml") for name in names]
    return [
        other if other.exists() else own if own.exists() else folder / name
        for name, own, other in zip(names, ours, theirs, strict=True)
    ]


def recipe_of(tree: Mapping[str, Any], file: str) -> config.Recipe:
    """The recipe that a resolved config tree says the same as. Raises InputError with every problem, unknown keys by name."""
    problems = [_unknown(key, TOP, file) for key in tree if key not in TOP]
    trainer, model = _section(tree, "trainer"), _section(tree, "model")
    found = [name for name in ALGORITHMS if name in trainer]
    if len(found) != 1:
        near = [k for k in trainer if difflib.get_close_matches(str(k), ALGORITHMS, 1, 0.7)]
        remedy = f"did you mean `{_nearest(near[0])}`?" if near else "give it a block pivotrl or llmdoctor"
        problems.append(Problem(file, None, "trainer", ", ".join(near or found) or "no algorithm", remedy))
    elif found[0] not in model:
        near = [k for k in model if difflib.get_close_matches(str(k), ALGORITHMS, 1, 0.7)]
        remedy = f"rename it to `{found[0]}`" if near else f"trainer.{found[0]} wants model.{found[0]} beside it"
        problems.append(Problem(file, None, f"model.{found[0]}", near[0] if near else "missing", remedy))
    else:
        try:
            made = (_pivotrl if found[0] == "pivotrl" else _llmdoctor)(tree, trainer, model)
        except InputError as error:
            problems += [dataclasses.replace(p, file=file) for p in error.problems]
    if problems:
        raise InputError(problems)
    return made


def _blocks(
    steps: type[Any], block: type[Any], trainer: Mapping[str, Any], model: Mapping[str, Any], name: str
) -> tuple[Any, Any]:
    """Our two blocks. Raises InputError with the problems of both."""
    made, problems = [], []
    for cls, tree, where in ((steps, trainer, "trainer"), (block, model, "model")):
        try:
            made.append(read_block(cls, tree[name], f"{where}.{name}"))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return made[0], made[1]


def _pivotrl(tree: Mapping[str, Any], trainer: Mapping[str, Any], model: Mapping[str, Any]) -> config.Recipe:
    steps, block = _blocks(PivotRLTrainerBlock, PivotRLModelBlock, trainer, model, "pivotrl")
    generation = config.Generation(
        temperature=block.sampling_params.temperature,
        top_p=block.sampling_params.top_p,
        max_new_tokens=block.length_params.max_length,
    )
    policy = _model(config.Policy, tree, model, block.chat, steps.gradient_clip_val, generation=generation)
    served = {}
    if block.generation == "servers":  # then a recipe's policy is the folder that `serve` starts its servers from
        half = str(_section(tree, "trainer").get("precision", "bf16")).startswith("bf16")
        policy = dataclasses.replace(
            policy, model_name=block.hf_folder, sampler="vllm", dtype="bfloat16" if half else "float32"
        )
        served["vllm"] = block.servers
    rows = block.num_rollout_samples * steps.num_rollouts_per_prompt
    grpo = config.Grpo(
        **_same(config.Grpo, steps),
        num_prompts_per_step=block.num_rollout_samples,
        num_generations_per_prompt=steps.num_rollouts_per_prompt,
        max_num_steps=steps.max_steps,
        max_num_epochs=steps.max_epochs,
        num_minibatches=max(1, rows // int(model.get("global_batch_size", rows))),
        val_period=steps.val_check_interval,
        val_candidates=block.num_val_samples,
        val_generations=1,
        pivots=_data(model) or config.Grpo().pivots,
    )
    return config.Recipe(
        algorithm="pivotrl",
        seed=steps.seed,
        policy=policy,
        grpo=grpo,
        loss_fn=dataclasses.replace(block.loss_fn, reference_policy_kl_penalty=steps.initial_policy_kl_penalty),
        verifier=block.verifier,
        checkpointing=config.Checkpointing(save_period=steps.save_interval or config.Checkpointing().save_period),
        **served,
        **_common(tree, model),
    )


def _llmdoctor(tree: Mapping[str, Any], trainer: Mapping[str, Any], model: Mapping[str, Any]) -> config.Recipe:
    steps, block = _blocks(LLMDoctorTrainerBlock, LLMDoctorModelBlock, trainer, model, "llmdoctor")
    tfpo = config.Tfpo(
        **_same(config.Tfpo, block),
        pairs_per_step=int(model.get("global_batch_size", config.Tfpo().pairs_per_step)),
        max_num_steps=steps.max_steps,
        max_num_epochs=steps.max_epochs,
        val_period=steps.val_check_interval,
    )
    return config.Recipe(
        algorithm="llmdoctor",
        seed=int(model.get("seed", 0)),
        doctor=_model(config.TrainedModel, tree, model, ChatBlock(), steps.gradient_clip_val),
        tfpo=tfpo,
        patient=config.Patient(**_same(config.Patient, block.patient)),
        reward=block.reward,
        checkpointing=config.Checkpointing(save_period=steps.save_interval or config.Checkpointing().save_period),
        **_common(tree, model),
    )


def _model(
    cls: type[Model],
    tree: Mapping[str, Any],
    model: Mapping[str, Any],
    chat: ChatBlock,
    max_grad_norm: float,
    **own: Any,
) -> Model:
    """The model that trains as a `cls`, whose `own` fields are given."""
    optim, usual = _section(model, "optim"), config.Optimizer()
    beta1, beta2 = optim.get("betas") or (usual.beta1, usual.beta2)
    peft, lora = _section(model, "peft"), _section(_section(model, "peft"), "lora_tuning")
    return cls(
        model_name=str(_section(tree, "pretrained_checkpoint").get("restore_from_path") or ""),
        backend="megatron",
        tool_parser=chat.tool_parser,
        template_kwargs=chat.template_kwargs,
        max_total_sequence_length=int(
            _section(model, "data").get("seq_length", config.Policy().max_total_sequence_length)
        ),
        lora=config.Lora(enabled=peft.get("peft_scheme") == "lora", r=int(lora.get("adapter_dim", config.Lora().r))),
        optimizer=config.Optimizer(
            lr=float(optim.get("lr", usual.lr)),
            weight_decay=float(optim.get("weight_decay", usual.weight_decay)),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(optim.get("eps", usual.eps)),
            max_grad_norm=max_grad_norm,
            warmup_steps=int(_section(optim, "sched").get("warmup_steps", usual.warmup_steps)),
        ),
        **own,
    )


def _common(tree: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Sections that both algorithms have: where a run lies, how it is spread, what it logs to."""
    exp = _section(tree, "exp_manager")
    folder = exp.get("explicit_log_dir") or (
        Path(str(exp.get("exp_dir") or "runs")) / str(exp.get("name") or "default")
    )
    megatron = {
        name: model[name]
        for name in (f.name for f in dataclasses.fields(config.Megatron))
        if model.get(name) is not None
    }
    megatron["bf16"] = str(_section(tree, "trainer").get("precision", "bf16")).startswith("bf16")
    optimizer = str(_section(model, "optim").get("name", "distributed_fused_adam"))
    megatron["use_distributed_optimizer"] = optimizer in ("distributed_fused_adam", "mcore_distributed_optim")
    return {
        "run_dir": str(folder),
        "megatron": read_block(config.Megatron, megatron, "model"),
        "logger": config.Logger(
            tensorboard=bool(exp.get("create_tensorboard_logger", True)),
            wandb=bool(exp.get("create_wandb_logger", False)),
            mlflow=bool(exp.get("create_mlflow_logger", False)),
        ),
    }


def _same(cls: type[Any], block: Any) -> dict[str, Any]:
    """The fields of `cls` that the block has under the same name."""
    names = {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(block)}
    return {name: getattr(block, name) for name in names}


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = tree.get(name)
    return value if isinstance(value, Mapping) else {}


def _data(model: Mapping[str, Any]) -> str:
    """The first train file, which NeMo-Aligner looks for in the working directory and a recipe in its run_dir."""
    prefix = _section(model, "data").get("data_prefix")
    train = prefix.get("train") if isinstance(prefix, Mapping) else prefix
    first = train[0] if isinstance(train, Sequence) and train and not isinstance(train, str) else train
    return str(Path(str(first)).absolute()) if first else ""


def _nearest(name: str) -> str:
    return difflib.get_close_matches(name, ALGORITHMS, 1, 0.0)[0]


def _unknown(key: Any, known: Sequence[str], file: str) -> Problem:
    near = difflib.get_close_matches(str(key), known, 1)
    remedy = f"did you mean `{near[0]}`?" if near else f"known sections: {', '.join(known)}"
    return Problem(file, None, str(key), f"unknown key `{short(str(key))}`", remedy)
