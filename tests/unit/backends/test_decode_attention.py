"""One new token a row through `backends/decode_attention.py` against the model as transformers runs it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_pivotrl.backends import decode_attention
from nemo_pivotrl.backends.batching import Decoder
from nemo_pivotrl.backends.reference import tree
from nemo_pivotrl.core.errors import InputError

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [13, 14, 15], [11, 12]]


def llama(kv_heads: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=kv_heads, **sizes)).to(dtype).eval()


def decoded(model: LlamaForCausalLM, steps: int = 4) -> torch.Tensor:
    """Logits [steps, R, V] of rows whose prompts are padded to one width, fed fixed tokens."""
    decoder, found = Decoder(model, PROMPTS), []
    for step in range(steps):
        found.append(decoder.logits())
        decoder.feed(torch.arange(len(PROMPTS)) + 20 + step)
    return torch.stack(found)


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_grouped_heads_give_the_logits_of_the_model_as_it_was_loaded(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = llama(kv_heads), []
    whole = decode_attention.scaled_dot_product_attention
    monkeypatch.setattr(
        decode_attention, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or whole(*a, **k)
    )
    found = decoded(model)
    assert calls == ([(4, 2, 3, 8)] * 2 * 3 if kv_heads == 2 else [])  # two layers, three tokens behind the prompts
    assert model.config._attn_implementation == "sdpa"  # as it was
    monkeypatch.setattr(decode_attention, "NAME", "sdpa")
    torch.testing.assert_close(found, decoded(model), rtol=0, atol=1e-6)


def test_a_model_in_bfloat16_shares_prefixes_and_a_branch_that_sees_its_sibling_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama(2, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)  # logits that depend on what stands before
    tree.prepare(model, "policy.prefix_sharing")

    def all_before(query, key, value, forest, scale, held=None, form="auto"):
        key, value = (x.repeat_interleave(3, 1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    monkeypatch.setattr(tree, "attend", all_before)
    with pytest.raises(InputError, match="logits then differ"):
        tree.prepare(model, "policy.prefix_sharing")
