"""Which models a recipe runs, and their shapes, without loading any of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.sizing.architecture import Architecture, read_architecture
from nemo_pivotrl.sizing.flops import model_bytes
from nemo_pivotrl.sizing.known_models import PUBLISHED, published


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the recipe."""

    role: str
    """The section that names it."""
    folder: str
    source: str
    """Where its shape is from."""
    parameters: int
    shape: Architecture


def models_of(recipe: Recipe) -> list[Model]:
    """The models that the recipe's algorithm runs. Raises InputError with all whose shape is not to be had."""
    roles = ("policy",) if recipe.algorithm == "pivotrl" else ("patient", "doctor")
    found, problems = [], []
    for role in roles:
        folder = getattr(recipe, role).model_name
        try:
            shape, source = shape_of(folder, recipe)
        except InputError as error:
            for p in error.problems:
                field = f"{role}.model_name" if p.field == "model_name" else p.field
                problems.append(Problem(p.file, p.line, field, p.found, p.remedy))
            continue
        found.append(Model(role, folder, source, model_bytes(shape, 1, 1), shape))
    if problems:
        raise InputError(problems)
    return found


def shape_of(folder: str, recipe: Recipe) -> tuple[Architecture, str]:
    """A model's architecture and where it is from: the folder's config.json, what the recipe's own stages will make there,
    or a published model of the folder's name. Raises InputError."""
    if Path(folder, "config.json").exists():
        return read_architecture(folder), f"{folder}/config.json"
    made = recipe.path(recipe.warmup.name) / "policy"
    if folder and Path(folder) == made:
        if recipe.warmup.source in ("world", "shipped") and not recipe.warmup.init:
            w = recipe.world
            return tiny_shape(w.vocab_size, w.hidden_size, w.layers, w.heads), "made by the warmup stage"
        if recipe.warmup.init and recipe.warmup.init != folder:
            return shape_of(recipe.warmup.init, recipe)
    n = recipe.manners
    for name, width, layers in (
        ("patient", n.hidden_size, n.layers),
        ("novice", n.doctor_hidden_size, n.doctor_layers),
    ):
        if folder and Path(folder) == recipe.path(name) / "policy":
            return tiny_shape(n.vocab_size, width, layers, n.heads), "made by the manners stage"
    known = published(Path(folder).name)
    if known is None:
        remedy = f"give an HF checkpoint folder, or name it as one of {', '.join(PUBLISHED)}"
        raise InputError(Problem("recipe", None, "model_name", f"{folder or 'nothing'}, without a config.json", remedy))
    return known


def tiny_shape(vocab_size: int, hidden_size: int, layers: int, heads: int) -> Architecture:
    """The shape of `tiny.make_model`."""
    return Architecture(
        model_type="llama",
        layers="D" * layers,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden_size // heads,
        vocab_size=vocab_size,
        max_position_embeddings=1024,
        norm_epsilon=1e-6,
        activation="silu",
        tied=True,
        qkv_bias=False,
        qk_norm=False,
        rope_theta=1e4,
        rope_factor=None,
        moe=None,
        mamba=None,
    )
