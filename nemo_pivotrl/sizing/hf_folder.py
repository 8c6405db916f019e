"""Config and tokenizer of an HF model folder, through transformers: nothing is fetched, and code in the folder is never run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.model_folder import AGAIN, OFFLINE, check_config, json_object, one_screen, regular_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_config(folder: str | Path, field: str) -> Any:
    """The transformers config of a folder. Raises InputError for a damaged one and for a kind that is not known here."""
    check_config(folder, field)
    from transformers import AutoConfig

    remedy = f"{AGAIN}; if it is whole, this release of transformers does not know it: install one that does"
    with one_screen(Path(folder, "config.json"), "config", remedy):
        return AutoConfig.from_pretrained(str(folder), **OFFLINE)


def load_tokenizer(
    folder: str | Path, field: str, remedy: str = "give an HF checkpoint folder"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises InputError where there is none, where a file of it is damaged, where it would run
    code of its own, and where its vocabulary does not fit the model beside it."""
    where = Path(folder)
    if not str(folder) or not (where / "tokenizer_config.json").exists():
        raise InputError(Problem(str(folder) or "recipe", None, field, "no tokenizer there", remedy))
    settings = json_object(where / "tokenizer_config.json")
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        if os.path.lexists(where / name):
            json_object(where / name)
    template = where / "chat_template.jinja"
    if os.path.lexists(template) and (why := regular_file(template)):
        raise InputError(Problem(str(template), None, "chat_template", why, AGAIN))
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
    if not any(os.path.lexists(where / name) for name in vocabularies) and not _plain_bytes(settings):
        raise InputError(Problem(str(where / "tokenizer.json"), None, field, "nothing", AGAIN))
    from transformers import AutoTokenizer

    with one_screen(where / "tokenizer.json", field):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **OFFLINE)
        size = len(tokenizer)
    if size == 0:
        raise InputError(Problem(str(where / "tokenizer.json"), None, field, "an empty vocabulary", AGAIN))
    _check_vocabulary(tokenizer, where, field)
    return tokenizer


def _plain_bytes(settings: dict[str, Any]) -> bool:
    """Whether a tokenizer has no vocabulary file by its nature: its tokens are bytes."""
    return str(settings.get("tokenizer_class", "")).startswith(("ByT5", "Perceiver", "Canine"))


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, where: Path, field: str) -> None:
    """Refuse a tokenizer whose tokens the model beside it has no embedding for. Tokens that somebody added behind the
    vocabulary without resizing the model are let be, unless a turn needs them."""
    if not (where / "config.json").exists():
        return
    config = json_object(where / "config.json")
    inner = config.get("text_config")
    rows = (inner if isinstance(inner, dict) else config).get("vocab_size")
    if not isinstance(rows, int) or rows <= 0:
        return
    remedy = "give the tokenizer that belongs to the model"
    if tokenizer.vocab_size > rows:
        found = f"{tokenizer.vocab_size} tokens, and the model has {rows} (vocab_size of its config.json)"
        raise InputError(Problem(str(where / "tokenizer.json"), None, field, found, remedy))
    ends = tokenizer.eos_token_id
    if isinstance(ends, int) and ends >= rows:
        found = f"eos token {ends}, and the model has {rows} tokens (vocab_size of its config.json)"
        raise InputError(Problem(str(where / "tokenizer_config.json"), None, field, found, remedy))
