"""Every recipe of a Nemotron-3 model starts: extract to profile, with the model's own template and a tiny model of its kind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipes import ROOT
from support.template_cases import template, tokenizer_with
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.loading import load_sampler
from nemo_pivotrl.config import Generation, Megatron, Policy, Recipe, Vllm
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.artifacts import read_header, read_rows
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.verifier_audit import audit

RECIPES = sorted((ROOT / "recipes/pivotrl").glob("pivotrl-nemotron-3-*.yaml"))
TASKS = 4


@pytest.fixture(scope="module")
def super_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid of Mamba, attention and dense layers with the chat template of Nemotron 3 Super, thinking on."""
    folder = tmp_path_factory.mktemp("super") / "policy"
    tokenizer = tokenizer_with(template("nemotron_3_super"))
    torch.manual_seed(1)
    config = NemotronHConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hybrid_override_pattern="M*-M",
        ssm_state_size=4,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=16,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    NemotronHForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def item(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": text}


def row(domain: str, task: int) -> dict[str, Any]:
    """A pivot row of a domain, as NVIDIA publishes them."""
    name, argument = {"search": ("web_search", "query"), "swe": ("bash", "command")}.get(
        domain, ("find_order", "order")
    )
    flag = {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
    properties = {argument: {"type": "string"}, "again": flag, "limit": {"type": "integer"}}
    tool = {
        "type": "function",
        "name": name,
        "parameters": {"type": "object", "properties": properties},
        "strict": False,
    }
    arguments = {argument: f"where is number {task}", "again": None, "limit": task}
    call = {"type": "function_call", "name": name, "arguments": json.dumps(arguments)}
    history = [
        item("system", "Help people."),
        item("user", f"Question {task} of {domain}, which is about the things of day {task * 7}?"),
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Look first."}]},
        {**call, "call_id": "c1", "arguments": json.dumps({argument: f"something else {task}", "again": True})},
        {"type": "function_call_output", "call_id": "c1", "output": f"nothing on shelf {task * 11}"},
    ]
    made: dict[str, Any] = {
        "trajectory_id": f"{domain}-{task}",
        "responses_create_params": {"input": history, "tools": [tool]},
        "expected_action": call,
    }
    if domain == "conversational" and task % 2:
        made["expected_action"] = {"type": "message", "content": f"It stands on shelf {task}."}
    if domain == "terminal":
        answer = {"analysis": "a", "plan": "p", "commands": [{"keystrokes": f"ls {task}\n", "duration": 0.1}]}
        made["responses_create_params"] = {"input": [*history[:2]], "tools": []}
        made["expected_answer"], made["metadata"] = json.dumps(answer), {"harness": "terminus_2"}
        made["threshold"] = 0.9
        del made["expected_action"]
    return made


def started(file: Path, model: Path, folder: Path) -> Recipe:
    """The recipe on this machine: its data, template, parser, verifier and settings, a tiny model in place of 120B."""
    domain = next(name for name in ("conversational", "search", "swe", "terminal") if name in file.stem)
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row(domain, task)) + "\n" for task in range(TASKS)), encoding="utf-8")
    here = [
        "policy.backend=reference",
        "policy.sampler=backend",
        "policy.device=cpu",
        "vllm.servers=[]",
        "num_threads=1",
    ]
    small = ["profile.num_generations=4", "policy.generation.max_new_tokens=6", "extract.validation_share=0.25"]
    return load_recipe(
        str(file),
        [f"run_dir={folder}/run", f"policy.model_name={model}", f"extract.trajectories=[{source}]", *here, *small],
    )


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem.removeprefix("pivotrl-nemotron-3-"))
def test_a_nemotron_3_recipe_starts_with_its_own_template(file: Path, super_model: Path, tmp_path: Path) -> None:
    recipe = started(file, super_model, tmp_path)
    extract(recipe)
    audit(recipe)
    found = json.loads((tmp_path / "run/audit.json").read_text())["round_trip"]
    assert found == {"parser": "qwen_coder", "tried": TASKS, "lost": {}, "refused": {}}
    rows = list(read_rows(profile(recipe)))
    assert len(rows) == TASKS and all(r["profile"]["failure"] is None and len(r["samples"]) > 0 for r in rows)
    assert read_header(tmp_path / "run/profiles.jsonl", "profiles").chat_template


def test_there_are_ten_of_them() -> None:
    assert len(RECIPES) == 10


def test_what_the_hybrid_samples_with_its_cache_has_the_log_probabilities_of_the_whole_sequence(
    super_model: Path,
) -> None:
    generation = Generation(max_new_tokens=9)
    backend = load_sampler(Policy(model_name=str(super_model), device="cpu", generation=generation), Megatron(), Vllm())
    prompts, seeds = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]], [[1, 2, 3], [4, 5]]
    drawn = [(p, s) for p, group in enumerate(backend.infer(prompts, seeds, frozenset([3]), generation)) for s in group]
    tokens = [s.token_ids for _, s in drawn]
    batch = TokenBatch([prompts[p] for p, _ in drawn], range(len(drawn)), tokens, {})
    for (_, sample), scored in zip(drawn, backend.get_inference_log_probs(batch), strict=True):
        assert torch.allclose(torch.tensor(sample.log_probs), scored[: len(sample.log_probs)].float(), atol=1e-5)
