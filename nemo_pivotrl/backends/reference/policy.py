"""The `reference` backend: transformers on one device. The slow truth, and what a laptop runs.

The sampler pads prompts on the left; a prompt runs once, and its keys and values are repeated for its responses. Scoring and
training run the rows as a forest of shared prefixes (`algorithms/prefix_tree.py`), or with `prefix_sharing: off` padded, prompts
on the left and responses on the right, each row with its whole prompt.

With a value head the model is a doctor: the head gives log V from the last hidden state at the L+1 states of a response, the
first of which is the prompt's last token. It starts at zero, is kept in float32 or better, and is dropped on export.
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
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from nemo_pivotrl.algorithms.model_outputs import ModelOutputs
from nemo_pivotrl.algorithms.prefix_tree import lay_out, packs, token_ratio
from nemo_pivotrl.backends.base import SequenceScores, TokenBatch
from nemo_pivotrl.backends.batching import Decoder, batches, pad, positions
from nemo_pivotrl.backends.hf_models import load_model
from nemo_pivotrl.backends.megatron.lora_mapping import ADAPTER
from nemo_pivotrl.backends.reference.logits import chunked_log_probs, takes_hidden
from nemo_pivotrl.backends.reference.tree import hidden_of, log_probs, prepare, run
from nemo_pivotrl.backends.sampling import Row, Turns, check_finite, check_log_probs, shares
from nemo_pivotrl.backends.tree_attention import check_form
from nemo_pivotrl.config import Generation, Optimizer, Policy
from nemo_pivotrl.core.errors import InputError, NotFiniteError, Problem, short
from nemo_pivotrl.core.types import FailedSample, Sample

if TYPE_CHECKING:
    from nemo_pivotrl.backends.base import LossFn

transformers.utils.logging.disable_progress_bar()  # loading and saving are seconds; the stages have bars of their own

STATE = "state.pt"
"""Name of the file in a training state's folder."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class ReferencePolicy(SequenceScores):
    """A causal language model that samples, scores and trains. See `backends.base.Backend` for the verbs.

    value_head: give it a head for log V. reference: keep its start weights beside those in training (adapters need none).
    section: the recipe's section that names the model, for errors.
    """

    in_one_process = True

    def __init__(self, policy: Policy, value_head: bool = False, reference: bool = False, section: str = "policy"):
        self.settings, self.section = policy, section
        device = policy.device if policy.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device)
        self.model = load_model(policy.model_name, f"{section}.model_name", DTYPES[policy.dtype], self.device)
        self.chunked = takes_hidden(self.model)
        """Whether scoring needs no logits of all positions at once."""
        self.reference = None
        if policy.lora.enabled:
            self.model = _with_lora(self.model, policy)
        elif reference:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.model.eval()
        if policy.prefix_sharing:
            text, form = self.model.config.get_text_config(), policy.prefix_attention
            width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            check_form(form, self.device.type == "cuda", width, self.model.dtype, f"{section}.prefix_attention")
            for model in (self.model, self.reference):
                if model is not None:
                    prepare(model, f"{section}.prefix_sharing", form)
        self.head = _value_head(self.model, self.device) if value_head else None
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
    ) -> list[list[Sample | FailedSample]]:
        """One sample per seed and prompt. Batches are formed by length; a sample depends on its seed and prompt only
        up to floating-point noise of the batch it is in, and exactly when the call is repeated as it was. One whose
        logits are NaN is drawn again alone, then it is `FailedSample`."""
        self.model.eval()
        found: dict[Row, Sample | FailedSample] = {}
        for rows in shares(prompts, seeds, generation)[0]:
            samples = self._sample_rows(prompts, seeds, rows, stop_ids, generation)
            for row, sample in zip(rows, samples, strict=True):
                lost = isinstance(sample, FailedSample) and len(rows) > 1
                found[row] = self._sample_rows(prompts, seeds, [row], stop_ids, generation)[0] if lost else sample
        return [[found[p, k] for k in range(len(own))] for p, own in enumerate(seeds)]

    def _sample_rows(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        rows: Sequence[Row],
        stop_ids: frozenset[int],
        generation: Generation,
    ) -> list[Sample | FailedSample]:
        decoder = Decoder(self.model, [prompts[p] for p, _ in rows])
        turns = Turns([seeds[p][k] for p, k in rows], stop_ids, generation)
        while True:
            token, log_prob = turns.draw(decoder.logits())
            turns.note(token.tolist(), log_prob.tolist())
            if turns.done:
                return turns.samples()
            decoder.feed(token)
            if (staying := turns.leave()) is not None:
                decoder.select(torch.tensor(staying, device=self.device))

    # ---- log-probabilities and values ----

    def outputs(self, batch: TokenBatch, rows: Sequence[int] | None = None) -> ModelOutputs:
        """What the model says of a micro-batch: the batch's rows at these places, by default all of them."""
        return self._outputs(self.model, batch, range(len(batch.responses)) if rows is None else rows, self.head)

    def _outputs(
        self, model: Any, batch: TokenBatch, rows: Sequence[int], head: torch.nn.Linear | None = None
    ) -> ModelOutputs:
        """What rows and their prompts share runs once, with `prefix_sharing: off` each row with its whole prompt."""
        if head is None and self.chunked:
            return ModelOutputs(self._log_probs_of(model, batch, rows))
        prompts, responses = [batch.prompts[batch.prompt_of[n]] for n in rows], [batch.responses[n] for n in rows]
        temperature = self.settings.generation.temperature or 1.0
        asked = {} if head is None else {"output_hidden_states": True}
        if self.settings.prefix_sharing:
            forest = lay_out(range(len(rows)), prompts, responses, keep_last=head is not None).to(self.device)
            output, of = run(model, forest, self.settings.prefix_attention, **asked)
            found = log_probs(output.logits[0], of, forest, temperature)
            if head is None:
                return ModelOutputs(found)
            values = _values(head, output.hidden_states[-1][0, forest.seen])[forest.states]
            return ModelOutputs(found, values.masked_fill(~_states(forest.mask), 0.0))
        ids, mask, targets, real = self._padded(prompts, responses)
        size = targets.shape[1] + 1
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
            logits_to_keep=size,
            **asked,
        )
        logits = output.logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        chosen = logits.gather(2, targets[:, :, None])[:, :, 0] - logits.logsumexp(2)
        found = chosen.masked_fill(~real, 0.0)
        if head is None:
            return ModelOutputs(found)
        values = _values(head, output.hidden_states[-1][:, -size:])
        return ModelOutputs(found, values.masked_fill(~_states(real), 0.0))

    def _padded(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ids [N, P+T], attention mask, response tokens [N, T], which of these are real): all prompts end at one place."""
        targets, target_mask = pad(responses, left=False, device=self.device)
        ids, mask = pad(prompts, left=True, device=self.device)
        return torch.cat([ids, targets], 1), torch.cat([mask, target_mask], 1), targets, target_mask.bool()

    def _log_probs_of(self, model: Any, batch: TokenBatch, rows: Sequence[int]) -> Tensor:
        """[n, T] log-probabilities by `chunked_log_probs`; 0 where the batch does not ask."""
        model = model.get_base_model() if self.settings.lora.enabled else model  # adapters are within its layers
        prompts, responses = [batch.prompts[batch.prompt_of[n]] for n in rows], [batch.responses[n] for n in rows]
        temperature = self.settings.generation.temperature or 1.0
        if self.settings.prefix_sharing:
            forest = lay_out(range(len(rows)), prompts, responses).to(self.device)
            hidden, of = hidden_of(model, forest, self.settings.prefix_attention)
            return forest.pick(chunked_log_probs(model, hidden, of, forest.goals, temperature))
        ids, mask, targets, real = self._padded(prompts, responses)
        if batch.asked is not None:
            real = real & batch.asked[list(rows), : real.shape[1]].to(self.device)
        output = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        hidden = output.last_hidden_state[:, -targets.shape[1] - 1 : -1][real]
        of = torch.arange(len(hidden), device=self.device)
        found = chunked_log_probs(model, hidden, of, targets[real], temperature)
        return found.new_zeros(targets.shape).masked_scatter(real, found)

    def _reference(self, batch: TokenBatch, rows: Sequence[int]) -> Tensor:
        """[n, T] log-probabilities of the model as it was before training. Raises ValueError where it was not kept."""
        with torch.no_grad():
            if self.reference is not None:
                return self._outputs(self.reference, batch, rows).log_probs
            if not self.settings.lora.enabled:
                raise ValueError("the start model was not kept: load it with reference=True")
            with self.model.disable_adapter():
                return self._outputs(self.model, batch, rows).log_probs

    def _micro_batches(self, batch: TokenBatch, with_states: bool) -> list[list[int]]:
        """Row numbers of each micro-batch: what shares most together, or without sharing by length."""
        budget, units = self.settings.train_micro_batch_tokens, batch.units
        if self.settings.prefix_sharing:
            width = 6.0 * self.model.config.get_text_config().hidden_size
            return packs(
                batch.prompts_of_rows,
                batch.responses,
                budget,
                groups=units,
                keep_last=with_states,
                pairs_per_token=width,
            )[0]
        longest = max(map(len, batch.responses))
        sizes = [max(len(batch.prompts[batch.prompt_of[n]]) for n in unit) + longest for unit in units]
        return [[n for i in held for n in units[i]] for held in batches(sizes, budget, rows=batch.together)]

    def get_inference_log_probs(self, batch: TokenBatch, reference: bool = False) -> Tensor:
        """[N, T] log-probabilities (nats) under the current policy, or under the start policy (`reference`)."""
        return check_log_probs(self._log_probs(batch, reference))

    @torch.no_grad()
    def _log_probs(self, batch: TokenBatch, reference: bool = False) -> Tensor:
        width, dtype = max(len(r) for r in batch.responses), torch.promote_types(self.model.dtype, torch.float32)
        out = torch.zeros(len(batch.responses), width, dtype=dtype)
        for rows in self._micro_batches(batch, with_states=False):
            found = self._reference(batch, rows) if reference else self._outputs(self.model, batch, rows).log_probs
            out[rows, : found.shape[1]] = found.cpu()
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
        torch.manual_seed(0)  # else each process has another random state, and two runs write different checkpoints
        self.optimizer_settings = optimizer
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        if self.head is not None:
            self.optimizer.add_param_group({"params": list(self.head.parameters())})

    def prepare_for_training_step(self) -> None:
        """Zero gradients, as tensors: a step without signal still moves by momentum, as it would with many ranks."""
        for parameter in self._trainable():
            parameter.grad = torch.zeros_like(parameter)

    def get_loss_and_metrics(
        self, batch: TokenBatch, loss_fn: LossFn, forward_only: bool = False, reference: bool = False
    ) -> dict[str, float]:
        """Run the batch in micro-batches, accumulate gradients, and return the summed metrics."""
        totals: dict[str, float] = {}
        if not batch.responses:
            return totals
        plan = self._micro_batches(batch, with_states=self.head is not None)
        for rows in plan:
            start = self._reference(batch, rows) if reference else None
            with torch.set_grad_enabled(not forward_only):
                outputs = self.outputs(batch, rows)._replace(reference=start)
                width = outputs.log_probs.shape[1]
                data = {key: _fit(value[rows], width).to(self.device) for key, value in batch.data.items()}
                loss, metrics = loss_fn(outputs, data)
            if not forward_only:
                loss.backward()
            for key, value in metrics.items():
                totals[key] = totals.get(key, 0.0) + float(value)
        return check_finite(totals | {"token_ratio": self._token_ratio(batch, plan)})

    def _token_ratio(self, batch: TokenBatch, plan: Sequence[Sequence[int]]) -> float:
        """Tokens of the rows one by one over those run; 1 without sharing."""
        if not self.settings.prefix_sharing:
            return 1.0
        return token_ratio(batch.prompts_of_rows, batch.responses, plan, self.head is not None)

    def finish_training_step(self) -> dict[str, float]:
        """Clip, step, and return gradient norm and learning rate. Raises NotFiniteError on a non-finite gradient."""
        assert self.optimizer is not None, "prepare_for_training first"
        settings, self.steps = self.optimizer_settings, self.steps + 1
        norm = float(torch.nn.utils.clip_grad_norm_(self._trainable(), settings.max_grad_norm or math.inf))
        if not math.isfinite(norm):
            remedy = f"lower {self.section}.optimizer.lr or check the data; the last checkpoint is whole"
            raise NotFiniteError(Problem("training", None, f"step {self.steps}", f"gradient norm {norm}", remedy))
        scale = min(1.0, self.steps / settings.warmup_steps) if settings.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * scale * self.decay
        self.optimizer.step()
        return {"grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}

    decay: float = 1.0
    """Factor on the learning rate, set by a stage that decays it."""

    def _trainable(self) -> list[torch.nn.Parameter]:
        own = [p for p in self.model.parameters() if p.requires_grad]
        return own if self.head is None else [*own, *self.head.parameters()]

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
        """Trained weights, optimiser, torch's random state, step, and the value head."""
        assert self.optimizer is not None, "prepare_for_training first"
        weights = {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.requires_grad}
        head = {} if self.head is None else {k: v.detach().cpu() for k, v in self.head.state_dict().items()}
        return {
            "weights": weights,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "steps": self.steps,
            **({"head": head} if head else {}),
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
        if self.head is not None:
            self.head.load_state_dict(state["head"])

    def export(self, folder: Path, trained_only: bool = False) -> None:
        """Write an ordinary HF checkpoint, with adapters merged into it, and adapters alone in its folder `adapter`."""
        if trained_only:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.weights(trained_only)}
            save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
            return
        self._merged().save_pretrained(folder)
        if self.settings.lora.enabled:
            self.model.save_pretrained(folder / ADAPTER)

    def _merged(self) -> Any:
        """The model; one with adapters as a copy into which they are merged."""
        return copy.deepcopy(self.model).merge_and_unload() if self.settings.lora.enabled else self.model

    def weights(self, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of `export`, by its HF name. Tied ones come once."""
        model = self._merged()
        first: dict[tuple[int, torch.Size], str] = {}  # an embedding stands before the head that is tied to it
        state = {
            name: tensor.detach()
            for name, tensor in model.state_dict().items()
            if first.setdefault((tensor.data_ptr(), tensor.shape), name) == name
        }
        if trained_only and self.settings.lora.enabled:
            blocks = self._adapted_blocks()
            state = {name: tensor for name, tensor in state.items() if name.startswith(blocks)}
        yield from revert_weight_conversion(model, state).items()

    def _adapted_blocks(self) -> tuple[str, ...]:
        """Names of the blocks (an attention, an MLP) that have adapters: engines fuse their layers, and load them together."""
        start, end = "base_model.model.", ".lora_A."
        named = {name.removeprefix(start).partition(end)[0] for name, _ in self.model.named_parameters() if end in name}
        return tuple(sorted({name.rpartition(".")[0] + "." for name in named}))


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


def _value_head(model: Any, device: torch.device) -> torch.nn.Linear:
    """A head for log V that says 0."""
    size, dtype = model.config.get_text_config().hidden_size, torch.promote_types(model.dtype, torch.float32)
    head = torch.nn.Linear(size, 1, device=device, dtype=dtype)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def _values(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """log V of hidden states [..., H]."""
    return head(hidden.to(head.weight.dtype))[..., 0]


def _states(tokens: Tensor) -> Tensor:
    """[N, T+1] bool: the states of responses whose tokens are [N, T]."""
    return torch.cat([torch.ones_like(tokens[:, :1]), tokens], 1)


def _fit(value: Tensor, width: int) -> Tensor:
    """Token-wise data [n, T] cut to a micro-batch's width; row-wise data as it is."""
    return value[:, :width] if value.dim() > 1 else value
