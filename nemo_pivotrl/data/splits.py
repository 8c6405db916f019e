"""Train and validation: whole tasks, never turns of one task on both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.core.types import Split


def split_by_task(task_ids: Sequence[str], validation_share: float, seed: int) -> dict[str, Split]:
    """The split of each task. The held-out share is exact to one task and stable under added tasks' order."""
    tasks = sorted(set(task_ids), key=lambda task: selection.order_key(seed, task))
    held_out = math.ceil(validation_share * len(tasks)) if len(tasks) > 1 else 0
    return {task: "validation" if i < held_out else "train" for i, task in enumerate(tasks)}
