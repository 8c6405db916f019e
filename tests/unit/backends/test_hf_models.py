"""A model is what its folder says, or it does not load: what is wrong is named on one screen, whoever loads it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_pivotrl.backends import loading as backends
from nemo_pivotrl.backends.hf_models import check_weights, load_model, not_finite
from nemo_pivotrl.config import Patient, Policy
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.sizing.hf_folder import load_tokenizer

VOCAB = 24
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.0.input_layernorm.weight"


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            tie_word_embeddings=tied,
        )
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder of a few kB, with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    llama(tied=False).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, **{f"w{n}": n for n in range(2, VOCAB)}}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "m"))


def change(folder: Path, **changes: Any) -> None:
    """Settings of config.json; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, which may be written anew afterwards: nothing is mapped."""
    return load(path.read_bytes())


def weights(folder: Path, do: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = read(folder / WEIGHTS)
    do(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def sharded(folder: Path) -> dict[str, str]:
    """The same model in two files with an index; its weight map."""
    tensors = read(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    table = {name: file for file, own in parts.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return table


def load_doctor(doctor: Policy, reference: bool = False) -> Any:
    return backends.load(doctor, value_head=True, reference=reference, section="doctor")


def refused(folder: Path) -> list[str]:
    """What a policy, a patient and a doctor of this folder are refused for: the same, each with its own field."""
    said = []
    for load_it, settings in (
        (backends.load, Policy(model_name=str(folder), device="cpu")),
        (backends.load_scorer, Patient(model_name=str(folder), device="cpu")),
        (load_doctor, Policy(model_name=str(folder), device="cpu")),
    ):
        with pytest.raises(InputError) as caught:
            load_it(settings)  # type: ignore[operator]
        said.append(str(caught.value))
        assert len(said[-1].splitlines()) < 45 and str(folder) in said[-1]
    return said


# ---- what loads ----


def test_whole_folders_load(folder: Path) -> None:
    found = load_model(str(folder), "policy.model_name", torch.float32)
    for name, tensor in read(folder / WEIGHTS).items():
        assert torch.equal(found.state_dict()[name], tensor)
    sharded(folder)
    again = load_model(str(folder), "policy.model_name", torch.bfloat16)
    assert torch.equal(again.lm_head.weight, found.lm_head.weight.bfloat16())


def test_a_tied_head_may_stand_in_the_file_or_not(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in read(tmp_path / WEIGHTS)
    first = load_model(str(tmp_path), "policy.model_name", torch.float32)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    again = load_model(str(tmp_path), "policy.model_name", torch.float32)
    assert torch.equal(again.lm_head.weight, first.lm_head.weight)
    weights(tmp_path, lambda t: t["lm_head.weight"].add_(1.0))
    assert all("lm_head.weight" in s and "tie_word_embeddings" in s for s in refused(tmp_path))


def test_what_the_model_does_not_use_may_lie_beside_it(folder: Path) -> None:
    """Multi-token prediction heads, and what old checkpoints keep of the rotary embedding."""
    extra = {"mtp.layers.0.weight": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    weights(folder, lambda t: t.update(extra))
    load_model(str(folder), "policy.model_name", torch.float32)


def test_a_doctors_head_is_new_and_a_reference_is_the_start_model(folder: Path) -> None:
    doctor = load_doctor(Policy(model_name=str(folder), device="cpu"), reference=True)
    assert not doctor.head.weight.any()
    own, kept = doctor.model.state_dict(), doctor.reference.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(own[name], kept[name]) and own[name] is not kept[name] for name in own)


# ---- tensors ----


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"x.{name}"] = tensors.pop(name)


def _filled(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def fill(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM][3] = value

    return fill


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(NORM), NORM),
    "missing head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
    "renamed": (_renamed, f"x.{NORM}"),
    "unexpected": (lambda t: t.update({"v_head.weight": torch.ones(1, 8)}), "v_head.weight"),
    "another layer": (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(16, 8)}), "layers.1.mlp"),
    "misshapen": (lambda t: t.update({NORM: torch.ones(7)}), "(7,)"),
    "transposed": (
        lambda t: t.update(
            {"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].T.contiguous()}
        ),
        "(8, 16)",
    ),
    "scalar": (lambda t: t.update({NORM: torch.tensor(1.0)}), "()"),
    "int8": (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), "I8"),
    "int64": (lambda t: t.update({k: v.long() for k, v in t.items()}), "I64"),
    "bool": (lambda t: t.update({NORM: t[NORM] > 0}), "BOOL"),
    "float8": (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), "F8_E4M3"),
    "nan": (_filled(float("nan")), "NaN among its values"),
    "inf": (_filled(float("inf")), "inf among its values"),
    "-inf": (_filled(-float("inf")), "-inf among its values"),
    "too large": (lambda t: t["lm_head.weight"].fill_(3e38), "among the logits"),
    "nothing": (lambda t: t.clear(), "no tensors"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_the_models(folder: Path, case: str) -> None:
    damage, says = TENSORS[case]
    weights(folder, damage)
    assert all(says in said for said in refused(folder))


def test_overflow_in_a_smaller_type_is_found(folder: Path) -> None:
    weights(folder, lambda t: t.update({NORM: torch.full((8,), 1e300, dtype=torch.float64)}))
    with pytest.raises(InputError, match="inf among its values"):
        load_model(str(folder), "policy.model_name", torch.float32)


def test_not_finite_tells_what_it_is() -> None:
    assert not_finite(torch.zeros(0)) is None and not_finite(torch.tensor([1, 2])) is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        whole = torch.zeros(3, 3, dtype=dtype)
        assert not_finite(whole) is None
        for value, name in ((float("nan"), "NaN"), (float("inf"), "inf"), (-float("inf"), "-inf")):
            whole[1, 2] = value
            assert not_finite(whole) == name


# ---- files ----


def _write(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda f: (f / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _cut(name: str, keep: float) -> Callable[[Path], Any]:
    return lambda f: (f / name).write_bytes((f / name).read_bytes()[: int(keep * (f / name).stat().st_size)])


def _replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def do(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return do


def _index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def do(folder: Path) -> None:
        table = {"metadata": {}, "weight_map": sharded(folder)}
        change(table)
        (folder / INDEX).write_text(json.dumps(table))

    return do


def _shard(do: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        sharded(folder)
        do(folder / "model-00002-of-00002.safetensors")

    return damage


def _flip_header(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[9] ^= 0xFF
    (folder / WEIGHTS).write_bytes(bytes(raw))


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "config: missing": lambda f: (f / "config.json").unlink(),
    "config: empty": _write("config.json", ""),
    "config: cut off": _cut("config.json", 0.5),
    "config: a list": _write("config.json", "[]"),
    "config: null": _write("config.json", "null"),
    "config: not UTF-8": _write("config.json", b"\xff\xfe{}"),
    "config: deep": _write("config.json", "[" * 100_000),
    "config: a directory": _replaced("config.json", Path.mkdir),
    "config: a FIFO": _replaced("config.json", os.mkfifo),
    "config: no type": lambda f: change(f, model_type=None),
    "config: type of another kind": lambda f: change(f, model_type=5),
    "config: unknown type": lambda f: change(f, model_type="no-such-model"),
    "config: no language model": lambda f: change(f, model_type="vit"),
    "config: another model": lambda f: change(f, model_type="gpt2"),
    "config: more layers": lambda f: change(f, num_hidden_layers=2),
    "config: layers without end": lambda f: change(f, num_hidden_layers=10**9),
    "config: a text for a number": lambda f: change(f, hidden_size="8"),
    "config: a negative number": lambda f: change(f, hidden_size=-8),
    "config: zero": lambda f: change(f, num_attention_heads=0),
    "config: another width": lambda f: change(f, hidden_size=16),
    "config: width without end": lambda f: change(f, hidden_size=2 * 10**9),
    "config: MLP without end": lambda f: change(f, intermediate_size=10**12),
    "config: another vocabulary": lambda f: change(f, vocab_size=25),
    "config: vocabulary without end": lambda f: change(f, vocab_size=10**12),
    "config: head_dim without end": lambda f: change(f, head_dim=10**12),
    "config: NaN": _write("config.json", '{"model_type": "llama", "rms_norm_eps": NaN}'),
    "config: no activation": lambda f: change(f, hidden_act="no-such"),
    "config: quantised": lambda f: change(
        f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "config: tied, and the file is not": lambda f: change(f, tie_word_embeddings=True),
    "config: code of its own": lambda f: (
        change(f, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
        (f / "own.py").write_text("raise SystemExit('code of the folder ran')"),
    ),
    "weights: missing": lambda f: (f / WEIGHTS).unlink(),
    "weights: empty": _write(WEIGHTS, ""),
    "weights: text": _write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "weights: cut in the header": _cut(WEIGHTS, 0.01),
    "weights: cut in the data": _cut(WEIGHTS, 0.9),
    "weights: more behind": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"more"),
    "weights: header of 2^62 bytes": _write(WEIGHTS, (1 << 62).to_bytes(8, "little") + b"{}"),
    "weights: header flipped": _flip_header,
    "weights: a directory": _replaced(WEIGHTS, Path.mkdir),
    "weights: a FIFO": _replaced(WEIGHTS, os.mkfifo),
    "weights: a dangling link": _replaced(WEIGHTS, lambda p: p.symlink_to("nowhere")),
    "weights: a pickle": lambda f: (torch.save(read(f / WEIGHTS), f / "pytorch_model.bin"), (f / WEIGHTS).unlink()),
    "weights: a pickle in disguise": lambda f: torch.save(read(f / WEIGHTS), f / WEIGHTS),
    "index: empty": lambda f: (sharded(f), (f / INDEX).write_text("")),
    "index: cut off": lambda f: (sharded(f), _cut(INDEX, 0.5)(f)),
    "index: no map": _index(lambda t: t.pop("weight_map")),
    "index: map of numbers": _index(lambda t: t.update(weight_map=5)),
    "index: empty map": _index(lambda t: t["weight_map"].clear()),
    "index: out of the folder": _index(
        lambda t: t["weight_map"].update({NORM: "../m/model-00001-of-00002.safetensors"})
    ),
    "index: absolute": _index(lambda t: t["weight_map"].update({NORM: "/etc/passwd"})),
    "index: a pickle": _index(lambda t: t["weight_map"].update({NORM: "pytorch_model.bin"})),
    "index: a file too few": _index(lambda t: t["weight_map"].update({NORM: "model-00003-of-00003.safetensors"})),
    "index: a tensor too few": _index(lambda t: t["weight_map"].pop(NORM)),
    "index: a tensor too many": _index(
        lambda t: t["weight_map"].update({"lm_head.bias": "model-00001-of-00002.safetensors"})
    ),
    "index: the wrong shard": _index(
        lambda t: t["weight_map"].update(
            {NORM: next(v for v in sorted(set(t["weight_map"].values())) if v != t["weight_map"][NORM])}
        )
    ),
    "index and a single file": lambda f: (shutil.copy(f / WEIGHTS, f / "w"), sharded(f), (f / "w").rename(f / WEIGHTS)),
    "shard: missing": _shard(Path.unlink),
    "shard: empty": _shard(lambda p: p.write_bytes(b"")),
    "shard: cut off": _shard(lambda p: p.write_bytes(p.read_bytes()[:-3])),
    "shard: a directory": _shard(lambda p: (p.unlink(), p.mkdir())),
    "shard: the other one again": _shard(lambda p: shutil.copy(p.with_name("model-00001-of-00002.safetensors"), p)),
    "generation_config: damaged": _write("generation_config.json", "{"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_damaged_folders(folder: Path, case: str) -> None:
    FOLDERS[case](folder)
    refused(folder)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("", str(tmp_path / "away"), str(tmp_path / "file"), str(tmp_path), "a\0b"):
        with pytest.raises(InputError, match=r"patient\.model_name"):
            backends.load_scorer(Patient(model_name=name, device="cpu"))


def test_two_files_with_one_tensor(folder: Path) -> None:
    sharded(folder)
    one, other = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    save_file(read(other) | {NORM: read(one)[NORM]} if NORM in read(one) else read(other), other)
    save_file(read(one) | {NORM: read(other)[NORM]}, one)
    with pytest.raises(InputError, match="one tensor stands in one file"):
        check_weights(folder, "policy.model_name")


# ---- tokenizers ----

TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "missing": lambda f: (f / "tokenizer.json").unlink(),
    "empty": _write("tokenizer.json", ""),
    "cut off": _cut("tokenizer.json", 0.5),
    "another JSON": _write("tokenizer.json", "{}"),
    "a list": _write("tokenizer.json", "[1]"),
    "not UTF-8": _write("tokenizer.json", b"\xff"),
    "a directory": _replaced("tokenizer.json", Path.mkdir),
    "a FIFO": _replaced("tokenizer.json", os.mkfifo),
    "settings missing": lambda f: (f / "tokenizer_config.json").unlink(),
    "settings empty": _write("tokenizer_config.json", ""),
    "settings cut off": _cut("tokenizer_config.json", 0.5),
    "settings a list": _write("tokenizer_config.json", "[]"),
    "settings a directory": _replaced("tokenizer_config.json", Path.mkdir),
    "template a directory": lambda f: (
        (f / "chat_template.jinja").unlink(missing_ok=True),
        (f / "chat_template.jinja").mkdir(),
    ),
    "template not UTF-8": _write("chat_template.jinja", b"\xff\xfe"),
    "smaller model": lambda f: change(f, vocab_size=VOCAB - 1),
    "code of its own": lambda f: (
        (f / "own.py").write_text("raise SystemExit('code of the folder ran')"),
        (f / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", None]}})
        ),
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_damaged_tokenizers(folder: Path, case: str) -> None:
    TOKENIZERS[case](folder)
    with pytest.raises(InputError) as caught:
        load_tokenizer(str(folder), "policy.model_name")
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) < 8


def test_a_tokenizer_loads(folder: Path) -> None:
    assert load_tokenizer(str(folder), "policy.model_name").encode("w2 w3") == [2, 3]


@pytest.mark.parametrize("kept", [1, 3])
def test_the_head_reads_hidden_states_in_one_piece_however_few_are_kept(made: Path, kept: int) -> None:
    """A head that is given a cut copies its weights once a row; the logits must stay those of all positions."""
    model = load_model(str(made), "policy.model_name", torch.float32)
    seen = []
    head = model.get_output_embeddings()
    compute = head.forward
    head.forward = lambda hidden: seen.append(hidden.is_contiguous()) or compute(hidden)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    with torch.no_grad():
        cut, whole = model(ids, logits_to_keep=kept).logits, model(ids).logits
    assert seen == [True, True]
    assert torch.allclose(cut, whole[:, -kept:], atol=1e-6)
