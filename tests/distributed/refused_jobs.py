"""What the ranks run in test_megatron_refused.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_pivotrl.core.errors import InputError


def refusals(folders: dict[str, str], layout: dict[str, Any], loads: dict[str, str]) -> dict[str, str]:
    """What each folder is refused for, '' for one that loads; loads: folder with a config to a checkpoint of a tool."""
    from model_jobs import settings

    from nemo_pivotrl.backends.megatron import model
    from nemo_pivotrl.backends.megatron.parallel import initialize

    found = {}
    groups = initialize(settings(**layout), seed=1)
    for name, folder in folders.items():
        try:
            model.build_model(folder, settings(**layout, load=loads.get(name, "")), groups)
            found[name] = ""
        except InputError as error:
            found[name] = str(error)
    return found


def refusal_of_a_tools(folder: str, target: str, value: float) -> str:
    """Write the model as a tool would, with `value` in one place of its last stage, and read it again; what for it is refused."""
    from model_jobs import settings

    from nemo_pivotrl.backends.megatron import model, torch_dist
    from nemo_pivotrl.backends.megatron.checkpoint import weights
    from nemo_pivotrl.backends.megatron.parallel import initialize

    megatron = settings(pipeline_model_parallel_size=2)
    groups = initialize(megatron, seed=1)
    (chunk,) = model.build_model(folder, megatron, groups)
    if groups.last_stage:
        with torch.no_grad():
            chunk.decoder.layers[-1].mlp.linear_fc2.weight[-1, -1] = value  # type: ignore[index,union-attr]
    layout = {"non_homogeneous_layers": False, "singleton_local_shards": False}
    torch_dist.write(weights(chunk, groups, "", **layout), Path(target), {})
    try:
        model.build_model(folder, settings(pipeline_model_parallel_size=2, load=target), groups)
    except InputError as error:
        return str(error)
    return ""
