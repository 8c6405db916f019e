"""Attention of one new token a row over its cache, for CPUs.

Where several query heads read one key-value head, transformers copies keys and values once for each of them, and torch's fused CPU
kernel then takes a row and head at a time: for one query a row that is several times the work of the layer's products, in bfloat16
even more. Here the query heads of a key-value head are queries of that head. The function is the same; only one new token a row
goes this way, a prompt runs as the model was loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "decode_grouped"
"""What it is called among transformers' own attentions."""


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """query [R, H, 1, D], key and value [R, K, S, D], mask [R or 1, 1, 1, S] or None to [R, 1, H, D]."""
    groups = query.shape[1] // key.shape[1]
    if query.shape[2] != 1 or groups == 1 or more.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    rows, heads, _, size = query.shape
    folded = query.view(rows, heads // groups, groups, size)
    mask = None if attention_mask is None else attention_mask.expand(-1, -1, groups, -1)
    scaling, dropout = more.get("scaling"), more.get("dropout", 0.0)
    found = scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return found.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def grouped(model: Any) -> Iterator[None]:
    """Such attention in a model on CPUs that was loaded with torch's fused one, for as long as it lasts."""
    config = model.config.get_text_config()
    held = config._attn_implementation
    if model.device.type == "cpu" and held == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = held
