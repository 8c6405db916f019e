"""Recipes: every mistake is named with its cure, all at once; what is printed is what runs; no setting is dead."""

import dataclasses
import re
import typing
from operator import attrgetter
from pathlib import Path

import pytest
from support.recipes import ROOT

from nemo_pivotrl import cli, config
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.build import GONE, RENAMED
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.config.show import to_yaml
from nemo_pivotrl.core.errors import InputError, Problem

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def recipe_file(folder: Path, text: str, name: str = "r.yaml") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems_of(path: str, *overrides: str) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_an_empty_recipe_gives_the_papers_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, ""))
    assert recipe == Recipe()
    assert (recipe.profile.num_generations, recipe.select.rule, recipe.select.lambda_diff) == (16, "adv", 0.6)
    assert (recipe.policy.generation.temperature, recipe.policy.generation.top_p) == (1.0, 1.0)
    assert (recipe.policy.optimizer.lr, recipe.loss_fn.ratio_clip_min, recipe.loss_fn.ratio_clip_max) == (
        1e-6,
        0.2,
        0.2,
    )


def test_a_misspelt_key_is_an_error_that_names_the_right_one(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "select: {lamda_diff: 0.5}")
    (problem,) = problems_of(path)
    assert (problem.file, problem.field) == (path, "select.lamda_diff")
    assert problem.remedy == "did you mean `lambda_diff`?"
    (nameless,) = problems_of(recipe_file(tmp_path, "select: {zzzz: 1}"))
    assert "rule" in nameless.remedy and "lambda_diff" in nameless.remedy


@pytest.mark.parametrize(
    ("text", "field", "allowed"),
    [
        ("select: {lambda_diff: 1.01}", "select.lambda_diff", "from 0.0 to 1.0"),
        ("select: {lambda_diff: -0.1}", "select.lambda_diff", "from 0.0 to 1.0"),
        ("select: {lambda_diff: .nan}", "select.lambda_diff", "from 0.0 to 1.0"),
        ("profile: {num_generations: 3}", "profile.num_generations", "from 4 to 256"),
        ("policy: {optimizer: {lr: -1e-6}}", "policy.optimizer.lr", "from 0.0 to 1.0"),
        ("extract: {min_reward: .nan}", "extract.min_reward", "a number"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(tmp_path: Path, text: str, field: str, allowed: str) -> None:
    (problem,) = problems_of(recipe_file(tmp_path, text))
    assert (
        problem.field == field
        and problem.remedy == f"out of range: use {'a value ' if allowed != 'a number' else ''}{allowed}"
    )


@pytest.mark.parametrize(
    ("text", "field", "wanted"),
    [
        ("profile: {num_generations: many}", "profile.num_generations", "expected int"),
        ("profile: {num_generations: 16.5}", "profile.num_generations", "expected int"),
        ("profile: {num_generations: true}", "profile.num_generations", "expected int"),
        ("select: {lambda_diff: fast}", "select.lambda_diff", "expected float"),
        ("select: {lambda_diff: true}", "select.lambda_diff", "expected float"),
        ("select: {lambda_diff: 1" + "0" * 400 + "}", "select.lambda_diff", "expected float"),
        ("select: {inclusive: 1}", "select.inclusive", "expected bool"),
        ("select: {output: 3}", "select.output", "expected str"),
        ("select: {rule: adw}", "select.rule", "did you mean `adv`?"),
        ("select: 3", "select", "this is a section"),
        ("extract: {trajectories: {a: 1}}", "extract.trajectories", "expected a list"),
        ("verifier: {settings: 3}", "verifier.settings", "expected a mapping"),
        ("loss_fn: {ratio_clip_c: high}", "loss_fn.ratio_clip_c", "expected float or NoneType"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_the_right_one(
    tmp_path: Path, text: str, field: str, wanted: str
) -> None:
    (problem,) = problems_of(recipe_file(tmp_path, text))
    assert problem.field == field and wanted in problem.remedy


def test_yaml_1e_6_and_whole_numbers_are_floats_and_a_lone_path_is_a_list(tmp_path: Path) -> None:
    text = "policy: {optimizer: {lr: 1e-6, weight_decay: 0}}\nextract: {trajectories: one.jsonl}\nloss_fn: {ratio_clip_c: null}"
    recipe = load_recipe(recipe_file(tmp_path, text))
    assert recipe.policy.optimizer.lr == 1e-6 and isinstance(recipe.policy.optimizer.weight_decay, float)
    assert recipe.extract.trajectories == ("one.jsonl",) and recipe.loss_fn.ratio_clip_c is None


def test_a_section_given_in_part_keeps_the_rest_of_its_own_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, "warmup: {num_steps: 3}\nsft: {optimizer: {beta2: 0.9}}"))
    assert (recipe.warmup.name, recipe.warmup.source, recipe.warmup.num_steps) == ("start", "candidates", 3)
    assert (recipe.sft.name, recipe.sft.optimizer.lr, recipe.sft.optimizer.beta2) == ("sft", 1e-5, 0.9)


def test_a_setting_that_went_is_refused_with_what_to_do(tmp_path: Path) -> None:
    text = "serve_guided: {max_batch: 4}\nwarmup: {puzzle_batch_size: 32}\nsft: {puzzle_batch_size: 32}\n"
    text += "doctor: {sampler: vllm, generation: {temperature: 0.5}}"
    found = {p.field: p.remedy for p in problems_of(recipe_file(tmp_path, text))}
    assert list(found) == list(GONE)
    assert all(remedy.startswith("remove it: ") for remedy in found.values())


def test_a_setting_with_a_new_name_is_read_under_the_old_one_with_a_warning(tmp_path: Path) -> None:
    for old, new in RENAMED.items():
        section, now = old.partition(".")[0], f"{old.rpartition('.')[0]}.{new}"
        with pytest.warns(FutureWarning, match=f"{old} is {now} now"):
            recipe = load_recipe(recipe_file(tmp_path, f"{section}: {{{old.rpartition('.')[2]}: 0.5}}"))
        assert attrgetter(now)(recipe) == 0.5
        both = f"{section}: {{{old.rpartition('.')[2]}: 0.5, {new}: 0.1}}"
        with pytest.warns(FutureWarning):
            assert [p.field for p in problems_of(recipe_file(tmp_path, both))] == [old]


def test_what_has_no_effect_where_it_stands_is_refused(tmp_path: Path) -> None:
    text = "sft: {copy_steps: 3}\nwarmup: {copy_steps: 4}"
    found = problems_of(recipe_file(tmp_path, text))
    assert [(p.field, p.found) for p in found] == [
        ("sft.copy_steps", "3"),
        ("warmup.copy_steps", "4"),
    ]
    assert "`source: world`" in found[0].remedy
    world = load_recipe(recipe_file(tmp_path, "warmup: {copy_steps: 4, source: world}"))
    assert world.warmup.copy_steps == 4


def test_all_mistakes_of_a_recipe_come_at_once(tmp_path: Path) -> None:
    text = "select: {lamda_diff: 0.5, rule: adw}\nprofile: {num_generations: 2}\ngrop: {}\npolicy: {generation: {top_p: x}}"
    fields = [p.field for p in problems_of(recipe_file(tmp_path, text))]
    assert fields == ["select.lamda_diff", "select.rule", "profile.num_generations", "grop", "policy.generation.top_p"]


def test_defaults_chain_from_the_files_folder_and_later_files_win(tmp_path: Path) -> None:
    recipe_file(tmp_path, "seed: 1\nselect: {lambda_diff: 0.1, limit: 1}\nprofile: {num_generations: 5}", "base/a.yaml")
    recipe_file(tmp_path, "defaults: a.yaml\nselect: {lambda_diff: 0.2, limit: 2}", "base/b.yaml")
    recipe_file(tmp_path, "select: {limit: 3}", "c.yaml")
    recipe = load_recipe(recipe_file(tmp_path, "defaults: [base/b.yaml, c.yaml]\nprofile: {num_generations: 6}"))
    assert (recipe.seed, recipe.select.lambda_diff, recipe.select.limit, recipe.profile.num_generations) == (
        1,
        0.2,
        3,
        6,
    )


def test_a_circle_of_defaults_and_a_missing_default_are_named(tmp_path: Path) -> None:
    recipe_file(tmp_path, "defaults: b.yaml", "a.yaml")
    recipe_file(tmp_path, "defaults: a.yaml", "b.yaml")
    (circle,) = problems_of(str(tmp_path / "a.yaml"))
    assert circle.field == "defaults" and circle.found == "a circle"
    (missing,) = problems_of(recipe_file(tmp_path, "defaults: nowhere.yaml"))
    assert (
        missing.file.endswith("r.yaml") and missing.found.endswith("nowhere.yaml") and "no such file" in missing.remedy
    )
    (absent,) = problems_of(str(tmp_path / "absent.yaml"))
    assert absent.file == "command line" and absent.found.endswith("absent.yaml")


@pytest.mark.parametrize("text", ["- a\n- b", "just words", "a: [1", "a: 1\na: 2", "run_dir: ${nowhere.at_all}"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    path = recipe_file(tmp_path, text)
    (problem,) = problems_of(path)
    assert problem.file == path


SECRETS = {
    "accounts": "root:$y$j9T$hunter2:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n",
    "names": "aws_access_key_id: hunter1\nhunter2_key: hunter3\n",
    "ini": "[hunter1]\nhunter2 = hunter3\n",
    "key": "-----BEGIN HUNTER PRIVATE KEY-----\nhunter2\n",
    "cut": "key: [hunter2\nhunter3: }",
    "alias": "key: *hunter2\n",
    "tag": "key: !hunter2 x\n",
    "interpolation": "key: ${hunter2\n",
    "json": '{"type": "hunter1", "private_key": "hunter2"}',
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_default_that_is_no_recipe_is_named_and_nothing_of_it_is_shown(tmp_path: Path, kind: str) -> None:
    """`defaults: /etc/shadow` would print that file's keys, and a parser's error the lines around the place."""
    (tmp_path / "secrets").write_text(SECRETS[kind])
    for text in ("defaults: secrets", "trainer: {}\ndefaults: [secrets]"):
        (problem,) = problems_of(recipe_file(tmp_path, text))
        assert problem.file == str(tmp_path / "secrets")
        assert "hunter" not in str(problem).lower()
    if kind in ("accounts", "ini", "key", "cut", "alias", "interpolation"):  # named by a person, too
        (problem,) = problems_of(str(tmp_path / "secrets"))
        assert "hunter" not in str(problem).lower()


def test_a_parsers_error_still_says_what_it_wants(tmp_path: Path) -> None:
    (problem,) = problems_of(recipe_file(tmp_path, "seed: 1\nselect: [a\nb: }"))
    assert (problem.line, problem.found) == (3, "expected ',' or ']', but got ':'")


def test_a_binary_file_or_a_folder_given_as_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff\xfe\x00\x81")
    for wrong in (path, tmp_path):
        (problem,) = problems_of(str(wrong))
        assert problem.file == str(wrong)


def test_an_empty_mapping_on_the_command_line_empties_one_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("verifier: {name: functional, settings: {rules: {sql: false}}}")
    made = load_recipe(str(tmp_path / "r.yaml"), ["verifier.name=exact", "verifier.settings={}"]).verifier
    assert (made.name, made.settings) == ("exact", {})


def test_overrides_win_and_are_checked_like_the_file(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "select: {lambda_diff: 0.5}\nrun_dir: a\npolicy: {model_name: '${run_dir}/policy'}")
    recipe = load_recipe(
        path,
        ["select.lambda_diff=0.25", "run_dir=b", "extract.trajectories=[x, y]", "verifier.settings.allow_subset=true"],
    )
    assert recipe.select.lambda_diff == 0.25 and recipe.policy.model_name == "b/policy"
    assert recipe.extract.trajectories == ("x", "y") and recipe.verifier.settings == {"allow_subset": True}
    assert [p.field for p in problems_of(path, "select.lambda_diff=2", "selekt.limit=1")] == [
        "select.lambda_diff",
        "selekt",
    ]
    for broken in ("select.lambda_diff", "=3", "select.limit=[1", "select.lambda_diff.deeper=1"):
        assert len(problems_of(path, broken)) == 1


def test_the_config_hash_follows_its_own_sections_and_the_seed_only(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "")
    base = load_recipe(path).digest("select")
    assert load_recipe(path, ["run_dir=elsewhere", "profile.num_generations=8"]).digest("select") == base
    assert load_recipe(path, ["select.lambda_diff=0.5"]).digest("select") != base
    assert load_recipe(path, ["seed=1"]).digest("select") != base


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_shipped_recipe_loads_and_its_print_config_loads_back_equal(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(str(path))
    assert cli.main(["select", str(path), "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert printed == to_yaml(recipe)
    assert load_recipe(recipe_file(tmp_path, printed)) == recipe


def test_print_config_loads_back_equal_for_awkward_values(tmp_path: Path) -> None:
    overrides = [
        "run_dir='007'",
        "policy.template_kwargs={enable_thinking: false, n: [1, 2.5, null]}",
        "policy.optimizer.lr=1e-7",
    ]
    overrides += ["evaluate.policies={base: a, 'null': b}", "loss_fn.ratio_clip_c=3", "extract.tools='yes'"]
    recipe = load_recipe(recipe_file(tmp_path, ""), overrides)
    assert (recipe.run_dir, recipe.extract.tools) == ("007", "yes")
    assert load_recipe(recipe_file(tmp_path, to_yaml(recipe))) == recipe


def test_every_setting_is_used_outside_the_file_that_declares_it() -> None:
    sources = [
        p.read_text(encoding="utf-8") for p in (ROOT / "nemo_pivotrl").rglob("*.py") if p.parent.name != "config"
    ]
    read_as_attribute_or_named_in_a_table = r"\.([a-z_0-9]+)\b|\"([a-z_0-9]+)\":"
    used = {name for pair in re.findall(read_as_attribute_or_named_in_a_table, "\n".join(sources)) for name in pair}
    sections = [c for c in vars(config).values() if dataclasses.is_dataclass(c)]
    assert Recipe in sections and len(sections) > 10
    dead = [
        f"{s.__name__}.{f.name}"
        for s in sections
        for f in dataclasses.fields(typing.cast(typing.Any, s))
        if f.name not in used
    ]
    assert dead == []
