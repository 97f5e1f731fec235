"""The recipe on the tiny target: it runs, goes on where it stopped, and its runs differ by what they say."""

import contextlib
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import smollm2
from dflash_jax.core import InputError, read_jsonl, save_tensors
from dflash_jax.text import load_tokenizer
from smollm2 import LEFT_OUT, Recipe, budget_s, prompts_of, variants
from support import tiny, tiny_chain


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a call of the recipe came to."""

    code: int
    out: str
    err: str
    results: dict[str, Any]
    written: int


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The tiny target with room for the built-in prompts, which never says the token that masks a block's slots."""
    folder = tmp_path_factory.mktemp("tiny") / "target"
    tiny.write_tiny_target(folder, seed=tiny.TARGET_SEED, max_position_embeddings=4096)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][tiny.MASK_ID] = 0.5 * weights["lm_head.weight"][tiny.MASK_ID + 1]
    save_tensors(folder / "model.safetensors", weights)
    return folder


def small(out, target, **changes):
    settings = {
        "out": out,
        "target": target,
        "in_process": True,
        "mix": "problems/plain=4,stdlib/complete=4",
        "copied": "stdlib/complete=1,stdlib/implement=1",
        "choosing": "problems=2",
        "max_new_tokens": 12,
        "response_batch": 8,
        "capture_layers": "1,2,3",
        "top_k": 4,
        "block_size": 4,
        "num_layers": 2,
        "steps": 4,
        "sequences_per_step": 2,
        "anchors_per_sequence": 5,
        "held_out": 3,
        "decode_prompts": 2,
        "held_out_tokens": 12,
        "decode_block_size": 3,
        "draft_vocab": 9,
    }
    return Recipe(**settings | changes)


def test_the_defaults_are_within_the_budget():
    recipe = Recipe(out=Path("out"))
    hours = sum(budget_s(recipe).values()) / 3600
    assert 1.8 < hours < 2.5 * 0.95  # some room for what is not counted
    assert budget_s(replace(recipe, steps=2 * recipe.steps))["train"] > 1.9 * budget_s(recipe)["train"]


def test_budget_by_hand():
    recipe = small(
        Path("out"),
        Path("t"),
        mix="problems/plain=4,self=3",
        choosing="problems=2,self=1",
        block_size=8,
        sampled_vocab=0,
        optimizer="adamw",
        max_new_tokens=100,
        held_out_tokens=100,
        opening_tokens=100,
    )
    found = budget_s(recipe)
    # 4 prompts that the target makes up take three rounds of 0.35 x 4 openings: 46 tokens to begin with, 62 sampled
    assert found["prompts"] == pytest.approx(3 * 15 + 4.2 * (62 / 200 + 46 / 700))
    assert budget_s(replace(recipe, mix="problems=7", choosing="problems=2"))["prompts"] == 0
    # 10 prompts of 117 tokens, 3 held-out ones of 191; responses of 80 tokens on average, of at most 100
    wanted = 3 * 15 + 10 * (80 / 200 + 117 / 700) + 3 * (80 / 115 + 191 / 430)  # held out: float32
    assert found["responses"] == pytest.approx(wanted)
    # and 2 copied texts of 149 tokens, which only the cache has to read
    assert found["caches"] == pytest.approx(3 * 15 + (10 * 197 + 2 * 149) / 700 + 3 * 271 / 430)
    assert budget_s(replace(recipe, target_dtype="float32"))["caches"] > 1.3 * found["caches"] - 20
    # 4 steps of 2 sequences of 5.3 GFLOP and 5 anchors each of 0.8 + 2 x 0.21 + 0.08, an update of 0.06 s, and 4 times
    # 3 x 80 anchors evaluated
    assert found["train"] == pytest.approx(15 + 4 * (2 * (5.3 + 5 * 1.3) / 250 + 0.06) + 4 * 240 / 200)
    sampled = budget_s(replace(recipe, sampled_vocab=12288))["train"]
    assert found["train"] - sampled == pytest.approx(4 * 2 * 5 * 0.6 / 250)
    # Muon's iterations take 0.52 s a layer and 0.04 s a captured one
    muon = budget_s(replace(recipe, optimizer="muon"))["train"]
    captured = len(recipe.capture_layers.split(","))
    assert muon - found["train"] == pytest.approx(4 * (0.52 * 2 + 0.04 * captured - 0.06))


@pytest.mark.slow
def test_prompts_of_a_mix():
    mix = "problems/plain=3,stdlib/complete=2"
    first, last = list(prompts_of(mix)), list(prompts_of(mix, from_the_end=True))
    assert [prompt.id.split("/")[0] for prompt in first] == ["problems"] * 3 + ["stdlib"] * 2
    assert all(prompt.id.endswith("/plain") for prompt in first[:3])
    assert not {prompt.id for prompt in first} & {prompt.id for prompt in last}
    # a smaller mix is a part of a larger one, so that its responses are too
    assert list(prompts_of("problems/plain=2")) == first[:2]
    with pytest.raises(InputError, match="the prompts of humaneval are held out"):
        list(prompts_of("humaneval=3"))
    with pytest.raises(InputError, match="1000 prompts of problems/plain are asked for: it has 284"):
        list(prompts_of("problems/plain=1000"))
    long = list(prompts_of("problems@300=5,problems/plain=2"))
    assert all(smollm2.characters_of(prompt) >= 300 for prompt in long[:5])
    assert all(prompt.id.endswith("/plain") for prompt in long[5:])
    both = [prompt.id for prompt in prompts_of("problems@300=5,problems=300")]
    assert len(set(both)) == 305
    for bad in ("stdlib", ""):
        with pytest.raises(InputError, match=r"SET\[/FORM\]\[@CHARACTERS\]=COUNT is needed"):
            list(prompts_of(bad))
    with pytest.raises(InputError, match=r"'problems@long' in a mix of prompts: 'long' is no number of characters"):
        list(prompts_of("problems@long=3"))


@pytest.mark.slow
def test_prompts_trained_on_are_not_chosen_by(tmp_path):
    with pytest.raises(InputError, match="--choosing holds 284 prompts that --mix has too"):
        smollm2.main(small(tmp_path, tmp_path, mix="problems/plain=284", choosing="problems/plain=284"))
    with pytest.raises(InputError, match="--choosing holds 3 prompts that --copied has too"):
        smollm2.main(small(tmp_path, tmp_path, copied="problems/plain=280", choosing="problems/plain=3"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_copied_texts_are_those_of_prompts_that_the_mix_leaves(target):
    mix, copied = "stdlib/complete=3", "stdlib/complete=2,stdlib/implement=2"
    prompts = smollm2.copied_prompts(mix, copied)
    assert [prompt.id.rpartition("/")[2] for prompt in prompts] == ["complete", "complete", "implement", "implement"]
    assert not {prompt.id for prompt in prompts} & {prompt.id for prompt in prompts_of(mix)}
    assert smollm2.copied_prompts(mix, "") == []
    rows = smollm2.copied_rows(prompts, target, max_new_tokens=160)
    tokenizer = load_tokenizer(target)
    for prompt, row in zip(prompts, rows, strict=True):
        asked, copy = row["prompt_ids"], row["response_ids"]
        assert (row["id"], row["set"]) == (f"copied/{prompt.id}", "copied")
        # the copy is what was asked for, token for token
        assert any(asked[start : start + len(copy)] == copy for start in range(len(asked)))
        assert prompt.messages is not None
        question = prompt.messages[0]["content"]
        code = question.partition("```python\n")[2].partition("\n```")[0]
        text = code or question.partition("\n\n")[2]
        assert copy == tokenizer.encode(f"```python\n{text.strip(chr(10))}\n```")[:160]
    (short, *_) = smollm2.copied_rows(prompts[:1], target, max_new_tokens=5)
    assert short["response_ids"] == rows[0]["response_ids"][:5]


def test_variants():
    recipe = replace(Recipe(out=Path("out")), without=("all",), vary=("num_layers=3,capture_layers=1,5,9,lr",))
    with pytest.raises(InputError, match="--vary capture_layers='1,5,9,lr': layers are numbers"):
        variants(recipe)
    recipe = replace(
        recipe, vary=("num_layers=3,capture_layers=1,5,9", "mix=problems=5,stdlib=7", "learning_rate=1e-3")
    )
    found = variants(recipe)
    assert list(found) == ["full", *(f"without {name}" for name in LEFT_OUT), *recipe.vary]
    assert [found[name] for name in recipe.vary] == [
        {"num_layers": 3, "capture_layers": "1,5,9"},
        {"mix": "problems=5,stdlib=7"},
        {"learning_rate": 1e-3},
    ]
    for name in LEFT_OUT:
        changes = found[f"without {name}"]
        assert all(value != getattr(recipe, setting) for setting, value in changes.items())
        # fewer steps are as many larger ones: the anchors stay
        assert set(changes) == {"sequences_per_step", "steps"} if name == "small-steps" else len(changes) == 1
    large = replace(recipe, **found["without small-steps"])
    assert large.steps * large.sequences_per_step == recipe.steps * recipe.sequences_per_step
    assert found["without problems"] == {"mix": "self=1400"}
    assert found["without self-prompts"] == {"mix": "problems=600,stdlib/complete=1400"}
    for bad, line in (
        ({"without": ("salt",)}, "--without is 'salt': choose all or warm-start"),
        ({"vary": ("out=x",)}, "--vary is 'out=x': begin with one of mix"),
        ({"vary": ("opening_tokens=9",)}, "--vary is 'opening_tokens=9': begin with one of mix"),
        ({"vary": ("steps=many",)}, "--vary steps=many: invalid literal"),
    ):
        with pytest.raises(InputError, match=line):
            variants(replace(recipe, **bad))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, target):
    """Two calls on one folder: one that has time for the first run alone, and one that makes the others.

    Between them the last record of the first run is lost, as by a kill.
    """
    recipe = small(
        tmp_path_factory.mktemp("recipe") / "out", target, without=("data-size", "loss"), vary=("num_layers=7",)
    )
    calls = []
    with tiny_chain.quick_compiles():
        for until_s in (0.0, math.inf):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = smollm2.main(replace(recipe, until_s=until_s))
            results = json.loads((recipe.out / "results.json").read_text())
            written = (recipe.out / "run-full" / "run-4" / "model.safetensors").stat().st_mtime_ns
            calls.append(Call(code=code, out=out.getvalue(), err=err.getvalue(), results=results, written=written))
            if until_s == 0:
                (recipe.out / "records" / "check-full.json").unlink()
    return recipe, calls


@pytest.mark.slow
def test_it_stops_in_time_and_goes_on_where_it_stopped(finished):
    recipe, (first, second) = finished
    assert first.code == 0
    assert list(first.results["runs"]) == ["full"]
    assert "[without loss] not begun: 0 s are over" in first.err
    assert list(second.results["runs"]) == ["full", "without data-size", "without loss", "num_layers=7"]
    # the check was made again, the drafter was not
    assert [name in second.err for name in ("[check-full]", "[train-full]", "[train-without-loss]")] == [1, 0, 1]
    assert second.written == first.written
    # what is made is read, however late it is; what failed would be begun again, and is not
    assert smollm2.main(replace(recipe, until_s=0.0)) == 0
    results = json.loads((recipe.out / "results.json").read_text())
    assert results["runs"] == {name: run for name, run in second.results["runs"].items() if "failed" not in run}
    one, other = (call.results["runs"]["full"] for call in (first, second))
    assert one["check"]["replay"] == other["check"]["replay"]
    assert one["decode"] == other["decode"]


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_does_not_end_the_others(finished):
    _, (_, second) = finished
    assert second.code == 1  # a target of 5 layers has no 7 to begin from
    assert "ended with exit code 2" in second.results["runs"]["num_layers=7"]["failed"]
    assert "num_layers=7] failed: stage train-num-layers-7 ended with exit code 2" in second.err


@pytest.mark.slow
def test_runs_share_what_they_have_in_common(finished):
    recipe, (_, second) = finished
    commands, runs = second.results["commands"], second.results["runs"]
    assert sum(name.startswith("responses-") for name in commands) == 3
    assert sum(name.startswith("cache-") for name in commands) == 4
    theirs = commands["train-without-loss"].replace("run-without-loss", "run-full")
    assert commands["train-full"] == theirs.replace("--loss cross-entropy", "--loss kl")

    def texts(count):
        """The runs' texts, without and with those that are copied."""
        found = recipe.out.glob(f"responses-train-problems-plain-{count}*.jsonl")
        return [read_jsonl(path, what="the responses") for path in sorted(found, key=lambda path: len(path.name))]

    (rows, whole), (quarter, small_whole) = texts(4), texts(1)
    assert quarter == [rows[0], rows[4]]
    # the same two texts are copied in every run, after what the target answers
    copied = whole[8:]
    assert [row["set"] for row in copied] == ["copied", "copied"]
    assert (whole, small_whole) == ([*rows, *copied], [*quarter, *copied])
    prompts = [runs[name]["train"]["num_prompts"] for name in ("full", "without data-size", "without loss")]
    assert prompts == [10, 4, 10]


@pytest.mark.slow
def test_results_hold_tau_its_difference_and_the_speed_up(finished):
    _, (_, second) = finished
    full, loss = (second.results["runs"][name] for name in ("full", "without loss"))
    assert full["check"]["num_prompts"] == 3
    assert full["check"]["seen"] is None
    assert full["check"]["comparison"] == []
    assert full["decode"]["tokens_equal"] is True
    assert len(full["decode"]["speedup_ci95"]) == 2
    assert [row["step"] for row in full["curve"]] == [1, 2, 3, 4]
    (compared,) = loss["check"]["comparison"]
    assert compared["paired"] is True
    assert compared["tau"]["a"] == pytest.approx(loss["check"]["replay"]["tau_micro"])
    assert compared["tau"]["b"] == pytest.approx(full["check"]["replay"]["tau_micro"])
    lines = second.out.splitlines()
    line = next(line for line in lines if line.startswith("| without loss | loss cross-entropy |"))
    assert f"| {loss['check']['replay']['tau_micro']:.3f} [" in line
    assert f"| {compared['tau']['difference']:+.3f} [" in line
    assert any(line.startswith("| num_layers=7 | num_layers 7 | failed |") for line in lines)
    assert lines[-1].startswith("decode, 2 prompts, blocks of 3: tau ")
    assert full["decode"]["draft_vocab_size"] == 9


def test_prompts_that_other_settings_left_are_refused(tmp_path):
    path = tmp_path / "prompts-choosing.jsonl"
    wanted = smollm2.prompt_file(path, "problems=3", of_self=(), from_the_end=True)
    before = path.read_bytes()
    assert smollm2.prompt_file(path, "problems=3", of_self=(), from_the_end=True) == wanted
    with pytest.raises(InputError, match="prompts-choosing.jsonl is of other settings: choose another --out"):
        smollm2.prompt_file(path, "problems=4", of_self=(), from_the_end=True)
    assert path.read_bytes() == before
