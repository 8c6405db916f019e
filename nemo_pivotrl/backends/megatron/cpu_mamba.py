"""Pure-torch stand-ins for the three symbols of mamba_ssm that megatron-core's Mamba-2 layer uses in training.

The arithmetic is that of "Transformers are SSMs" (arXiv 2405.21060), listing 1, in float32 or better. Letters: B sequences,
L tokens, H heads, P channels of a head, G groups that share B and C, N states, Q tokens of a chunk.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemo_pivotrl.algorithms.model_outputs import wide

NO_LIMIT = (0.0, float("inf"))


def install() -> None:
    """Offer these functions under mamba_ssm's names, unless the real package is there."""
    try:
        import mamba_ssm  # noqa: F401
    except ImportError:
        pass
    else:
        raise RuntimeError(
            "mamba_ssm is installed, whose kernels do not run on a CPU: uninstall it to use megatron.cpu"
        )
    contents: dict[str, dict[str, Any]] = {
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": RMSNorm},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
            "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
        },
    }
    for name, symbols in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(symbols)
        module.__path__ = []
        sys.modules[name] = module


class RMSNorm(nn.Module):
    """RMS norm over groups of channels, of x * silu(z) where z is given."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size or hidden_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x and z [..., hidden_size] to the same."""
        h = wide(x)
        if z is not None and not self.norm_before_gate:
            h = h * functional.silu(wide(z))
        grouped = h.unflatten(-1, (-1, self.group_size))
        grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        h = grouped.flatten(-2) * wide(self.weight)
        if z is not None and self.norm_before_gate:
            h = h * functional.silu(wide(z))
        return h.to(x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    *,
    seq_idx: Tensor | None = None,
    activation: str = "silu",
    headdim: int,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """Convolution, scan and gate: zxbcdt [B, L, 2HP + 2GN + H] to [B, L, HP]; conv1d_weight [HP + 2GN, K], A and D [H].

    Raises NotImplementedError for packed sequences and for per-channel D.
    """
    if seq_idx is not None or D.dim() != 1 or activation != "silu":
        raise NotImplementedError("on a CPU: no packed sequences, one D per head, silu")
    heads = D.shape[0]
    inner = heads * headdim
    states = (zxbcdt.shape[-1] - 2 * inner - heads) // (2 * ngroups)
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * ngroups * states, heads], -1)
    width = conv1d_weight.shape[-1]
    padded = functional.pad(xbc.transpose(1, 2), (width - 1, 0))
    xbc = functional.silu(functional.conv1d(padded, conv1d_weight[:, None], conv1d_bias, groups=xbc.shape[-1]))
    x, b, c = xbc.transpose(1, 2).split([inner, ngroups * states, ngroups * states], -1)
    out = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        b.unflatten(-1, (ngroups, states)),
        c.unflatten(-1, (ngroups, states)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, headdim)),
        dt_bias=dt_bias,
        dt_softplus=True,
    )
    assert isinstance(out, Tensor)
    return out.flatten(-2)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    cu_seqlens: Tensor | None = None,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The state-space scan: x [B, L, H, P], dt [B, L, H], A [H], B and C [B, L, G, N] to y [B, L, H, P], and the last
    state [B, H, P, N] if asked for. Raises NotImplementedError for packed sequences."""
    if seq_idx is not None or cu_seqlens is not None or return_varlen_states:
        raise NotImplementedError("on a CPU: no packed sequences")
    kind, length, heads = x.dtype, x.shape[1], x.shape[2]
    step = wide(dt) if dt_bias is None else wide(dt) + wide(dt_bias)
    step = functional.softplus(step) if dt_softplus else step
    step = step.clamp(*dt_limit) if dt_limit != NO_LIMIT else step
    chunk = min(chunk_size, length)
    missing = -length % chunk  # padded tokens have step 0: they neither decay the state nor enter it

    def chunked(t: Tensor) -> Tensor:
        """[B, L, H, ...] to [B, L/Q, Q, H, ...]."""
        t = functional.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
        return t.unflatten(1, (-1, chunk))

    per_head = heads // B.shape[2]
    b = chunked(wide(B).repeat_interleave(per_head, 2))
    c = chunked(wide(C).repeat_interleave(per_head, 2))
    decay = chunked(step * wide(A)).cumsum(2)  # log of the decay since the chunk's beginning [B, n, Q, H]
    moved = chunked(wide(x) * step[..., None])
    between = decay[:, :, :, None] - decay[:, :, None]  # [B, n, Q, Q, H]: from column to row
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    weight = between.masked_fill(future[:, :, None], -torch.inf).exp()
    y = torch.einsum("bnqhs,bnkhs,bnqkh,bnkhp->bnqhp", c, b, weight, moved)
    to_end = (decay[:, :, -1:] - decay).exp()
    added = torch.einsum("bnqhs,bnqh,bnqhp->bnhps", b, to_end, moved)
    state = torch.zeros_like(added[:, 0]) if initial_states is None else wide(initial_states)
    before = []
    for n in range(added.shape[1]):
        before.append(state)
        state = state * decay[:, n, -1].exp()[..., None, None] + added[:, n]
    y = y + torch.einsum("bnqhs,bnqh,bnhps->bnqhp", c, decay.exp(), torch.stack(before, 1))
    y = y.flatten(1, 2)[:, :length]
    if D is not None:
        y = y + wide(x) * (wide(D) if D.dim() == 2 else wide(D)[:, None])
    if z is not None:
        y = y * functional.silu(wide(z))
    return (y.to(kind), state) if return_final_states else y.to(kind)
