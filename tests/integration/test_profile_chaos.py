"""A profile over servers that drop, stall, cut, refuse, miscount and babble: what it ends with is what sound servers give."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.http_stub import StandIn
from support.processes import PATIENCE_S, wait_for
from support.recipes import recipe_at
from support.stages import said

from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.vllm.requests import SEEDS
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Sample
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.select import select_pivots

Policy = Callable[[dict[str, Any]], dict[str, Any]]
FAULTY = ["audit.before_profile=false", "profile.max_failure_share=1", "profile.max_retries=1"]
QUICK = [
    "vllm.max_retries=3",
    "vllm.backoff_s=0.002",
    "vllm.timeout_s=1.2",  # a server that hangs does so for longer
    "vllm.concurrency=6",
    "vllm.eject_after=50",
]


@pytest.fixture(scope="module")
def drawn(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[tuple[int, ...], int], Sample]:
    """What the start policy draws for every prompt and seed of the profile: the servers' answers."""
    folder = tmp_path_factory.mktemp("drawn") / "run"
    shutil.copytree(trained, folder)
    (folder / "profiles.jsonl").unlink()
    found: dict[tuple[tuple[int, ...], int], Sample] = {}
    load = loading.load_sampler

    def noting(*arguments: Any) -> Any:
        sampler = load(*arguments)
        infer = sampler.infer

        def noted(prompts: Any, seeds: Any, *rest: Any) -> Any:
            groups = infer(prompts, seeds, *rest)
            for prompt, own, group in zip(prompts, seeds, groups, strict=True):
                found.update({(tuple(prompt), seed & SEEDS): s for seed, s in zip(own, group, strict=True)})
            return groups

        sampler.infer = noted
        return sampler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_sampler", noting)
        profile(recipe_at(folder, "profile.curtail=none", "audit.before_profile=false"))
    return found


def answering(drawn: dict[tuple[tuple[int, ...], int], Sample]) -> Policy:
    def policy(body: dict[str, Any]) -> dict[str, Any]:
        sample = drawn[tuple(body["prompt"]), body["seed"]]
        shown = {"tokens": [f"token_id:{i}" for i in sample.token_ids], "token_logprobs": list(sample.log_probs)}
        choice = {"index": 0, "text": "", "token_ids": list(sample.token_ids), "logprobs": shown}
        return {"choices": [choice | {"finish_reason": sample.finish_reason}]}

    return policy


@pytest.fixture
def served(trained: Path, tmp_path: Path, drawn: Any) -> Iterator[Callable[..., tuple[Path, list[StandIn]]]]:
    """A run directory and servers with these faults."""
    made: list[StandIn] = []

    def begin(name: str, *faults: Any) -> tuple[Path, list[StandIn]]:
        folder = tmp_path / name
        shutil.copytree(trained, folder)
        (folder / "profiles.jsonl").unlink()
        servers = [StandIn(fault, policy=answering(drawn)) for fault in faults]
        made.extend(servers)
        return folder, servers

    yield begin
    for one in made:
        one.close()


def at(folder: Path, servers: list[StandIn], *overrides: str) -> Any:
    urls = ",".join(server.url for server in servers)
    return recipe_at(folder, "policy.sampler=vllm", f"vllm.servers=[{urls}]", *QUICK, *FAULTY, *overrides)


def chaos(policy: Policy, seed: int, share: float, doomed: set[int]) -> Callable[[dict[str, Any], int], Any]:
    """Requests go wrong in one of many ways, by chance; those with a doomed seed always do."""
    rng, lock, done = random.Random(seed), threading.Lock(), Counter[str]()

    def fault(body: dict[str, Any], number: int) -> Any:
        with lock:
            if body["seed"] not in doomed and rng.random() > share:
                return None
            kind = rng.choice(
                ["drop", "hang", "cut", "500", "503", "count", "other ids", "garbage", "nan", "deep", "empty"]
            )
            done[kind] += 1
        whole = policy(body)
        choice = whole["choices"][0]
        if kind == "cut":
            return 200, {}, json.dumps(whole).encode()[: rng.randrange(5, 60)]
        if kind in ("500", "503"):
            return int(kind), {"retry-after": "0.01"}, b"the engine is gone"
        if kind == "count":
            return 200, {}, {"choices": whole["choices"] * rng.choice([0, 2])}
        if kind == "other ids":
            return 200, {}, {"choices": [choice | {"token_ids": choice["token_ids"][:-1]}]}
        if kind == "garbage":
            return 200, {}, rng.randbytes(200)
        if kind == "nan":
            logs = {**choice["logprobs"], "token_logprobs": [float("nan")] * len(choice["token_ids"])}
            return 200, {}, {"choices": [choice | {"logprobs": logs}]}
        if kind == "deep":
            return 200, {}, b"[" * 100_000
        return kind if kind in ("drop", "hang") else (200, {}, b"")

    fault.done = done  # type: ignore[attr-defined]
    return fault


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["candidate_id"]: row for row in read_rows(folder / "profiles.jsonl")}


def test_chaos_ends_with_the_clean_runs_rows_and_no_failure_is_a_zero(served: Any, drawn: Any) -> None:
    folder, servers = served("clean", None, None)
    profile(at(folder, servers, "vllm.timeout_s=60"))
    clean = rows_of(folder)
    assert len({len(row["samples"]) for row in clean.values()}) > 1, "it is curtailed"
    assert {seed for one in servers for seed in [b["seed"] for b in one.asked]} <= {seed for _, seed in drawn}
    asked = Counter(b["seed"] for one in servers for b in one.asked)
    assert asked.total() == len(asked) == sum(len(row["samples"]) for row in clean.values()), "nothing is drawn twice"
    rng = random.Random(1)
    doomed = set(rng.sample(sorted(asked), 12))
    faults = [chaos(answering(drawn), seed, 0.25, doomed) for seed in (1, 2, 3)]
    folder, servers = served("chaos", *faults)
    profile(at(folder, servers))
    rows = rows_of(folder)
    assert all(len(f.done) == 11 for f in faults[:1]), "every kind of fault has happened"
    failed = {name for name, row in rows.items() if row["profile"]["failure"]}
    assert 0 < len(failed) <= 12
    for name, row in rows.items():
        if name in failed:
            assert row["samples"] == [] and "pass_rate" not in row
            assert row["profile"]["failure"].startswith("sampler_")
            assert [x["text"] for k, x in row["profile"]["kept"]] == [
                clean[name]["samples"][k]["text"] for k, _ in row["profile"]["kept"]
            ]
        else:
            assert said(row) == said(clean[name]) and row["pass_rate"] == clean[name]["pass_rate"]
    zeros = {name for name, row in rows.items() if row.get("pass_rate") == 0.0}
    assert zeros <= {name for name, row in clean.items() if row["pass_rate"] == 0.0}
    folder_2 = folder  # the servers are mended: what had failed is all that is drawn now
    for server in servers:
        server.fault = None
        server.asked.clear()
    again = at(folder_2, servers, "profile.retry_failed=true")
    profile(again)
    for name, row in rows_of(folder).items():  # what is known of a candidate may settle it with fewer than a whole wave
        assert said(row) == said(clean[name])[: len(row["samples"])] and not row["profile"]["failure"]
        assert name in failed or len(row["samples"]) == len(clean[name]["samples"])
    drawn_now = sum(len(s.asked) for s in servers)
    most = sum(len(clean[n]["samples"]) - len(rows[n]["profile"]["kept"]) for n in failed)
    assert 0 < drawn_now <= most, "not one rollout twice"
    select_pivots(again, True)


def test_a_straggler_holds_up_nothing_but_itself(served: Any, drawn: Any) -> None:
    """One request of the first trajectory hangs; meanwhile everything else is drawn, and written."""
    first = next(iter(drawn))
    released, held = threading.Event(), threading.Event()

    def stall(body: dict[str, Any], number: int) -> None:
        if tuple(body["prompt"]) == first[0] and not held.is_set():
            held.set()
            released.wait(PATIENCE_S)

    folder, servers = served("slow", stall)
    recipe = at(folder, servers, f"vllm.timeout_s={2 * PATIENCE_S}", "vllm.concurrency=8")
    done: list[Any] = []
    run = threading.Thread(target=lambda: done.append(profile(recipe)))
    run.start()
    assert held.wait(PATIENCE_S)
    journal, candidates = folder / "profiles.jsonl.journal", len({p for p, _ in drawn})

    def finished() -> int:
        """Candidates whose rows are in the journal."""
        lines = re.findall(rb"^\d+ d (\d+) \d+ \d+ \d+$", journal.read_bytes(), re.M)
        return sum(map(int, lines))

    wait_for(lambda: finished() >= candidates - 8, "the others' rows")
    others = finished()
    released.set()
    run.join(PATIENCE_S)
    assert candidates - 8 <= others < candidates and done, "all but the straggler's own trajectory are there"


def test_servers_that_all_go_away_stop_the_run_and_the_same_command_goes_on(served: Any, drawn: Any) -> None:
    folder, servers = served("clean", None)
    profile(at(folder, servers, "vllm.timeout_s=60"))
    clean = rows_of(folder)

    def leaving(server: list[StandIn]) -> Callable[[dict[str, Any], int], Any]:
        def fault(body: dict[str, Any], number: int) -> Any:
            if number == 120:
                server[0].away = True
            return "drop" if server[0].away else None

        return fault

    here: list[StandIn] = []
    folder, servers = served("away", leaving(here))
    here.append(servers[0])
    with pytest.raises(InputError, match=r"none of .* for|could not be judged"):
        profile(at(folder, servers, "vllm.timeout_s=0.3"))
    assert not (folder / "profiles.jsonl").exists()
    servers[0].away, servers[0].fault = False, None
    before = len(servers[0].asked)
    profile(at(folder, servers))
    assert {name: said(row) for name, row in rows_of(folder).items()} == {n: said(r) for n, r in clean.items()}
    total = sum(len(row["samples"]) for row in clean.values())
    assert len(servers[0].asked) - before <= total - 100, "most of what was drawn before is not drawn again"
