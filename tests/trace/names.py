"""Names that Python files take from a package, and whether its sources have them: by their syntax, without an import."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKS = ("version", "HAVE_", "is_te_min", "TYPE_CHECKING")
"""What a condition has in it that asks which release is there."""


@dataclass(frozen=True)
class Taken:
    file: str
    line: int
    name: str
    """With its modules, dotted."""
    guarded: bool
    """The file is prepared for a release without it."""


@functools.cache
def taken(root: Path, package: str) -> list[Taken]:
    """What the files under a folder take from a package."""
    found: list[Taken] = []
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if package in text:
            found += _in_file(ast.parse(text), str(path.relative_to(root)), package)
    return found


def _in_file(tree: ast.AST, file: str, package: str) -> Iterator[Taken]:
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for found in node.names:
                if found.name.split(".")[0] == package:
                    aliases[found.asname or package] = found.name if found.asname else package

    def visit(node: ast.AST, guarded: bool) -> Iterator[Taken]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package and not node.level:
            yield from (Taken(file, node.lineno, f"{node.module}.{a.name}", guarded) for a in node.names)
        if isinstance(node, ast.Import):
            yield from (
                Taken(file, node.lineno, a.name, guarded) for a in node.names if a.name.startswith(package + ".")
            )
        if isinstance(node, ast.Attribute) and (dotted := _dotted(node)):
            first, _, rest = dotted.partition(".")
            if first in aliases:
                yield Taken(file, node.lineno, f"{aliases[first]}.{rest}", guarded)
                return  # its own parts are shorter names of the same
        for field, value in ast.iter_fields(node):
            inside = guarded
            if isinstance(node, ast.Try) and field == "body":
                inside = True  # whatever it catches, the file goes on without the name
            if isinstance(node, ast.If | ast.IfExp) and field in ("body", "orelse"):
                inside = guarded or any(word in ast.unparse(node.test) for word in CHECKS)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, inside)

    yield from visit(tree, False)


def _dotted(node: ast.AST) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def there(root: Path, name: str) -> bool:
    """Whether a package's sources have a dotted name, as far as syntax tells: what stands behind a class is not looked at."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        if (file := _file(root, tuple(parts[:cut]))) is not None:
            return cut == len(parts) or parts[cut] in _names(root, tuple(parts[:cut]), file)
    return False


def _file(root: Path, module: tuple[str, ...]) -> Path | None:
    path = root.joinpath(*module)
    found = path / "__init__.py" if (path / "__init__.py").exists() else path.with_suffix(".py")
    return found if found.exists() else None


@functools.cache
def _names(root: Path, module: tuple[str, ...], file: Path) -> set[str]:
    """Every name that a module's file binds anywhere, with those of `import *`."""
    found = {"__version__", "__file__"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import):
            found |= {a.asname or a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name for a in node.names}
            if any(a.name == "*" for a in node.names):
                found |= _starred(root, module, file, node)
    if file.name == "__init__.py":
        found |= {path.stem for path in file.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    return found


@functools.cache
def _used(root: Path) -> set[str]:
    files = (root / "transformer_engine/pytorch").rglob("*.py")
    return {name for file in files for name in re.findall(r"\btex\.(\w+)", file.read_text(encoding="utf-8"))}


def _starred(root: Path, module: tuple[str, ...], file: Path, node: ast.ImportFrom) -> set[str]:
    below = list(module if file.name == "__init__.py" else module[:-1])
    base = below[: len(below) - node.level + 1] if node.level else []
    source = (*base, *(node.module or "").split("."))
    if source == ("transformer_engine_torch",):  # compiled: of its names those that the release's own files use
        return _used(root)
    where = _file(root, source)
    return _names(root, source, where) if where is not None else set()
