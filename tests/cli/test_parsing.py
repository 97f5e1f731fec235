"""Flags and recipes to configs, and one line for each way to get them wrong."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from dflash_jax.cli.parsing import parse
from dflash_jax.core import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class _Config:
    """Every kind of field that a command's config has."""

    target: Path
    """A folder."""
    steps: int = 200
    """A number."""
    learning_rate: float = 6e-4
    """A real number."""
    position_offsets: tuple[int, ...] = (0,)
    """Numbers in one value."""
    capture_layers: tuple[int, ...] | None = None
    """Numbers in one value, or none."""
    inputs: tuple[Path, ...] = ()
    """Paths, one value each."""
    limit: int | None = None
    """A number or none."""
    resume: bool = False
    """A switch."""
    init: Literal["target", "random"] = "target"
    """A choice."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"--steps is {self.steps}: a positive number is needed")


def _parse(*arguments: str) -> _Config:
    return parse(_Config, arguments, command="train")[0]


def test_flags_fill_the_config_in_both_spellings():
    config = _parse("--target", "t", "--position-offsets", "0,4096,65536,131072", "--capture-layers=1,10,18,27")
    assert config == _Config(
        target=Path("t"), position_offsets=(0, 4096, 65536, 131072), capture_layers=(1, 10, 18, 27)
    )
    config = _parse(
        "--target=t", "--learning_rate=1e-3", "--resume", "--init", "random", "--limit=3", "--inputs", "a", "b"
    )
    expected = {"learning_rate": 1e-3, "resume": True, "init": "random", "limit": 3, "inputs": (Path("a"), Path("b"))}
    assert config == _Config(target=Path("t"), **expected)
    # A negative number is a value, for the config to judge.
    assert _parse("--target=t", "--limit", "-5", "--position-offsets", "-1,2").position_offsets == (-1, 2)


def test_json_flag_is_given_back():
    assert parse(_Config, ["--target=t", "--json", "r.json"], command="train")[1] == Path("r.json")
    assert parse(_Config, ["--target=t"], command="train")[1] is None


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--target=t", "--stepz", "5"], "unknown flag --stepz; did you mean --steps? (see dflash-jax train --help)"),
        (["--stepz=5"], "unknown flag --stepz; did you mean --steps? (see dflash-jax train --help)"),
        (["--target=t", "--position_ofsets=1"], "unknown flag --position_ofsets; did you mean --position-offsets?"),
        (["--target=t", "--qqq"], "unknown flag --qqq (see dflash-jax train --help)"),
        (["--target=t", "stray"], "unexpected argument 'stray': values follow a flag"),
        (["--target=t", "--resume=true"], "unexpected argument 'true': values follow a flag"),
        ([], "--target is needed (see dflash-jax train --help)"),
        (["--target=t", "--steps"], "--steps needs a value (INT)"),
        (["--target=t", "--steps", "many"], "--steps needs INT: invalid literal for int() with base 10: 'many'"),
        (["--target=t", "--limit=x"], "--limit needs INT: invalid literal for int() with base 10: 'x'"),
        (["--target=t", "--capture-layers=1,x"], "--capture-layers needs INT,INT,...: invalid literal for int()"),
        (
            ["--target=t", "--position-offsets", "1,,2"],
            "--position-offsets needs INT,INT,...: invalid literal for int()",
        ),
        (["--target=t", "--init=zero"], "--init is 'zero': choose target or random (see dflash-jax train --help)"),
        (["--target=t", "--steps=0"], "--steps is 0: a positive number is needed"),
    ],
)
def test_bad_flags_are_one_line(arguments: list[str], line: str):
    with pytest.raises(InputError) as caught:
        _parse(*arguments)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def _recipe(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text)
    return f"--config={folder / 'recipe.yaml'}"


def test_recipe_fills_the_config_and_flags_win(tmp_path: Path):
    recipe = _recipe(
        tmp_path,
        "target: t\nsteps: 7\nlearning-rate: 1e-3\nposition_offsets: [0, 4096]\ncapture_layers: '1,2'\n"
        "inputs: [a, b]\nlimit: null\nresume: true\n",
    )
    from_recipe = {
        "target": Path("t"),
        "learning_rate": 1e-3,
        "position_offsets": (0, 4096),
        "capture_layers": (1, 2),
        "inputs": (Path("a"), Path("b")),
    }
    assert _parse(recipe) == _Config(steps=7, resume=True, **from_recipe)
    # Wherever the recipe stands among the flags.
    for arguments in (["--steps=9", recipe, "--no-resume"], [recipe, "--steps", "9", "--no-resume"]):
        assert _parse(*arguments) == _Config(steps=9, resume=False, **from_recipe)
    assert _parse(recipe, "--inputs", "c").inputs == (Path("c"),)
    path = recipe.removeprefix("--config=")
    assert _parse("--config", path) == _parse(recipe)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("target: t\nstepz: 5", "unknown key stepz in RECIPE; did you mean steps?"),
        ("qqq: 5", "unknown key qqq in RECIPE; known are target, steps, learning_rate, "),
        ("target: t\nsteps: many", "--steps needs INT: invalid literal for int() with base 10: 'many' (in RECIPE)"),
        ("target: t\nresume: 1", "resume is 1 in RECIPE: true or false is needed"),
        ("target: t\nsteps: {a: 1}", "steps is {'a': 1} in RECIPE: a dict does not fit it"),
        ("target: t\nsteps: true", "steps is True in RECIPE: a bool does not fit it"),
        ("steps: 5", "--target is needed (see dflash-jax train --help)"),
        ("target: t\nsteps: 0", "--steps is 0: a positive number is needed"),
        ("- 1\n- 2", "the recipe is a YAML list, a mapping of flags to values is needed: RECIPE"),
        ("a: [1", "the recipe is not YAML: RECIPE: while parsing a flow sequence in"),
    ],
)
def test_bad_recipes_are_one_line(tmp_path: Path, text: str, line: str):
    recipe = _recipe(tmp_path, text)
    with pytest.raises(InputError) as caught:
        _parse(recipe)
    assert str(caught.value).startswith(line.replace("RECIPE", recipe.removeprefix("--config=")))
    assert "\n" not in str(caught.value)


def test_a_bad_flag_is_not_blamed_on_the_recipe(tmp_path: Path):
    recipe = _recipe(tmp_path, "target: t\nsteps: 5")
    with pytest.raises(InputError, match=r"--steps needs INT: .* 'x' \(see dflash-jax train --help\)$"):
        _parse(recipe, "--steps=x")


def test_recipe_that_is_missing_or_empty(tmp_path: Path):
    with pytest.raises(InputError, match=r"the recipe is missing: .*gone\.yaml"):
        _parse("--target=t", "--config", str(tmp_path / "gone.yaml"))
    with pytest.raises(InputError, match="--config needs a value"):
        _parse("--target=t", "--config")
    assert _parse(_recipe(tmp_path, ""), "--target=t") == _Config(target=Path("t"))


def test_help_names_every_flag_its_meaning_and_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        _parse("--help")
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "usage: dflash-jax train" in text
    assert "Every kind of field that a command's config has." in text
    assert "--steps INT A number. (default: 200)" in text
    assert "--position-offsets INT,INT,... Numbers in one value. (default: 0)" in text
    assert "--init {target,random}" in text
    assert "--config FILE YAML recipe" in text
    assert "--json FILE" in text
