"""Shared prefixes against whole rows: tokens, time and memory of one GRPO step on this CPU, and tokens at real lengths.

python benchmarks/prefix.py              # measure, in one process a case and layout
python benchmarks/prefix.py --project    # tokens alone, at the lengths of three kinds of trajectories
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

SHAPE = dict(
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=768,
    max_position_embeddings=8192,
)
RESPONSE = 64
CASES = [(512, 8, 1), (512, 16, 1), (1024, 8, 1), (2048, 8, 1), (2048, 16, 1), (2048, 8, 4), (2048, 8, 8), (4096, 8, 1)]
"""(prompt tokens of the last pivot, samples of a pivot, pivots of the trajectory)"""


def rows_of(
    prompt: int, samples: int, pivots: int, response: int = RESPONSE
) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Pivots at even distances along one trajectory whose last state has `prompt` tokens."""
    maker = random.Random(0)
    trunk = [maker.randrange(SHAPE["vocab_size"]) for _ in range(prompt)]
    prompts = [trunk[: prompt * (i + 1) // pivots] for i in range(pivots)]
    of = [i for i in range(pivots) for _ in range(samples)]
    return prompts, of, [[maker.randrange(SHAPE["vocab_size"]) for _ in range(response)] for _ in of]


def measure(prompt: int, samples: int, pivots: int, share: bool, folder: str) -> dict[str, float]:
    """Seconds of a forward and backward pass, the second of two, and the process's peak above what the model takes."""
    import torch

    from nemo_pivotrl.algorithms import pivotrl
    from nemo_pivotrl.backends.base import TokenBatch
    from nemo_pivotrl.backends.reference.policy import ReferencePolicy
    from nemo_pivotrl.config import Policy

    torch.set_num_threads(1)
    prompts, of, responses = rows_of(prompt, samples, pivots)
    budget = (prompt + RESPONSE) * 4
    backend = ReferencePolicy(
        Policy(model_name=folder, device="cpu", prefix_sharing=share, train_micro_batch_tokens=budget)
    )
    batch = TokenBatch(prompts, of, responses, {"mask": torch.ones(len(of), RESPONSE)})
    loss = partial(pivotrl.sft_loss, normaliser=float(len(of) * RESPONSE))
    seconds = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        backend.prepare_for_training_step()
        started = time.perf_counter()
        found = backend.get_loss_and_metrics(batch, loss)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": min(seconds), "mib": peak / 1024, "loss": found["loss"], "ratio": found["token_ratio"]}


def compare(hidden: int, cases: list[tuple[int, int, int]]) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    print("prompt  samples  pivots  token ratio  time ratio  of it  seconds (whole, shared)  peak MiB (whole, shared)")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        width = dict(hidden_size=hidden, head_dim=hidden // 8, intermediate_size=3 * hidden)
        Qwen3ForCausalLM(Qwen3Config(**SHAPE | width)).save_pretrained(folder)
        for case in cases:
            found = []
            for share in (False, True):
                command = [sys.executable, __file__, "--one", json.dumps([*case, share, folder])]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
                )
                found.append(json.loads(done.stdout.splitlines()[-1]))
            whole, shared = found
            assert abs(whole["loss"] - shared["loss"]) < 1e-4, found
            faster = whole["seconds"] / shared["seconds"]
            print(
                "{:>6}{:>9}{:>8}{:>13.2f}{:>12.2f}{:>7.2f}{:>14.1f} {:>9.1f}{:>16.0f} {:>8.0f}".format(
                    *case,
                    shared["ratio"],
                    faster,
                    faster / shared["ratio"],
                    whole["seconds"],
                    shared["seconds"],
                    whole["mib"],
                    shared["mib"],
                ),
                flush=True,
            )


def project(data: str) -> None:
    """Token ratios where a step holds whole trajectories, G = 16, in packs large enough for one."""
    assumed = {"terminal": (12_000, 300, 16), "SWE": (30_000, 512, 12)}
    cases = {f"{name}, assumed": [_evenly(*shape)] for name, shape in assumed.items()}
    if Path(data).exists():
        cases = {"tau, real": _real(Path(data))} | cases
    print("trajectories       number  last prompt  pivots  one pivot a step  all pivots a step")
    for name, trajectories in cases.items():
        counts = [_tokens(turns) for turns in trajectories]
        whole, alone, together = (sum(column) for column in zip(*counts, strict=True))
        last, turns = (
            statistics.median(column) for column in zip(*((t[-1][0], len(t)) for t in trajectories), strict=True)
        )
        print(
            f"{name:<18}{len(trajectories):>7}{last:>13,.0f}{turns:>8.0f}{whole / alone:>18.1f}{whole / together:>19.1f}"
        )
        if len(counts) > 1:
            alone_of, together_of = (statistics.quantiles([c[0] / c[n] for c in counts], n=10) for n in (1, 2))
            print(
                f"  by trajectory, 10 %, 50 %, 90 %{'':>14}"
                + "".join(
                    "{:>7.1f} {:>5.1f} {:>5.1f}".format(*(q[i] for i in (0, 4, 8))) for q in (alone_of, together_of)
                )
            )


def _evenly(prompt: int, response: int, pivots: int) -> list[tuple[int, int]]:
    return [(prompt * (i + 1) // pivots, response) for i in range(pivots)]


def _tokens(turns: list[tuple[int, int]], samples: int = 16) -> tuple[int, int, int]:
    """Tokens of a trajectory's (prompt, response) lengths: whole rows, one pivot sharing its prompt, all pivots sharing."""
    from nemo_pivotrl.algorithms.prefix_tree import token_ratio

    maker = random.Random(0)
    trunk = [maker.randrange(2**16) for _ in range(turns[-1][0])]
    of = [i for i in range(len(turns)) for _ in range(samples)]
    rows = [trunk[: turns[i][0]] for i in of]
    responses = [[maker.randrange(2**16) for _ in range(turns[i][1])] for i in of]
    pivots = [[n for n in range(len(of)) if of[n] == i] for i in range(len(turns))]
    whole = sum(map(len, rows)) + sum(map(len, responses))
    alone, together = (whole / token_ratio(rows, responses, plan) for plan in (pivots, [list(range(len(of)))]))
    return whole, round(alone), round(together)


def _real(path: Path) -> list[list[tuple[int, int]]]:
    """(tokens before an action, tokens of it) for every action of every trajectory, at 4 characters a token."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = row.get("messages") or row["traj"]
        sizes = [len(json.dumps(m)) // 4 for m in messages]
        turns = [(sum(sizes[:i]), sizes[i]) for i, m in enumerate(messages) if m["role"] == "assistant" and i]
        if turns:
            found.append(turns)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", action="store_true")
    parser.add_argument(
        "--data", default="../shared/data/tau_airline/trajectories.jsonl", help="OpenAI chat, a line each"
    )
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"], help="width of the model")
    parser.add_argument("--cases", nargs="*", default=[], help="prompt,samples,pivots of each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*json.loads(arguments.one))))
    elif arguments.project:
        project(arguments.data)
    else:
        compare(arguments.hidden, [tuple(map(int, case.split(","))) for case in arguments.cases] or CASES)
