"""vLLM against the reference backend, and what a doctor inside the engine costs: python benchmarks/vllm_speed.py

Random models, one thread, everything in one process and in turns, so that only ratios are worth reading: medians over rounds,
with the lowest and the highest. `uncached` is a doctor that reads the whole sequence again for every token. The `loop` is how
GenARM's published code decodes: both models through transformers with their caches, one prompt at a time.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import vllm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nemo_pivotrl.backends.reference.policy import ReferencePolicy
from nemo_pivotrl.backends.vllm import guidance as vllm_doctors
from nemo_pivotrl.backends.vllm.decode import GuidedEngine
from nemo_pivotrl.backends.vllm.engine import Engine
from nemo_pivotrl.backends.vllm.row_stream import RowStream
from nemo_pivotrl.config import Decode, Doctor, Generation, Patient, Policy, Vllm
from nemo_pivotrl.demo import tiny_models as tiny

ROWS = 32
PROMPT = 32


class Uncached(RowStream):
    """A stream without a cache, for comparison."""

    def logits(self, keys: Sequence[Any]) -> torch.Tensor:
        if not hasattr(self, "whole"):
            self.whole: dict[Any, list[int]] = {}
        for key in keys:
            self.whole[key] = self.whole.get(key, []) + self.waiting[key]
            self.waiting[key] = []
        width = max(len(self.whole[key]) for key in keys)
        ids = torch.tensor([[0] * (width - len(self.whole[key])) + self.whole[key] for key in keys])
        mask = torch.tensor([[0] * (width - len(self.whole[key])) + [1] * len(self.whole[key]) for key in keys])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            found = self.model(
                input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1
            )
        return found.logits[:, -1]


def saved(folder: Path, tokenizer: Any, hidden: int, layers: int, seed: int) -> str:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2048,  # wider than the tokenizer, whose texts are few
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        head_dim=64,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def ratio(top: Sequence[float], bottom: Sequence[float]) -> str:
    each = [a / b for a, b in zip(top, bottom, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}, {max(each):.2f})"


def rollouts(folder: str, rounds: int) -> None:
    """16 trajectories of 4 states each, every state a prefix of the next, 8 samples of 32 tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for _ in range(16):
        ids = torch.randint(8, 250, (256,), generator=generator).tolist()
        prompts += [ids[:n] for n in (64, 128, 192, 256)]
    seeds = [[100 * p + k for k in range(8)] for p in range(len(prompts))]
    generation = Generation(max_new_tokens=32)
    policy = Policy(model_name=folder, sampler="vllm", max_total_sequence_length=512, device="cpu")
    engine, reference = Engine(policy, Vllm(max_num_seqs=128)), ReferencePolicy(policy)
    count = sum(map(len, seeds))
    found: dict[str, list[float]] = {"vllm": [], "reference": []}

    def run(sampler: Any) -> Callable[[], object]:
        return lambda: sampler.infer(prompts, seeds, frozenset(), generation)

    run(engine)()
    for _ in range(rounds):
        engine.llm.reset_prefix_cache()
        found["vllm"].append(count / seconds(run(engine)))
        found["reference"].append(count / seconds(run(reference)))
    engine.close()
    for name, values in found.items():
        print(f"rollouts/s, {name:<10} {statistics.median(values):8.1f}")
    print(f"vllm / reference      {ratio(found['vllm'], found['reference'])}\n", flush=True)


def guided(patient: str, doctor: str, tokenizer: Any, lengths: Sequence[int], rounds: int) -> None:
    """Tokens a second of 32 sequences, by what decodes them."""
    settings = Vllm(max_num_seqs=ROWS)
    decode = Decode(doctors={"d": Doctor(path=doctor)})
    engine = GuidedEngine(
        Patient(model_name=patient, max_total_sequence_length=1024), decode, settings, tokenizer, frozenset()
    )
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (patient, doctor)]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(8, 250, (PROMPT,), generator=generator).tolist() for _ in range(ROWS)]
    made = RowStream

    def answers(length: int, weight: float | None, kind: type[RowStream]) -> Callable[[], object]:
        extra = {"guidance.alpha": 1.0} if weight is None else {"guidance.beta.d": weight}
        asked = vllm.SamplingParams(max_tokens=length, seed=1, ignore_eos=True, detokenize=False, extra_args=extra)

        def work() -> None:
            vllm_doctors.RowStream = kind  # type: ignore[misc]
            inside = _guidance(engine)
            inside.streams.clear()
            engine.engine._generate(prompts, [asked] * ROWS)
            vllm_doctors.RowStream = made  # type: ignore[misc]

        return work

    answers(8, 1.0, made)()
    for length in lengths:
        ways = {
            "patient alone": answers(length, None, made),
            "doctor": answers(length, 1.0, made),
            "doctor, uncached": answers(length, 1.0, Uncached),
        }
        speed: dict[str, list[float]] = {name: [] for name in (*ways, "loop")}
        for _ in range(rounds):
            for name, work in ways.items():
                speed[name].append(ROWS * length / seconds(work))
            few = prompts[:4]
            speed["loop"].append(len(few) * length / seconds(lambda few=few, length=length: loop(models, few, length)))
        print(f"{length} new tokens")
        for name, values in speed.items():
            print(f"  tokens/s, {name:<17} {statistics.median(values):8.1f}")
        print(f"  doctor / patient alone     {ratio(speed['doctor'], speed['patient alone'])}")
        print(f"  uncached / patient alone   {ratio(speed['doctor, uncached'], speed['patient alone'])}")
        print(f"  doctor / uncached          {ratio(speed['doctor'], speed['doctor, uncached'])}")
        print(f"  doctor / loop              {ratio(speed['doctor'], speed['loop'])}\n", flush=True)
    engine.engine.close()


_made: list[Any] = []


def _guidance(engine: GuidedEngine) -> Any:
    return _made[-1]


@torch.no_grad()
def loop(models: Sequence[Any], prompts: Sequence[Sequence[int]], length: int) -> None:
    """Both models, their own caches, one prompt at a time."""
    for prompt in prompts:
        ids, caches = torch.tensor([list(prompt)]), [None, None]
        for _ in range(length):
            logs = []
            for i, model in enumerate(models):
                out = model(input_ids=ids, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
                caches[i] = out.past_key_values
                logs.append(out.logits[:, -1].log_softmax(-1))
            ids = torch.multinomial((logs[0] + logs[1]).softmax(-1), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = vllm_doctors.Guidance.__init__

    def noted(self: Any, *arguments: Any, **named: Any) -> None:
        _made.append(self)
        real(self, *arguments, **named)

    vllm_doctors.Guidance.__init__ = noted  # type: ignore[method-assign]
    tokenizer = tiny.make_tokenizer([f"word{i} and {i * i}" for i in range(2000)], 2048)
    with tempfile.TemporaryDirectory() as folder:
        patient = saved(Path(folder, "patient"), tokenizer, options.hidden, options.layers, 1)
        doctor = saved(Path(folder, "doctor"), tokenizer, 128, 2, 2)
        count = [
            sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(f).parameters()) for f in (patient, doctor)
        ]
        print(
            f"patient {count[0] / 1e6:.1f} M, doctor {count[1] / 1e6:.2f} M parameters, float32, {options.rounds} rounds\n"
        )
        rollouts(patient, options.rounds)
        guided(patient, doctor, tokenizer, options.lengths, options.rounds)


if __name__ == "__main__":
    main()
