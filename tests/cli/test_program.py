"""The program from outside: exit codes, one line for bad input, the last line of stdout."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dflash_jax import __version__
from dflash_jax.cli import main, program
from dflash_jax.cli.commands import COMMANDS, CacheInfoConfig, Command

PROGRAM = [sys.executable, "-c", "import sys; from dflash_jax.cli import main; sys.exit(main())"]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=120)


def test_help_and_version_need_no_jax():
    loaded = "import sys; from dflash_jax.cli import main; main(sys.argv[1:]); print('jax' in sys.modules)"
    for argument in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", loaded, argument], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False"
    assert f"dflash-jax {__version__}" in done.stdout


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    assert main(["cache", "--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert text.count(f"\n  {command.name} ") == 2


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_has_help_and_is_wired_to_its_room(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"usage: dflash-jax {command} " in out
    assert "--json FILE" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "unknown command trian; did you mean train? (see dflash-jax --help)"),
        (["cache", "bild"], "unknown command cache bild; did you mean cache build? (see dflash-jax --help)"),
        (["cache"], "cache needs one word more: cache build or cache cost or cache info or cache verify"),
        (["cache", "--cache", "x"], "unknown command cache; did you mean cache info? (see dflash-jax --help)"),
        (["zzzzzz"], "unknown command zzzzzz (see dflash-jax --help)"),
        (["target", "import", "--out", "x"], "target import needs one source: give either --smollm2 or --gguf FILE"),
        (["target", "info", "--tarjet", "x"], "unknown flag --tarjet; did you mean --target?"),
        (["target", "info", "--target", "nowhere"], "no target folder at nowhere"),
        # A command with a progress bar: the line stands alone all the same.
        (["train", "--target", "t", "--cache", "nowhere", "--out", "o"], ""),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dflash-jax: {line}")
    assert err.count("\n") == 1


def test_last_line_of_stdout_is_the_result_and_json_holds_it_too(smollm2: Path, tmp_path: Path):
    path = tmp_path / "new" / "info.json"
    done = _run("target", "info", "--target", str(smollm2), "--json", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["num_layers"] == 30
    assert json.loads(path.read_text()) == result
    assert any("num_layers" in line and "30" in line for line in done.stdout.splitlines()[:-1])


def test_violation_is_exit_1_and_still_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["cache", "verify", "--cache", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["ok"] is False
    assert result["problems"]
    assert err == ""


@pytest.mark.parametrize(("tokens_equal", "holds"), [(True, True), (False, False), (None, True)])
def test_unequal_tokens_are_a_violation(tokens_equal: bool | None, holds: bool):
    commands = {command.name: command for command in COMMANDS}
    decoded = {"tokens_equal": tokens_equal, "tau_micro": 1.5}
    assert commands["decode"].holds(decoded) is holds
    assert commands["demo"].holds({"check": {}, "decode": decoded}) is holds


@pytest.mark.parametrize(
    ("dtype", "explained", "holds"),
    [("bfloat16", [True, True], True), ("bfloat16", [True, False], False), ("float32", [True, True], False)],
)
def test_only_bfloat16_may_flip_near_ties(dtype: str, explained: list[bool], holds: bool):
    (decode,) = (command for command in COMMANDS if command.name == "decode")
    differences = [{"explained": one} for one in explained]
    assert decode.holds({"tokens_equal": False, "dtype": dtype, "differences": differences}) is holds


def test_json_that_cannot_be_written_is_learnt_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    for path, why in ((tmp_path, "is a folder"), (tmp_path / "file" / "a.json", "cannot be written")):
        # The target is missing too: that it is not named shows that the work was not begun.
        assert main(["target", "info", "--target", "nowhere", "--json", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"dflash-jax: --json {path} {why}")


def test_operating_system_errors_name_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    numbers = {"tau_micro": 2.0, "tau_macro": 2.0, "tokens_per_s": 9.0, "num_prompts": 1, "num_tokens": 8}
    (tmp_path / "decode.json").write_text(json.dumps({"tokens_equal": True, "block_size": 8, **numbers}))
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "page.html"
    assert main(["report", "--inputs", str(tmp_path / "decode.json"), "--out", str(out)]) == 2
    # The parent is a file: making it a folder fails.
    assert capsys.readouterr().err == f"dflash-jax: {tmp_path / 'file'}: File exists\n"


def test_closed_stdout_is_no_traceback_and_no_violation(smollm2: Path):
    arguments = [*PROGRAM, "target", "info", "--target", str(smollm2)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 2


@pytest.mark.slow
def test_interrupt_says_how_to_go_on_and_leaves_nothing(tmp_path: Path):
    out = tmp_path / "target"
    arguments = [*PROGRAM, "target", "import", "--smollm2", "--out", str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        # The folder that is being filled shows that the command is at work.
        while not any(tmp_path.iterdir()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        try:
            out_text, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:  # a library's C++ caught it, once in hundreds of runs: people press again
            os.kill(process.pid, signal.SIGINT)
            out_text, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == (
        "dflash-jax: interrupted: run the same command again (with --resume for train) to go on"
    )
    assert "Traceback" not in err
    assert out_text == ""
    assert list(tmp_path.iterdir()) == []


class _Finaliser:
    def __del__(self) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_that_lands_in_a_finaliser_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def work(_: object) -> dict[str, object]:
        _Finaliser()
        for _ in range(500):
            time.sleep(0.01)
        return {}

    command = Command(name="work", summary="", load=lambda: (CacheInfoConfig, work))
    monkeypatch.setattr(program, "COMMANDS", (command,))
    hook = sys.unraisablehook
    assert main(["work", "--cache", "somewhere"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sys.unraisablehook is hook
