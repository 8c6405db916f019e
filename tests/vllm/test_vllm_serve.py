"""`nemo-pivotrl serve` of a patient with doctors, and the decode and reward stages over vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vllm_guide import TEXTS, folders
from vllm_world import ROOT, Process

from nemo_pivotrl.backends.reference.guided import GuidedGenerator, GuidedSamplingParams, load_guided
from nemo_pivotrl.config import Doctor
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.llmdoctor.assess import assess
from nemo_pivotrl.llmdoctor.decode import decode
from nemo_pivotrl.llmdoctor.rank import rank
from nemo_pivotrl.tools.serve import command

__all__ = ["folders"]
TIGHT = 1e-5


@pytest.fixture(scope="module")
def recipe_file(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("recipe")
    prompts = root / "prompts.jsonl"
    lines: list[Any] = [{"prompt": text, "beta": {"kind": 0.5 * i}} for i, text in enumerate(TEXTS)]
    lines.append({"messages": [{"role": "user", "content": TEXTS[0]}], "alpha": 0.8})
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "algorithm": "llmdoctor",
        "run_dir": str(root / "run"),
        "num_threads": 1,
        "patient": {"model_name": folders["patient"], "max_total_sequence_length": 128},
        "decode": {
            "prompts": str(prompts),
            "mode": "ratio",
            "max_new_tokens": 20,
            "num_samples": 2,
            "doctors": {"kind": {"path": folders["kind"], "reference": folders["novice"], "beta": 0.7}},
        },
        "vllm": {"kv_cache_gib": 0.06, "max_num_seqs": 16},
    }
    path = root / "r.yaml"
    path.write_text(json.dumps(recipe))
    return str(path)


def test_the_decode_stage_writes_what_the_reference_backend_writes(recipe_file: str, tmp_path: Path) -> None:
    rows = []
    for backend in ("reference", "vllm"):
        recipe = load_recipe(recipe_file, [f"run_dir={tmp_path / backend}", f"patient.backend={backend}"])
        rows.append(list(read_rows(decode(recipe))))
    assert len(rows[0]) == len(rows[1]) == 10
    for theirs, ours in zip(*rows, strict=True):
        assert ours["token_ids"] == theirs["token_ids"] and ours["text"] == theirs["text"]
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=2e-5) and ours["changed"] == theirs["changed"]
        assert ours["tokens"]["mixed_log_prob"] == pytest.approx(theirs["tokens"]["mixed_log_prob"], abs=2e-5)


def test_assess_writes_what_the_reference_backend_writes_and_rank_makes_pairs(recipe_file: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps([{"role": "user", "content": text}]) + "\n" for text in TEXTS))
    arms = {"plain": {}, "kind": {"beta": {"kind": 1.0}}, "best of 2": {"best_of": 2}, "cut": {"top_p": 0.8}}
    given = {
        "assess": {"prompts": str(prompts), "objectives": ["brevity"], "arms": arms, "samples": 2},
        "rank": {"prompts": str(prompts), "objectives": ["brevity"], "answers_per_prompt": 16, "answers_per_pair": 2},
    }
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(json.loads(Path(recipe_file).read_text()) | given))
    rows = []
    for backend in ("reference", "vllm"):
        told = load_recipe(str(recipe), [f"run_dir={tmp_path / backend}", f"patient.backend={backend}"])
        rows.append(list(read_rows(assess(told))))
    longer = "decode.max_new_tokens=100"  # some of these answers end by themselves, and some leave the reference's by rounding
    told = load_recipe(str(recipe), [f"run_dir={tmp_path / 'rank'}", "patient.backend=vllm", longer])
    pairs = [json.loads(line) for line in (rank(told) / "brevity.jsonl").read_text().splitlines()]
    assert pairs and all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
    assert len(rows[0]) == len(rows[1]) == 2 * len(arms) * len(TEXTS)
    for theirs, ours in zip(*rows, strict=True):
        assert ours["text"] == theirs["text"] and ours["scores"] == theirs["scores"]
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=2e-5)
        names = {"patient", "kind", "kind reference"} if ours["arm"] == "kind" else {"patient"}
        assert ours["forwards_per_token"].keys() == theirs["forwards_per_token"].keys() == names
        # in the reference rows wait for the longest of their batch
        assert all(ours["forwards_per_token"][n] <= theirs["forwards_per_token"][n] for n in names)


@pytest.fixture(scope="module")
def server(recipe_file: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    made = Process(tmp_path_factory.mktemp("log") / "server.log", recipe_file)
    try:
        made.wait()
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def open_server(recipe_file: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    made = Process(tmp_path_factory.mktemp("log") / "server.log", recipe_file, "--refit")
    try:
        made.wait()
        yield made
    finally:
        made.kill()


def on(server: Process, folder: Path, *overrides: str) -> list[str]:
    """Overrides of a recipe that decodes by this server."""
    return [f"run_dir={folder}", "patient.backend=vllm", f"vllm.servers=[{server.url}]", *overrides]


def test_decode_and_assess_by_servers_write_what_the_reference_backend_writes(
    open_server: Process, recipe_file: str, tmp_path: Path
) -> None:
    asked = [f"assess.{what}" for what in ("arms={plain: {}, kind: {beta: {kind: 1.0}}}", "objectives=[brevity]")]
    asked.append(f"assess.prompts={json.loads(Path(recipe_file).read_text())['decode']['prompts']}")
    decoded, assessed = [], []
    for told in (
        [f"run_dir={tmp_path / 'reference'}"],
        on(open_server, tmp_path / "servers"),
    ):
        decoded.append(list(read_rows(decode(load_recipe(recipe_file, told)))))
        assessed.append(list(read_rows(assess(load_recipe(recipe_file, [*told, *asked])))))
    assert len(decoded[0]) == len(decoded[1]) == 10
    for theirs, ours in zip(*decoded, strict=True):
        assert ours["token_ids"] == theirs["token_ids"] and ours["finish_reason"] == theirs["finish_reason"]
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=2e-5) and ours["changed"] == theirs["changed"]
        assert ours["tokens"]["mixed_log_prob"] == pytest.approx(theirs["tokens"]["mixed_log_prob"], abs=2e-5)
    for theirs, ours in zip(*assessed, strict=True):
        assert ours["text"] == theirs["text"] and ours["scores"] == theirs["scores"]


def test_rank_by_servers_needs_no_doctors(open_server: Process, recipe_file: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps([{"role": "user", "content": text}]) + "\n" for text in TEXTS))
    asked = [
        "rank.objectives=[brevity]",
        "rank.answers_per_prompt=8",
        "rank.answers_per_pair=2",
        f"rank.prompts={prompts}",
    ]
    told = on(open_server, tmp_path, *asked, "decode.max_new_tokens=100")
    pairs = [
        json.loads(line) for line in (rank(load_recipe(recipe_file, told)) / "brevity.jsonl").read_text().splitlines()
    ]
    assert pairs and all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)


def test_servers_with_other_doctors_or_closed_ones_are_named(
    server: Process, open_server: Process, folders: dict[str, str], recipe_file: str, tmp_path: Path
) -> None:
    other = f"decode.doctors.kind.path={folders['novice']}"
    with pytest.raises(InputError, match=r"(?s)kind\.revision.*start the server with this recipe"):
        decode(load_recipe(recipe_file, on(open_server, tmp_path / "other", other)))
    with pytest.raises(InputError, match=r"(?s)collective_rpc.*serve RECIPE --refit"):
        decode(load_recipe(recipe_file, on(server, tmp_path / "closed")))


def ask(server: Process, **body: Any) -> tuple[int, dict[str, Any]]:
    asked = {
        "model": "guided",
        "max_tokens": 16,
        "temperature": 1.0,
        "logprobs": 0,
        "return_token_ids": True,
        "seed": 3,
        **body,
    }
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def mixed(truth: GuidedGenerator, prompt: list[int], ids: list[int], alpha: float, beta: float) -> list[float]:
    decoding = truth.start([prompt], [GuidedSamplingParams(alpha=alpha, beta={"kind": beta}, max_new_tokens=20)])
    found = []
    for token in ids:
        found.append(float(decoding.guide.mix(decoding.stream.logits()).log_probs[0, token]))
        decoding.stream.feed(torch.tensor([token]))
        decoding.guide.feed(torch.tensor([token]))
    return found


def test_the_server_steers_each_request_by_its_own_weights(server: Process, folders: dict[str, str]) -> None:
    doctors = {"kind": Doctor(path=folders["kind"], reference=folders["novice"])}
    truth = load_guided(folders["patient"], doctors, "ratio", device="cpu")
    prompt = truth.tokenizer.encode(TEXTS[1])
    cases = {
        (1.0, 0.7): {},  # the recipe's own weight
        (1.0, 0.0): {"guidance.alpha": 1.0},
        (0.8, -1.0): {"guidance.alpha": 0.8, "guidance.beta.kind": -1.0},
        (1.0, 2.0): {"guidance.beta.kind": 2},
    }
    for (alpha, beta), wish in cases.items():
        status, answer = ask(server, prompt=prompt, **({"vllm_xargs": wish} if wish else {}))
        assert status == 200, answer
        choice = answer["choices"][0]
        got = choice["logprobs"]["token_logprobs"]
        want = mixed(truth, prompt, choice["token_ids"], alpha, beta)
        if beta == 0.0:  # the patient to the bit, the columns past its vocabulary included
            ids = choice["token_ids"]
            logits = truth.patient(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            want = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        assert want == pytest.approx(got, abs=TIGHT)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"guidance.beta.nobody": 1.0}, "the doctors are kind"),
        ({"guidance.beta.kind": "much"}, "a finite number"),
        ({"guidance.gamma": 1.0}, "unknown"),
        ({"guidance.spans": ["<a>"]}, "in pairs"),
    ],
)
def test_a_bad_request_is_a_400_and_the_server_lives(server: Process, wish: dict[str, Any], said: str) -> None:
    status, answer = ask(server, prompt=[5, 6], vllm_xargs=wish)
    assert status == 400 and said in json.dumps(answer)
    assert ask(server, prompt=[5, 6])[0] == 200


def test_the_server_is_closed_to_trainers_unless_it_was_opened(server: Process) -> None:
    def status(**headers: str) -> int:
        request = urllib.request.Request(server.url + "/collective_rpc", b'{"method": "refit"}', headers, method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        return int(refused.value.code)

    json_body = {"Content-Type": "application/json"}
    assert status(**json_body) == 404
    assert status(**json_body, Host="evil.example") == 400  # a page whose name was pointed at this machine
    assert status(**json_body, Origin="https://evil.example") == 403
    assert status(**{"Content-Type": "text/plain"}) == 415


def test_the_servers_command_says_what_the_recipe_says(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, environment = command(load_recipe(recipe_file), "127.0.0.1", 8000, refit=False)
    flags = dict(pairwise(arguments))
    assert flags["--logprobs-mode"] == "processed_logprobs" and flags["--host"] == "127.0.0.1"
    assert (
        flags["--logits-processors"] == "nemo_pivotrl.backends.vllm.guide:Guide"
        and "VLLM_SERVER_DEV_MODE" not in environment
    )
    assert json.loads(flags["--additional-config"])["nemo_pivotrl"]["beta"] == {"kind": 0.7}
    _, opened = command(load_recipe(recipe_file), "0.0.0.0", 8000, refit=True)
    assert opened["VLLM_SERVER_DEV_MODE"] == "1" and "can replace the weights" in capsys.readouterr().out


def test_two_ranks_draw_the_same_tokens(recipe_file: str, tmp_path: Path) -> None:
    """The patient over two tensor-parallel ranks, the doctors on the first: the answers of one process."""
    single = load_recipe(recipe_file, [f"run_dir={tmp_path / 'one'}", "patient.backend=vllm"])
    one = list(read_rows(decode(single)))
    overrides = [f"run_dir={tmp_path / 'two'}", "patient.backend=vllm", "vllm.tensor_parallel_size=2"]
    done = subprocess.run(
        [sys.executable, "-m", "nemo_pivotrl.cli", "decode", recipe_file, *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = list(read_rows(tmp_path / "two/decoded.jsonl"))
    assert [row["token_ids"] for row in two] == [row["token_ids"] for row in one]
