"""States stored once: pointers give the candidates that they were made from, wherever the run folder lies, and follow no other."""

import pickle
import shutil
from pathlib import Path

import pytest
from support.pointers import pointers, profile_row, store, write_candidates

from nemo_pivotrl.core.artifacts import Header, read_header, read_rows, write_artefact
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Action, Candidate, Message, Profile, ToolCall
from nemo_pivotrl.data.gym_rows import message_of
from nemo_pivotrl.data.states import NAME, candidates_of, moved_reference, open_states, reference

TOOL = {"type": "function", "function": {"name": "find", "description": "", "parameters": {"type": "object"}}}


def candidate(number: int, split: str = "train") -> Candidate:
    state: tuple[Message, ...] = ({"role": "user", "content": f"lone \ud83d {number}"},)
    expected = Action("calls", "so:", (ToolCall("find", '{"n":1}', "c1"),), reasoning="why")
    fields = {"harness": "h", "threshold": 0.5}
    return Candidate(f"c{number}", "t", "k", split, 1, 0, state, (TOOL,), expected, 3, fields)  # type: ignore[arg-type]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    made = [candidate(0), candidate(1, "validation"), candidate(2)]
    return write_candidates(tmp_path / "run/candidates.jsonl", made)


def test_a_candidate_comes_back_from_its_pointer_with_the_experts_reasoning_and_call_ids(written: Path) -> None:
    found = list(candidates_of(written))
    assert found == [candidate(0), candidate(1, "validation"), candidate(2)]
    assert message_of(found[0].expected) == message_of(candidate(0).expected)
    assert [c.candidate_id for c in candidates_of(written, "validation")] == ["c1"]
    assert b"lone" not in written.read_bytes()


def test_candidates_of_one_trajectory_share_its_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2
    (tmp_path / "run").mkdir()
    target = tmp_path / "run" / NAME
    row = {"trajectory_id": "t", "messages": messages, "tools": [], "fields": {}}
    write_artefact(target, Header("trajectories", "c"), [row])
    path = tmp_path / "run/candidates.jsonl"
    own = pointers([candidate(0), candidate(1)])
    rows = [row | {"trajectory": 0, "turn": turn} for row, turn in zip(own, (1, 3), strict=True)]
    write_artefact(path, Header("candidates", "c", extra=reference(target, path)), rows)
    first, second = map(pickle.loads(pickle.dumps(open_states(path))).candidate, rows)
    assert first.messages[0] is second.messages[0] and first.tools is second.tools
    assert [m["content"] for m in second.messages] == ["q", "a", "q"] and second.expected == Action("message", "a")


def test_a_run_folder_can_be_moved_and_an_artefact_below_it_points_up(written: Path, tmp_path: Path) -> None:
    below = tmp_path / "run/round-02/candidates.jsonl"
    below.parent.mkdir()
    header = read_header(written, "candidates")
    own = Header("candidates", "c", extra=moved_reference(header, written, below))
    write_artefact(below, own, list(read_rows(written))[1:])
    moved = shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    for path, count in ((moved / "candidates.jsonl", 3), (moved / "round-02/candidates.jsonl", 2)):
        assert len(list(candidates_of(path))) == count
    assert open_states(moved / "round-02/candidates.jsonl").path == moved / NAME


def test_a_lost_a_damaged_and_another_versions_file_are_refused_with_a_remedy(written: Path) -> None:
    stored, whole = written.with_name(NAME), written.with_name(NAME).read_bytes()
    stored.unlink()
    with pytest.raises(InputError, match=r"trajectories\.jsonl: file: found no such file\n(?s:.*)extract RECIPE again"):
        open_states(written)
    stored.write_bytes(whole.replace(b"lone", b"lorn", 1))
    with pytest.raises(InputError, match="not what was written"):
        open_states(written)
    store([candidate(5), candidate(6), candidate(7)], written)
    with pytest.raises(InputError, match=r"digest: found (?s:.*)candidates\.jsonl points into the version"):
        next(candidates_of(written))
    stored.write_bytes(whole)
    assert len(list(candidates_of(written))) == 3


@pytest.mark.parametrize("change", [{"trajectory": 3}, {"turn": 2}, {"turn": "x"}, {"trajectory": None}])
def test_a_pointer_to_nothing_names_its_row(written: Path, change: dict[str, object]) -> None:
    rows = [row | change for row in read_rows(written)]
    write_artefact(written, read_header(written, "candidates"), rows)
    with pytest.raises(InputError, match=r"trajectory, turn: found (?s:.*)points to no turn of"):
        next(candidates_of(written))


@pytest.mark.parametrize(
    ("stage", "command"), [("candidates", "extract"), ("profiles", "profile"), ("pivots", "select")]
)
def test_artefacts_that_hold_their_states_are_refused_with_the_command_that_makes_new_ones(
    tmp_path: Path, stage: str, command: str
) -> None:
    path = write_artefact(tmp_path / "old.jsonl", Header(stage, "c", format=1), [{"provenance": {"candidate_id": "c"}}])
    for read in (open_states, lambda p: list(read_rows(p)), lambda p: read_header(p, stage)):
        with pytest.raises(InputError, match=rf"format: found 1\n(?s:.*)nemo-pivotrl {command} RECIPE fresh=true"):
            read(path)


def test_a_profiles_row_is_its_candidates_row_with_samples_and_rate() -> None:
    samples = ({"reward": 1.0}, {"reward": 0.0})
    row = profile_row(Profile(candidate(0), samples, 8, 100), 4)
    (own,) = pointers([candidate(0)])
    assert (
        row.items() >= (own | {"trajectory": 4, "pass_rate": 0.5, "pass_rate_total": 2, "pass_rate_passed": 1}).items()
    )
    failed = profile_row(Profile(candidate(0), samples, 8, 100, "judge"), 4)
    assert failed["samples"] == [] and failed["profile"]["failure"] == "judge" and "pass_rate" not in failed
