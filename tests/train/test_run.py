"""The command, end to end on the tiny target."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dflash_jax.cache import open_cache
from dflash_jax.core import InputError, load_tensors
from dflash_jax.drafter import load_drafter, read_drafter_config, save_drafter, with_draft_vocabulary
from dflash_jax.train import grouping, train
from dflash_jax.train.data import make_batches
from support import tiny, tiny_chain

STEPS = 25


@pytest.fixture(scope="module")
def run(tmp_path_factory, target_folder, cache):
    """A run's folder, what the command said, and what its bar was told."""
    out, bar = tmp_path_factory.mktemp("run") / "run", []
    config = tiny_chain.train_config(
        target_folder, cache, out, steps=STEPS, num_layers=1, checkpoint_every=12, keep_initial=True
    )
    said = train(config, progress=lambda *move: bar.append(move))
    return out, said, bar


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_layout(run):
    out, said, _ = run
    drafters = {"run-0", "run-12", "run-24", "run-25"}
    assert {path.name for path in out.iterdir()} == {*drafters, "last", "state", "config.json", "metrics.jsonl"}
    assert (out / "last").readlink() == Path("run-25")
    assert {path.name for path in (out / "state").iterdir()} == {"24", "25"}
    for name in drafters:
        assert {path.name for path in (out / name).iterdir()} == {"config.json", "model.safetensors", "record.json"}
    assert said["drafter"] == str(out / "run-25")
    config = read_drafter_config(out / "run-25")
    assert (config.block_size, config.num_layers, config.capture_layers) == (5, 1, (1, 3))
    assert config.mask_token_id == tiny.MASK_ID


def test_records(run, cache):
    out, _, _ = run
    begun = json.loads((out / "config.json").read_text())
    assert begun["config"]["steps"] == STEPS
    assert begun["cache_fingerprint"] == open_cache(cache).manifest["fingerprint"]
    hashes = {f"{value:016x}" for value in open_cache(cache).prompt_hashes().tolist()}
    for step, wanted in ((0, []), (12, sorted(hashes)), (25, sorted(hashes))):
        record = json.loads((out / f"run-{step}" / "record.json").read_text())
        assert (record["step"], record["trained_prompt_hashes"]) == (step, wanted)
        assert record["command"] == "train"
    assert len(hashes) == len(tiny.TEXTS)


def test_kl_wants_a_cache_with_the_targets_distribution(tmp_path, target_folder, cache):
    config = tiny_chain.train_config(target_folder, cache, tmp_path / "run", loss="kl")
    message = (
        f"--loss kl needs the target's distribution, which the cache {cache} does not have: build one with "
        "`cache build --top-k 32`"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_kl_d_pace_muon_and_bfloat16_learn_too(tmp_path, target_folder):
    cache = tiny_chain.make_cache(tmp_path / "chain", target_folder, tiny.TEXTS[:2], top_k=8)
    for name, settings in {
        "kl": {"loss": "kl", "remat": True},
        "d-pace": {"loss": "d-pace", "loss_denominator": "labels", "optimizer": "muon", "schedule": "wsd"},
        "bfloat16": {"dtype": "bfloat16", "schedule": "constant"},
    }.items():
        config = tiny_chain.train_config(
            target_folder, cache, tmp_path / name, steps=40, num_layers=1, learning_rate=1e-2, checkpoint_every=40,
            **settings,
        )  # fmt: skip
        train(config)
        losses = [row["loss"] for row in rows_of(tmp_path / name)]
        assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5]), name
        weights = load_tensors(tmp_path / name / "run-40" / "model.safetensors", what="weights")
        assert {str(value.dtype) for value in weights.values()} == {"float32"}


def test_curve(run):
    out, said, bar = run
    rows = rows_of(out)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert set(rows[0]) == {
        "step", "loss", "accuracy", "accuracy_by_slot", "num_labels", "learning_rate", "grad_norm", "anchors_per_s",
        "seconds", "input_s",
    }  # fmt: skip
    # one step of warm-up
    assert [row["learning_rate"] for row in rows[:2]] == pytest.approx([0.0, 3e-3])
    assert all(len(row["accuracy_by_slot"]) == 4 and row["num_labels"] > 3 * 7 for row in rows)
    assert np.mean([row["loss"] for row in rows[-5:]]) < np.mean([row["loss"] for row in rows[:5]]) - 0.3
    for name in ("loss", "accuracy", "accuracy_by_slot", "anchors_per_s"):
        assert said[name] == rows[-1][name]
    assert [move[:2] for move in bar] == [(10, 25), (12, 25), (22, 25), (24, 25), (25, 25)]
    slots = " ".join(f"{share:.2f}".removeprefix("0") for share in rows[-1]["accuracy_by_slot"])
    assert bar[-1][2].startswith(f"loss {rows[-1]['loss']:.3f}  acc {rows[-1]['accuracy']:.3f} [{slots}]  ")
    assert bar[-1][2].endswith(" anchors/s  0:00:00 left")
    assert 0 <= said["input_share"] < 1
    assert said["best"] is None


def test_what_the_command_says(run):
    out, said, _ = run
    weights = load_tensors(out / "run-25" / "model.safetensors", what="the weights")
    assert said["num_parameters"] == sum(weight.size for weight in weights.values())
    assert (said["run"], said["steps"], said["steps_this_run"], said["num_prompts"]) == (str(out), 25, 25, 8)
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}
    before = load_tensors(out / "run-0" / "model.safetensors", what="the weights")
    assert all((before[name] != weights[name]).any() for name in weights)


def test_batches_go_through_the_cache_in_epochs_and_stop_at_the_context(cache):
    opened = open_cache(cache)
    batches = make_batches(opened, sequences_per_step=4, max_positions=60, seed=1)
    for epoch in range(2):
        texts = {tuple(row[:n].tolist()) for step in (0, 1) for batch in [batches(2 * epoch + step)]
                 for row, n in zip(np.asarray(batch.token_ids), batch.length.tolist(), strict=True)}  # fmt: skip
        assert len(texts) == 8
    again = make_batches(opened, sequences_per_step=4, max_positions=60, seed=1)(3)
    assert (batches(3).token_ids == again.token_ids).all()
    assert batches(3).token_ids.shape == (4, 64)
    limits = {}
    for batch in map(batches, (0, 1)):
        limits |= dict(zip(batch.prompt_len.tolist(), batch.limit.tolist(), strict=True))
    # 24 new tokens, or the context's end
    assert limits[7] == 31
    assert limits[39] == 60


def test_batches_of_two_widths_hold_the_same_texts(cache, monkeypatch):
    monkeypatch.setattr(grouping, "LENGTH_BUCKET", 8)
    opened = open_cache(cache)
    batches = make_batches(opened, sequences_per_step=2, max_positions=60, seed=1, widths=2)
    found = [batches(step) for step in range(4)]
    assert [batch.token_ids.shape[1] for batch in found].count(64) < 4
    assert len({batch.token_ids.shape[1] for batch in found}) == 2
    lengths = sorted(length for batch in found for length in batch.length.tolist())
    assert lengths == sorted(opened.lengths().tolist())
    for batch in found:
        for row, length in enumerate(batch.length.tolist()):
            ids = np.asarray(batch.token_ids[row])
            stored = next(s for s in map(opened.sequence, range(8)) if np.array_equal(s.token_ids, ids[:length]))
            np.testing.assert_array_equal(batch.features[row, :length], stored.features)
            assert not np.asarray(batch.features[row, length:]).any()


@pytest.mark.slow
def test_a_run_of_two_widths_goes_on_bit_for_bit(tmp_path, target_folder, cache, monkeypatch):
    monkeypatch.setattr(grouping, "LENGTH_BUCKET", 8)
    settings = {"length_buckets": 2, "steps": 6, "sequences_per_step": 2, "checkpoint_every": 3}
    whole, halves = (tiny_chain.train_config(target_folder, cache, tmp_path / name, **settings) for name in "ab")
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(halves, progress=interrupt_after(6))  # the state after 3 steps is there
    train(replace(halves, resume=True))
    one, other = (load_tensors(config.out / "run-6" / "model.safetensors", what="x") for config in (whole, halves))
    assert all((one[name] == other[name]).all() for name in one)
    with pytest.raises(InputError, match="length_buckets"):
        train(replace(halves, resume=True, length_buckets=None))


def interrupt_after(step):
    def progress(done, *_):
        if done >= step:
            raise KeyboardInterrupt

    return progress


def test_existing_folder_is_refused(run, target_folder, cache):
    out, _, _ = run
    with pytest.raises(InputError, match=r"run exists already: give --resume to go on with it, or choose another"):
        train(tiny_chain.train_config(target_folder, cache, out))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate was 0\.003, now 0\.001$"),
        ({"steps": 30, "seed": 4}, r"steps was 25, now 30; seed was 0, now 4$"),
        ({"num_layers": 2}, r"num_layers was 1, now 2$"),
        ({"keep_initial": False}, r"keep_initial was True, now False$"),
    ],
)
def test_resume_with_other_settings_names_them(run, target_folder, cache, changes, message):
    out, _, _ = run
    same = {"steps": STEPS, "num_layers": 1, "checkpoint_every": 12, "keep_initial": True, "resume": True}
    with pytest.raises(InputError, match=f"^--resume needs the settings the run was begun with: {message}"):
        train(tiny_chain.train_config(target_folder, cache, out, **same | changes))


def test_resume_with_another_cache_is_refused(run, target_folder, cache, tmp_path):
    out, _, _ = run
    responses = cache.parent / "responses.jsonl"
    other = tiny_chain.build_cache(tmp_path / "other", target_folder, responses, position_offsets=(9,))
    config = tiny_chain.train_config(
        target_folder, other, out, steps=STEPS, num_layers=1, checkpoint_every=12, keep_initial=True, resume=True
    )
    with pytest.raises(InputError, match=r"the cache is another one \(cache_sha256 differs\)$"):
        train(config)


def test_resume_needs_a_run(tmp_path, run, target_folder, cache):
    with pytest.raises(InputError, match=r"^--resume: no run at .*nothing \(no config.json\): start it without"):
        train(tiny_chain.train_config(target_folder, cache, tmp_path / "nothing", resume=True))
    drafter = run[0] / "run-25"
    with pytest.raises(InputError, match=r"^--resume: .*run-25 is not a run: its config.json is of something else$"):
        train(tiny_chain.train_config(target_folder, cache, drafter, resume=True))


def test_cache_of_another_target_names_the_field(tmp_path, cache):
    other = tiny.write_tiny_target(tmp_path / "target", seed=99)
    with pytest.raises(InputError, match=r"was not made for the target .*: target_weights is '.*' in the cache"):
        train(tiny_chain.train_config(other, cache, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_init_from_that_does_not_fit_names_everything(tmp_path, run, target_folder, cache):
    parent = tmp_path / "parent"
    config = json.loads((run[0] / "run-25" / "config.json").read_text())
    config |= {"vocab_size": 50, "num_target_layers": 4}
    config["dflash_config"]["target_layer_ids"] = [1, 2]
    parent.mkdir()
    (parent / "config.json").write_text(json.dumps(config))
    wanted = (
        "block_size is 5, 7 is needed; num_layers is 1, 3 is needed; capture_layers is [1, 2], [1, 3] is needed; "
        "vocab_size is 50, 53 is needed; num_target_layers is 4, 5 is needed"
    )
    with pytest.raises(InputError) as error:
        train(tiny_chain.train_config(
            target_folder, cache, tmp_path / "out", init_from=parent, block_size=7, num_layers=3
        ))  # fmt: skip
    assert str(error.value) == f"--init-from {parent} does not fit: {wanted}"


@pytest.mark.slow
def test_fine_tuning_leaves_a_draft_vocabulary_behind(tmp_path, run, target_folder, cache):
    parent = tmp_path / "parent"
    parent.mkdir()
    save_drafter(with_draft_vocabulary(load_drafter(run[0] / "run-25"), np.arange(9)), parent)
    train(tiny_chain.train_config(target_folder, cache, tmp_path / "out", init_from=parent, num_layers=1, steps=1))
    assert load_drafter(tmp_path / "out" / "last").draft_ids is None


@pytest.mark.slow
def test_a_drafter_with_sliding_layers_learns_and_is_tuned_as_it_is(tmp_path, target_folder, cache):
    settings = {"num_layers": 2, "sliding_window": 9, "full_layers": (1,), "steps": 8, "checkpoint_every": 8}
    train(tiny_chain.train_config(target_folder, cache, tmp_path / "out", **settings))
    config = read_drafter_config(tmp_path / "out" / "last")
    assert (config.sliding_window, config.sliding_layers) == (9, (0,))
    rows = rows_of(tmp_path / "out")
    assert rows[-1]["loss"] < rows[0]["loss"]
    tuned = {"init_from": tmp_path / "out" / "last", "num_layers": None, "block_size": None, "steps": 1}
    train(tiny_chain.train_config(target_folder, cache, tmp_path / "child", **tuned))
    assert read_drafter_config(tmp_path / "child" / "last") == config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sliding_window": 0}, "--sliding-window is 0"),
        ({"full_layers": (1,)}, "give --sliding-window with it"),
        ({"sliding_window": 4, "init_from": Path("a")}, "--sliding-window is for new drafters"),
        (
            {"sliding_window": 4, "full_layers": (2,), "num_layers": 2},
            "--full-layers is 2: the drafter has layers 0 to 1",
        ),
    ],
)
def test_layers_that_cannot_slide_are_refused(tmp_path, target_folder, cache, settings, said):
    with pytest.raises(InputError, match=said):
        train(tiny_chain.train_config(target_folder, cache, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_mask_token_outside_the_vocabulary(tmp_path, target_folder, cache):
    with pytest.raises(InputError, match=r"^--mask-token-id is 53: the target's vocabulary is 0 to 52$"):
        train(tiny_chain.train_config(target_folder, cache, tmp_path / "out", mask_token_id=53))
    assert not (tmp_path / "out").exists()


def test_more_layers_than_there_are_to_copy_from(tmp_path, target_folder, cache):
    with pytest.raises(InputError, match=r"^--num-layers is 6, the target has 5 to copy from: give at most that, or"):
        train(tiny_chain.train_config(target_folder, cache, tmp_path / "out", num_layers=6))
    assert not (tmp_path / "out").exists()


def test_damaged_cache_leaves_nothing_behind(tmp_path, target_folder, cache):
    damaged = shutil.copytree(cache, tmp_path / "cache")
    with (damaged / "shard-00000.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(InputError, match="shard-00000.safetensors"):
        train(tiny_chain.train_config(target_folder, damaged, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
