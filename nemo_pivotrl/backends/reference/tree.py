"""Shared prefixes (`algorithms/prefix_tree.py`) in transformers' models: attention and Mamba layers over a forest.

A forward call given `forest=` reaches the layers as transformers hands on what it does not know itself. While
`over_forests` holds, attention is ours; at all other times the model is as it was loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from nemo_pivotrl.algorithms.prefix_tree import Forest, lay_out
from nemo_pivotrl.backends.tree_attention import attend
from nemo_pivotrl.backends.tree_mamba import convolve, scan
from nemo_pivotrl.core.errors import InputError, Problem

NAME = "shared_prefix"
"""What our attention is called among transformers' own, with its form behind it."""
MAMBA = "NemotronHMamba2Mixer"
"""The one recurrent layer that is known here."""
KNOWN = {"full_attention", "linear_attention", "mlp", "moe"}
OTHER_KINDS = ("sliding_window", "softcap", "s_aux")
"""What transformers hands to attention that is more than softmax over all that stands before."""
OFF = "set it to off: every sample then runs with its whole prompt"


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    forest: Forest,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    form: str,
    **more: Any,
) -> tuple[Tensor, None]:
    """query [1, H, S, D], key and value [1, K, S, D] to [1, S, H, D]. Raises TypeError for attention of another kind."""
    other = [name for name in OTHER_KINDS if more.get(name) is not None]
    if other:
        raise TypeError(f"attention with {', '.join(other)}")
    assert attention_mask is None and not dropout, "the forest is the mask, and nothing drops out"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, forest, scale, form=form).transpose(1, 2), None


@contextmanager
def over_forests(model: Any, form: str = "auto") -> Iterator[None]:
    """Attention over forests, in the form that `policy.prefix_attention` names, for as long as it lasts."""
    config = model.config.get_text_config()
    held, name = config._attn_implementation, f"{NAME}_{form}"
    AttentionInterface.register(name, partial(_attention, form=form))
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = held


def run(model: Any, forest: Forest, form: str = "auto", **asked: Any) -> tuple[Any, Tensor]:
    """(the model's output with logits [1, A, V] of the tokens that predict, which of them each prediction [P] reads)."""
    at, of = torch.unique(forest.places, return_inverse=True)
    ids, positions = forest.tokens[None], forest.positions[None]
    with over_forests(model, form):
        output = model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=at, forest=forest, **asked
        )
    return output, of


def hidden_of(model: Any, forest: Forest, form: str = "auto") -> tuple[Tensor, Tensor]:
    """(last hidden states [A, H] of the tokens that predict, which of them each prediction [P] reads), without logits."""
    at, of = torch.unique(forest.places, return_inverse=True)
    with over_forests(model, form):
        output = model.base_model(
            input_ids=forest.tokens[None], position_ids=forest.positions[None], use_cache=False, forest=forest
        )
    return output.last_hidden_state[0, at], of


def log_probs(logits: Tensor, of: Tensor, forest: Forest, temperature: float = 1.0) -> Tensor:
    """Log-probability [n, T] (nats, float32 or better) of every response token, 0 on padding; logits [A, V]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return forest.pick(logits[of, forest.goals] - logits.logsumexp(1)[of])


def prepare(model: Any, field: str, form: str = "auto") -> None:
    """Make a model ready for forests. Raises InputError for one whose rows would not be what they are alone.

    Beside what its config says, a small forest is run and compared with its rows.
    """
    config = model.config.get_text_config()
    given = config.to_dict()  # settings that its architecture does not have are not there
    kinds = set(given.get("layer_types") or ["full_attention"])
    mixers = [module for module in model.modules() if type(module).__name__ == MAMBA]
    windowed = given.get("sliding_window") and not given.get("layer_types")
    if windowed or kinds - KNOWN or ("linear_attention" in kinds and not mixers):
        found = "sliding_window" if windowed else ", ".join(sorted(kinds - {"full_attention"}))
        raise InputError(Problem("recipe", None, field, f"on, for a {config.model_type} with {found}", OFF))
    for mixer in mixers:
        mixer.forward = partial(_mixer, mixer, mixer.forward)
    try:
        apart = _apart(model, config.vocab_size, form)
    except TypeError as error:  # a model that does not hand on what it does not know
        raise InputError(Problem("recipe", None, field, f"on, for a {config.model_type}: {error}", OFF)) from error
    if not apart < (1e-1 if model.dtype == torch.bfloat16 else 1e-3):
        found = f"on, for a {config.model_type} whose logits then differ by {apart:.1e}"
        raise InputError(Problem("recipe", None, field, found, OFF))


@torch.no_grad()
def _apart(model: Any, size: int, form: str) -> float:
    """How much a small forest's logits differ from its rows': the largest difference of a place, as norms about the mean.

    On SmolLM2-135M in bfloat16 it is 0.02 to 0.03, and 0.4 or more if a branch sees its siblings. Its tokens are spread over the
    vocabulary: the first ids are often markers, whose activations are so large there that bfloat16 alone makes it 0.2.
    """
    trunk = [3, 1, 4, 1, 5]
    prompts, responses = [trunk, trunk, [*trunk, 9, 2]], [[9, 2, 6], [8, 7, 3], [6, 5, 4]]
    prompts, responses = ([[i * size // 10 for i in ids] for ids in rows] for rows in (prompts, responses))
    forest = lay_out(range(3), prompts, responses).to(model.device)
    output, of = run(model, forest, form)
    worst = 0.0
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = torch.tensor([[*prompt, *response]], device=model.device)
        alone = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        difference = output.logits[0, of[forest.predicts[i]]].float() - alone
        worst = max(worst, float((_spread(difference) / _spread(alone).clamp(min=1.0)).max()))
    return worst


def _spread(logits: Tensor) -> Tensor:
    """Norm [T] about their mean of logits [T, V]: what softmax sees of them."""
    return (logits - logits.mean(1, keepdim=True)).norm(dim=1)


def _mixer(mixer: Any, alone: Any, hidden_states: Tensor, forest: Forest | None = None, **kwargs: Any) -> Tensor:
    """A Mamba-2 layer: with a forest [1, S, hidden] to the same, else as it is."""
    if forest is None:
        return alone(hidden_states, **kwargs)
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    inner, groups, states = mixer.intermediate_size, mixer.n_groups, mixer.ssm_state_size
    gate, mixed, dt = mixer.in_proj(hidden_states).split([inner, mixer.conv_dim, mixer.num_heads], -1)
    mixed = mixer.act(convolve(mixed, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, forest))
    x, b, c = mixed.split([inner, groups * states, groups * states], -1)
    y = scan(
        mamba2_chunk_scan,
        x.unflatten(-1, (mixer.num_heads, -1)),
        dt,
        b.unflatten(-1, (groups, states)),
        c.unflatten(-1, (groups, states)),
        forest,
        A=-torch.exp(mixer.A_log.float()),
        chunk_size=mixer.chunk_size,
        D=mixer.D,
        dt_bias=mixer.dt_bias,
        dt_softplus=True,
        dt_limit=mixer.time_step_limit,
    )
    return mixer.out_proj(mixer.norm(y.flatten(2), gate).to(hidden_states.dtype))
