"""Static shares of a stage's rows, and what puts them together."""

from pathlib import Path

import pytest

from nemo_pivotrl.components.shards import Shard, merge_shards
from nemo_pivotrl.core.artifacts import Header, read_rows, write_artefact
from nemo_pivotrl.core.errors import InputError

HEADER = Header("decoded", "a recipe")


def test_shares_are_all_of_it_and_merge_in_order(tmp_path: Path) -> None:
    whole, shards = tmp_path / "d.jsonl", [Shard(n, 3) for n in range(3)]
    assert [n for shard in shards for n in shard.share(10)] == list(range(10))
    for shard in reversed(shards):
        write_artefact(shard.path(whole), shard.header(HEADER), ({"n": n} for n in shard.share(10)))
    merge_shards(whole, HEADER, HEADER)
    assert [row["n"] for row in read_rows(whole)] == list(range(10)) and not (tmp_path / "d.parts").exists()


def test_a_shard_of_another_recipe_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "d.jsonl"
    for number, header in enumerate((HEADER, Header("decoded", "another"))):
        shard = Shard(number, 2)
        write_artefact(shard.path(whole), shard.header(header), [{"n": number}])
    with pytest.raises(InputError, match=r"1-of-2.jsonl(?s:.*)config_hash='another'(?s:.*)--shard 1/2"):
        merge_shards(whole, HEADER, HEADER)
