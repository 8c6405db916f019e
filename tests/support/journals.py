"""What a killed map leaves: its journal, as it was before the artefact was made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nemo_pivotrl.components.durable_map import Map
from nemo_pivotrl.components.journal import Journal


@contextmanager
def journals_kept() -> Iterator[list[bytes]]:
    """The whole journals of the maps that end in the block."""
    found: list[bytes] = []
    order = Map._order

    def keep(self: Map, journal: Journal) -> None:
        found.append(journal.path.read_bytes())
        order(self, journal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Map, "_order", keep)
        yield found
