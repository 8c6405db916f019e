"""A line of JSON for each recipe: what Transformer Engine's assertion, and what our check, says of its matrices in FP8.

`python tests/trace/fp8_rules.py [--width N] RECIPE ...`; width: another size of the MLP.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_pivotrl.backends.base import as_trained
from nemo_pivotrl.backends.megatron.mapping import entries
from nemo_pivotrl.backends.traced import device, engine, sources
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.sizing.layout_rules import fp8_dimensions, multiple_of
from nemo_pivotrl.sizing.precision import DIMENSION_MULTIPLE, token_multiple
from nemo_pivotrl.tools.plan_models import shape_of

MULTIPLIED = tuple(
    f"{name}.weight" for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj", "out_proj")
)
LATENT = ("fc1_latent_proj.weight", "fc2_latent_proj.weight")
ACROSS = ("linear_proj.weight", "linear_fc2.weight", "out_proj.weight")
"""Cut along what they sum over."""


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--width", type=int)
    arguments.add_argument("recipes", nargs="+", type=Path)
    options = arguments.parse_args()
    folder = sources.find()
    device.install((9, 0), 80)
    engine.install(folder, sources.versions(folder)["transformer_engine"])
    from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec

    for path in options.recipes:
        print(json.dumps(told(path, options.width, assert_dim_for_fp8_exec)))
    return 0


def told(path: Path, width: int | None, assertion: Any) -> dict[str, Any]:
    recipe = load_recipe(path, ["megatron.fp8=hybrid"])
    model = recipe.policy if recipe.algorithm == "pivotrl" else as_trained(recipe.doctor)
    shape, _ = shape_of(model.model_name, recipe)
    shape = replace(shape, intermediate_size=width) if width else shape
    m, refused, number = recipe.megatron, set(), 0
    tp, cp = m.tensor_model_parallel_size, m.context_parallel_size
    kinds = {layer: shape.layers.index(layer) for layer in dict.fromkeys(shape.layers)}
    tokens = multiple_of(tp, cp, m.sequence_parallel, token_multiple(m)) // cp // (tp if m.sequence_parallel else 1)
    for entry in entries(shape):
        if not entry.name.endswith((*MULTIPLIED, *LATENT)) or entry.expert or not _first(entry.name, kinds):
            continue
        ranks = m.expert_tensor_parallel_size if entry.expert is not None else tp
        own = sum(stop - start for _, start, stop in entry.cut(0, ranks))
        inner = shape.hidden_size if entry.dim == 0 else own
        if entry.expert is not None and shape.moe is not None and shape.moe.latent_size:
            inner = shape.moe.latent_size if entry.dim == 0 else own
        outer = own if entry.dim == 0 else shape.hidden_size
        number += 1
        try:
            assertion(torch.empty(outer, inner), torch.empty(tokens, inner), torch.empty(tokens, outer))
        except ValueError:
            refused.add(entry.name)
    ours = sorted(name for name, size in fp8_dimensions(shape, m).items() if size % DIMENSION_MULTIPLE)
    return {"recipe": path.stem, "matrices": number, "engine_refuses": sorted(refused), "we_refuse": ours}


def _first(name: str, kinds: dict[str, int]) -> bool:
    """Of the first layer of its kind: the others have the same shapes."""
    return any(f".layers.{i}." in name for i in kinds.values())


if __name__ == "__main__":
    sys.exit(main())
