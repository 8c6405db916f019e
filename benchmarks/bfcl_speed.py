"""Tokens a processor second on BFCL's prompts, to size benchmarks/bfcl.py.

    python benchmarks/bfcl_speed.py MODEL TRAJECTORIES [--vllm DTYPE]

Four prompts with eight samples of at most 32 tokens each, one thread: the reference sampler with and without grouped heads
(`backends/decode_attention.py`), in float32 and bfloat16, and a training pass with LoRA over the samples, prefixes shared; with
--vllm vLLM in their place. Processor seconds, since other work may run beside it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import resource
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bfcl import RECIPE

from nemo_pivotrl.algorithms import pivotrl
from nemo_pivotrl.backends import decode_attention
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.components.rollout import load_chat
from nemo_pivotrl.config.load import load_recipe

PROMPTS, SAMPLES, TOKENS = 4, 8, 32


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what `work` returns."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    found = work()
    return spent() - before, found


def reference(recipe: Any, chat: Any, prompts: list[list[int]], seeds: list[list[int]]) -> None:
    from nemo_pivotrl.backends.reference.policy import ReferencePolicy

    generation = recipe.policy.generation
    for dtype in ("float32", "bfloat16"):
        model = ReferencePolicy(replace(recipe.policy, dtype=dtype, sampler="backend"))
        infer = partial(model.infer, prompts, seeds, chat.stop_ids, generation)
        ours = decode_attention.NAME
        for name, said in (("sdpa", "transformers' attention"), (ours, "grouped heads")):
            decode_attention.NAME = name
            took, groups = seconds(infer)
            tokens = sum(len(s.token_ids) for group in groups for s in group)
            print(f"reference, {dtype}, {said}: {tokens / took:.0f} tokens/s ({tokens} in {took:.1f} s)", flush=True)
        decode_attention.NAME = ours
        samples = [s.token_ids for group in groups for s in group]
        batch = TokenBatch(prompts, [i for i in range(PROMPTS) for _ in range(SAMPLES)], samples, {})
        width = max(map(len, samples))
        batch.data["mask"] = torch.tensor([[1.0] * len(s) + [0.0] * (width - len(s)) for s in samples])
        model.prepare_for_training(recipe.policy.optimizer)
        model.prepare_for_training_step()
        loss = partial(pivotrl.sft_loss, normaliser=float(tokens))
        took, found = seconds(lambda: model.get_loss_and_metrics(batch, loss))  # noqa: B023
        print(
            f"training, {dtype}, LoRA: {tokens / took:.0f} tokens/s, {found['token_ratio']:.2f} times fewer tokens run"
        )


def engine(recipe: Any, chat: Any, prompts: list[list[int]], seeds: list[list[int]]) -> None:
    from nemo_pivotrl.backends.vllm.engine import Engine

    sampler = Engine(recipe.policy, recipe.vllm)
    for turn in ("first", "second"):  # the first makes kernels ready
        took, groups = seconds(lambda: sampler.infer(prompts, seeds, chat.stop_ids, recipe.policy.generation))
        tokens = sum(len(s.token_ids) for group in groups for s in group)
        print(
            f"vLLM, {recipe.policy.dtype}, {turn} call: {tokens / took:.0f} tokens/s ({tokens} in {took:.1f} s)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("trajectories", type=Path)
    parser.add_argument("--vllm", default="", metavar="DTYPE", help="measure vLLM in this dtype, one a process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    own = [f"policy.model_name={options.model}", f"policy.generation.max_new_tokens={TOKENS}"]
    recipe = load_recipe(RECIPE, own + ([f"policy.dtype={options.vllm}"] if options.vllm else []))
    chat = load_chat(recipe.policy)
    rows = [json.loads(line) for line in options.trajectories.read_text(encoding="utf-8").splitlines()[:PROMPTS]]
    prompts = [chat.prompt_ids(row["messages"][:-1], row["tools"]) for row in rows]
    seeds = [[100 * i + k for k in range(SAMPLES)] for i in range(PROMPTS)]
    print(f"{PROMPTS} prompts of {sum(map(len, prompts)) / PROMPTS:.0f} tokens")
    (engine if options.vllm else reference)(recipe, chat, prompts, seeds)


if __name__ == "__main__":
    main()
