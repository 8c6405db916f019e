"""Peak memory and time of log-probabilities from hidden states, forward and backward: torch's way and ours, chunked.

    python benchmarks/logprob_memory.py [--tokens 4096] [--vocabulary 32768] [--hidden 512] [--chunk 256]

Each way runs in a process of its own. On a CUDA device the peak is the allocator's; on a CPU it is how far the process's
resident memory rose above what it was with the inputs in place.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("torch", "chunked")


def measure(way: str, tokens: int, vocabulary: int, hidden: int, chunk: int) -> tuple[float, float]:
    """(peak above the inputs in MiB, seconds) of one forward and backward pass in bf16."""
    import torch

    from nemo_pivotrl.backends.megatron.logprobs import chunked_log_probs

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    states = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=device).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, dtype=torch.bfloat16, device=device) / hidden**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def run(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if way == "torch":
            log_p = torch.log_softmax((states @ weight.t()).float(), -1)
            found = log_p.gather(1, targets[:, None])[:, 0]
        else:
            found = chunked_log_probs(states, weight, targets, None, chunk)
        found.sum().backward()
        return found

    run(states[:8], targets[:8])  # libraries load their own memory at the first call
    states.grad = weight.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    run(states, targets)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    after = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return (after - before) / 2**20, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 4096, "vocabulary": 32768, "hidden": 512, "chunk": 256}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--way", choices=WAYS, help="measure this one alone, in this process")
    options = parser.parse_args()
    if options.way:
        peak, seconds = measure(options.way, options.tokens, options.vocabulary, options.hidden, options.chunk)
        print(f"{options.way:<8} {peak:8.0f} MiB {seconds:7.2f} s")
        return
    print(
        f"tokens {options.tokens}, vocabulary {options.vocabulary}, hidden {options.hidden}, chunk {options.chunk}, bf16"
    )
    for way in WAYS:
        given = [f"--{name}={getattr(options, name)}" for name in sizes]
        subprocess.run([sys.executable, str(Path(__file__)), f"--way={way}", *given], check=True)


if __name__ == "__main__":
    main()
