"""Plug-ins by import path: `package.module:name` in a recipe is an object of the user's own code."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from nemo_pivotrl.core.errors import InputError, Problem

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_import_path(value: str) -> bool:
    """Whether `value` has the form `package.module:name`. Nothing is imported."""
    return _PATH.fullmatch(value) is not None


def load_plugin(path: str, field: str, where: str = "recipe") -> Any:
    """The object that `path` names.

    The module is looked for as Python does: installed, or in a folder on PYTHONPATH. Raises InputError, which names
    `field` of `where`, for a path of another form, a module that is not there and a name that the module lacks.
    A fault inside the module's own code is not caught.
    """
    if not is_import_path(path):
        raise InputError(Problem(where, None, field, path, "write package.module:name"))
    module, _, name = path.partition(":")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise  # the module is there; what it imports is not
        remedy = "install its package, or add its folder to PYTHONPATH"
        raise InputError(Problem(where, None, field, f"no module {error.name}", remedy)) from None
    for part in name.split("."):
        if not hasattr(found, part):
            public = ", ".join(sorted(n for n in vars(found) if not n.startswith("_"))[:12])
            raise InputError(Problem(where, None, field, f"{module} has no {part}", f"it has {public}"))
        found = getattr(found, part)
    return found
