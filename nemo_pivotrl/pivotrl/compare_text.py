"""What `compare` found, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def as_text(found: dict[str, Any]) -> str:
    """The comparison as lines of text."""
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    for name in ("left", "right"):
        side = found[name]
        drawn = "at most " if side["curtailed"] else ""
        yield (
            f"{name:<5} {side['path']}: policy {side['policy']}, {drawn}{side['num_generations']} rollouts each, "
            f"rule {side['rule']}, lambda_diff {side['lambda_diff']:g}"
        )
    for reason in found["other_reasons"]:
        yield f"NOT DRIFT ALONE: {reason}"
    for note in found["notes"]:
        yield f"note: {note}"
    counts, rate = found["candidates"], found["hit_rate"]
    yield (
        f"{counts['both']:,} candidates in both, {counts['only_left']:,} only in the left one, {counts['only_right']:,} only in "
        f"the right one; {counts['compared']:,} failed in neither and are compared"
    )
    if rate["change"] is not None:
        ends = "" if rate["low"] is None else f" [{rate['low']:+.3f}, {rate['high']:+.3f}]"
        yield f"mean hit rate: {rate['left']:.3f} -> {rate['right']:.3f}, change {rate['change']:+.3f}{ends}"
    yield from _classes(found["classes"])
    yield from _pivots(found["pivots"], found["undecided"])
    yield from _moved(found["moved"])
    for name, rows in found["by"].items():
        yield f"{name:<28}{'all':>8}{'change':>9}{'up':>7}{'down':>7}"
        for key, row in rows.items():
            yield f"{key[:27]:<28}{row['candidates']:>8}{row['change']:>+9.3f}{row['up']:>7}{row['down']:>7}"
    if found["largest"]:
        yield "largest moves (* significant):"
    for move in found["largest"]:
        sides = " -> ".join(f"{move[n]['mean'] * move[n]['count']:g}/{move[n]['count']}" for n in ("left", "right"))
        p_value = "not testable" if move["p_value"] is None else f"p {move['p_value']:.2g}"
        mark = " *" if move["significant"] else ""
        yield f"    {move['candidate_id']}  {sides:<14} {p_value:<13} {move['action']}, depth {move['depth']}{mark}"


def _classes(table: dict[str, dict[str, int]]) -> Iterator[str]:
    columns = list(next(iter(table.values())))
    yield f"{'left one | right one':<22}" + "".join(f"{name:>10}" for name in columns)
    for name, row in table.items():
        yield f"{name:<22}" + "".join(f"{row[column]:>10}" for column in columns)
    if any(name.endswith("so far") for name in (*table, *columns)):
        yield "so far: stopped before all K; whether the rest would have been equal is not known"


def _pivots(pivots: dict[str, Any], undecided: dict[str, int]) -> Iterator[str]:
    jaccard = "" if pivots["jaccard"] is None else f" (Jaccard {pivots['jaccard']:.3f})"
    yield (
        f"pivots among train candidates, before any limit: {pivots['left']} and {pivots['right']}, {pivots['both']} in both{jaccard}"
    )
    for name, other in (("left", "right"), ("right", "left")):
        rates = pivots[f"rates_of_{name}"]
        if rates["left"] is not None:
            yield (
                f"    the {name} one's pivots: mean hit rate {rates[name]:.3f} there, {rates[other]:.3f} in the {other} one "
                "(some of it because low rates were selected)"
            )
    for name, count in undecided.items():
        if count:
            yield f"    {count} train candidates of the {name} one are not decided by their samples and go by their rate"


def _moved(moved: dict[str, Any]) -> Iterator[str]:
    yield (
        f"moved significantly: {moved['up']} up, {moved['down']} down of {moved['tested']} tested (exact, false-discovery rate "
        f"{moved['false_discovery_rate']:.0%})"
    )
    if moved["not_testable"]:
        yield f"    {moved['not_testable']} cannot be tested: rewards between 0 and 1, or samples that no known rule stopped"
    if moved["tested"] and not moved["threshold"]:
        yield f"    the smallest p-value is {moved['smallest_p']:.2g}: no single candidate stands out; the mean may still have moved"
