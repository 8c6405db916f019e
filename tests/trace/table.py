"""Every GPU recipe's training step with all its layers, traced beside planned: `python tests/trace/table.py [RECIPE ...]`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from traced import GPU_RECIPES, ranks_of, run


def main(chosen: list[Path]) -> int:
    """Print a line for each recipe and rank as it is traced. Returns 1 where one is not good."""
    print(
        f"{'recipe':76}{'traced':>9}{'planned':>9}{'off':>7}{'seconds':>9}  GiB at most; what is off by more than a tenth"
    )
    bad = 0
    for recipe in chosen:
        for rank in ranks_of(recipe):
            start = time.monotonic()
            found = run(recipe, rank=rank, layers="")
            spent = time.monotonic() - start
            name = f"{recipe.stem} rank {rank}"
            if not found.answer:
                print(f"{name:76} failed: {found.error.strip().splitlines()[-1][:150]}", flush=True)
                bad += 1
                continue
            line = found.answer["lines"][-1]
            figures = f"{line['traced']:9.1f}{line['planned']:9.1f}{line['off']:+7.1%}{spent:9.0f}"
            print(f"{name:76}{figures}  {', '.join(found.off())}", flush=True)
            bad += not found.answer["good"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]] or GPU_RECIPES))
