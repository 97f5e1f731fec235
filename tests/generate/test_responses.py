import json
import shutil
from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import pytest

from dflash_jax.core import InputError
from dflash_jax.decode import Decoder
from dflash_jax.drafter import drafter_fingerprint
from dflash_jax.generate import ResponsesConfig, generate_responses
from dflash_jax.targets import load_target
from dflash_jax.text import load_tokenizer
from support import tiny

MAX_NEW = 38  # as in tests/decode/test_engine.py: the same shapes are compiled once


def config(target, prompts, out, **changes):
    settings = {"target": target, "prompts": prompts, "out": out, "max_new_tokens": MAX_NEW, "batch_size": 3}
    return ResponsesConfig(**settings | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Prompt file, responses file and result of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    prompts = str(tiny.write_prompts(folder / "prompts.jsonl", tiny.TEXTS))
    result = generate_responses(config(tiny.tiny_target(), prompts, folder / "out.jsonl"))
    return prompts, folder / "out.jsonl", result


def rows_of(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_rows_are_in_the_prompts_order_and_say_how_they_ended(whole, target):
    _, out, result = whole
    rows, tokenizer = rows_of(out), load_tokenizer(target)
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(len(tiny.TEXTS))]
    for row, text in zip(rows, tiny.TEXTS, strict=True):
        assert list(row) == ["id", "set", "prompt_ids", "response_ids", "finish", "text"]
        assert row["set"] == "prompts"
        assert row["prompt_ids"] == tokenizer.encode(text)
        assert row["text"] == tokenizer.decode(row["response_ids"])
        stopped = row["response_ids"][-1] == tiny.STOP_ID
        assert row["finish"] == ("stop" if stopped else "length")
        assert tiny.STOP_ID not in row["response_ids"][:-1]
        assert stopped or len(row["response_ids"]) == MAX_NEW
    finishes = [row["finish"] for row in rows]
    assert {"stop", "length"} == set(finishes)
    assert result["finish"] == {"stop": finishes.count("stop"), "length": finishes.count("length")}
    assert (result["num_prompts"], result["num_tokens"]) == (8, sum(len(row["response_ids"]) for row in rows))
    assert result["responses"] == str(out)


def test_the_record_lies_beside_and_nothing_else_is_left(whole):
    _, out, _ = whole
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.record.json", "prompts.jsonl"]
    record = json.loads((out.parent / "out.jsonl.record.json").read_text())
    assert record["command"] == "responses"
    assert record["config"]["max_new_tokens"] == MAX_NEW
    assert set(record["fingerprint"]) == {
        "target_weights", "target_config", "tokenizer_sha256", "chat_template_sha256",
    }  # fmt: skip


class KilledError(Exception):
    pass


def killed_run(settings, *, after):
    """A run that dies when `after` prompts are done; what its progress said."""
    seen = []

    def progress(done, total, _):
        seen.append((done, total))
        if done >= after:
            raise KilledError

    with pytest.raises(KilledError):
        generate_responses(settings, progress=progress)
    return seen


def test_a_killed_run_goes_on_where_it_stopped(whole, target, tmp_path):
    prompts, wanted, _ = whole
    settings = config(target, prompts, tmp_path / "out.jsonl")
    assert killed_run(settings, after=3) == [(1, 8), (3, 8)]  # texts come as they end, two of them at the same step
    assert not settings.out.exists()
    partial = tmp_path / "out.jsonl.partial"
    content = partial.read_bytes()
    assert content.count(b"\n") == 1 + 3
    # the kill fell into the last line, inside the two bytes of an é
    cut = content.rindex("é".encode()) + 1
    lost = content[cut:].count(b"\n")
    assert 1 <= lost < 3
    partial.write_bytes(content[:cut])
    # what was whole is not computed again; then a second kill, behind what the first one left
    ((kept, _),) = killed_run(settings, after=1)
    assert kept > 3 - lost
    content = partial.read_bytes()
    result = generate_responses(settings)
    assert settings.out.read_bytes() == wanted.read_bytes()
    assert not partial.exists()
    kept = {json.loads(line)["id"] for line in content.split(b"\n")[1:-1]}
    again = [row for row in rows_of(wanted) if row["id"] not in kept]
    assert result["num_tokens"] == sum(len(row["response_ids"]) for row in again)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2", "model=2"])
def test_a_mesh_gives_the_responses_of_one_device(whole, target, tmp_path, mesh):
    prompts, wanted, _ = whole
    out = tmp_path / "out.jsonl"
    result = generate_responses(config(target, prompts, out, mesh=mesh, batch_size=4))
    assert result["mesh"] == mesh
    assert out.read_bytes() == wanted.read_bytes()


def test_characters_that_python_takes_for_line_ends_survive(whole, target, tmp_path):
    prompts, wanted, _ = whole
    assert "\u2028" in "".join(row["text"] for row in rows_of(wanted))
    settings = config(target, prompts, tmp_path / "out.jsonl")
    killed_run(settings, after=8)  # all is done but the file
    result = generate_responses(settings)
    assert settings.out.read_bytes() == wanted.read_bytes()
    assert result["num_tokens"] == 0


def test_a_partial_file_of_other_settings_is_refused(whole, target, tmp_path):
    prompts, _, _ = whole
    settings = config(target, prompts, tmp_path / "out.jsonl")
    killed_run(settings, after=3)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(InputError, match=r"begun with other settings \(max_new_tokens was 38, now 9\): remove it or"):
        generate_responses(config(target, prompts, settings.out, max_new_tokens=9))
    with pytest.raises(InputError, match="begun with other settings .prompts was '"):
        generate_responses(config(target, prompts, settings.out, limit=5))
    other = tiny.write_tiny_target(tmp_path / "other", seed=6)
    with pytest.raises(InputError, match="begun with other settings .target was '"):
        generate_responses(config(other, prompts, settings.out))
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    (tmp_path / "out.jsonl.partial").write_bytes(before.replace(b'"id"', b'"id', 1))
    with pytest.raises(InputError, match=r"out.jsonl.partial is damaged .*: remove it to start afresh"):
        generate_responses(settings)


@pytest.mark.slow
def test_sampled_responses_are_recorded_and_hang_on_seed_and_id_alone(whole, target, tmp_path):
    prompts, greedy, _ = whole
    sampled = {"temperature": 0.8, "top_p": 0.95, "sample_seed": 6}
    settings = config(target, prompts, tmp_path / "out.jsonl", **sampled)
    killed_run(settings, after=3)
    with pytest.raises(InputError, match="begun with other settings .sampling was "):
        generate_responses(config(target, prompts, settings.out))
    result = generate_responses(settings)
    rows = rows_of(settings.out)
    assert (
        sum(row["response_ids"] == other["response_ids"] for row, other in zip(rows, rows_of(greedy), strict=True)) < 3
    )
    record = json.loads((tmp_path / "out.jsonl.record.json").read_text())
    wanted = {"temperature": 0.8, "top_k": None, "top_p": 0.95, "seed": 6}
    assert record["sampling"] == result["sampling"] == wanted
    assert record["config"]["temperature"] == 0.8
    # in other batches
    generate_responses(config(target, prompts, tmp_path / "few.jsonl", limit=4, **sampled))
    full = {row["id"]: row for row in rows}
    assert all(row == full[row["id"]] for row in rows_of(tmp_path / "few.jsonl"))


def test_a_token_of_ones_own_ends_a_response(whole, target, tmp_path):
    prompts, wanted, _ = whole
    greedy = {row["id"]: row for row in rows_of(wanted)}
    tokenizer = load_tokenizer(target)
    (most, _), (second, _) = Counter(
        token for row in greedy.values() for token in set(row["response_ids"]) - {tiny.STOP_ID}
    ).most_common(2)
    stops = tuple(tokenizer.decode([token]) for token in (most, second))
    settings = config(target, prompts, tmp_path / "out.jsonl", stop_tokens=stops)
    killed_run(settings, after=3)
    with pytest.raises(InputError, match=r"begun with other settings \(stop_tokens was \['"):
        generate_responses(config(target, prompts, settings.out))
    generate_responses(settings)
    cut = 0
    for row in rows_of(settings.out):
        whole_ids = greedy[row["id"]]["response_ids"]
        ends = [place for place, token in enumerate(whole_ids) if token in (most, second)]
        assert row["response_ids"] == whole_ids[: ends[0] + 1 if ends else None]
        assert row["finish"] == ("stop" if ends else greedy[row["id"]]["finish"])
        cut += bool(ends)
    assert cut > len(greedy) / 2


def test_a_stop_token_is_one_token(target, tmp_path):
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS))
    for text, count in (("ab", 2), ("", 0)):
        settings = config(target, prompts, tmp_path / "new" / "out.jsonl", stop_tokens=("a", text))
        with pytest.raises(InputError, match=f"--stop-tokens has '{text}', which is {count} of the target's tokens"):
            generate_responses(settings)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_responses_in_bfloat16(whole, target, tmp_path):
    prompts, wanted, _ = whole
    settings = config(target, prompts, tmp_path / "out.jsonl", dtype="bfloat16")
    killed_run(settings, after=3)
    with pytest.raises(InputError, match="begun with other settings .dtype was 'bfloat16', now None"):
        generate_responses(config(target, prompts, settings.out))
    generate_responses(settings)
    rows = rows_of(settings.out)
    half = Decoder(
        load_target(target, dtype=jnp.bfloat16), stop_ids=[tiny.STOP_ID], max_new_tokens=MAX_NEW, batch_size=3
    )
    for row in rows:
        assert row["response_ids"] == half.decode([row["prompt_ids"]]).rows[0].tokens
    # the rounding is seen: by so small a model in some text
    assert [row["response_ids"] for row in rows] != [row["response_ids"] for row in rows_of(wanted)]


def test_a_limit_takes_a_seeded_sample(whole, target, tmp_path):
    prompts, wanted, _ = whole
    full = {row["id"]: row for row in rows_of(wanted)}
    picked = []
    for seed in (0, 1):
        out = tmp_path / f"{seed}.jsonl"
        generate_responses(config(target, prompts, out, limit=3, seed=seed))
        picked.append([row["id"] for row in rows_of(out)])
        assert all(row == full[row["id"]] for row in rows_of(out))
        assert len(rows_of(out)) == 3
    assert picked[0] != picked[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the prompt file holds no rows: .*prompts.jsonl"),
        ('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt"\n', "prompts.jsonl line 2 is not JSON"),
        ('{"id": "long", "prompt": "%s"}\n' % ("a" * 160), "'long' of .* has 160 tokens, the target's context is 160"),
    ],
)
def test_bad_prompt_files_leave_nothing_behind(target, tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        generate_responses(config(target, str(path), tmp_path / "new" / "out.jsonl"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_an_output_that_exists_is_not_touched(whole, target):
    prompts, out, _ = whole
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"out.jsonl exists already: choose another --out or remove it"):
        generate_responses(config(target, prompts, out))
    assert out.read_bytes() == before


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size", "limit"])
def test_numbers_that_make_no_sense(target, tmp_path, name):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is 0: a positive number is needed"):
        config(target, "humaneval", tmp_path / "x", **{name: 0})


def test_a_damaged_target_leaves_no_file(tmp_path, target):
    damaged = tmp_path / "target"
    shutil.copytree(target, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS))
    with pytest.raises(InputError, match="truncated or damaged"):
        generate_responses(config(damaged, prompts, tmp_path / "new" / "out.jsonl"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_drafter_changes_no_response(whole, target, drafter, tmp_path, sampled):
    prompts, out, result = whole
    assert result["tau_micro"] is None
    how = {"temperature": 0.9, "sample_seed": 3} if sampled else {}
    if sampled:
        out = tmp_path / "plainly.jsonl"
        generate_responses(config(target, prompts, out, **how))
    settings = config(target, prompts, tmp_path / "out.jsonl", drafter=drafter, block_size=3, **how)
    result = generate_responses(settings)
    assert settings.out.read_bytes() == out.read_bytes()
    assert 1.1 < result["tau_micro"] <= 3
    record = json.loads((tmp_path / "out.jsonl.record.json").read_text())
    assert record["drafter_sha256"] == drafter_fingerprint(drafter)
    assert record["config"]["block_size"] == 3


def test_in_float32_a_file_goes_on_with_a_drafter_or_without_and_in_bfloat16_with_the_same(
    whole, target, drafter, tmp_path
):
    prompts, out, _ = whole

    def stop(settings):
        def progress(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate_responses(settings, progress=progress)

    plain = config(target, prompts, tmp_path / "out.jsonl")
    stop(plain)
    generate_responses(replace(plain, drafter=drafter))
    assert plain.out.read_bytes() == out.read_bytes()
    low = config(target, prompts, tmp_path / "low.jsonl", dtype="bfloat16", drafter=drafter, block_size=3)
    stop(low)
    with pytest.raises(InputError, match="was begun with other settings .*block_size was 3, now 2"):
        generate_responses(replace(low, block_size=2))
    with pytest.raises(InputError, match="was begun with other settings .*drafter_sha256 was '.*', now None"):
        generate_responses(replace(low, drafter=None, block_size=None))


def test_drafters_and_blocks_that_cannot_be(target, drafter, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="--block-size 4 without --drafter: plain decoding has no blocks"):
        config(target, prompts, out, block_size=4)
    with pytest.raises(InputError, match="--block-size is 1: at least 2 are needed"):
        config(target, prompts, out, drafter=drafter, block_size=1)
    with pytest.raises(InputError, match="--block-size is 9: the drafter was trained for blocks of 5"):
        generate_responses(config(target, prompts, out, drafter=drafter, block_size=9))
    misfit = tmp_path / "misfit"
    shutil.copytree(drafter, misfit)
    values = json.loads((misfit / "config.json").read_text())
    (misfit / "config.json").write_text(json.dumps(values | {"num_target_layers": 77}))
    with pytest.raises(InputError, match="does not fit the target: num_target_layers is 77"):
        generate_responses(config(target, prompts, out, drafter=misfit))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []
