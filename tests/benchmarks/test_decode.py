"""The decoding benchmarks on tiny shapes: they run, and their numbers are what their names say."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import decode as benchmark
import decode_work
import how_fast
from common import Times
from dflash_jax.drafter import save_drafter
from dflash_jax.targets import load_target
from support import tiny, tiny_chain


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    with tiny_chain.quick_compiles():
        yield


def times(*wall):
    return Times(wall_s=wall, cpu_s=wall)


@pytest.fixture(scope="module")
def runs():
    prompts = [[5, 9, 11], [7, 6, 30, 12, 8]]
    batch = decode_work.Batch.of(prompts, width=64, new_tokens=13)
    target = load_target(tiny.tiny_target())
    return decode_work.Runs(target, tiny.half_memorised(), [batch], new_tokens=13, block_size=5, passes=2)


@pytest.mark.slow
def test_an_oracle_commits_as_many_as_it_is_right_and_the_text_stays(runs):
    plain = runs.plain()
    texts = decode_work.new_tokens_of(plain, runs.batches)
    assert [len(text) for text in texts] == [13, 13]
    assert decode_work.passes_made(plain) == 12
    for accept, blocks in ((0, [1] * 12), (1, [2] * 6), (2, [3] * 4), (4, [5, 5, 2])):
        states = runs.oracle(accept)
        assert decode_work.new_tokens_of(states, runs.batches) == texts
        assert np.asarray(states[0].committed)[:, : len(blocks)].tolist() == [blocks, blocks]
        assert decode_work.passes_made(states) == len(blocks)
        assert decode_work.tau_of(states) == pytest.approx(12 / len(blocks))


@pytest.mark.slow
def test_an_oracle_that_is_not_asked_leaves_the_drafter_alone(runs):
    own, told = runs.speculative(), runs.oracle(-1)
    np.testing.assert_array_equal(own[0].committed, told[0].committed)
    assert decode_work.new_tokens_of(own, runs.batches) == decode_work.new_tokens_of(runs.plain(), runs.batches)


@pytest.mark.slow
def test_passes_apart_are_passes(runs):
    head = runs.passes_of("t_head")
    assert head.shape == (2, 4, 24)
    assert bool(jnp.isfinite(head).all())
    for kind in ("t_plain", "t_draft", "t_verify"):
        tokens = runs.passes_of(kind)
        # each pass puts another token at the anchor, so that none can be left out
        at = np.asarray(runs.batches[0].lengths)
        before = np.asarray(runs.begin(runs.batches[0], runs.drafter).tokens)
        after = np.asarray(tokens)
        for row, anchor in enumerate(at):
            np.testing.assert_array_equal(after[row, :anchor], before[row, :anchor])


def test_weights_are_counted_once():
    target = load_target(tiny.tiny_target())
    size = Path(tiny.tiny_target() / "model.safetensors").stat().st_size
    assert 0.9 * size < decode_work.weight_bytes(target) < size


@pytest.mark.slow
def test_a_run_against_its_passes_by_hand(runs):
    states = runs.oracle(4)  # 3 passes for 12 tokens a row
    apart = {"t_plain": times(2.0, 2.0), "t_draft": times(1.0, 1.0), "t_verify": times(3.0, 3.0)}
    found = benchmark.speculation(times(24.0, 24.0), times(15.0, 16.0), states, apart, plain_passes=12)
    assert (found["num_passes"], found["tau_of_slowest_rows"], found["tau_micro"]) == (3, 4.0, 4.0)
    assert found["predicted_speedup"] == 4 * 2 / (1 + 3)
    assert found["speedup"].median == pytest.approx((24 / 15 + 24 / 16) / 2)
    # 3 passes of 4 s are 12 of 15 or 16 s
    assert found["blocks_predicted"].median == pytest.approx((12 / 15 + 12 / 16) / 2)


def test_whole_runs_are_compared_without_their_prompts():
    assert benchmark.less(times(5.0, 7.0), times(1.0, 2.0)).wall_s == (4.0, 5.0)


@pytest.mark.slow
def test_random_shapes_run_and_are_drawn(tmp_path, capsys, monkeypatch):
    # two layers of it: compiling is what takes the time
    smaller = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    monkeypatch.setitem(benchmark.SHAPES, "gpt-oss-tiny", benchmark.SHAPES["gpt-oss-tiny"] | smaller)
    drafter = {"num_layers": 1, "num_target_layers": 2, "capture_layers": (0,)}
    monkeypatch.setitem(benchmark.DRAFTERS, "gpt-oss-tiny", benchmark.DRAFTERS["gpt-oss-tiny"] | drafter)
    shape = ["--shapes", "gpt-oss-tiny", "--batch-sizes", "2", "--prompt-tokens", "20", "--new-tokens", "9"]
    benchmark.main(
        [*shape, "--rounds", "2", "--passes", "2", "--accept", "1", "3", "--block-size", "4", "--ceiling-size", "64"]
    )
    line = capsys.readouterr().out.splitlines()[-1]
    result = json.loads(line)
    assert result["block_size"] == 4  # of the 8 it was trained for
    assert list(result["by_batch_size"]) == ["2"]
    for size, entry in result["by_batch_size"].items():
        assert entry["num_prompts"] == int(size)
        assert [one["accept"] for one in entry["oracle"]] == [1, 3]
        for one in [*entry["oracle"], entry["dflash"]]:
            assert 1 <= one["tau_micro"] <= 4
            assert one["speedup"]["rounds"] == 2
            assert one["share_of_predicted"] > 0
    (tmp_path / "decode.json").write_text(f"a line for people\n{line}\n")
    (tmp_path / "page.md").write_text(f"before\n{how_fast.BEGIN}\nold\n{how_fast.END}\nafter\n")
    inputs = ["--inputs", str(tmp_path / "decode.json"), "--figure", str(tmp_path / "images" / "f.svg")]
    how_fast.main([*inputs, "--page", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert page.startswith(f"before\n{how_fast.BEGIN}\n\n![Speed-up against tau](images/f.svg)")
    assert page.endswith(f"{how_fast.END}\nafter\n")
    assert "old" not in page
    assert page.count("| the drafter's own |") == 1
    figure = (tmp_path / "images" / "f.svg").read_text()
    assert figure.count("<circle") == 2
    assert figure.count("<path") == 1


def test_curves_are_named_by_what_differs(tmp_path):
    document = json.loads(
        (Path(__file__).parents[2] / "docs" / "results" / "decode-smollm2-cpu-batch-1.json")
        .read_text()
        .splitlines()[-1]
    )
    paths = [tmp_path / "whole.json", tmp_path / "part.json"]
    paths[0].write_text(json.dumps(document))
    paths[1].write_text(json.dumps(document | {"block_size": 4, "draft_vocab_size": 4096}))
    assert [curve.name for curve in how_fast.read_curves(paths[:1])] == ["SmolLM2-135M, cpu, batch 1"]
    named = how_fast.read_curves(paths)
    assert [curve.name for curve in named] == [
        "SmolLM2-135M, cpu, batch 1 in blocks of 8",
        "SmolLM2-135M, cpu, batch 1 in blocks of 4, drafts of 4,096 tokens",
    ]
    # one below the other in the figure
    heights = [float(y) for y in re.findall(r'<text x="584.0" y="([\d.]+)"', how_fast.draw(named))]
    assert len(heights) == 7
    assert (np.diff(heights) >= 15).all()


def test_a_speedup_in_the_millions_is_drawn_with_a_few_lines():
    """Runs of a millisecond, less their prompts' passes, may be measured as nothing."""
    path = Path(__file__).parents[2] / "docs" / "results" / "decode-gpt-oss-20b-h100.json"
    document = json.loads(path.read_text().splitlines()[-1])
    document["by_batch_size"]["1"]["dflash"]["speedup"]["median"] = 5e7
    result = document["by_batch_size"]["1"]
    figure = how_fast.draw([how_fast.Curve(name="a, b, c", result=result, block_size=document["block_size"])])
    assert figure.count("<line") < 20


@pytest.mark.slow
def test_transformers_and_z_lab_decode_the_same(tmp_path, capsys):
    (tmp_path / "drafter").mkdir()
    save_drafter(tiny.half_memorised(), tmp_path / "drafter")
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS[1:3])
    folders = ["--target", str(tiny.tiny_target()), "--drafter", str(tmp_path / "drafter"), "--prompts", str(prompts)]
    some = ["--batch-sizes", "1", "--new-tokens", "6", "--rounds", "1", "--passes", "1", "--accept", "4"]
    benchmark.main([*folders, *some, "--ceiling-size", "64", "--threads", "1", "--uncompiled"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for entry in result["by_batch_size"].values():
        assert entry["transformers"]["prompts_equal"] == entry["dflash"]["prompts_equal"] == 1
    one = result["by_batch_size"]["1"]
    assert one["zlab"]["prompts_equal"] == 1
    assert one["zlab"]["tau_micro"] == pytest.approx(one["dflash"]["tau_micro"], rel=1e-4)


@pytest.mark.slow
def test_z_lab_s_blocks_are_ours(tmp_path, capsys):
    import zlab_agreement

    (tmp_path / "drafter").mkdir()
    save_drafter(tiny.half_memorised(), tmp_path / "drafter")
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS[:4])
    folders = ["--target", str(tiny.tiny_target()), "--drafter", str(tmp_path / "drafter"), "--prompts", str(prompts)]
    code = zlab_agreement.main([*folders, "--new-tokens", "20", "--threads", "1", "--batch-size", "3"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (code, result["differences"]) == (0, [])
    assert result["num_equal"] == result["num_blocks"] > 10
    assert result["num_prompts_with_equal_tokens"] == result["num_prompts"] == 4


@pytest.mark.slow
def test_oracle_drafts_by_hand(runs):
    state = runs.begin(runs.batches[0], runs.drafter)
    text = jnp.arange(state.tokens.size, dtype=jnp.int32).reshape(state.tokens.shape) % 50
    drafted = jnp.full((2, 4), 9, jnp.int32)
    told = decode_work.oracle_drafts(drafted, state, text, jnp.int32(2), 53)
    start = np.asarray(state.start)
    right = np.asarray(text)[np.arange(2)[:, None], start[:, None] + np.arange(1, 5)]
    np.testing.assert_array_equal(np.asarray(told)[:, :2], right[:, :2])
    assert (np.asarray(told)[:, 2:] != right[:, 2:]).all()
    np.testing.assert_array_equal(decode_work.oracle_drafts(drafted, state, text, jnp.int32(-1), 53), drafted)
