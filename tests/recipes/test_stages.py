"""Stages of a recipe: each command runs once, its record is kept, and what differs is refused."""

import pytest

from dflash_jax.core import read_json, write_json
from stages import KEEPS_MEMORY, StageError, Stages
from support import tiny


@pytest.mark.parametrize("in_process", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_stage_runs_once(tmp_path, in_process):
    target = tiny.write_tiny_target(tmp_path / "target")
    arguments = ("target", "info", "--target", target)
    stages = Stages(tmp_path / "out", in_process=in_process)
    found = stages.run("info", *arguments)
    assert found["num_layers"] == 5
    assert stages.commands == {"info": f"dflash-jax target info --target {target}"}
    assert stages.seconds["info"] > 0
    assert (tmp_path / "out" / "logs" / "info.log").exists() == in_process
    # its record is read, the command is not run
    write_json(tmp_path / "out" / "records" / "info.json", {"from": "the record"})
    again = Stages(tmp_path / "out", in_process=in_process)
    assert again.run("info", *arguments) == {"from": "the record"}
    assert again.seconds == stages.seconds


def test_a_record_of_another_command_is_refused(tmp_path):
    target = tiny.write_tiny_target(tmp_path / "target")
    stages = Stages(tmp_path / "out", in_process=True)
    stages.run("info", "target", "info", "--target", target)
    with pytest.raises(StageError, match="stage info .* was run as .*target info --target .* now it is .* data=2"):
        stages.run("info", "target", "info", "--target", target, "--mesh", "data=2")


@pytest.mark.parametrize("in_process", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_stage_that_fails_leaves_no_record_and_says_where_to_look(tmp_path, in_process, capfd):
    stages = Stages(tmp_path / "out", in_process=in_process)
    with pytest.raises(StageError, match="stage info ended with exit code 2: see"):
        stages.run("info", "target", "info", "--target", tmp_path / "nothing")
    assert list((tmp_path / "out" / "records").iterdir()) == []
    assert "nothing" in capfd.readouterr().err


def test_exit_codes_that_are_allowed_are_no_failure(tmp_path):
    stages = Stages(tmp_path / "out", in_process=True)
    record = tmp_path / "out" / "records" / "info.json"
    write_json(record, {"left": "by the command"})
    assert stages.run("info", "target", "info", "--target", tmp_path / "nothing", allowed=(0, 2)) == read_json(
        record, what="the record"
    )


def test_what_is_there_already_is_not_made_again(tmp_path):
    made = tiny.write_tiny_target(tmp_path / "target")
    stages = Stages(tmp_path / "out", in_process=True)
    assert stages.run("target", "target", "import", "--smollm2", "--out", made, made=made) == {"made": str(made)}
    assert stages.seconds == {"target": 0.0}


def test_stages_keep_what_they_free_unless_told_otherwise(tmp_path, monkeypatch):
    told = tmp_path / "told"
    monkeypatch.setattr(
        "stages.PROGRAM", f"import json, os; open({str(told)!r}, 'w').write(json.dumps(dict(os.environ)))"
    )
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    for name in set(KEEPS_MEMORY) - {"MALLOC_ARENA_MAX"}:
        monkeypatch.delenv(name, raising=False)
    assert Stages._apart(["nothing"]) == 0
    environment = read_json(told, what="what a stage was told")
    assert {name: environment[name] for name in KEEPS_MEMORY} == KEEPS_MEMORY | {"MALLOC_ARENA_MAX": "3"}
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
