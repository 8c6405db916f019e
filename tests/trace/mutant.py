"""`python mutant.py NAME trace ...`: the command with one thing wrong, which the trace must notice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nemo_pivotrl.backends.traced import step


def in_config(**changes: Any) -> None:
    """Another field of the model's TransformerConfig."""

    def change() -> None:
        import nemo_pivotrl.backends.megatron.model as model

        make = model.transformer_config

        def changed(*args: Any) -> Any:
            config = make(*args)
            for name, value in changes.items():
                setattr(config, name, value)
            return config

        model.transformer_config = changed

    before_run(change)


def in_recipe(**changes: Any) -> None:
    """Another setting where the trainer reads it; the plan's stays."""

    def changed(asked: Any, *rest: Any) -> None:
        run(replace(asked, megatron=replace(asked.megatron, **changes)), *rest)

    run = step._run
    step._run = changed


def before_run(change: Callable[[], None]) -> None:
    """Apply a change when megatron-core can be imported and the numbers are gone."""
    prepare = step._without_numbers

    def prepared(*args: Any) -> None:
        prepare(*args)
        change()

    step._without_numbers = prepared


def no_key() -> None:
    import nemo_pivotrl.backends.megatron.weights as weights

    entries = weights.entries
    weights.entries = lambda shape: [e for e in entries(shape) if not e.name.endswith("linear_proj.weight")]


def not_recomputed() -> None:
    import nemo_pivotrl.backends.megatron.hybrid as hybrid

    hybrid.recomputed = lambda layer, _: layer


def mask_of_all_queries() -> None:
    import nemo_pivotrl.backends.tree_attention as attention

    flex = attention.flex
    attention.flex = lambda query, key, value, forest, scale, held=None: flex(query, key, value, forest, scale)


def routing_is_kept() -> None:
    import nemo_pivotrl.backends.megatron.pipeline_stage as stage

    stage.forget_routing = lambda _: None


def no_fp8_padding() -> None:
    import nemo_pivotrl.backends.megatron.train as train

    train.token_multiple = lambda _: 1


def whole_logits() -> None:
    import nemo_pivotrl.backends.megatron.pipeline_stage as stage

    make = stage.chunked_log_probs
    stage.chunked_log_probs = lambda *args: make(*args[:4], 10**9, *args[5:])


MUTANTS: dict[str, Callable[[], None]] = {
    "shapes between stages are not told": lambda: in_config(variable_seq_lengths=False),
    "squared relu without fusion": lambda: in_config(use_fused_weighted_squared_relu=False),
    "swiglu without fusion": lambda: in_config(bias_activation_fusion=False),
    "rotary embedding without fusion": lambda: in_config(apply_rope_fusion=False),
    "permutation without fusion": lambda: in_config(moe_permute_fusion=False),
    "a norm that is not cut over the sequence": lambda: in_config(sequence_parallel=False),
    "weights in float32": lambda: in_recipe(bf16=False),
    "gradients in float32": lambda: in_recipe(grad_reduce_in_fp32=True),
    "an optimiser that is not distributed": lambda: in_recipe(use_distributed_optimizer=False),
    "a key missing in the name map": lambda: before_run(no_key),
    "layers that are not recomputed": lambda: before_run(not_recomputed),
    "a mask of all queries": lambda: before_run(mask_of_all_queries),
    "routing that is kept": lambda: before_run(routing_is_kept),
    "FP8 rows that are not padded": lambda: before_run(no_fp8_padding),
    "logits of all positions at once": lambda: before_run(whole_logits),
}

if __name__ == "__main__":
    from nemo_pivotrl.cli import main

    MUTANTS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
