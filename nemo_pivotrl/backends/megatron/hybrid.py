"""NemotronH: megatron-core's hybrid model. Imported only for such models: it needs mamba_ssm, or `cpu_mamba` in its place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from nemo_pivotrl.backends.megatron.local_layers import ForestParams, Norm, StreamAttention, te_with_forests
from nemo_pivotrl.backends.megatron.releases import RECOMPUTES, Stack, StackSubmodules, hybrid_model, stack_spec
from nemo_pivotrl.backends.tree_mamba import convolve, scan
from nemo_pivotrl.sizing.architecture import Architecture


def build_hybrid(architecture: Architecture, te: bool, common: dict[str, Any]) -> nn.Module:
    """This rank's stage of a hybrid; `common` are the arguments that it shares with a GPT."""
    config: TransformerConfig = common["config"]
    stack = copy.deepcopy(stack_spec) if te else local_stack(config)
    if te and architecture.moe is not None and not config.moe_grouped_gemm:
        stack.submodules.moe_layer.submodules.mlp = get_moe_module_spec(
            use_te=True, num_experts=architecture.moe.num_experts, moe_grouped_gemm=False
        )
    if te:
        slots = stack.submodules.attention_layer.submodules.self_attention.submodules
        slots.core_attention = te_with_forests()[slots.core_attention]
    if architecture.mamba is not None:
        mixer = stack.submodules.mamba_layer.submodules.mixer
        mixer.module = ForestMixer
        mixer.params = {
            **(mixer.params or {}),
            "d_conv": architecture.mamba.conv_kernel,
            "chunk_size": architecture.mamba.chunk_size,
        }
    if config.recompute_granularity == "full" and not RECOMPUTES:
        for name in ("mamba_layer", "attention_layer", "mlp_layer", "moe_layer"):
            slot = getattr(stack.submodules, name)
            slot.module = recomputed(slot.module, common["pg_collection"].tp)
    model: nn.Module = hybrid_model(stack, architecture.layers, position_embedding_type="none", **common)
    return model


def recomputed(layer: type, group: ProcessGroup) -> type:
    """A layer that keeps its input alone and runs once more in the backward pass."""

    class Layer(layer):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **arguments: Any) -> Any:
            def run(hidden: Tensor) -> Any:
                found = super(Layer, self).forward(hidden_states=hidden, **arguments)
                return found[0] if isinstance(found, tuple) else found

            if not torch.is_grad_enabled():
                return super().forward(hidden_states=hidden_states, **arguments)
            if self.config.fp8:
                from megatron.core.extensions.transformer_engine import te_checkpoint

                tracker = tensor_parallel.random.get_cuda_rng_tracker
                hidden = te_checkpoint(run, False, tracker, group, hidden_states)
            else:
                hidden = tensor_parallel.checkpoint(run, False, hidden_states)
            return (hidden, None) if issubclass(layer, TransformerLayer) else hidden

    return Layer


class ForestMixer(MambaMixer):
    """megatron-core's Mamba-2 layer, which over a stream with shared prefixes forks its states where branches leave."""

    def forward(self, hidden_states: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """[S/C, 1, hidden] to the same; of C context-parallel ranks each has all of the stream for some heads in between."""
        if not isinstance(packed_seq_params, ForestParams):
            return super().forward(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
        projected, _ = self.in_proj(hidden_states)
        # a forest is one stream, cut over ranks as one row is: what megatron-core puts in order where nothing is packed
        return self.out_proj(self._ssm_training(self.cp.pre_conv_ssm(projected), packed_seq_params))

    def _ssm_training(self, zxBCdt: Tensor, packed_seq_params: Any = None) -> Tensor:
        """Convolution, scan, gate and norm: [S, 1, 2HP + 2GN + H] with this rank's heads and groups to [S/C, 1, HP]."""
        forest = packed_seq_params.forest if isinstance(packed_seq_params, ForestParams) else None
        if forest is None:
            return super()._ssm_training(zxBCdt, packed_seq_params)
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        own = self.cp
        heads, groups = own.nheads_local_tpcp, own.ngroups_local_tpcp
        inner, states = heads * self.headdim, groups * self.d_state
        z, mixed, dt = zxBCdt.transpose(0, 1).split([inner, inner + 2 * states, heads], -1)
        mixed = functional.silu(convolve(mixed, own.get_conv1d_weight().squeeze(1), own.get_conv1d_bias(), forest))
        x, b, c = mixed.split([inner, states, states], -1)
        skip = own.get_D()
        y = scan(
            mamba_chunk_scan_combined,
            x.unflatten(-1, (heads, self.headdim)),
            dt,
            b.unflatten(-1, (groups, self.d_state)),
            c.unflatten(-1, (groups, self.d_state)),
            forest,
            A=-torch.exp(own.get_A_log().float()),
            chunk_size=self.chunk_size,
            D=skip.float().unflatten(0, (heads, self.headdim)) if self.D_has_hdim else skip,
            dt_bias=own.get_dt_bias().float(),
            dt_softplus=True,
        )
        gated = (y.flatten(2).float() * functional.silu(z.float())).to(z.dtype).transpose(0, 1).contiguous()
        gated = own.post_conv_ssm(gated)
        return self.norm(gated) if self.rmsnorm else gated


LINEAR_NORM = "layer_norm_"
"""Prefix of a norm inside Transformer Engine's linear layers. Checkpoints have it whichever layers wrote them."""


def local_stack(config: TransformerConfig) -> ModuleSpec:
    """The hybrid's layers without Transformer Engine, which megatron-core does not offer itself."""
    mixer = ModuleSpec(
        module=ForestMixer, submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    )
    self_attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=StreamAttention, linear_proj=RowParallelLinear
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    experts = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts or 1, moe_grouped_gemm=False)

    def transformer(module: type, **slots: Any) -> ModuleSpec:
        return ModuleSpec(module=module, submodules=TransformerLayerSubmodules(**slots))

    return ModuleSpec(
        module=Stack,
        submodules=StackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=Norm,
                    mixer=mixer,
                    mamba_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={"norm.": f"mixer.in_proj.{LINEAR_NORM}"},
                ),
            ),
            attention_layer=transformer(
                TransformerLayer,
                input_layernorm=Norm,
                self_attention=self_attention,
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"input_layernorm.": f"self_attention.linear_qkv.{LINEAR_NORM}"},
            ),
            mlp_layer=transformer(
                MLPLayer,
                pre_mlp_layernorm=Norm,
                mlp=mlp,
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": f"mlp.linear_fc1.{LINEAR_NORM}"},
            ),
            moe_layer=transformer(
                MoETransformerLayer, pre_mlp_layernorm=Norm, mlp=experts, mlp_bda=get_bias_dropout_add
            ),
        ),
    )
