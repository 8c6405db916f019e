"""LoRA adapters of several doctors on one model, each for its own rows of a pass.

The adapters' matrices stand side by side. A linear layer's input is multiplied by all A's that the pass needs, the columns of
other rows' adapters are set to zero, and one product with all B's adds what is left: two small products a layer, however many
adapters there are, and the base's own product is made once for all rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo_pivotrl.backends.adapters import Adapter


class SharedBase:
    """Hooks on a model's linear layers. `rows` says whose adapter each row of the next pass has; without it none has any."""

    def __init__(self, model: nn.Module, adapters: dict[str, Adapter]):
        self.number = {name: n for n, name in enumerate(adapters)}
        self.present: list[int] = []
        self.of_row = torch.empty(0, dtype=torch.long)
        self.masks: dict[Hashable, tuple[Tensor | None, Tensor | None]] = {}
        modules: dict[str, Any] = dict(model.named_modules())
        for layer in sorted({layer for adapter in adapters.values() for layer in adapter.pairs}):
            own = [(n, a.scale, *a.pairs[layer]) for n, a in enumerate(adapters.values()) if layer in a.pairs]
            weight = modules[layer].weight
            first = torch.cat([a for _, _, a, _ in own]).to(weight.device, weight.dtype)
            second = torch.cat([(scale * b.float()).T for _, scale, _, b in own]).to(weight.device, weight.dtype)
            owners = tuple(n for n, _, a, _ in own for _ in range(len(a)))
            modules[layer].register_forward_hook(_Delta(self, owners, first, second))

    def rows(self, adapters: Sequence[str]) -> None:
        """The adapter of each row of the next pass; "": none."""
        numbers = [self.number.get(name, -1) for name in adapters]
        self.present = sorted({n for n in numbers if n >= 0})
        self.of_row = torch.tensor(numbers)
        self.masks = {}

    def columns(self, owners: tuple[int, ...], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Which columns of A's output the pass needs (None: all), and which of these are not the row's, [rows, 1, columns] bool
        (None: no such). The same for all layers whose columns have the same owners."""
        if owners not in self.masks:
            kept = [at for at, owner in enumerate(owners) if owner in self.present]
            index = None if len(kept) == len(owners) else torch.tensor(kept, device=device, dtype=torch.long)
            theirs = torch.tensor([owners[at] for at in kept])[None] != self.of_row[:, None]
            self.masks[owners] = index, theirs[:, None].to(device) if bool(theirs.any()) else None
        return self.masks[owners]


class _Delta:
    """Hook of one linear layer: adds each row's own adapter."""

    def __init__(self, shared: SharedBase, owners: tuple[int, ...], first: Tensor, second: Tensor):
        self.shared, self.owners, self.first, self.second = shared, owners, first, second
        """A's [columns, in] and scale * B's, transposed [columns, out]."""

    def __call__(self, _: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.shared.present:
            return output
        index, foreign = self.shared.columns(self.owners, output.device)
        if index is not None and not len(index):
            return output
        first, second = (self.first, self.second) if index is None else (self.first[index], self.second[index])
        narrow = given[0] @ first.T
        if foreign is not None:  # not by a product: what overflows in a row that does not want it would be NaN
            narrow = narrow.masked_fill(foreign, 0.0)
        return output + narrow @ second
