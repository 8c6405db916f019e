"""Names that differ between megatron-core 0.16 and later releases: 0.17 calls the hybrid model by another name. Both work."""

from __future__ import annotations

from typing import Any

try:
    from megatron.core.models.hybrid import hybrid_block as stack_file
    from megatron.core.models.hybrid.hybrid_block import HybridStack as Stack, HybridStackSubmodules as StackSubmodules
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    SPEC, PATTERN, RECOMPUTES = "hybrid_stack_spec", "hybrid_layer_pattern", True
except ImportError:
    from megatron.core.models.mamba import MambaModel as HybridModel
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as stack_spec
    from megatron.core.ssm import mamba_block as stack_file
    from megatron.core.ssm.mamba_block import MambaStack as Stack, MambaStackSubmodules as StackSubmodules

    SPEC, PATTERN, RECOMPUTES = "mamba_stack_spec", "hybrid_override_pattern", False

__all__ = ["RECOMPUTES", "Stack", "StackSubmodules", "hybrid_model", "stack_file", "stack_spec"]

# RECOMPUTES: a hybrid heeds `recompute_granularity: full`, which 0.16 ignores


def hybrid_model(spec: Any, layers: str, **arguments: Any) -> Any:
    """The hybrid model of `layers`, a letter each. Arguments are those that no release renames."""
    return HybridModel(**{SPEC: spec, PATTERN: layers}, **arguments)
