"""Every record that passes between stages, and the headered JSONL files that hold them.

An artefact is a JSONL file whose first line is a header (what made this file, from what) and whose other lines are
rows. A stage refuses an input whose header contradicts its recipe and says which field differs, because a silent
change of tokenizer, chat template or policy is the commonest way to lose days of GPU time.

Messages are OpenAI chat messages (plain dicts): `role`, `content`, and on assistant turns `reasoning_content` and
`tool_calls`. Rows on disk are NeMo-Gym rows (Responses items); `responses.py` translates between the two.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FORMAT_VERSION = 1
HEADER_KEY = "nemo_pivotrl"
MAX_PROBLEMS_SHOWN = 20

Message = dict[str, Any]
Split = Literal["train", "validation"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an input, in the words a person needs to mend it."""

    file: str
    """Path of the input, or the recipe's path."""
    line: int | None
    """1-based line in a JSONL file, 1-based element in a JSON list, None where there are no lines."""
    field: str
    """Dotted path of the field, e.g. `messages[3].tool_calls[0].function.arguments`."""
    found: str
    """What stands there, shortened."""
    remedy: str
    """What to do about it."""

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.field}: found {self.found}\n    -> {self.remedy}"


class InputError(ValueError):
    """Bad input or a bad recipe: all problems at once. The command prints it and exits with code 2."""

    def __init__(self, problems: Iterable[Problem] | Problem):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        shown = "\n".join(f"  {p}" for p in self.problems[:MAX_PROBLEMS_SHOWN])
        more = len(self.problems) - MAX_PROBLEMS_SHOWN
        tail = f"\n  ... and {more} more" if more > 0 else ""
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__(f"{count}:\n{shown}{tail}")

    def __reduce__(self) -> tuple[type[InputError], tuple[list[Problem]]]:
        return InputError, (self.problems,)  # from a worker process it arrives with its problems


def short(value: object, limit: int = 120) -> str:
    """`value` as one line of at most `limit` characters, for error messages."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of an assistant turn."""

    name: str
    arguments: str
    """The arguments as the model wrote them: a JSON text, not checked here."""
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Action:
    """What an assistant turn does, as a verifier sees it: reasoning already removed."""

    kind: Literal["message", "calls", "malformed", "none"]
    """`malformed`: a tool call was begun and cannot be read. `none`: neither text nor call."""
    content: str = ""
    calls: tuple[ToolCall, ...] = ()
    detail: str = ""
    """For `malformed`: why."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One expert trajectory as a reader gives it."""

    trajectory_id: str
    task_id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    """Tool definitions in the OpenAI chat form `{"type": "function", "function": {...}}`."""
    reward: float | None
    """Outcome of the whole trajectory, None where the source has none."""
    source: str
    """`file:line` it was read from."""
    last_only: bool = False
    """True where only the last message is an action to learn (a ready-made pivot row)."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row's fields for its verifier (`responses.VERIFIER_FIELDS`)."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a verifier is told: the expert's action and the state it was taken in."""

    expected: Action
    tools: tuple[dict[str, Any], ...] = ()
    """In the chat form or the flat one."""
    messages: tuple[Message, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What the row says to its verifier: `harness`, `threshold`, `declared_tools`, `metadata`, `files`."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair (state, expert action): one assistant turn of one trajectory."""

    candidate_id: str
    trajectory_id: str
    task_id: str
    split: Split
    turn: int
    """Index of the action in the trajectory's messages."""
    depth: int
    """How many assistant turns precede it."""
    messages: tuple[Message, ...]
    """The state: everything before the action, as chat messages."""
    tools: tuple[dict[str, Any], ...]
    expected: Action
    num_unique_actions: int = 1
    """How many different expert actions the source has at this state."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row's fields for its verifier."""

    @property
    def case(self) -> Case:
        """The candidate as its verifier sees it."""
        return Case(self.expected, self.tools, self.messages, self.fields)

    @property
    def action_name(self) -> str:
        """Tool name of the expert action, `message` for a talking turn, names joined by `+` for a batch."""
        return "message" if self.expected.kind == "message" else "+".join(c.name for c in self.expected.calls)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, of which one is preferred under an objective."""

    preference_id: str
    """Digest of what the pair says: the same pair has the same id in every file."""
    split: Split
    objective: str
    """What the preference is about, e.g. `helpfulness`; one objective makes one doctor."""
    prompt: tuple[Message, ...]
    """Chat messages before the answer; the last one is no assistant turn."""
    chosen: str
    rejected: str
    source: str
    """`file:line` it was read from."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated turn. Token ids are what the policy emitted, never re-tokenised text."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    """Log-probability (nats) of each token under the sampling distribution."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Lost:
    """A turn that could not be generated: a fault of machines, after all retries. It says nothing about the policy."""

    kind: str
    """E.g. `sampler_timeout`."""
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verifier's judgement of one sampled action."""

    reward: float
    """In [0, 1]."""
    category: str
    """Why, in the verifier's own vocabulary."""
    detail: str = ""
    rules: tuple[str, ...] = ()
    """Relaxations without which the action would not have been accepted."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What was measured on the way, e.g. `similarity`."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A candidate with its K verified one-turn rollouts."""

    candidate: Candidate
    samples: tuple[dict[str, Any], ...]
    """One dict a rollout: text, tokens, finish_reason, reward, category. Fewer than K where curtailed sampling stopped."""
    tokens_generated: int
    tokens_prompt: int
    failure: str | None = None
    """Why the candidate is excluded (a fault that outlived its retries); then it has no k."""
    interval: tuple[float, float] | None = None
    """Jeffreys interval of the hit rate (95 %); None where rewards are not 0 or 1, and for what failed."""
    control: bool = False
    """Whether it was drawn in full whatever its first outcomes said."""

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(float(s["reward"]) for s in self.samples)


def canonical_json(value: object) -> str:
    """The one JSON text of `value`: sorted keys, no spaces. What hashes are made from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def json_line(row: object) -> bytes:
    """A row as one UTF-8 line, keys in their own order: a tool schema must reach the prompt as it was written."""
    return json_bytes(row) + b"\n"


def json_bytes(value: object) -> bytes:
    """`value` as JSON without spaces. Lone surrogates, which models do emit, are kept as JSON escapes."""
    try:
        return _compact(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), default=_plain).encode()


def _plain(value: object) -> object:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)  # type: ignore[call-overload]
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


# made once: what `json.dumps` makes anew at every call costs more than a small row
_compact = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, default=_plain).encode


def digest(value: object, length: int = 16) -> str:
    """Hex SHA-256 of `value`'s canonical JSON, cut to `length` characters."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:length]


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes (16 characters)."""
    hasher = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Header:
    """First line of an artefact: what made it, from what."""

    stage: str
    """`candidates`, `profiles`, `pivots`, `preferences`, `token_rewards`, ..."""
    config_hash: str
    """Of the recipe sections that decide this artefact's content."""
    parent: str = ""
    """Digest of the input artefact's file, empty for a first stage."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer (`chat.fingerprint`), empty where none was used."""
    chat_template: str = ""
    policy: str = ""
    """Revision of the policy: digest of its weights."""
    verifier: str = ""
    """`name version settings-digest`, empty where none was used."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT_VERSION

    def to_line(self) -> str:
        return canonical_json({HEADER_KEY: asdict(self)}) + "\n"


def read_header(path: Path, stage: str | tuple[str, ...]) -> Header:
    """Header of the artefact at `path`, which must be of `stage` (one of them, where several are given).

    Raises InputError when the file is missing, empty, has no header, or belongs to another stage.
    """
    wanted = (stage,) if isinstance(stage, str) else stage
    if not path.exists():
        raise InputError(
            Problem(str(path), None, "file", "no such file", f"run the stage that writes {wanted[0]} first")
        )
    with path.open("rb") as handle:
        first = handle.readline()
    try:
        raw = json.loads(first)[HEADER_KEY]
        header = Header(**raw)
    except (ValueError, KeyError, TypeError, RecursionError):
        found = "an empty file" if not first else short(first.decode("utf-8", "replace"))
        raise InputError(
            Problem(str(path), 1, "header", found, "this is no nemo_pivotrl artefact; give a file that a stage wrote")
        ) from None
    if header.format != FORMAT_VERSION:
        raise InputError(
            Problem(
                str(path),
                1,
                "format",
                str(header.format),
                f"this version reads format {FORMAT_VERSION}; re-run the stage",
            )
        )
    if header.stage not in wanted:
        raise InputError(
            Problem(str(path), 1, "stage", header.stage, f"this stage reads {' or '.join(wanted)}; check the path")
        )
    return header


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows after the header. Raises InputError with every line that is not a JSON object."""
    return (row for _, row in placed_rows(path))


def placed_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte at which its line begins, row) of every row after the header. Raises InputError as `read_rows` does."""
    problems = []
    with path.open("rb") as handle:
        end = len(handle.readline())
        for number, line in enumerate(handle, start=2):
            place, end = end, end + len(line)
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"it is a {type(row).__name__}")
            except (ValueError, RecursionError) as error:
                problems.append(
                    Problem(
                        str(path),
                        number,
                        "line",
                        short(line.decode("utf-8", "replace")),
                        f"not a JSON object ({error}); re-run the stage",
                    )
                )
                continue
            if not problems:
                yield place, row
    if problems:
        raise InputError(problems)


def rows_at(path: Path, places: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The rows that begin at these bytes, which `placed_rows` gave."""
    with path.open("rb") as handle:
        for place in places:
            handle.seek(place)
            yield json.loads(handle.readline())


def check_headers(path: Path, found: Header, **expected: str) -> None:
    """Compare header fields with what the recipe implies, all differences in one InputError."""
    problems = [
        Problem(
            str(path),
            1,
            name,
            repr(getattr(found, name)),
            f"the recipe gives {value!r}; use the matching recipe or re-run the stage",
        )
        for name, value in expected.items()
        if getattr(found, name) != value
    ]
    if problems:
        raise InputError(problems)


def check_parent(path: Path, found: Header, parent: Path) -> None:
    """Refuse an artefact made from an older version of `parent`. A parent that is not here (another job's) is no error."""
    if parent.exists() and found.parent != file_digest(parent):
        raise InputError(
            Problem(
                str(path),
                1,
                "parent",
                found.parent,
                f"{parent} has changed since; re-run the stage that writes {path.name}",
            )
        )


def is_complete(path: Path, header: Header, fresh: bool) -> bool:
    """Whether the finished artefact at `path` is the one `header` describes.

    Raises InputError when it is finished but another one and `fresh` is not set: it may be paid-for work.
    """
    if fresh or not path.exists():
        return False
    with path.open("rb") as handle:
        first = handle.readline()
    if first == header.to_line().encode():
        return True
    difference = short(header_difference(first, header.to_line().encode()))
    raise InputError(
        Problem(
            str(path), 1, "header", difference, "finished work of another recipe or input; add fresh=true to replace it"
        )
    )


class ArtefactWriter:
    """Writes an artefact so that kill -9 at any byte loses at most the rows not yet flushed.

    Rows go to `PATH.part`. `finish` renames it to PATH, so PATH is always complete. Opening a second time with the
    same header resumes: whole rows are kept, a torn last line is cut off, and `rows_done` says how many are there.
    A `.part` with another header is refused unless `fresh` is set: it holds somebody's paid-for rollouts.
    """

    def __init__(self, path: Path, header: Header, fresh: bool = False):
        self.path = path
        self.part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        line = header.to_line().encode()
        self.rows_done = 0
        if self.part.exists() and not fresh:
            self.rows_done = self._keep_whole_rows(line)
        if self.rows_done == 0:
            self.part.write_bytes(line)
        self._handle = self.part.open("ab")

    def _keep_whole_rows(self, header_line: bytes) -> int:
        with self.part.open("rb+") as handle:
            first = handle.readline()
            if not first.endswith(b"\n"):
                return 0
            if first != header_line:
                raise InputError(
                    Problem(
                        str(self.part),
                        1,
                        "header",
                        short(header_difference(first, header_line)),
                        "unfinished work of another recipe or input; finish it with its own recipe, or add fresh=true to drop it",
                    )
                )
            rows, end = 0, handle.tell()
            while handle.readline().endswith(b"\n"):
                rows, end = rows + 1, handle.tell()
            handle.truncate(end)
        return rows

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows already there, for a stage that resumes."""
        return read_rows(self.part)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows as one write, then fsync. A crash may keep the first of them; a torn last row is cut on resume."""
        lines = b"".join(json_line(row) for row in rows)
        try:
            self._handle.write(lines)
            self._handle.flush()
            os.fsync(self._handle.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._handle.close()  # now, or its buffer would reach the file at some later time
            raise

    def finish(self) -> Path:
        self._handle.close()
        os.replace(self.part, self.path)
        return self.path

    def __enter__(self) -> ArtefactWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file; unless `finish` was called, `.part` stays for a later resume."""
        self._handle.close()


def header_difference(found: bytes, wanted: bytes) -> str:
    try:
        old, new = json.loads(found)[HEADER_KEY], json.loads(wanted)[HEADER_KEY]
    except (ValueError, KeyError, TypeError):
        return found.decode("utf-8", "replace")
    return ", ".join(f"{key}={old.get(key)!r} (now {new[key]!r})" for key in new if old.get(key) != new[key])


def write_atomically(path: Path, text: str) -> None:
    """Write a whole small file; a reader sees the old content or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)
