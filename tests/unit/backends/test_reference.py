"""The reference backend against itself run the slow way, in float64, and against what sampling should be."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from support import varlen_libraries
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from nemo_pivotrl.algorithms.pivotrl import sft_loss
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.backends.loading import load
from nemo_pivotrl.backends.reference import logits, policy as reference_policy
from nemo_pivotrl.backends.reference.policy import ReferencePolicy
from nemo_pivotrl.backends.varlen_attention import KERNELS
from nemo_pivotrl.config import Generation, Lora, Optimizer, Policy
from nemo_pivotrl.core.errors import InputError

VOCAB, STOP = 23, frozenset({7})
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 7,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
        )
    ),
    # attention, Mamba-2 and dense layers; chunks shorter than a prompt
    "nemotron_h": lambda: NemotronHForCausalLM(
        NemotronHConfig(
            **{k: v for k, v in SHAPE.items() if k != "num_hidden_layers"},
            hybrid_override_pattern="M*-M",
            head_dim=8,
            ssm_state_size=4,
            mamba_num_heads=4,
            mamba_head_dim=8,
            n_groups=2,
            chunk_size=4,
            time_step_min=1e-12,
        )
    ),
}
ROUNDING = dict.fromkeys(MODELS, 1e-12) | {"nemotron_h": 1e-6}
"""Of log-probabilities: transformers' Mamba layers and what follows them compute in float32 inside a float64 model."""
PROMPTS = [[3, 5, 8, 13, 2, 9], [4, 4, 1], [11, 6, 19, 20]]
BATCH = TokenBatch(
    PROMPTS,
    [0, 0, 1, 2, 2, 2],
    [[5, 9, 7], [5], [12, 1, 1, 3, 7], [2, 7], [2, 8, 7], [21]],
    {
        "mask": torch.tensor(
            [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
        ).double()
    },
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for name, build in MODELS.items():
        torch.manual_seed(1)
        made[name] = str(tmp_path_factory.mktemp(name))
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)  # far from the near-uniform start, so that mistakes show
        model.save_pretrained(made[name])
    return made


def policy(folder: str, **changes: object) -> ReferencePolicy:
    return ReferencePolicy(dataclasses.replace(Policy(model_name=folder, dtype="float64", device="cpu"), **changes))


loss_fn = partial(sft_loss, normaliser=15.0)


def slow_log_probs(model: ReferencePolicy, batch: TokenBatch) -> list[list[float]]:
    """One row at a time, no padding, no cache."""
    out = []
    for p, response in zip(batch.prompt_of, batch.responses, strict=True):
        ids = torch.tensor([[*batch.prompts[p], *response]])
        logits = model.model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(batch.prompts[p])
        out.append([float(logits[start + i - 1, t]) for i, t in enumerate(response)])
    return out


def gradients(model: ReferencePolicy) -> list[torch.Tensor]:
    model.prepare_for_training_step()
    model.get_loss_and_metrics(BATCH, loss_fn)
    return [p.grad.clone() for p in model.model.parameters()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [True, False])
def test_log_probs_equal_the_unpadded_uncached_ones(folders: dict[str, str], name: str, share: bool) -> None:
    model = policy(folders[name], prefix_sharing=share)
    with torch.no_grad():
        expected = slow_log_probs(model, BATCH)
        found = model.outputs(BATCH).log_probs
    for row, wanted in zip(found.tolist(), expected, strict=True):
        assert row[: len(wanted)] == pytest.approx(wanted, abs=ROUNDING[name]) and not any(row[len(wanted) :])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [True, False])
def test_gradients_through_chunks_of_logits_are_those_of_all_logits_at_once(
    folders: dict[str, str], name: str, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 1, 3 and all positions, and the form for models whose head is not known."""
    model = policy(folders[name], prefix_sharing=share)
    assert model.chunked
    model.chunked = False
    whole = gradients(model)
    model.chunked = True
    for positions in (1, 3, 1000):
        monkeypatch.setattr(logits, "CHUNK_LOGITS", positions * model.model.config.vocab_size)
        found = gradients(model)
        assert max(float((a - b).abs().max()) for a, b in zip(whole, found, strict=True)) <= ROUNDING[name]


@pytest.mark.parametrize("share", [True, False])
def test_adapters_get_the_same_gradients_through_chunks_of_logits(
    folders: dict[str, str], share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = policy(folders["llama"], prefix_sharing=share, lora=Lora(enabled=True, r=2))
    model.prepare_for_training(Optimizer(lr=5e-2))
    step(model)  # from here on the adapters say something
    assert model.chunked
    monkeypatch.setattr(logits, "CHUNK_LOGITS", 3 * VOCAB)
    found = adapter_gradients(model)
    model.chunked = False
    whole = adapter_gradients(model)
    assert len(found) == len(whole) > 0 and any(float(a.abs().max()) > 1e-6 for a in whole)
    assert max(float((a - b).abs().max()) for a, b in zip(whole, found, strict=True)) <= ROUNDING["llama"]


def adapter_gradients(model: ReferencePolicy) -> list[torch.Tensor]:
    model.prepare_for_training_step()
    model.get_loss_and_metrics(BATCH, loss_fn)
    return [p.grad.clone() for p in model.model.parameters() if p.requires_grad and p.grad is not None]


def test_in_training_no_more_logits_exist_than_one_chunk_has(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = policy(folders["llama"], prefix_sharing=False)
    size = model.model.config.vocab_size
    monkeypatch.setattr(logits, "CHUNK_LOGITS", 2 * size)
    made: list[int] = []
    head = model.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _given, out: made.append(out.numel() // size))
    gradients(model)
    assert max(made) == 2 and sum(made) == 2 * sum(map(len, BATCH.responses)), "each chunk runs twice"


def test_log_probs_that_the_loss_does_not_read_are_not_computed(folders: dict[str, str]) -> None:
    model = policy(folders["llama"], prefix_sharing=False)
    asked = torch.zeros(6, 5, dtype=torch.bool)
    asked[0, 1:3] = asked[2, 4] = asked[5, 0] = True
    whole = dataclasses.replace(BATCH, data={"mask": asked.double()})
    found = []
    for batch in (whole, dataclasses.replace(whole, asked=asked)):
        model.prepare_for_training_step()
        loss = model.get_loss_and_metrics(batch, loss_fn)["loss"]
        found.append([torch.tensor(loss), *(p.grad.clone() for p in model.model.parameters())])
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) <= 1e-12
    log_probs = model.outputs(dataclasses.replace(whole, asked=asked)).log_probs
    assert not log_probs[~asked].any() and log_probs[asked].all()


@pytest.mark.parametrize("name", MODELS)
def test_sharing_a_prompt_gives_the_same_loss_and_gradient_in_any_micro_batching(
    folders: dict[str, str], name: str
) -> None:
    naive = gradients(policy(folders[name], prefix_sharing=False))
    for budget in (16, 40, 10_000):
        for share in (True, False):
            shared = gradients(policy(folders[name], prefix_sharing=share, train_micro_batch_tokens=budget))
            # transformers computes norms in float32 inside a float64 model, hence not 1e-12
            allowed = max(1e-7, ROUNDING[name])
            assert max(float((a - b).abs().max()) for a, b in zip(naive, shared, strict=True)) < allowed
    assert max(float(g.abs().max()) for g in naive) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_without_transformers_float32_norms_the_gradients_are_equal_to_1e_12(
    folders: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers casts norms and routers to float32 by name, which here leaves float64 as it is."""
    cast, to_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def to(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if self.dtype is torch.float64 and torch.float32 in (*args, *kwargs.values()):
            return self
        return cast(self, *args, **kwargs)

    def exact(x: torch.Tensor, *args: int, dtype: torch.dtype | None = None, **kwargs: int) -> torch.Tensor:
        return softmax(x, *args, dtype=torch.promote_types(x.dtype, dtype or x.dtype), **kwargs)

    batch = dataclasses.replace(BATCH, prompts=[PROMPTS[0], PROMPTS[0][:3], [*PROMPTS[0], 4, 4]])
    found = []
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype is torch.float64 else to_float(x))
    monkeypatch.setattr(torch.nn.functional, "softmax", exact)
    for share in (False, True):
        model = policy(folders[name], prefix_sharing=share)
        model.prepare_for_training_step()
        metrics = model.get_loss_and_metrics(batch, loss_fn)
        assert (metrics["token_ratio"] > 2) == share
        found.append((metrics["loss"], [p.grad.clone() for p in model.model.parameters()]))
    (one, a), (other, b) = found
    assert abs(one - other) <= 1e-12
    assert max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) <= 1e-12


@pytest.mark.parametrize("form", sorted(KERNELS))
@pytest.mark.parametrize("name", MODELS)
def test_kernels_for_packed_sequences_give_the_same_gradient(
    folders: dict[str, str], name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their libraries emulated; the check before them, which asks for a GPU, is left out."""
    monkeypatch.setattr(reference_policy, "check_form", lambda *_: None)
    want = gradients(policy(folders[name]))
    with varlen_libraries.installed():
        varlen_libraries.CALLED.clear()
        found = gradients(policy(folders[name], prefix_attention=form))
        assert varlen_libraries.CALLED[form] > 0
    allowed = max(1e-7, ROUNDING[name])
    assert max(float((a - b).abs().max()) for a, b in zip(want, found, strict=True)) < allowed


def test_a_kernel_for_gpus_is_refused_on_a_cpu(folders: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"policy\.prefix_attention: found flash_attn_3, on a CPU"):
        policy(folders["llama"], prefix_attention="flash_attn_3")


def test_attention_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"policy\.prefix_sharing: found on, for a mistral with sliding_window"):
        policy(str(tmp_path))
    policy(str(tmp_path), prefix_sharing=False)


def test_a_sample_depends_on_its_seed_and_prompt_and_not_on_its_neighbours(folders: dict[str, str]) -> None:
    model = policy(folders["llama"])
    generation = Generation(max_new_tokens=12)
    together = model.infer(PROMPTS, [[10, 11], [12], [13, 14, 15]], STOP, generation)
    alone = model.infer([PROMPTS[2]], [[14]], STOP, generation)[0][0]
    assert together[2][1].token_ids == alone.token_ids
    assert len({s.token_ids for s in model.infer([PROMPTS[0]], [list(range(8))], STOP, generation)[0]}) > 1
    small = model.infer(PROMPTS, [[10, 11], [12], [13, 14, 15]], STOP, dataclasses.replace(generation, batch_tokens=20))
    assert [[s.token_ids for s in g] for g in small] == [[s.token_ids for s in g] for g in together]


def test_sampled_log_probs_are_the_trainers_and_stop_tokens_end_samples(folders: dict[str, str]) -> None:
    model = policy(folders["qwen3"])
    groups = model.infer(PROMPTS, [[1, 2, 3], [4, 5, 6], [7, 8, 9]], STOP, Generation(max_new_tokens=9))
    samples = [s for g in groups for s in g]
    batch = TokenBatch(PROMPTS, [0, 0, 0, 1, 1, 1, 2, 2, 2], [s.token_ids for s in samples], {})
    scored = model.get_inference_log_probs(batch)
    for row, sample in zip(scored.tolist(), samples, strict=True):
        assert row[: len(sample.token_ids)] == pytest.approx(list(sample.log_probs), abs=1e-6)
        assert (sample.finish_reason == "stop") == (sample.token_ids[-1] in STOP)
        assert not any(t in STOP for t in sample.token_ids[:-1])
        assert len(sample.token_ids) <= 9


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_sampling_frequencies_are_the_softmax_tempered_and_cut(
    folders: dict[str, str], temperature: float, top_p: float
) -> None:
    model = policy(folders["llama"])
    draws = 4000
    generation = Generation(max_new_tokens=1, temperature=temperature, top_p=top_p, batch_tokens=100_000)
    found = model.infer([PROMPTS[0]], [list(range(draws))], STOP, generation)[0]
    with torch.no_grad():
        p = (model.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1)
    ordered = p.sort(descending=True)
    kept, mass = set(), 0.0
    for q, index in zip(ordered.values.tolist(), ordered.indices.tolist(), strict=True):
        if mass < top_p:
            kept.add(index)
            mass += q
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in found]), minlength=VOCAB)
    for token in range(VOCAB):
        share = float(p[token]) / mass if token in kept else 0.0
        assert abs(float(counts[token]) / draws - share) < 5 * (share * (1 - share) / draws) ** 0.5 + 1e-9
    by_token = {s.token_ids[0]: s.log_probs[0] for s in found}
    for token, log_prob in by_token.items():
        assert log_prob == pytest.approx(float((p[token] / mass).log()), abs=1e-9)


def test_temperature_zero_takes_the_likeliest_token(folders: dict[str, str]) -> None:
    model = policy(folders["llama"])
    sample = model.infer([PROMPTS[1]], [[99]], frozenset(), Generation(max_new_tokens=4, temperature=0.0))[0][0]
    ids = list(PROMPTS[1])
    for token in sample.token_ids:
        assert token == int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def step(model: ReferencePolicy) -> None:
    model.prepare_for_training_step()
    model.get_loss_and_metrics(BATCH, loss_fn)
    model.finish_training_step()


@pytest.mark.parametrize("lora", [False, True])
def test_restored_training_state_continues_bit_by_bit(folders: dict[str, str], tmp_path: Path, lora: bool) -> None:
    settings = {"dtype": "float32", "lora": Lora(enabled=lora, r=2)}
    straight, first = policy(folders["llama"], **settings), policy(folders["llama"], **settings)
    for model in (straight, first):
        model.prepare_for_training(Optimizer(lr=1e-2))
        step(model)
        step(model)
    first.save_training_state(tmp_path / "state")
    resumed = policy(folders["llama"], **settings)
    resumed.prepare_for_training(Optimizer(lr=1e-2))
    resumed.load_training_state(tmp_path / "state")
    step(straight)
    step(resumed)
    pairs = zip(straight.model.named_parameters(), resumed.model.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_two_processes_write_the_same_training_state(folders: dict[str, str], tmp_path: Path) -> None:
    """Torch seeds the generator of every process anew."""
    for name in ("first", "second"):
        torch.seed()
        model = policy(folders["llama"], dtype="float32")
        model.prepare_for_training(Optimizer(lr=1e-2))
        step(model)
        model.save_training_state(tmp_path / name)
    first, second = ((tmp_path / name / "state.pt").read_bytes() for name in ("first", "second"))
    assert first == second


def test_random_numbers_go_on_where_the_saved_run_was(folders: dict[str, str], tmp_path: Path) -> None:
    model = policy(folders["llama"], dtype="float32")
    model.prepare_for_training(Optimizer(lr=1e-2))
    torch.manual_seed(7)
    torch.rand(3)
    model.save_training_state(tmp_path / "state")
    wanted = torch.rand(5)
    model.load_training_state(tmp_path / "state")
    assert torch.equal(torch.rand(5), wanted)


def test_adapters_leave_the_reference_alone_and_export_merged(folders: dict[str, str], tmp_path: Path) -> None:
    model = policy(folders["llama"], lora=Lora(enabled=True, r=2))
    before = model.get_inference_log_probs(BATCH)
    model.prepare_for_training(Optimizer(lr=5e-2))
    step(model)
    step(model)
    after = model.get_inference_log_probs(BATCH)
    assert float((after - before).abs().max()) > 1e-3
    assert torch.equal(model.get_inference_log_probs(BATCH, reference=True), before)
    model.export(tmp_path)
    merged = policy(str(tmp_path)).get_inference_log_probs(BATCH)
    assert float((merged - after).abs().max()) < 1e-5


def test_full_training_keeps_a_frozen_reference_copy(folders: dict[str, str]) -> None:
    model = ReferencePolicy(Policy(model_name=folders["llama"], dtype="float64", device="cpu"), reference=True)
    before = model.get_inference_log_probs(BATCH)
    model.prepare_for_training(Optimizer(lr=5e-2))
    step(model)
    assert torch.equal(model.get_inference_log_probs(BATCH, reference=True), before)
    assert float((model.get_inference_log_probs(BATCH) - before).abs().max()) > 1e-3


def test_a_non_finite_gradient_stops_the_run(folders: dict[str, str]) -> None:
    model = policy(folders["llama"])
    model.prepare_for_training(Optimizer())
    model.prepare_for_training_step()
    next(model.model.parameters()).grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="gradient norm nan"):
        model.finish_training_step()


def test_training_bfloat16_weights_is_refused_because_small_steps_would_round_away(folders: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"policy\.dtype"):
        policy(folders["llama"], dtype="bfloat16").prepare_for_training(Optimizer())


def test_a_missing_checkpoint_is_a_clear_error_and_revisions_tell_weights_apart(
    folders: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"policy\.model_name"):
        load(Policy(model_name=str(tmp_path / "nothing")))
    assert policy_revision(folders["llama"]) == policy_revision(folders["llama"]) != policy_revision(folders["qwen3"])
