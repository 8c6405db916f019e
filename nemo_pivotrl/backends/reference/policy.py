"""The `reference` backend: transformers on one device. The slow truth, and what a laptop runs.

The sampler pads prompts on the left and responses on the right, so that a prompt ends where its responses begin; a prompt runs
once, and its keys and values are repeated for its responses. Scoring and training run the rows as a forest of shared
prefixes (`algorithms/prefix_tree.py`), or with `prefix_sharing: off` padded, each row with its whole prompt.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.core_model_loading import revert_weight_conversion

from nemo_pivotrl.algorithms.prefix_tree import lay_out, packs, token_ratio
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.hf_models import load_model
from nemo_pivotrl.backends.reference.tree import log_probs, prepare, run
from nemo_pivotrl.backends.sampling import Turns, chunks, pad, positions
from nemo_pivotrl.config import Generation, Optimizer, Policy
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import Sample

if TYPE_CHECKING:
    from nemo_pivotrl.backends.base import LossFn

transformers.utils.logging.disable_progress_bar()  # loading and saving are seconds; the stages have bars of their own

STATE = "state.pt"
"""Name of the file in a training state's folder."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class ReferencePolicy:
    """A causal language model that samples, scores and trains. See `backends.base.Backend` for the verbs."""

    in_one_process = True

    section = "policy"
    """The recipe's section that names the model, for errors."""

    def __init__(self, policy: Policy, with_reference: bool = False):
        self.settings = policy
        device = policy.device if policy.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device)
        field = f"{self.section}.model_name"
        self.model = load_model(policy.model_name, field, DTYPES[policy.dtype], self.device)
        self.reference = None
        if policy.lora.enabled:
            self.model = _with_lora(self.model, policy)
        elif with_reference:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.model.eval()
        if policy.prefix_sharing:
            for model in (self.model, self.reference):
                if model is not None:
                    prepare(model, "policy.prefix_sharing")
        self.optimizer: torch.optim.AdamW | None = None
        self.steps = 0

    # ---- sampling ----

    @torch.no_grad()
    def infer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        stop_ids: frozenset[int],
        generation: Generation,
    ) -> list[list[Sample]]:
        """One sample per seed and prompt. Batches are formed by length; a sample depends on its seed and prompt only
        up to floating-point noise of the batch it is in, and exactly when the call is repeated as it was."""
        self.model.eval()
        out: list[list[Sample | None]] = [[None] * len(s) for s in seeds]
        rows = [
            (p, k)
            for p in sorted(range(len(prompts)), key=lambda p: (len(prompts[p]), p))
            for k in range(len(seeds[p]))
        ]
        for chunk in chunks(
            rows, lambda row: len(prompts[row[0]]) + generation.max_new_tokens, generation.batch_tokens
        ):
            samples = self._sample_rows(prompts, seeds, chunk, stop_ids, generation)
            for (p, k), sample in zip(chunk, samples, strict=True):
                out[p][k] = sample
        return [[s for s in group if s is not None] for group in out]

    def _sample_rows(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        rows: Sequence[tuple[int, int]],
        stop_ids: frozenset[int],
        generation: Generation,
    ) -> list[Sample]:
        unique = list(dict.fromkeys(p for p, _ in rows))
        place = {p: i for i, p in enumerate(unique)}
        cache, logits, mask = self._prefill(self.model, [prompts[p] for p in unique], [place[p] for p, _ in rows])
        turns = Turns([seeds[p][k] for p, k in rows], stop_ids, generation)
        while True:
            token, log_prob = turns.draw(logits)
            turns.note(token.tolist(), log_prob.tolist())
            if turns.done:
                return turns.samples()
            staying = turns.leave()
            if staying is not None:
                index = torch.tensor(staying, device=self.device)
                cache.batch_select_indices(index)
                mask, token = mask[index], token[index]
            mask = torch.cat([mask, mask.new_ones(len(token), 1)], 1)
            output = self.model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]

    def _prefill(
        self, model: Any, prompts: Sequence[Sequence[int]], prompt_of: Sequence[int]
    ) -> tuple[DynamicCache, Tensor, Tensor]:
        """Run each prompt once and hand it to its N rows: cache, next-token logits [N, V], attention mask [N, P]."""
        ids, mask = pad(prompts, left=True, device=self.device)
        cache = DynamicCache()
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        rows = torch.tensor(list(prompt_of), device=self.device)
        cache.batch_select_indices(rows)
        return cache, output.logits[rows, -1], mask[rows]

    # ---- log-probabilities ----

    def _log_probs(
        self, model: Any, prompts: Sequence[Sequence[int]], prompt_of: Sequence[int], responses: Sequence[Sequence[int]]
    ) -> Tensor:
        """Log-probability [N, T] (nats, float32 or better) of every response token, 0 on padding."""
        temperature = self.settings.generation.temperature or 1.0
        if self.settings.prefix_sharing:
            forest = lay_out(range(len(responses)), [prompts[p] for p in prompt_of], responses).to(self.device)
            output, of = run(model, forest)
            return log_probs(output.logits[0], of, forest, temperature)
        targets, target_mask = pad(responses, left=False, device=self.device)
        ids, mask = pad([prompts[p] for p in prompt_of], left=True, device=self.device)
        ids, mask = torch.cat([ids, targets], 1), torch.cat([mask, target_mask], 1)
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), logits_to_keep=targets.shape[1] + 1
        )
        logits = output.logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        chosen = logits.gather(2, targets[:, :, None])[:, :, 0] - logits.logsumexp(2)
        return torch.where(target_mask.bool(), chosen, torch.zeros_like(chosen))

    def _micro_batches(self, batch: TokenBatch) -> list[list[int]]:
        """Row numbers of each micro-batch: what shares most together, or without sharing by prompt length."""
        budget = self.settings.train_micro_batch_tokens
        if self.settings.prefix_sharing:
            width = 6.0 * self.model.config.get_text_config().hidden_size
            return packs(batch.prompts_of_rows, batch.responses, budget, pairs_per_token=width)[0]
        length = [len(prompt) for prompt in batch.prompts_of_rows]
        width = max(len(r) for r in batch.responses)
        rows = sorted(range(len(length)), key=lambda n: (length[n], batch.prompt_of[n], n))
        held: list[list[int]] = []
        for row in rows:  # the last is the longest so far
            if not held or (len(held[-1]) + 1) * (length[row] + width) > budget:
                held.append([])
            held[-1].append(row)
        return held

    def _rows(self, model: Any, batch: TokenBatch, rows: list[int]) -> Tensor:
        used = list(dict.fromkeys(batch.prompt_of[n] for n in rows))
        place = {p: i for i, p in enumerate(used)}
        return self._log_probs(
            model,
            [batch.prompts[p] for p in used],
            [place[batch.prompt_of[n]] for n in rows],
            [batch.responses[n] for n in rows],
        )

    @torch.no_grad()
    def get_inference_log_probs(self, batch: TokenBatch, reference: bool = False) -> Tensor:
        """[N, T] log-probabilities (nats) under the current policy, or under the start policy (`reference`)."""
        width = max(len(r) for r in batch.responses)
        out = torch.zeros(len(batch.responses), width)
        for rows in self._micro_batches(batch):
            if reference and self.reference is None:
                with self.model.disable_adapter():
                    found = self._rows(self.model, batch, rows)
            else:
                found = self._rows(self.reference if reference else self.model, batch, rows)
            out[rows, : found.shape[1]] = found.float().cpu()
        return out

    # ---- training ----

    def prepare_for_training(self, optimizer: Optimizer) -> None:
        """Make the optimiser. Dropout stays off: the policy that trains is the policy that sampled."""
        low = [name for name, p in self.model.named_parameters() if p.requires_grad and p.dtype is torch.bfloat16]
        if low:
            raise InputError(
                Problem(
                    "recipe",
                    None,
                    "policy.dtype",
                    "bfloat16",
                    f"{len(low)} trained tensors would round small steps away; train in float32 or with LoRA",
                )
            )
        self.optimizer_settings = optimizer
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )

    def prepare_for_training_step(self) -> None:
        """Zero gradients, as tensors: a step without signal still moves by momentum, as it would with many ranks."""
        for parameter in self._trainable():
            parameter.grad = torch.zeros_like(parameter)

    def get_loss_and_metrics(self, batch: TokenBatch, loss_fn: LossFn, forward_only: bool = False) -> dict[str, float]:
        """Run the batch in micro-batches, accumulate gradients, and return the summed metrics."""
        totals: dict[str, float] = {}
        if not batch.responses:
            return totals
        packs_of_rows = self._micro_batches(batch)
        for rows in packs_of_rows:
            with torch.set_grad_enabled(not forward_only):
                found = self._rows(self.model, batch, rows)
                data = {key: _fit(value[rows], found.shape[1]).to(self.device) for key, value in batch.data.items()}
                loss, metrics = loss_fn(found, data)
            if not forward_only:
                loss.backward()
            for key, value in metrics.items():
                totals[key] = totals.get(key, 0.0) + float(value)
        return totals | {"token_ratio": self._token_ratio(batch, packs_of_rows)}

    def _token_ratio(self, batch: TokenBatch, plan: Sequence[Sequence[int]], keep_last: bool = False) -> float:
        """Tokens of the rows one by one over those run; 1 without sharing."""
        if not self.settings.prefix_sharing:
            return 1.0
        return token_ratio(batch.prompts_of_rows, batch.responses, plan, keep_last)

    def finish_training_step(self) -> dict[str, float]:
        """Clip, step, and return gradient norm and learning rate. Raises FloatingPointError on a non-finite gradient."""
        assert self.optimizer is not None, "prepare_for_training first"
        settings, self.steps = self.optimizer_settings, self.steps + 1
        norm = float(torch.nn.utils.clip_grad_norm_(self._trainable(), settings.max_grad_norm or math.inf))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm {norm} at step {self.steps}: lower policy.optimizer.lr or check the data"
            )
        scale = min(1.0, self.steps / settings.warmup_steps) if settings.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * scale * self.decay
        self.optimizer.step()
        return {"grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}

    decay: float = 1.0
    """Factor on the learning rate, set by a stage that decays it."""

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def save_training_state(self, folder: Path) -> None:
        """Write everything a bit-exact resume needs as `FOLDER/state.pt`. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / STATE).open("wb") as file:
            torch.save(self._state(), file)
            file.flush()
            os.fsync(file.fileno())

    def load_training_state(self, folder: Path) -> None:
        """Undo `save_training_state`. Raises InputError for a damaged file and for another model's."""
        path = folder / STATE
        try:
            self._restore(torch.load(path, weights_only=True))
        except (OSError, EOFError, RuntimeError, LookupError, ValueError, pickle.UnpicklingError) as error:
            remedy = "damaged, or of another model: use the recipe that wrote it, or remove the checkpoint's folder"
            raise InputError(Problem(str(path), None, "checkpoint", short(f"{error!r}"), remedy)) from error

    def _state(self) -> dict[str, Any]:
        """Trained weights, optimiser, torch's random state, step."""
        assert self.optimizer is not None, "prepare_for_training first"
        weights = {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.requires_grad}
        return {
            "weights": weights,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "steps": self.steps,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        assert self.optimizer is not None, "prepare_for_training first"
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.steps = state["steps"]

    def export(self, folder: Path) -> None:
        """Write an ordinary HF checkpoint; adapters are merged into a copy."""
        self._merged().save_pretrained(folder)

    def _merged(self) -> Any:
        """The model; one with adapters as a copy into which they are merged."""
        return copy.deepcopy(self.model).merge_and_unload() if self.settings.lora.enabled else self.model

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of `export`, by its HF name. Tied ones come once."""
        model = self._merged()
        first: dict[tuple[int, torch.Size], str] = {}  # an embedding stands before the head that is tied to it
        state = {
            name: tensor.detach()
            for name, tensor in model.state_dict().items()
            if first.setdefault((tensor.data_ptr(), tensor.shape), name) == name
        }
        yield from revert_weight_conversion(model, state).items()


def _with_lora(model: Any, policy: Policy) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # adapters start the same in every run; B is zero, so the policy is the start policy
    lora = policy.lora
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _fit(value: Tensor, width: int) -> Tensor:
    """Token-wise data [n, T] cut to a micro-batch's width; row-wise data as it is."""
    return value[:, :width] if value.dim() > 1 else value
