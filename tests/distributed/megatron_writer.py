"""Checkpoints as Megatron-LM and NeMo write them: `python megatron_writer.py JSON`, a list of `write`'s arguments.

A process of its own, because megatron-core's own writer forks, which the tests' workers must not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from nemo_pivotrl.config import Megatron


def write(folder: str, target: str, tool: str, singleton: bool, megatron: Megatron, groups: Any) -> None:
    """The HF checkpoint `folder` in one that `tool` would have written."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from nemo_pivotrl.backends.megatron.model import build_model

    (chunk,) = build_model(folder, megatron, groups)
    prefix = {"megatron-lm": "", "nemo": "module."}[tool]
    model: dict[str, Any] = chunk.sharded_state_dict(  # type: ignore[operator]
        prefix=prefix, metadata={"dp_cp_group": groups.dp_cp, "singleton_local_shards": singleton}
    )
    weights = {name: t for name, t in model.items() if isinstance(t, ShardedTensor)}
    moments = {
        name: ShardedTensor.from_rank_offsets(f"optimizer.state.exp_avg.{t.key}", t.data.detach().clone())
        for name, t in list(weights.items())[:2]
    }
    state: dict[str, Any] = {
        "args": argparse.Namespace(hidden_size=32),  # which is why `common.pt` cannot be read safely
        "iteration": 7,
        "model": model,
        "optimizer": moments,
        "rng_state": ShardedObject("rng_state", {"random": 1}, (1,), (0,)),
    }
    final = {"megatron-lm": Path(target, "iter_0000007"), "nemo": Path(target, "weights")}[tool]
    final.mkdir(parents=True)
    dist_checkpointing.save(state, str(final))
    if tool == "nemo":
        Path(target, "context").mkdir()
    else:
        Path(target, "latest_checkpointed_iteration.txt").write_text("7")


def main() -> None:
    from nemo_pivotrl.backends.megatron.parallel import initialize, leave

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    megatron = Megatron(cpu=True, bf16=False, recompute="none")
    groups = initialize(megatron, seed=1)
    for arguments in json.loads(sys.argv[1]):
        write(*arguments, megatron, groups)
    leave()


if __name__ == "__main__":
    main()
