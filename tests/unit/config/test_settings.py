"""Every setting is explained, printed with its explanation, and listed. Run as a program, this file renews both lists."""

import dataclasses
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import nemo_pivotrl
from nemo_pivotrl import cli, config
from nemo_pivotrl.config import Recipe, Sft
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.config.schema import Setting, choices, explanations, settings_of
from nemo_pivotrl.config.show import to_yaml
from nemo_pivotrl.verifiers.loading import SHARED, VERIFIERS

ROOT = Path(nemo_pivotrl.__file__).parents[1]
LIST, PAGE = Path(__file__).with_name("settings.txt"), ROOT / "docs/settings.md"
RENEW = f"python {Path(__file__).relative_to(ROOT)}"
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SHOWN = 48
"""Characters of a default that the page shows."""


def of_verifiers() -> Iterator[tuple[str, Setting]]:
    """(verifier, setting) of every verifier's own settings."""
    for name, path in VERIFIERS.items():
        module, _, cls = path.partition(":")
        made = getattr(import_module(module), cls)()
        for setting in settings_of(made):
            if setting.name.partition(".")[0] not in SHARED:
                yield name, setting


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def shown(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False)


def listing() -> str:
    """One line a setting, with its default."""
    lines = [f"{s.name} = {shown(s.default)}" for s in settings_of(Recipe())]
    lines += [f"verifier.settings.{s.name} = {shown(s.default)}  ({name})" for name, s in of_verifiers()]
    return "\n".join(lines) + "\n"


def allowed(setting: Setting) -> str:
    """Words or range."""
    if words := choices(setting.kind):
        return ", ".join(f"`{word}`" for word in words)
    low, high = setting.low, setting.high
    return "" if low is None else f"at least {low}" if high is None else f"{low} to {high}"


def row(setting: Setting, name: str) -> str:
    """A line of the page's table."""
    default = shown(setting.default)
    default = f"{default[:SHOWN]} ..." if len(default) > SHOWN else default
    cells = [f"`{name}`", f"`{default}`", allowed(setting), setting.explanation]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


BEGIN = """# Settings

Every setting of a recipe: its default, its range or the words it may have, and its explanation. This page is made from the
declarations in `nemo_pivotrl/config/`. `nemo-pivotrl select RECIPE.yaml --print-config` prints the same lines beside the values of
a recipe; `--changed` with it prints only what differs from the defaults. Numbers such as P1 and D1 are those of
[algorithms.md](algorithms.md). NAME stands for a name of your own.
"""
TABLE = ["", "| setting | default | allowed | |", "|---|---|---|---|"]
TWINS = {"doctor": "policy", "sft": "warmup"}
"""Sections with the settings of an earlier one."""


def page() -> str:
    """docs/settings.md."""
    of: dict[str, list[Setting]] = {}
    for setting in settings_of(Recipe()):
        of.setdefault(setting.name.partition(".")[0], []).append(setting)
    alone = [found[0] for found in of.values() if "." not in found[0].name]
    lines = [BEGIN, "## The recipe itself", *TABLE, *(row(s, s.name) for s in alone)]
    for section, found in of.items():
        if found[0] in alone:
            continue
        lines += ["", f"## `{section}`", "", explanations(Recipe)[section]]
        inner = [(s.name.partition(".")[2], s) for s in found]
        if twin := TWINS.get(section):
            usual = {s.name.partition(".")[2]: s.default for s in of[twin]}
            without = sorted({name.partition(".")[0] for name in usual.keys() - {name for name, _ in inner}})
            but = f" but for {' and '.join(f'`{name}`' for name in without)}" if without else ""
            inner = [(name, s) for name, s in inner if s.default != usual[name]]
            lines += ["", f"It has the settings of `{twin}`{but}. These defaults differ:"]
        lines += [*TABLE, *(row(s, name) for name, s in inner)]
    for verifier in VERIFIERS:
        own = [s for name, s in of_verifiers() if name == verifier]
        lines += ["", f"## `verifier.settings` of `{verifier}`", *(TABLE if own else ["", "It has none."])]
        lines += [row(s, s.name) for s in own]
    return "\n".join(lines) + "\n"


def test_the_list_of_settings_is_the_one_that_was_agreed_on() -> None:
    now, agreed = set(listing().splitlines()), set(LIST.read_text(encoding="utf-8").splitlines())
    assert now == agreed, f"new: {sorted(now - agreed)}; gone: {sorted(agreed - now)}; if that is meant: {RENEW}"


def test_the_page_of_settings_is_made_from_the_declarations() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), f"renew docs/settings.md: {RENEW}"


def test_every_setting_has_one_line_of_explanation() -> None:
    found = [(s.name, s.explanation) for s in settings_of(Recipe())]
    found += [(f"{verifier}: {s.name}", s.explanation) for verifier, s in of_verifiers()]
    found += [(name, line) for name, line in explanations(Recipe).items()]
    wanted = (
        "a docstring below the field, whose first line is a sentence of at most 125 characters and ends with a period"
    )
    bad = [f"{name}: {line!r}" for name, line in found if not (10 < len(line) <= 125 and line.endswith("."))]
    assert bad == [], wanted


def test_explanations_come_from_the_declaration_of_the_class_or_a_class_below(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Own(Sft):
        pass

    assert explanations(Own)["batch_size"] == explanations(Sft)["batch_size"] == "Sequences a step."
    assert explanations(Recipe)["policy"] == "The start policy (pi_0) and how it is run."  # the section's own
    names = [s.name for s in settings_of(Recipe())]
    assert {"seed", "policy.lora.r", "decode.doctors", "decode.doctors.NAME.beta"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("changed", [False, True])
def test_explanations_stand_beside_their_settings_and_the_print_loads_back(changed: bool, tmp_path: Path) -> None:
    text = 'select: {lambda_diff: 0.25}\nreward: {positive: "one # two\\nthree: four"}\n'
    text += "decode: {doctors: {'a: b': {beta: -1}, c: {}}}"
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(
        str(tmp_path / "r.yaml"), ["policy.template_kwargs={a: [1, {b: null}], 'null': ''}", "run_dir='#'"]
    )
    printed = to_yaml(recipe, changed)
    assert ("  rule: adv  # Which candidates" in printed) != changed and ("[random, mixed, adv, " in printed) != changed
    assert "  lambda_diff: 0.25  # Keep iff k < lambda_diff * K (P2), decided on integers.\n" in printed
    assert ("seed: 0" not in printed) == ("inclusive" not in printed) == ("c: {}" in printed) == changed
    (tmp_path / "again.yaml").write_text(printed)
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    assert to_yaml(load_recipe(str(tmp_path / "again.yaml")), changed) == printed


def test_a_recipe_of_defaults_prints_nothing_that_changed(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(to_yaml(Recipe(), changed=True))
    assert (tmp_path / "r.yaml").read_text() == "{}\n" and load_recipe(str(tmp_path / "r.yaml")) == Recipe()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_what_a_shipped_recipe_changes_is_that_recipe(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["select", str(path), "--print-config", "--changed"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "r.yaml").write_text(printed)
    assert load_recipe(str(tmp_path / "r.yaml")) == load_recipe(str(path))
    assert len(yaml.safe_load(printed)) < len(dataclasses.fields(Recipe)) / 2


def test_changed_without_print_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["select", str(RECIPES[-1]), "--changed"])
    assert caught.value.code == 2 and "--print-config" in capsys.readouterr().err


def test_every_name_of_the_door_is_a_section_or_the_way_to_declare_one() -> None:
    assert sorted(config.__all__) == sorted(n for n in vars(config) if re.fullmatch(r"[A-Z]\w+|ranged", n))


if __name__ == "__main__":
    LIST.write_text(listing(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
