import json
import os
import subprocess
import sys

import pytest

from dflash_jax.core import InputError
from dflash_jax.demo import DemoConfig, run_demo
from dflash_jax.text import load_prompts

SMALL = {"train_prompts": 2, "check_prompts": 2, "decode_prompts": 1, "max_new_tokens": 8, "steps": 2}


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not a demo's folder"):
        run_demo(DemoConfig(out=tmp_path, **SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_other_settings_are_named(tmp_path):
    begun = {**SMALL, "seed": 0, "steps": 3}
    (tmp_path / "demo.json").write_text(json.dumps(begun))
    with pytest.raises(InputError, match="other settings: steps was 3, now 2"):
        run_demo(DemoConfig(out=tmp_path, **SMALL))


def test_numbers_must_be_positive():
    with pytest.raises(InputError, match="--check-prompts is 0"):
        DemoConfig(check_prompts=0)


def demo(out):
    """The command in a process of its own, compiled as users compile: the real target's passes are faster then."""
    flags = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    program = [sys.executable, "-c", "import sys; from dflash_jax.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [*program, "demo", "--out", str(out), *flags], capture_output=True, text=True, check=False,
        env=os.environ | {"XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_whole_chain_and_again_from_its_records(tmp_path, smollm2):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "demo.json").write_text(json.dumps({**SMALL, "seed": 0}))
    (out / "target").symlink_to(smollm2)
    result = demo(out)
    assert set(result) == {"check", "decode", "report", "seconds"}
    assert list(result["check"]["by_ctx_pos_start"]) == ["0", "4096", "65536", "131072"]
    assert result["check"]["seen"] is None
    assert result["check"]["unseen"]["num_prompts"] == 2
    assert result["check"]["untrained"]["num_anchors"] == result["check"]["by_ctx_pos_start"]["0"]["num_anchors"]
    assert result["decode"]["tokens_equal"] is True
    assert "SmolLM2" in (out / "report.html").read_text()
    trained_on = [json.loads(line)["id"] for line in (out / "responses-train.jsonl").read_text().splitlines()]
    stdlib = {prompt.id for prompt in load_prompts("stdlib")}
    assert all(name.endswith("/complete") and name in stdlib for name in trained_on)

    written = (out / "run" / "run-2" / "model.safetensors").stat().st_mtime_ns
    assert demo(out) == result  # every stage kept, none run again
    assert (out / "run" / "run-2" / "model.safetensors").stat().st_mtime_ns == written
