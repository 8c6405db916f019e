"""plan: shapes, memory, layouts and costs by arithmetic, against published numbers and cases computed by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.recipes import ROOT

from nemo_pivotrl import cli
from nemo_pivotrl.backends.megatron.lora_mapping import stage_adapters
from nemo_pivotrl.config import Cluster, Generation, Lora, Megatron, Plan as Told, Policy, Recipe
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.sizing.architecture import Architecture, read_architecture
from nemo_pivotrl.sizing.flops import active_parameters, cache_bytes, forward_flops, model_bytes
from nemo_pivotrl.sizing.known_models import PUBLISHED, published
from nemo_pivotrl.sizing.memory import Layout, MicroBatch, activation_bytes, layout_of, stage_parameters, state_bytes
from nemo_pivotrl.tools.plan import Verdict, plan
from nemo_pivotrl.tools.plan_costs import pivotrl_costs, step_tokens

SUPER = "NVIDIA-Nemotron-3-Super-120B-A12B-BF16"
RECIPES = ROOT / "recipes/pivotrl"
PUBLISHED_LAYOUTS = {  # spec: the hardware is the publisher's, but for small.yaml, which names none
    "nemotron-3-super-120b-a12b-64n8g-tp8cp16ep8-swe": ("b200", 256, 2),
    "nemotron-3-super-120b-a12b-20n8g-tp8cp8ep16-swe": ("h100", 128, 2),
    "nemotron-3-super-120b-a12b-8n8g-tp8cp4ep16-swe": ("b200", 32, 1),
    "qwen3-30b-a3b-thinking-16n8g-tp2pp2cp4ep8-swe": ("h100", 64, 4),
}


def shape(name: str) -> Architecture:
    found = published(name)
    assert found is not None
    return found[0]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-2-7b-hf", 6_738_415_616),
        ("Llama-3.1-8B-Instruct", 8_030_261_248),
        ("tulu-2-70b", 68_976_648_192),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-30B-A3B-Thinking-2507", 30_532_122_624),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 31_577_937_344),
    ],
)
def test_a_published_shape_has_as_many_parameters_as_its_checkpoint(name: str, parameters: int) -> None:
    a, m = shape(name), Megatron(moe_freeze_router=False)
    assert model_bytes(a, 1, 1) == parameters
    assert stage_parameters(a, m, layout_of(m, 1), 0).all == parameters  # their vocabularies need no padding


def test_active_parameters_are_those_in_the_models_names() -> None:
    tables = {name: 2 * shape(name).vocab_size * shape(name).hidden_size for name in PUBLISHED}
    qwen, nemotron = "Qwen3-30B-A3B-Thinking-2507", SUPER
    assert active_parameters(shape(qwen)) + tables[qwen] == pytest.approx(3.35e9, rel=0.01)
    assert active_parameters(shape(nemotron)) + tables[nemotron] == pytest.approx(12.7e9, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_is_what_transformers_reads_from_its_config(name: str, tmp_path: Path) -> None:
    import transformers

    fields: dict[str, Any] = {k: v for k, v in PUBLISHED[name][1].items() if k != "model_type"}
    kinds = {"llama": "Llama", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "nemotron_h": "NemotronH"}
    getattr(transformers, kinds[PUBLISHED[name][1]["model_type"]] + "Config")(**fields).save_pretrained(tmp_path)
    assert read_architecture(tmp_path) == shape(name)


def test_a_name_that_is_not_known_gives_the_ones_that_are() -> None:
    with pytest.raises(InputError, match=r"(?s)policy\.model_name.*models/nobody.*Qwen3-8B"):
        plan(Recipe(policy=Policy(model_name="models/nobody")))


def test_a_models_bytes_over_a_layout_by_hand() -> None:
    m = Megatron(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=4)
    a, layout = shape("Qwen3-30B-A3B-Thinking-2507"), layout_of(m, 16)
    assert layout == Layout(tp=2, pp=1, cp=1, dp=8, ep=4, etp=1, expert_dp=4, sp=2)
    experts = 48 * 128 // 4 * 3 * 2048 * 768
    attention = 2048 * (2 * 4096 + 2 * 512) // 2 + 2 * 128
    dense = 48 * (attention + 2 * 2048) + 2048 + 2 * 151936 // 2 * 2048  # 151,936 is 2 x 593.5 x 128: padded
    dense += 2 * 64 * 2048
    count = stage_parameters(a, m, layout, 0)
    assert (count.experts, count.dense, count.frozen) == (experts, dense, 48 * 128 * 2048)
    state = state_bytes(count, m, layout)
    assert state.weights == 2 * count.all and state.gradients == 4 * (experts + dense)
    assert state.optimizer == 12 * experts // 4 + 12 * dense // 8 and state.step == 0
    half = state_bytes(count, replace(m, grad_reduce_in_fp32=False), layout)
    assert half.gradients == 2 * (experts + dense) and half.step == 4 * (experts // 4 + dense // 8)


def test_activations_fall_with_every_cut_that_should_make_them_fall() -> None:
    a, batch = shape(SUPER), MicroBatch(131072, 131072, 1024)

    def kept(**changes: Any) -> int:
        m = Megatron(**{"tensor_model_parallel_size": 8, "sequence_parallel": True, "recompute": "full", **changes})
        return activation_bytes(a, m, layout_of(m, 256), 0, batch, "te", 1).held

    whole = kept(context_parallel_size=8)
    norm = 131072 // 8 // 8 * 4096 * 2  # the last norm's input; and the hidden states that are asked for
    assert whole == 88 * norm + norm + 1024 * 4096 * 2
    assert kept(context_parallel_size=16) < 0.52 * whole
    assert kept(context_parallel_size=8, sequence_parallel=False) > 4 * whole
    assert kept(context_parallel_size=8, recompute="selective") > 10 * whole


@pytest.mark.parametrize("name", PUBLISHED_LAYOUTS)
def test_a_published_layout_fits(name: str) -> None:
    gpu, ranks, dp = PUBLISHED_LAYOUTS[name]
    recipe = load_recipe(str(RECIPES / f"pivotrl-{name}.yaml"))
    verdict = plan(recipe)
    assert verdict.good and recipe.cluster.gpu == gpu
    assert layout_of(recipe.megatron, ranks).dp == dp and f"DP {dp}" in verdict.memory[0].layout
    assert not recipe.megatron.grad_reduce_in_fp32 and recipe.megatron.recompute == "full"


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    path = str(RECIPES / "pivotrl-nemotron-3-super-120b-a12b-8n8g-tp8cp4ep16-swe.yaml")
    verdict = plan(load_recipe(path, ["cluster.gpu=h100"]))
    train = verdict.memory[0]
    assert not verdict.good and not train.fits and train.peak - train.limit == pytest.approx(13.3, abs=0.3)
    assert any("cluster.num_nodes=12" in r for r in train.remedies) and not any("fp32" in r for r in train.remedies)
    verdict = plan(load_recipe(path, ["cluster.gpu=h100", "megatron.grad_reduce_in_fp32=true"]))
    assert any(r.startswith("megatron.expert_model_parallel_size=32") for r in verdict.memory[0].remedies)


def test_without_recompute_the_remedy_is_to_recompute() -> None:
    path = str(RECIPES / "pivotrl-nemotron-3-super-120b-a12b-20n8g-tp8ep16-swe-shared.yaml")
    verdict = plan(load_recipe(path, ["megatron.recompute=selective"]))
    assert verdict.memory[0].remedies[0].startswith("megatron.recompute=full: 62.")


@pytest.mark.parametrize(
    ("changes", "field", "remedy"),
    [
        (["megatron.context_parallel_size=32"], "context_parallel_size", "a rank's Mamba heads, 128 / 8"),
        (["megatron.tensor_model_parallel_size=16"], "tensor_model_parallel_size", "Mamba groups, 8"),
        (["megatron.expert_model_parallel_size=24"], "expert_model_parallel_size", "experts, 512"),
        (["megatron.pipeline_model_parallel_size=3"], "pipeline_model_parallel_size", "layers, 88"),
        (["megatron.sequence_parallel=false"], "sequence_parallel", "trains experts"),
        (["megatron.sequence_packing=true"], "sequence_packing", "Mamba state"),
        (["cluster.generation_nodes=64"], "cluster.generation_nodes", "leave nodes"),
        (["policy.generation.max_new_tokens=131072"], "max_new_tokens", "room for a prompt"),
        (["megatron.fp8=hybrid", "megatron.fp8_recipe=mxfp8", "cluster.gpu=h100"], "fp8_recipe", "Blackwell"),
        (["megatron.fp8=hybrid", "cluster.gpu=a100"], "fp8", "needs Hopper"),
        (["grpo.num_prompts_per_step=1", "grpo.num_minibatches=2"], "num_minibatches", "at most"),
    ],
)
def test_a_layout_that_may_not_be_is_named(changes: list[str], field: str, remedy: str) -> None:
    path = str(RECIPES / "pivotrl-nemotron-3-super-120b-a12b-64n8g-tp8cp16ep8-swe.yaml")
    verdict = plan(load_recipe(path, changes))
    assert not verdict.good and not verdict.memory
    assert any(field in p.field and remedy in p.remedy for p in verdict.problems), verdict.problems


def test_flops_and_caches_by_hand() -> None:
    a = shape("Llama-3.1-8B-Instruct")
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    assert active_parameters(a) == matrices
    want = 100 * (2 * matrices + 32 * 4 * 4096 * 50) + 2 * 10 * 4096 * 128256
    assert forward_flops(a, 100, 50, 10) == want
    assert cache_bytes(a, 1) == (32 * 2 * 8 * 128 * 2, 0) and cache_bytes(a, 16)[0] == 32 * 2 * 128 * 2
    # of a sequence: states of 40 Mamba layers in float32 and three inputs of their convolution
    token, sequence = cache_bytes(shape(SUPER), 4)
    assert (token, sequence) == (8 * 2 * 128 * 2, 40 * (4 * 8192 * 128 + 2 * 10240 * 3) // 4)


def test_adapters_by_hand() -> None:
    lora = Lora(enabled=True, r=8)
    llama = shape("Llama-2-7b-hf")
    assert stage_adapters(llama, lora, 1, range(32)) == 19_988_480  # as peft prints for this model
    q, o = (replace(lora, target_modules=(name,)) for name in ("q_proj", "o_proj"))
    assert stage_adapters(llama, q, 4, range(2)) == 2 * 8 * (4096 + 1024)  # A whole, a quarter of B
    assert stage_adapters(llama, o, 4, range(2)) == 2 * 8 * (1024 + 4096)  # a quarter of A, B whole


def told(**changes: Any) -> Recipe:
    numbers = {"candidates": 500, "mean_prompt_tokens": 100, "mean_response_tokens": 10, "pivots_per_trajectory": 2}
    numbers["rollout_share"] = 1.0
    policy = Policy(model_name="Qwen3-8B", max_total_sequence_length=400, generation=Generation(max_new_tokens=20))
    recipe = Recipe(policy=policy, cluster=Cluster(gpus_per_node=1), plan=Told(**{**numbers, **changes}))
    return replace(recipe, grpo=replace(recipe.grpo, num_prompts_per_step=4, num_generations_per_prompt=3))


def test_a_colocated_engine_takes_its_share_beside_the_trainer() -> None:
    recipe = load_recipe(str(RECIPES / "pivotrl-qwen3-8b-1n8g-tp2-conversational.yaml"))
    (fits,) = [m for m in plan(recipe).memory if m.phase == "rollouts"]
    greedy = load_recipe(
        str(RECIPES / "pivotrl-qwen3-8b-1n8g-tp2-conversational.yaml"), ["vllm.gpu_memory_utilization=0.8"]
    )
    (full,) = [m for m in plan(greedy).memory if m.phase == "rollouts"]
    assert fits.fits and not full.fits
    assert full.peak == pytest.approx(0.8 * 79.1 + full.parts["the trainer beside it"], rel=0.01)
    assert full.parts["the trainer beside it"] == pytest.approx(34.3, abs=0.1)
    assert any("vllm.gpu_memory_utilization=0.5" in remedy for remedy in full.remedies)


def test_tokens_of_a_step_by_hand() -> None:
    # two trajectories with two pivots each: trunks of 2 * 2 / 3 means, six answers on each
    assert step_tokens(told()) == pytest.approx((12 * 110, 2 * (100 * 4 / 3 + 60)))
    short = replace(told(), policy=replace(told().policy, train_micro_batch_tokens=160))
    assert step_tokens(short)[1] == pytest.approx(2 * (3 * 100 * 4 / 3 + 60))  # room for two answers beside a trunk
    alone = replace(told(), grpo=replace(told().grpo, keep_together=1.0))
    assert step_tokens(alone)[1] == pytest.approx(4 * (100 + 30))
    off = replace(told(), policy=replace(told().policy, prefix_sharing=False))
    assert step_tokens(off) == (1320.0, 1320.0)


def test_the_cost_of_profiling_by_hand() -> None:
    recipe = told(rollouts_per_gpu_hour=100.0, rollout_share=0.25, gpu_hour_price=2.0)
    cost = pivotrl_costs(recipe, shape("Qwen3-8B"))[0]
    assert cost.figures["rollouts at most"] == 8000 and cost.figures["rollouts expected"] == 2000
    assert (cost.gpu_hours, cost.price) == (20.0, 40.0)
    assert cost.figures["prompt tokens, each prompt once"] == 50_000
    assert cost.figures["tokens generated"] == 20_000
    assert cost.figures["GPU-hours at the public sweep's 351 rollouts a GPU-hour"] == pytest.approx(2000 / 351)


def test_curtailed_profiling_is_expected_to_draw_fewer() -> None:
    recipe = told(rollout_share=0.0, rollouts_per_gpu_hour=100.0)
    settings = replace(recipe.profile, control_share=0.0, min_wave=1, num_generations=4, prior=(1.0, 1.0))
    recipe = replace(recipe, profile=settings, select=replace(recipe.select, lambda_diff=0.5))
    found = pivotrl_costs(recipe, shape("Qwen3-8B"))[0].figures
    # kept: one success of four. Every number of successes is equally likely, so two at once have 1/3; FSS and SFS, 1/12 each, end
    # at the third; all else is open to the last
    assert found["rollouts at most"] == 2000
    chances = {2: 1 / 3, 3: 1 / 6, 4: 1 / 2}
    assert found["rollouts expected"] == pytest.approx(500 * sum(n * p for n, p in chances.items()))
    all_of_them = replace(recipe, profile=replace(settings, curtail="none"))
    assert pivotrl_costs(all_of_them, shape("Qwen3-8B"))[0].figures["rollouts expected"] == 2000


def test_estimated_rollouts_take_longer_for_longer_answers_and_larger_models() -> None:
    def hours(model: str, **changes: Any) -> float:
        return pivotrl_costs(told(**changes), shape(model))[0].gpu_hours

    assert hours("Qwen3-8B") < hours("Qwen3-8B", mean_response_tokens=40) < hours("Qwen3-8B", decode_efficiency=0.05)
    assert hours("Qwen3-1.7B") < hours("Qwen3-8B")


def test_candidates_are_counted_in_the_artefact(tmp_path: Path) -> None:
    (tmp_path / "candidates.jsonl").write_text("{}\n" * 8)
    recipe = replace(told(candidates=0), run_dir=str(tmp_path))
    cost = pivotrl_costs(recipe, shape("Qwen3-8B"))[0]
    assert (cost.unit, cost.figures["candidates"]) == ("in all", 7)  # and a header
    nothing = pivotrl_costs(replace(recipe, run_dir=str(tmp_path / "other")), shape("Qwen3-8B"))[0]
    assert nothing.unit == "of 1,000 candidates"


def test_the_command_prints_tables_and_json_and_says_by_its_code_what_it_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(RECIPES / "pivotrl-nemotron-3-super-120b-a12b-20n8g-tp8cp8ep16-swe.yaml")
    assert cli.main(["plan", path]) == 0
    text = capsys.readouterr().out
    assert "fits: train needs 45." in text and "huggingface.co/nvidia/" in text and "plan.train_mfu=0.2" in text
    assert cli.main(["plan", path, "--json", "megatron.grad_reduce_in_fp32=true", "plan.reserve_gib=20"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["good"] and not found["memory"][0]["fits"] and found["memory"][1]["fits"]
    assert found["models"][0]["parameters"] == 120_668_687_360 and found["memory"][0]["remedies"]
    assert cli.main(["plan", path, "megatron.context_parallel_size=7"]) == 2
    assert "NOT POSSIBLE: megatron.tensor_model_parallel_size: 128 processes" in capsys.readouterr().out


def test_planning_imports_nothing_heavy() -> None:
    path = str(RECIPES / "pivotrl-nemotron-3-super-120b-a12b-20n8g-tp8cp8ep16-swe.yaml")
    program = (
        "import sys; from nemo_pivotrl import cli; code = cli.main(['plan', sys.argv[1], 'plan.rollout_share=0.5'])\n"
        "assert not {'torch', 'numpy', 'transformers', 'megatron'} & sys.modules.keys()\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_vllm_must_hold_one_whole_sequence() -> None:
    path = str(RECIPES / "pivotrl-nemotron-3-super-120b-a12b-20n8g-tp8cp8ep16-swe.yaml")
    verdict: Verdict = plan(load_recipe(path, ["vllm.tensor_parallel_size=2"]))
    rollouts = verdict.memory[1]
    assert not rollouts.fits and rollouts.remedies[0].startswith("vllm.tensor_parallel_size=4")
    assert "54 sequences of 131,072 tokens" in plan(load_recipe(path)).memory[1].note
