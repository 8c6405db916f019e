"""What `view` knows of a run folder: where each row lies, and the few fields that lists filter and sort by.

One pass over an artefact finds the places; a row is read again when somebody looks at it. A million candidates take 0.5 GB.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_pivotrl.components.conclusions import read_checks
from nemo_pivotrl.core.artifacts import placed_rows, read_first_line, read_header, read_rows, rows_at
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import Candidate
from nemo_pivotrl.data.gym_rows import action_to_row, to_items, tool_to_flat
from nemo_pivotrl.data.states import States, open_states
from nemo_pivotrl.pivotrl.evaluate import read_items
from nemo_pivotrl.pivotrl.profile_rows import light_of_row
from nemo_pivotrl.pivotrl.select import fate
from nemo_pivotrl.report.reasons import in_words

Row = dict[str, Any]
PIVOTS = "pivots.jsonl"


@dataclass(frozen=True, slots=True)
class Turn:
    """A candidate in a list: one assistant turn of the expert."""

    id: str
    trajectory: str
    task: str
    tool: str
    split: str
    depth: int
    turn: int
    tokens: int
    """Of the prompt; 0 where nothing was profiled."""
    samples: int
    hits: float
    """Sum of the samples' rewards."""
    truncated: int
    fate: str
    """`pivot`, `all 0`, `all 1`, `all equal`, `too easy`, `not drawn`, `failed`, `left out` (talk), or `not profiled`;
    `held out` in validation."""
    failure: str
    place: int

    @property
    def rate(self) -> float:
        """Hit rate; -1 without samples, so that these are last when the best come first."""
        return self.hits / self.samples if self.samples else -1.0


@dataclass
class Run:
    """A run folder that was looked through once."""

    folder: Path
    source: Path | None = None
    """profiles.jsonl, or candidates.jsonl where nothing is profiled yet."""
    states: States | None = None
    """What its rows point into."""
    turns: list[Turn] = field(default_factory=list)
    by_id: dict[str, int] = field(default_factory=dict)
    by_trajectory: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    sets: dict[str, frozenset[str]] = field(default_factory=dict)
    """File of a pivot set -> ids of its train pivots."""
    lambda_diff: float | None = None
    answers: dict[str, dict[str, Row]] = field(default_factory=lambda: defaultdict(dict))
    """Held-out candidate -> policy -> its first sample and scores."""
    audited: dict[str, int] = field(default_factory=dict)
    """Candidate -> place in audit.jsonl."""
    pairs: list[Row] = field(default_factory=list)
    """Rows of token_rewards.jsonl: id, objective, split, place."""
    prompts: dict[Any, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Prompt of assessment.jsonl -> places of its answers."""


def open_run(folder: Path) -> Run:
    """Look through a run folder. Raises InputError for one without artefacts, and for a damaged artefact."""
    run = Run(folder)
    for name in ("profiles.jsonl", "candidates.jsonl"):
        if (folder / name).exists():
            run.source, run.states = folder / name, open_states(folder / name)
            break
    _read_sets(run)
    if run.source is not None:
        _read_turns(run)
    if (path := folder / "evaluation.jsonl").exists():
        for item in read_items(path):
            if item["set"] == "one_turn":
                run.answers[item["item"]][item["policy"]] = {k: item.get(k) for k in ("sample", "category", "scores")}
    if (path := folder / "audit.jsonl").exists():
        run.audited = {row["candidate_id"]: place for place, row in placed_rows(path)}
    if (path := folder / "token_rewards.jsonl").exists():
        for place, row in placed_rows(path):
            kept = {"id": row["preference_id"], "objective": row["objective"], "split": row["split"], "place": place}
            run.pairs.append(kept | {side: len(row[side]["ids"]) for side in ("chosen", "rejected")})
    if (path := folder / "assessment.jsonl").exists():
        for place, row in placed_rows(path):
            run.prompts[row["prompt"]].append(place)
    if not (run.turns or run.pairs or run.prompts):
        remedy = "give the run_dir of a recipe after `extract` (PivotRL) or `reward` (LLMdoctor)"
        raise InputError(Problem(str(folder), None, "RUN", "no artefacts to show", remedy))
    return run


def _read_sets(run: Run) -> None:
    """Every pivot set of the folder, by its file's name."""
    for path in sorted(run.folder.glob("*.jsonl")):
        with path.open("rb") as file:
            try:
                stage = read_first_line(file.readline(1 << 24))[0].stage
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # a ledger or another file without a header
        if stage == "pivots":
            run.sets[path.name] = frozenset(r["candidate_id"] for r in read_rows(path) if r["split"] == "train")
    if PIVOTS in run.sets:
        run.lambda_diff = float(read_header(run.folder / PIVOTS, "pivots").extra["lambda_diff"])


def _read_turns(run: Run) -> None:
    assert run.source is not None
    pivots = set(run.sets.get(PIVOTS, ()))
    for place, row in placed_rows(run.source):
        profiled = "profile" in row
        light = light_of_row(row if profiled else row | {"samples": [], "profile": NOT_PROFILED})
        candidate, samples = light.candidate, row.get("samples", ())
        became = "not profiled"
        if candidate.split != "train":
            became = "held out"
        elif profiled:
            became = fate(light, pivots, 1.0 if run.lambda_diff is None else run.lambda_diff)
        turn = Turn(
            candidate.candidate_id,
            candidate.trajectory_id,
            candidate.task_id,
            sys.intern(candidate.action_name),
            candidate.split,
            candidate.depth,
            candidate.turn,
            light.tokens_prompt,
            len(samples),
            sum(light.rewards),
            sum(sample["finish_reason"] == "length" for sample in samples),
            became,
            light.failure or "",
            place,
        )
        run.by_id[turn.id] = len(run.turns)
        run.by_trajectory[turn.trajectory].append(len(run.turns))
        run.turns.append(turn)


NOT_PROFILED = {"tokens_generated": 0, "tokens_prompt": 0, "failure": None}

# ---- answers ----


def overview(run: Run) -> Row:
    """The run at a glance: what there is, verdicts of its stages, and what lists can be filtered by."""
    fates = Counter(turn.fate for turn in run.turns)
    samples = sum(turn.samples for turn in run.turns)
    return {
        "folder": str(run.folder),
        "turns": len(run.turns),
        "trajectories": len(run.by_trajectory),
        "samples": samples,
        "truncated": sum(turn.truncated for turn in run.turns),
        "fates": dict(fates.most_common()),
        "pivots_by_depth": [len([t for t in run.turns if t.fate == "pivot" and t.depth == d]) for d in range(12)],
        "rates": [sum(t.samples > 0 and min(9, int(10 * t.rate)) == n for t in run.turns) for n in range(10)],
        "lambda_diff": run.lambda_diff,
        "tools": dict(Counter(turn.tool for turn in run.turns).most_common(200)),
        "splits": dict(Counter(turn.split for turn in run.turns)),
        "failures": dict(Counter(turn.failure for turn in run.turns if turn.failure)),
        "sets": {name: len(ids) for name, ids in run.sets.items()},
        "policies": sorted({policy for by_policy in run.answers.values() for policy in by_policy}),
        "pairs": len(run.pairs),
        "objectives": dict(Counter(pair["objective"] for pair in run.pairs)),
        "prompts": len(run.prompts),
        "checks": read_checks(run.folder),
        "report": (run.folder / "report.html").exists(),
    }


SORTS: Mapping[str, Callable[[Turn], Any]] = {
    "file": lambda t: t.place,
    "rate": lambda t: t.rate,
    "depth": lambda t: t.depth,
    "tokens": lambda t: t.tokens,
    "task": lambda t: t.task,
    "tool": lambda t: t.tool,
    "truncated": lambda t: t.truncated,
    "fate": lambda t: t.fate,
}
PAGE = 50
MAX_PAGE = 500


def listed(run: Run, asked: Mapping[str, str]) -> Row:
    """A page of turns. asked: `tool`, `fate`, `split`, `failure`, `task`, `trajectory` (equal), `in` and `out` (pivot sets),
    `low` and `high` (hit rate), `q` (text), `sort`, `desc`, `offset`, `limit`. Raises ValueError for another key or a bad value.
    """
    known = {*EQUAL, "in", "out", "low", "high", "q", "sort", "desc", "offset", "limit"}
    if unknown := sorted(set(asked) - known):
        raise ValueError(f"unknown filter {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if (sort := asked.get("sort") or "file") not in SORTS:
        raise ValueError(f"sort {sort!r}; known: {', '.join(SORTS)}")
    found = _filtered(run, asked)
    if asked.get("q"):
        found = list(_with_text(run, found, asked["q"]))
    found.sort(key=SORTS[sort], reverse=asked.get("desc") == "1")
    if sort == "rate":
        found.sort(key=lambda turn: not turn.samples)  # those without a hit rate come last either way
    start, size = max(0, int(asked.get("offset") or 0)), min(MAX_PAGE, int(asked.get("limit") or PAGE))
    return {"total": len(found), "offset": start, "rows": [_turn_row(turn) for turn in found[start : start + size]]}


EQUAL = ("tool", "fate", "split", "failure", "task", "trajectory")


def _filtered(run: Run, asked: Mapping[str, str]) -> list[Turn]:
    wanted = {key: asked[key] for key in EQUAL if asked.get(key)}
    low, high = (float(asked.get(key) or default) for key, default in (("low", -1), ("high", 1)))
    inside, outside = (_set(run, asked[key]) if asked.get(key) else None for key in ("in", "out"))
    return [
        turn
        for turn in run.turns
        if low <= turn.rate <= high
        and all(getattr(turn, key) == value for key, value in wanted.items())
        and (inside is None or turn.id in inside)
        and (outside is None or turn.id not in outside)
    ]


def _set(run: Run, name: str) -> frozenset[str]:
    if name not in run.sets:
        raise ValueError(f"no pivot set {name!r}; there are: {', '.join(run.sets) or 'none'}")
    return run.sets[name]


def _with_text(run: Run, turns: Sequence[Turn], text: str) -> Iterator[Turn]:
    """Turns whose row, tools, state or action hold a text, upper and lower case alike; in JSON, and in JSON inside a JSON text."""
    once = json.dumps(text.lower(), ensure_ascii=False)[1:-1]
    needles = (once, json.dumps(once, ensure_ascii=False)[1:-1])
    assert run.states is not None
    first: dict[int, int] = {}  # trajectory to its first message with the text
    for turn in turns:
        row = _row(run, turn)
        if (number := row["trajectory"]) not in first:
            messages, tools, fields = run.states.trajectory(number)
            found = [i for i, m in enumerate(messages) if _holds(m, needles)]
            first[number] = -1 if _holds([tools, fields], needles) else found[0] if found else len(messages)
        if first[number] <= turn.turn or _holds(row, needles):
            yield turn


def _holds(value: object, needles: Sequence[str]) -> bool:
    said = json.dumps(value, ensure_ascii=False, separators=(",", ":")).lower()
    return any(needle in said for needle in needles)


def _turn_row(turn: Turn) -> Row:
    return {key: value for key, value in asdict(turn).items() if key != "place"} | {"rate": turn.rate}


def whole_turn(run: Run, candidate_id: str) -> Row:
    """Everything about a turn. Raises KeyError for an id that is not there."""
    turn = run.turns[run.by_id[candidate_id]]
    row = _row(run, turn)
    candidate = _candidate(run, row)
    siblings = [run.turns[n] for n in run.by_trajectory[turn.trajectory]]
    siblings.sort(key=lambda t: t.turn)
    audited = run.audited.get(candidate_id)
    return _turn_row(turn) | {
        "why": why(turn, run.lambda_diff),
        "state": to_items(candidate.messages),
        "tools": [tool_to_flat(tool) for tool in candidate.tools],
        "expected": _action(action_to_row(candidate.expected)),
        "reasoning": candidate.expected.reasoning,
        "interval": row.get("profile", {}).get("interval"),
        "control": bool(row.get("profile", {}).get("control")),
        "detail": row.get("profile", {}).get("detail", ""),
        "groups": groups(row.get("samples", ())),
        "sets": [name for name, ids in run.sets.items() if candidate_id in ids],
        "answers": run.answers.get(candidate_id, {}),
        "audit": None if audited is None else next(rows_at(run.folder / "audit.jsonl", [audited])),
        "siblings": [_turn_row(t) for t in siblings],
    }


def groups(samples: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A turn's samples by distinct action and verdict, the most frequent first."""
    found: dict[str, Row] = {}
    for sample in samples:
        action = _action(sample["action"])
        key = json.dumps([action, sample["category"], sample["finish_reason"]], sort_keys=True)
        group = found.setdefault(
            key,
            {
                "action": action,
                "count": 0,
                "reward": sample["reward"],
                "category": sample["category"],
                "words": in_words(sample["category"]),
                "detail": sample.get("detail", ""),
                "rules": sample.get("rules", []),
                "finish_reason": sample["finish_reason"],
                "text": sample["text"],
                "tokens": sample["tokens"],
                "log_prob": sample["log_prob"],
            },
        )
        group["count"] += 1
    return sorted(found.values(), key=lambda group: -group["count"])


def _action(row: Mapping[str, Any]) -> Row:
    """An action as the page shows it: kind, text and calls, arguments parsed where they are JSON."""
    calls = row["calls"] if row["type"] == "function_call_batch" else [row] if row["type"] == "function_call" else []
    content = row.get("content") or ""
    return {
        "kind": "calls" if calls else row["type"],
        "content": content if isinstance(content, str) else json.dumps(content, ensure_ascii=False),
        "detail": row.get("detail", ""),
        "calls": [{"name": call["name"], "arguments": _pretty(call["arguments"])} for call in calls],
    }


def _pretty(arguments: str) -> str:
    """Arguments on lines, keys sorted, so that two calls can be laid side by side; text that is no JSON as it is."""
    try:
        return json.dumps(json.loads(arguments), indent=1, sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments


def why(turn: Turn, lambda_diff: float | None) -> str:
    """One sentence on what became of a turn."""
    rate = f"{turn.hits:g} of {turn.samples} samples were accepted"
    limit = "" if lambda_diff is None else f" (lambda_diff {lambda_diff:g})"
    return {
        "pivot": f"A pivot: {rate}, so there is something to learn{limit}.",
        "all 0": f"Dropped: {rate}. Equal rewards have no gradient. See below what the verifier rejected.",
        "all 1": f"Dropped: {rate}. The policy can do this already.",
        "all equal": "Dropped: every sample got the same reward, which has no gradient.",
        "too easy": f"Dropped: {rate}, at or above the threshold{limit}.",
        "not drawn": f"Left out though it could be a pivot ({rate}): select.limit, select.max_message_ratio, "
        "select.drop_constant_wins, or no pivot set was made yet.",
        "failed": f"Excluded: {turn.failure}. It has no hit rate.",
        "left out": "Left out: the expert talks here, and no judge compares texts (verifier.message: exclude).",
        "held out": f"Held out: never trained on. {rate}.",
        "not profiled": "Not profiled yet: run nemo-pivotrl profile.",
    }[turn.fate]


def trajectory(run: Run, name: str) -> Row:
    """A trajectory as a conversation: the longest state of it with its action, and what is known of each of its turns. Raises
    KeyError for one that is not there."""
    if name not in run.by_trajectory:
        raise KeyError(name)
    turns = sorted((run.turns[n] for n in run.by_trajectory[name]), key=lambda t: t.turn)
    last = _candidate(run, _row(run, turns[-1]))
    return {
        "id": name,
        "task": turns[0].task,
        "split": turns[0].split,
        "state": to_items(last.messages),
        "expected": _action(action_to_row(last.expected)),
        "turns": [_turn_row(t) | {"why": why(t, run.lambda_diff), "interval": _interval(run, t)} for t in turns],
    }


def _interval(run: Run, turn: Turn) -> list[float] | None:
    found: list[float] | None = _row(run, turn).get("profile", {}).get("interval")
    return found


def _row(run: Run, turn: Turn) -> Row:
    assert run.source is not None
    return next(rows_at(run.source, [turn.place]))


def candidate_of(run: Run, candidate_id: str) -> Candidate:
    """A turn with its state and tools, read from its place. Raises KeyError for an id that is not there."""
    return _candidate(run, _row(run, run.turns[run.by_id[candidate_id]]))


def _candidate(run: Run, row: Row) -> Candidate:
    assert run.states is not None
    return run.states.candidate(row)


def pair(run: Run, preference_id: str, pieces: Callable[[Sequence[int]], list[str]]) -> Row:
    """A rewarded pair, token by token: [text, reward, Delta, log-probability under the positive face, and under the negative one];
    the last two where the artefact has them. Raises KeyError."""
    number = next((n for n, p in enumerate(run.pairs) if p["id"] == preference_id), None)
    if number is None:
        raise KeyError(preference_id)
    row = next(rows_at(run.folder / "token_rewards.jsonl", [run.pairs[number]["place"]]))
    shown: Row = {"id": preference_id, "objective": row["objective"], "split": row["split"]}
    shown["prompt"] = "".join(pieces(row["prompt_ids"]))
    shown["previous"] = run.pairs[number - 1]["id"] if number else None
    shown["next"] = run.pairs[number + 1]["id"] if number + 1 < len(run.pairs) else None
    for side in ("chosen", "rejected"):
        texts = pieces(row[side]["ids"])
        columns = [row[side][name] for name in ("rewards", "importance", "positive", "negative") if name in row[side]]
        shown[side] = [list(token) for token in zip(texts, *columns, strict=True)]
    return shown


def prompts(run: Run, offset: int, limit: int) -> Row:
    """A page of assessed prompts."""
    names = list(run.prompts)[offset : offset + min(limit, MAX_PAGE)]
    first = rows_at(run.folder / "assessment.jsonl", [run.prompts[name][0] for name in names])
    rows = [{"prompt": name, "asked": row["asked"]} for name, row in zip(names, first, strict=True)]
    return {"total": len(run.prompts), "offset": offset, "rows": rows}


def prompt(run: Run, name: int, sample: int) -> Row:
    """The arms' answers to a prompt, one sample of each, with what guidance did to every token. Raises KeyError."""
    if name not in run.prompts:
        raise KeyError(name)
    rows = [r for r in rows_at(run.folder / "assessment.jsonl", run.prompts[name])]
    return {
        "prompt": name,
        "asked": rows[0]["asked"],
        "samples": max(r["sample"] for r in rows) + 1,
        "arms": [r for r in rows if r["sample"] == sample],
    }
