"""The files of an HF model folder: damaged ones are refused by name, on one screen, and never opened where they are no files.

A folder comes from elsewhere, so it is data: its own Python code is never run (`trust_remote_code=False`), and whatever a
parser of a file in it raises becomes one `Problem` with the file and the remedy. `sizing/hf_folder.py` loads config and tokenizer,
`backends/hf_models.py` weights.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from nemo_pivotrl.core.errors import InputError, Problem, short

CARD = "README.md"
"""The model card. It is no part of what makes a model this one."""
MAX_JSON = 1 << 28
"""Bytes of a JSON file that is read. The largest are the tokenizer.json of big vocabularies and the index of many shards."""
AGAIN = "copy or download the folder again, or export it again"
OFFLINE: dict[str, bool] = {"local_files_only": True, "trust_remote_code": False}
"""What every `from_pretrained` is given: nothing is fetched, and code in the folder is never run."""


def regular_file(path: Path) -> str | None:
    """Why `path` is no file with bytes in it; None if it is one. A FIFO or a device is never opened."""
    try:
        about = os.stat(path)
    except (OSError, ValueError) as error:
        return "nothing" if isinstance(error, FileNotFoundError) else short(str(error))
    if stat.S_ISDIR(about.st_mode):
        return "a directory"
    if not stat.S_ISREG(about.st_mode):
        return "no regular file"
    return None if about.st_size else "an empty file"


def json_object(path: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError for anything else; NaN and infinity are no JSON."""

    def refuse(found: str) -> InputError:
        return InputError(Problem(str(path), None, "file", found, remedy))

    if why := regular_file(path):
        raise refuse(why)
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise refuse(f"{size:,} bytes, more than {MAX_JSON:,}")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise refuse("JSON nested too deeply") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise refuse(short(f"no JSON: {error}")) from None
    if not isinstance(value, dict):
        raise refuse(f"a JSON {type(value).__name__}, not an object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


@contextmanager
def one_screen(file: str | Path, field: str, remedy: str = AGAIN) -> Iterator[None]:
    """Turn whatever a library raises over a file of the folder into an InputError: their parsers raise any type, even bare
    `Exception`. Only the lack of memory passes as it is."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        found = short(f"{type(error).__name__}: {error}", 200)
        if "trust_remote_code" in str(error):
            found = "a model whose own Python code would have to run"
            remedy = "code of a model folder is never run: use a model that the installed transformers knows"
        raise InputError(Problem(str(file), None, field, found, remedy)) from error


def check_config(folder: str | Path, field: str, remedy: str = "give an HF checkpoint folder") -> dict[str, Any]:
    """The parsed config.json. Raises InputError for no folder, no config, and one that names no `model_type`."""
    where = Path(folder)
    if not str(folder) or not where.is_dir() or not (where / "config.json").exists():
        raise InputError(Problem("recipe", None, field, str(folder) or "nothing", remedy))
    config = json_object(where / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise InputError(Problem(str(where / "config.json"), None, "model_type", short(kind), AGAIN))
    return config
