"""Weights from a trainer into vLLM, and the proof that they arrived.

Two checks follow every refit, and either stops the run. The fingerprint of all tensors (names, shapes, bits) as the trainer
sent them must be that of what each worker loaded. And the engine's log-probabilities of a probe must be the trainer's: engines
pack weights into layouts of their own, where a fingerprint cannot follow them and a stale copy has gone unnoticed before.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_pivotrl.backends.base import Sampler, TokenBatch, Trainer
from nemo_pivotrl.backends.hf_models import not_finite
from nemo_pivotrl.config import Generation, Optimizer, Policy, Vllm
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import FailedSample, Sample

PROBE_TOKENS = 16
"""Of the probe's prompt, and of its answer."""


# ---- both sides ----


class Fingerprint:
    """Fingerprint of a stream of tensors: equal for equal names, shapes and bits, in any order."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[object, ...]] = {}

    def through(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, noted. Raises ValueError for a name that comes twice."""
        for name, tensor in weights:
            if name in self.seen:
                raise ValueError(f"{name} comes twice")
            self.seen[name] = (str(tensor.dtype), list(tensor.shape), *checksum(tensor))
            yield name, tensor

    @property
    def value(self) -> str:
        return digest(sorted(self.seen.items()))


def checksum(tensor: Tensor) -> tuple[int, int]:
    """Two sums over a tensor's bits, one of them weighted by place; computed where the tensor is, exactly."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(flat) // 8 * 8
    words, rest = flat[:whole].view(torch.int64), flat[whole:].long()
    plain = weighted = 0
    step = 1 << 22  # places exist for so many words at a time
    for start in (*range(0, len(words), step), -1):
        piece = rest if start < 0 else words[start : start + step]
        place = torch.arange(1, len(piece) + 1, device=flat.device) + max(start, 0)
        plain += int(piece.sum())
        weighted += int((piece * place).sum())  # wraps at 64 bits, always alike
    return plain % (1 << 64), weighted % (1 << 64)


def read_folder(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an HF checkpoint folder, one at a time."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise InputError(Problem(str(folder), None, "weights", "no safetensors", "every worker must see this folder"))
    for path in files:
        with safe_open(str(path), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


# ---- the engine's side ----


class Refit:
    """What vLLM adds to each of its workers (`worker_extension_cls`). All engines of a process must have the same."""

    model_runner: Any

    def refit(self, source: Any) -> str:
        """Load HF tensors, from a folder's name or an iterable; the fingerprint of all that was loaded."""
        read, model = Fingerprint(), self.model_runner.get_model()
        weights = read_folder(source) if isinstance(source, str) else source
        kernels = unpack_experts(model)
        self.model_runner.reload_weights(weights_iterator=read.through(weights))
        for method, kernel in kernels:
            method.moe_kernel = method.moe_kernel or kernel  # none was made where no expert came
        repack_tied_head(model)
        return read.value

    def weights_not_finite(self) -> list[tuple[str, str]]:
        """(parameter, NaN or infinity) of every parameter in this worker that holds one."""
        named = self.model_runner.get_model().named_parameters()
        return [(name, what) for name, parameter in named if (what := not_finite(parameter))]

    def guide_records(self, numbers: Sequence[int]) -> list[list[tuple[Any, ...]]]:
        """What doctors in this worker drew for the requests of these numbers; it is forgotten."""
        from nemo_pivotrl.backends.vllm.guidance import RECORDS

        return [[tuple(token) for token in RECORDS.pop(number, [])] for number in numbers]

    def guided_answer(self, number: int) -> dict[str, Any]:
        """The same of one request, as JSON has it (None: no number), and which doctors this worker has."""
        from nemo_pivotrl.backends.vllm.guidance import IDENTITY

        tokens = [
            [None if isinstance(v, float) and not math.isfinite(v) else v for v in token[:-1]]
            for token in self.guide_records([number])[0]
        ]
        return {"identity": IDENTITY, "tokens": tokens}


def unpack_experts(model: Any) -> list[tuple[Any, Any]]:
    """Have vLLM pack experts again when they are reloaded, which it does on CPUs only while they have no kernel; (method, the
    kernel that it had) of each.

    It keeps the kernel for the sake of CUDA graphs that hold its addresses; a CPU has none.
    """
    found = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        kernel, weight = getattr(method, "moe_kernel", None), getattr(module, "w13_weight", None)
        if kernel is not None and weight is not None and weight.device.type == "cpu":
            found.append((method, kernel))
            method.moe_kernel = None
    return found


def repack_tied_head(model: Any) -> None:
    """Make a tied output head anew: on CPUs it is a module with its own packed copy, which a reload leaves as it was."""
    head = getattr(model, "lm_head", None)
    found = [m for n, m in model.named_modules() if n.endswith(("embed_tokens", "embeddings")) and hasattr(m, "weight")]
    if head is None or not found or not hasattr(head, "quant_method"):
        return
    embedding = found[0]
    shared = head is not embedding and head.weight.numel() and head.weight.data_ptr() == embedding.weight.data_ptr()
    if shared or (head is embedding):
        head.quant_method.process_weights_after_loading(head)


# ---- the trainer's side ----


class Refitted:
    """A trainer whose turns come from vLLM: `backends.base.Backend`. After a step the engine is refitted before it samples.

    moved: the trainer does not begin with the weights in `policy.model_name`.
    """

    def __init__(self, trainer: Trainer, sampler: Sampler, policy: Policy, settings: Vllm, moved: bool = False):
        self.trainer, self.sampler, self.policy, self.settings = trainer, sampler, policy, settings
        self.stale = moved
        self.folder = Path(settings.refit_folder or tempfile.mkdtemp(prefix="refit-", dir=_memory()))
        if not settings.refit_folder:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.mismatch = 0.0
        """Nats a token between trainer and engine on the probe, at the latest refit."""
        self.names: frozenset[str] = frozenset()
        self.trained_only = not settings.servers
        """Whether the engine has the weights that training leaves alone. Servers may hold any until they were sent all."""

    def infer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        stop_ids: frozenset[int],
        generation: Generation,
    ) -> list[list[Sample | FailedSample]]:
        """See `backends.base.Sampler`; always from the weights in training. Raises InputError when they did not arrive."""
        if self.stale:
            self.refit()
        return self.sampler.infer(prompts, seeds, stop_ids, generation)

    def refit(self) -> None:
        """Hand over the weights that training changes, to servers at first all of them, and compare both sides."""
        sampler: Any = self.sampler
        sent = Fingerprint()
        if self._passes_directly():
            arrived = sampler.refit(sent.through(self.trainer.weights(self.trained_only)))
        else:
            new = self.folder / "weights"
            shutil.rmtree(new, ignore_errors=True)
            self.trainer.export(new, self.trained_only)
            for _ in sent.through(read_folder(new)):
                pass
            arrived = sampler.refit(str(new))
        wrong = sorted({found for found in arrived if found != sent.value})
        if wrong or not arrived:
            found = f"{', '.join(wrong) or 'no answer'}; the trainer sent {sent.value}"
            raise InputError(Problem("refit", None, "fingerprint of the weights", found, "see vLLM's log; run again"))
        if self.names and self.names != sent.seen.keys():
            differing = ", ".join(sorted(self.names ^ sent.seen.keys())[:4])
            raise InputError(
                Problem("refit", None, "tensors", f"not those of the last refit: {differing}", "run again")
            )
        self._probe()
        if self.trained_only:
            self.names = frozenset(sent.seen)
        # one that was away has not got them: all are sent until none is
        self.trained_only = self.trained_only or len(sampler.well) == len(self.settings.servers)
        self.stale = False

    def _passes_directly(self) -> bool:
        """Whether tensors can be handed over one by one: trainer and engine are in this process, whole."""
        sampler: Any = self.sampler
        return bool(sampler.in_one_process and self.trainer.in_one_process)

    def _probe(self) -> None:
        """Draw a short answer and compare its log-probabilities with the trainer's; both at the policy's temperature."""
        words = range(3, 3 + PROBE_TOKENS)
        generation = Generation(temperature=self.policy.generation.temperature, max_new_tokens=PROBE_TOKENS)
        ((drawn,),) = self.sampler.infer([list(words)], [[1]], frozenset(), generation)
        if isinstance(drawn, FailedSample):
            raise InputError(
                Problem("refit", None, "probe", f"{drawn.kind}: {drawn.detail}", "mend the engine; run again")
            )
        batch = TokenBatch([list(words)], [0], [drawn.token_ids], {})
        own = self.trainer.get_inference_log_probs(batch)[0].tolist()
        self.mismatch = fmean(abs(a - b) for a, b in zip(own, drawn.log_probs, strict=True))
        if not self.mismatch <= self.settings.refit_tolerance or not math.isfinite(self.mismatch):
            found = f"{self.mismatch:.4f} nats a token from the trainer's"
            remedy = (
                "the engine does not compute with the weights it was given; if its precision alone is coarser than "
                f"vllm.refit_tolerance={self.settings.refit_tolerance}, raise that"
            )
            raise InputError(Problem("refit", None, "log-probabilities of the probe", found, remedy))

    # ---- the trainer's verbs ----

    def prepare_for_training(self, optimizer: Optimizer) -> None:
        self.trainer.prepare_for_training(optimizer)

    def prepare_for_training_step(self) -> None:
        self.trainer.prepare_for_training_step()

    def get_loss_and_metrics(
        self, batch: TokenBatch, loss_fn: Any, forward_only: bool = False, reference: bool = False
    ) -> dict[str, float]:
        return self.trainer.get_loss_and_metrics(batch, loss_fn, forward_only, reference)

    def finish_training_step(self) -> dict[str, float]:
        self.stale = True
        return self.trainer.finish_training_step()

    def get_inference_log_probs(self, batch: TokenBatch, reference: bool = False) -> Tensor:
        return self.trainer.get_inference_log_probs(batch, reference)

    def save_training_state(self, folder: Path) -> None:
        self.trainer.save_training_state(folder)

    def load_training_state(self, folder: Path) -> None:
        self.stale = True
        self.trainer.load_training_state(folder)

    def export(self, folder: Path, trained_only: bool = False) -> None:
        self.trainer.export(folder, trained_only)

    def weights(self, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        return self.trainer.weights(trained_only)

    @property
    def in_one_process(self) -> bool:
        return self.trainer.in_one_process


def _memory() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
