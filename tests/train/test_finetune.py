"""Fine-tuning on another cache, and the check before and after in one report: the commands of docs/training.md."""

import dataclasses
import json

import pytest

from dflash_jax.check import CheckConfig, check
from dflash_jax.core import write_json
from dflash_jax.report import ReportConfig, write_report
from dflash_jax.train import train
from support import tiny, tiny_chain

pytestmark = pytest.mark.slow


def test_before_and_after_in_one_report(tmp_path, target_folder):
    first = tiny_chain.make_cache(tmp_path / "first", target_folder, tiny.TEXTS[1:3])
    # other texts, at other offsets
    other = tiny_chain.make_cache(tmp_path / "other", target_folder, tiny.TEXTS[3:6], position_offsets=(0, 4096))
    config = tiny_chain.train_config(target_folder, first, tmp_path / "parent", steps=8, num_layers=1)
    train(config)
    child = dataclasses.replace(
        config, cache=other, out=tmp_path / "child", steps=40, init_from=tmp_path / "parent" / "last", num_layers=None,
        block_size=None, schedule="constant", learning_rate=3e-3, eval_cache=first, eval_every=20, keep=1,
    )  # fmt: skip
    # the parent has seen every prompt of the first cache: nothing there is held out
    with pytest.raises(ValueError, match=r"--eval-cache .* has no prompt that the drafter was not trained on"):
        train(child)
    said = train(dataclasses.replace(child, eval_cache=None, eval_every=None))
    # the link was resolved: what it points to tomorrow does not matter
    begun = json.loads((tmp_path / "child" / "config.json").read_text())
    assert begun["config"]["init_from"] == str(tmp_path / "parent" / "run-8")
    assert said["num_prompts"] == 5
    rates = [
        json.loads(line)["learning_rate"] for line in (tmp_path / "child" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rates[-1] == pytest.approx(3e-3)
    told = check(
        CheckConfig(
            target=target_folder, cache=other, drafter=tmp_path / "child" / "last",
            compare_drafters=(tmp_path / "parent" / "last",), bootstrap_samples=50,
        )
    )  # fmt: skip
    (pair,) = told["comparison"]
    assert (pair["a"]["drafter"], pair["b"]["drafter"]) == (
        str(tmp_path / "child" / "last"),
        str(tmp_path / "parent" / "last"),
    )
    before, after = told["checks"][1]["token_acc_mean"], told["checks"][0]["token_acc_mean"]
    assert after > before + 0.05
    write_json(tmp_path / "check.json", told)
    page = tmp_path / "report.html"
    write_report(ReportConfig(inputs=(tmp_path / "check.json", tmp_path / "child"), out=page))
    text = page.read_text()
    assert "child/last" in text
    assert "parent/last" in text
