"""What a rank of a test does, in as many processes as the test asks for: a function a job (`rank.py`)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny_aligner
import tiny_policy
import torch


def pivotrl_model(
    folder: Path,
    overrides: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
    architecture: Any = tiny_aligner.ARCHITECTURE,
) -> tuple[Any, Any, Any, Any]:
    """(config, Lightning trainer, state, model) of a tiny policy, in its distributed place but not yet set up."""
    from nemo_pivotrl.integrations.nemo_aligner import launch
    from nemo_pivotrl.integrations.nemo_aligner.actor import MegatronGPTPivotRLActorModel

    cfg = tiny_aligner.config("pivotrl", folder, PIVOTRL | overrides)
    lightning, state = launch.lightning(cfg, "pivotrl")
    model = MegatronGPTPivotRLActorModel(cfg.model, lightning)
    launch.join(cfg, lightning, model)
    tiny_aligner.load_weights(model, weights, architecture)
    return cfg, lightning, state, model


PIVOTRL: dict[str, Any] = {
    "trainer.pivotrl.max_steps": 2,
    "trainer.pivotrl.max_epochs": 4,
    "trainer.pivotrl.val_check_interval": 0,
    "trainer.pivotrl.save_interval": 0,
    "trainer.pivotrl.num_rollouts_per_prompt": 4,
    "trainer.pivotrl.gradient_clip_val": 10.0,
    "model.pivotrl.rollout_micro_batch_size": 2,
    "model.pivotrl.num_rollout_samples": 4,
    "model.pivotrl.num_val_samples": 4,
    "model.pivotrl.length_params.max_length": tiny_aligner.MAX_LENGTH,
    "model.pivotrl.offload_adam_states": False,
    "model.micro_batch_size": 4,
    "model.global_batch_size": 16,
}


class FirstLetter:
    """Reward 1 for a turn that begins with one of half the letters: even a random policy has some of it."""

    name, version, concurrency, asks_judge = "first_letter", "1", 1, False

    def __init__(self, fails_on: str = "") -> None:
        self.fails_on = fails_on

    def verify(self, case: Any, actual: Any) -> Any:
        from nemo_pivotrl.core.types import Verdict
        from nemo_pivotrl.verifiers.base import VerifierFault

        text = actual.content.strip().lower()
        if self.fails_on and text[:1] in self.fails_on:
            raise VerifierFault("test", "no verdict")
        return Verdict(float(text[:1] in "abcdefghijklm"), "letter")


def make_trainer(cfg: Any, lightning: Any, state: Any, model: Any, verifier: Any = None) -> tuple[Any, Any]:
    """Our trainer with a verifier that has signal, and the logger it writes to."""
    from nemo_pivotrl.integrations.nemo_aligner import train_gpt_pivotrl

    trainer = train_gpt_pivotrl.make_trainer(cfg, lightning, model, state)
    trainer.rm.verifier = verifier or FirstLetter()
    trainer.logger = tiny_aligner.JsonLines()
    return trainer, trainer.logger


SAVING: dict[str, Any] = {
    "exp_manager.create_checkpoint_callback": True,
    "exp_manager.resume_if_exists": True,
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": False,
}


def die_after_saving(trainer: Any, report: Any) -> None:
    """End the process, with no farewell to anybody, as soon as the first checkpoint is written."""
    save = trainer.save

    def save_and_die(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        report()
        os._exit(0)

    trainer.save = save_and_die


def write(folder: Path, found: dict[str, Any]) -> None:
    """What this rank found, for the test."""
    (folder / f"out-{os.environ['RANK']}.json").write_text(json.dumps(found, default=float))


def resumable(folder: Path, die: bool, **overrides: Any) -> dict[str, Any]:
    """PivotRL with checkpoints in FOLDER/logs, from the last of them if there is one."""
    weights = tiny_aligner.talkative_weights(folder)
    cfg, lightning, state, model = pivotrl_model(folder, SAVING | overrides, weights)
    trainer, logger = make_trainer(cfg, lightning, state, model)
    first = trainer.step
    if die:
        die_after_saving(trainer, lambda: write(folder, {"first": first, "rows": logger.rows}))
    trainer.fit()
    trainer.rm.close()
    return {"first": first, "rows": logger.rows, "state": trainer.state_dict()}


def resumable_doctor(folder: Path, die: bool, **overrides: Any) -> dict[str, Any]:
    """LLMdoctor with checkpoints in FOLDER/logs, from the last of them if there is one."""
    from nemo_pivotrl.integrations.nemo_aligner import train_gpt_llmdoctor

    cfg, lightning, state, model = doctor_model(folder, SAVING | overrides, head=False)
    trainer = train_gpt_llmdoctor.make_trainer(cfg, lightning, model, state)
    trainer.logger = logger = tiny_aligner.JsonLines()
    first = trainer.step
    if die:
        die_after_saving(trainer, lambda: write(folder, {"first": first, "rows": logger.rows}))
    trainer.fit()
    return {"first": first, "rows": logger.rows, "state": trainer.state_dict()}


def save_nemo(folder: Path, golden: bool = False) -> dict[str, Any]:
    """Write the talkative policy, or the one of `golden.json`, as FOLDER/start.nemo."""
    from nemo_pivotrl.integrations.nemo_aligner import launch

    weights = None if golden else tiny_aligner.talkative_weights(folder)
    cfg, lightning, _, model = pivotrl_model(folder, {}, weights)
    launch.set_up(cfg, lightning, model, list(range(64)))
    model.save_to(str(folder / "start.nemo"))
    return {}


def script(folder: Path, name: str, arguments: list[str]) -> dict[str, Any]:
    """A launch script with a command line, and what its trainer logged."""
    import importlib

    module = importlib.import_module(f"nemo_pivotrl.integrations.nemo_aligner.{name}")
    logger, made = tiny_aligner.JsonLines(), module.make_trainer
    trainers: list[Any] = []

    def watched(*args: Any) -> Any:
        trainers.append(made(*args))
        trainers[0].logger = logger
        if hasattr(trainers[0], "rm"):
            trainers[0].rm.verifier = FirstLetter()
        return trainers[0]

    module.make_trainer = watched
    sys.argv = [f"{name}.py", *arguments]
    module.main()
    first = next(p for n, p in trainers[0].model.model.named_parameters() if n == "decoder.final_layernorm.weight")
    return {"rows": logger.rows, "state": trainers[0].state_dict(), "norm": first.tolist()}


def extract(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Stage 1 by its own command line."""
    from nemo_pivotrl.integrations.nemo_aligner import extract_token_rewards

    sys.argv = ["extract_token_rewards.py", *arguments]
    extract_token_rewards.main()
    return {}


def golden_batch(model: Any, kl: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`tiny_policy`'s batch in NeMo-Aligner's keys, and the log-probabilities of its response tokens."""
    rows = [
        tiny_policy.PROMPTS[p] + response
        for p, response in zip(tiny_policy.PROMPT_OF, tiny_policy.RESPONSES, strict=True)
    ]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.zeros(len(rows), width - 1)
    for i, (p, response) in enumerate(zip(tiny_policy.PROMPT_OF, tiny_policy.RESPONSES, strict=True)):
        start = len(tiny_policy.PROMPTS[p]) - 1
        mask[i, start : start + len(response)] = 1.0
    log_probs = model.get_inference_log_probs(tokens, forward_micro_batch_size=2)
    batch = {
        "response_tokens": tokens,
        "prev_logprobs": log_probs + torch.tensor(tiny_policy.OLD_SHIFT)[:, None],
        "advantages": torch.tensor(tiny_policy.ADVANTAGES),
        "mask": mask,
        "valid": torch.ones(len(rows)),
    }
    if kl:
        batch["init_logprobs"] = log_probs + tiny_policy.REF_SHIFT
    return batch, log_probs


def loss(folder: Path, tp: int, pp: int, dp: int, mbs: int, kl: bool = False) -> dict[str, Any]:
    """Log-probabilities, loss and gradient norm of the golden batch."""
    from nemo_aligner.utils import parallel_state
    from nemo_aligner.utils.train_utils import clip_gradients

    from nemo_pivotrl.integrations.nemo_aligner import launch

    rows = len(tiny_policy.RESPONSES)
    settings = {
        "model.micro_batch_size": mbs,
        "model.global_batch_size": rows,
        "model.pivotrl.loss_fn.ratio_clip_max": tiny_policy.SETTINGS["ratio_clip_max"],
        "model.pivotrl.loss_fn.ratio_clip_c": tiny_policy.SETTINGS["ratio_clip_c"],
        "trainer.pivotrl.initial_policy_kl_penalty": tiny_policy.KL_BETA if kl else 0.0,
    }
    cfg, lightning, _, model = pivotrl_model(folder, tiny_aligner.layout(tp, pp, dp) | settings)
    parts = launch.set_up(cfg, lightning, model, list(range(64)))
    model.prepare_for_training()
    whole, log_probs = golden_batch(model, kl)
    rank = parallel_state.get_data_parallel_rank()
    local = {key: value[rank * rows // dp : (rank + 1) * rows // dp] for key, value in whole.items()}
    parts["optimizer"].zero_grad()
    model.prepare_for_training_step()
    loss, metrics = model.get_loss_and_metrics(local, forward_only=False)
    model.finish_training_step()
    norm = float(clip_gradients(model, 1e9))
    found = [row[mask.bool()].tolist() for row, mask in zip(log_probs, whole["mask"], strict=True)]
    return {"log_probs": found, "loss": loss, "metrics": metrics, "grad_norm": norm}


def train(folder: Path, tp: int = 1, pp: int = 1, dp: int = 1, fails_on: str = "", **overrides: Any) -> dict[str, Any]:
    """A few steps of PivotRL, with what each rank saw."""
    weights = tiny_aligner.talkative_weights(folder)
    cfg, lightning, state, model = pivotrl_model(folder, tiny_aligner.layout(tp, pp, dp) | overrides, weights)
    trainer, logger = make_trainer(cfg, lightning, state, model, FirstLetter(fails_on))
    drawn: list[str] = []
    tokens: list[Any] = []
    collate, infer = trainer.collate_fn, model.infer

    def watched_collate(batch: Any) -> Any:
        drawn.extend(item["pivot"].candidate_id for item in batch)
        return collate(batch)

    def watched_infer(batch: Any) -> Any:
        found = infer(batch)
        tokens.append(found["response_tokens"].tolist())
        return found

    trainer.collate_fn, model.infer = watched_collate, watched_infer
    trainer.fit()
    trainer.rm.close()
    return {"rows": logger.rows, "drawn": drawn, "tokens": tokens, "state": trainer.state_dict()}


def served_model(folder: Path, settings: dict[str, Any], tp: int, pp: int, dp: int) -> tuple[Any, Any, Any, Any]:
    """`pivotrl_model` in a shape that vLLM takes on CPUs."""
    import tiny_served

    overrides = tiny_served.MODEL | tiny_aligner.layout(tp, pp, dp) | settings
    return pivotrl_model(folder, overrides, tiny_served.weights(folder), tiny_served.ARCHITECTURE)


def export(folder: Path, hf_folder: str, tp: int, pp: int, dp: int, multiple: int, rename: bool) -> dict[str, Any]:
    """The policy as an HF folder FOLDER/there; `rename`: with Transformer Engine's names for the norms."""
    from nemo_pivotrl.core.errors import InputError
    from nemo_pivotrl.integrations.nemo_aligner import exported
    from nemo_pivotrl.sizing.architecture import read_architecture

    _, _, _, model = served_model(folder, {"model.make_vocab_size_divisible_by": multiple}, tp, pp, dp)
    if rename:
        for layer in model.model.decoder.layers:
            layer.self_attention.linear_qkv.layer_norm_weight = layer.input_layernorm.weight
            layer.mlp.linear_fc1.layer_norm_weight = layer.pre_mlp_layernorm.weight
            layer.input_layernorm = layer.pre_mlp_layernorm = torch.nn.Identity()
    try:
        for _ in range(2):  # the second takes the first one's place
            exported.export(model.model, read_architecture(hf_folder), Path(hf_folder), folder / "there")
    except InputError as error:
        return {"error": str(error)}
    return {"error": ""}


PROBED = ([5, 9, 14, 30], [61, 100, 7])


def train_served(
    folder: Path,
    hf_folder: str,
    url: str,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    lose: bool = False,
    kill: int = 0,
    servers: dict[str, Any] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """A few steps of PivotRL on served turns. `lose`: the pool loses each call's first turn. `kill`: the process group of
    the server, which dies in the middle of the second step. Whatever InputError ends it is in `error`."""
    import signal

    import tiny_served

    from nemo_pivotrl.core.errors import InputError
    from nemo_pivotrl.core.types import FailedSample

    settings = tiny_served.settings(hf_folder, url, **(servers or {})) | overrides
    cfg, lightning, state, model = served_model(folder, settings, tp, pp, dp)
    trainer, logger = make_trainer(cfg, lightning, state, model)
    seen: dict[str, list[Any]] = {"tokens": [], "lost": [], "theirs": [], "own": [], "mismatch": [], "rewards": []}
    refit, infer, judged = model.served.refit, model.infer, trainer.compute_rollout_metrics

    def watched_refit(actor: Any) -> None:
        refit(actor)
        pool, real = actor.served.pool, getattr(actor.served.pool, "infer", None)
        if pool is not None:
            seen["theirs"].append(pool.log_probs([PROBED])[0].tolist())
            if lose and len(seen["theirs"]) == 1:
                turns = lambda *a: [[FailedSample("test", "lost")] if n == 0 else f for n, f in enumerate(real(*a))]  # noqa: E731
                pool.infer = lambda *a: turns(*a) if len(a[0]) > 1 else real(*a)  # not the probe
        tokens = torch.tensor([[*PROBED[0], *PROBED[1]]])
        own = actor.get_inference_log_probs(tokens, forward_micro_batch_size=1)[0, len(PROBED[0]) - 1 :]
        seen["own"].append(own.tolist())
        seen["mismatch"].append(actor.served.mismatch)
        torch.distributed.barrier()  # no rank goes on, and kills the server, while another asks it here

    def watched_infer(batch: Any) -> Any:
        if kill and trainer.step == 1 and os.environ["RANK"] == "0" and len(seen["tokens"]) % 4 == 1:
            os.killpg(kill, signal.SIGKILL)
        found = infer(batch)
        seen["tokens"].append(found["response_tokens"].tolist())
        seen["lost"].append(found["lost"].tolist())
        return found

    def watched_judged(rollouts: Any) -> Any:
        seen["rewards"].append(rollouts["rewards"].tolist())
        return judged(rollouts)

    model.served.refit, model.infer, trainer.compute_rollout_metrics = watched_refit, watched_infer, watched_judged
    error = ""
    try:
        trainer.fit()
    except InputError as caught:
        error = str(caught)
    trainer.rm.close()
    return {"rows": logger.rows, "error": error, "state": trainer.state_dict(), **seen}


def refusals(folder: Path, hf_folder: str, cases: list[dict[str, Any]], without_httpx: bool) -> dict[str, Any]:
    """What a served policy says to each of these overrides before anything is asked of a server."""
    import tiny_served

    from nemo_pivotrl.config.nemo_aligner_blocks import PivotRLModelBlock, read_block
    from nemo_pivotrl.core.errors import InputError
    from nemo_pivotrl.integrations.nemo_aligner.served import ServedTurns

    if without_httpx:
        sys.modules["httpx"] = None  # type: ignore[assignment]
    said = []
    for case in cases:
        settings = tiny_served.MODEL | tiny_served.settings(hf_folder, "http://127.0.0.1:9") | case
        cfg = tiny_aligner.config("pivotrl", folder, PIVOTRL | settings)
        try:
            ServedTurns(read_block(PivotRLModelBlock, cfg.model.pivotrl, "model.pivotrl"), cfg.model)
            said.append("")
        except InputError as error:
            said.append(str(error))
    return {"said": said}


def train_world(folder: Path, warmup: int, steps: int, seed: int = 1) -> dict[str, Any]:
    """PivotRL on turns of the embedded world under its own verifier, from a policy that `warmup` steps of SFT made."""
    import tiny_world

    from nemo_pivotrl.integrations.nemo_aligner import train_gpt_pivotrl

    home = folder / "world"
    tiny_world.write_world(home, pivots=4)
    settings = {
        "trainer.pivotrl.max_steps": steps,
        "trainer.pivotrl.max_epochs": steps,
        "trainer.pivotrl.num_rollouts_per_prompt": 12,
        "trainer.pivotrl.val_check_interval": steps,
        "trainer.pivotrl.save_interval": steps,
        "model.pivotrl.rollout_micro_batch_size": 4,
        "model.pivotrl.num_rollout_samples": 4,
        "model.pivotrl.num_val_samples": 4,
        "model.pivotrl.length_params.max_length": tiny_world.MAX_LENGTH,
        "model.micro_batch_size": 24,
        "model.global_batch_size": 24,
        "model.data.seq_length": 512,
        "trainer.pivotrl.gradient_clip_val": 0.35,
    }
    cfg = tiny_aligner.config("pivotrl", home, PIVOTRL | settings | tiny_world.MODEL | {"model.seed": seed})
    from nemo_pivotrl.integrations.nemo_aligner import launch
    from nemo_pivotrl.integrations.nemo_aligner.actor import MegatronGPTPivotRLActorModel

    lightning, state = launch.lightning(cfg, "pivotrl")
    torch.manual_seed(seed)
    model = MegatronGPTPivotRLActorModel(cfg.model, lightning)
    trainer = train_gpt_pivotrl.make_trainer(cfg, lightning, model, state)
    trainer.logger = logger = tiny_aligner.JsonLines()
    tiny_world.imitate(trainer, home, warmup, copies=6)
    trainer.fit()
    trainer.rm.close()
    return {"rows": logger.rows}


DOCTOR: dict[str, Any] = {
    "trainer.llmdoctor.max_steps": 4,
    "trainer.llmdoctor.max_epochs": 9,
    "trainer.llmdoctor.val_check_interval": 2,
    "trainer.llmdoctor.save_interval": 2,
    "trainer.llmdoctor.gradient_clip_val": 10.0,
    "model.micro_batch_size": 2,
    "model.global_batch_size": 4,
    "model.optim": {"name": "sgd", "lr": 0.02, "weight_decay": 0.0},
} | {f"model.llmdoctor.{key}": value for key, value in tiny_policy.TFPO.items()}


def doctor_model(folder: Path, overrides: dict[str, Any], head: bool) -> tuple[Any, Any, Any, Any]:
    """(config, Lightning trainer, state, model) of a tiny doctor; its head at zero, or at `tiny_policy.head`."""
    from nemo_pivotrl.integrations.nemo_aligner import launch
    from nemo_pivotrl.integrations.nemo_aligner.doctor_model import MegatronGPTLLMDoctorModel

    cfg = tiny_aligner.config("llmdoctor", folder, DOCTOR | overrides)
    lightning, state = launch.lightning(cfg, "llmdoctor")
    model = MegatronGPTLLMDoctorModel(cfg.model, lightning)
    launch.join(cfg, lightning, model)
    tiny_aligner.load_weights(model)
    parameters = dict(model.model.named_parameters())
    if head and "doctor_head.weight" in parameters:
        with torch.no_grad():
            for name, value in zip(("weight", "bias"), tiny_policy.head(), strict=True):
                parameters[f"doctor_head.{name}"].copy_(value)
    return cfg, lightning, state, model


def doctor_loss(folder: Path, tp: int, pp: int, dp: int, mbs: int, anchor: str) -> dict[str, Any]:
    """TFPO's metrics and gradient norm on the pairs of `tiny_policy`."""
    from nemo_aligner.utils import parallel_state
    from nemo_aligner.utils.train_utils import clip_gradients
    from nemo_aligner.utils.utils import retrieve_model_state_dict_in_cpu

    from nemo_pivotrl.integrations.nemo_aligner import launch
    from nemo_pivotrl.integrations.nemo_aligner.doctor_data import collate_pairs

    settings = {"model.micro_batch_size": mbs, "model.llmdoctor.anchor": anchor}
    cfg, lightning, _, model = doctor_model(folder, tiny_aligner.layout(tp, pp, dp) | settings, head=True)
    parts = launch.set_up(cfg, lightning, model, list(range(64)))
    model.ref_policy_state_dict = retrieve_model_state_dict_in_cpu(model, megatron_amp_O2=False)
    rank, count = parallel_state.get_data_parallel_rank(), len(tiny_policy.PAIRS) // dp
    batch = collate_pairs(tiny_policy.PAIRS[rank * count : (rank + 1) * count], 0, 16)
    if anchor == "reference":
        chosen, rejected = model.get_ref_policy_logprobs(batch).chunk(2)
        batch |= {"ref_policy_log_probs_chosen": chosen, "ref_policy_log_probs_rejected": rejected}
    parts["optimizer"].zero_grad()
    model.prepare_for_training_step()
    _, metrics = model.get_loss_and_metrics(batch, forward_only=False)
    model.finish_training_step()
    return {"metrics": metrics, "grad_norm": float(clip_gradients(model, 1e9))}


def train_doctor(folder: Path, tp: int = 1, pp: int = 1, dp: int = 1, **overrides: Any) -> dict[str, Any]:
    """A few steps of LLMdoctor's second stage."""
    from nemo_pivotrl.integrations.nemo_aligner import train_gpt_llmdoctor

    cfg, lightning, state, model = doctor_model(folder, tiny_aligner.layout(tp, pp, dp) | overrides, head=False)
    trainer = train_gpt_llmdoctor.make_trainer(cfg, lightning, model, state)
    trainer.logger = tiny_aligner.JsonLines()
    drawn: list[str] = []
    collate = trainer.collate_fn

    def watched(batch: Any, **kwargs: Any) -> Any:
        drawn.extend(f"{row['split']} {row['preference_id']}" for row in batch)
        return collate(batch, **kwargs)

    trainer.collate_fn = watched
    trainer.fit()
    return {"rows": trainer.logger.rows, "drawn": drawn, "state": trainer.state_dict()}
