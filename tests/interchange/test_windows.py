"""The baseline report's layout: samples written by transformers, joined into texts, given back bit for bit."""

import json
import shutil

import numpy as np
import pytest

from dflash_jax.cache import open_cache, stack_on_host, verify_cache
from dflash_jax.core import InputError
from dflash_jax.interchange import CacheImportConfig, WindowText, import_cache, window_arrays
from support import tiny
from support.peer_caches import Rollout, write_windows

CONTEXT, BLOCK, LAYERS = 19, 5, (1, 3)
SIZES = {"context": CONTEXT, "block_size": BLOCK, "capture_layers": LAYERS}
# whole blocks; every step there is; and a text of one sample
ROLLOUTS = (
    Rollout(prompt=[1, *range(5, 5 + CONTEXT)], position_offset=0, steps=(5, 5, 5)),
    Rollout(prompt=[7, *range(12, 12 + CONTEXT)], position_offset=4096, steps=(1, 5, 2, 3, 4)),
    Rollout(prompt=[9, *range(20, 20 + CONTEXT)], position_offset=65536, steps=()),
)
STEPS = sum(sum(rollout.steps) for rollout in ROLLOUTS)


def imported(source, target, out, **changes):
    config = {"format": "windows", "source": source, "target": target, "out": out}
    return import_cache(CacheImportConfig(**config | changes))


@pytest.fixture(scope="module")
def windows(tmp_path_factory, target_folder):
    folder = tmp_path_factory.mktemp("windows") / "source"
    return folder, write_windows(folder, target_folder, ROLLOUTS, **SIZES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, windows, target_folder):
    out = tmp_path_factory.mktemp("windows-cache") / "cache"
    return out, imported(windows[0], target_folder, out, tokens_per_shard=63, prompt_set="report")


@pytest.fixture
def source(windows, tmp_path):
    return shutil.copytree(windows[0], tmp_path / "source")


def change(folder, name, edit):
    array = np.load(folder / f"{name}.npy")
    array = edit(array)
    np.save(folder / f"{name}.npy", array)


def test_every_token_is_stored_once(windows, cache):
    out, result = cache
    samples = len(windows[1]["anchor_ids"])
    assert samples == 4 + 6 + 1
    tokens = 3 * (CONTEXT + BLOCK) + STEPS
    assert (result["num_sequences"], result["num_tokens"], result["samples"]) == (3, tokens, samples)
    assert result["shrink"] == pytest.approx(samples * CONTEXT / tokens)
    assert result["reproduced"] is True
    assert 0 < result["features_relative_error"] < 0.01  # float32 here, bfloat16 there
    assert verify_cache(out)["ok"]
    assert len(open_cache(out).manifest["shards"]) == 2


def test_the_arrays_come_back_from_the_cache_alone(windows, cache):
    """As a user would: with what the manifest says, and with no help of the import's own comparison."""
    opened = open_cache(cache[0])
    facts = opened.manifest["records"][0]["windows"]
    seen = []
    for index, told in enumerate(facts["texts"]):
        text = WindowText(samples=tuple(told["samples"]), anchors=tuple(told["anchors"]), moves=told["moves"])
        sequence = opened.sequence(index)
        for sample, anchor in zip(text.samples, text.anchors, strict=True):
            made = window_arrays(sequence, text, anchor, context=facts["context"], block_size=facts["block_size"])
            seen.append(sample)
            for name, array in made.items():
                wanted = windows[1][name][sample]
                assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape), name
                assert array.tobytes() == wanted.tobytes(), name
    assert sorted(seen) == list(range(11))


def test_a_text_by_hand(windows, cache):
    arrays = windows[1]
    sequence = open_cache(cache[0]).sequence(0)
    # four windows moved on by five: 19 tokens, then 3 * 5 committed ones, the last anchor and its four labels
    assert len(sequence.token_ids) == 19 + 15 + 5
    assert sequence.token_ids[:19].tolist() == arrays["ctx_token_ids"][0].tolist()
    assert sequence.token_ids[19:34].tolist() == arrays["ctx_token_ids"][3, -15:].tolist()
    assert sequence.token_ids[34:].tolist() == [arrays["anchor_ids"][3], *arrays["target_ids"][3]]
    # the text is greedy: labels are the tokens after; what the source does not know is -1
    assert sequence.next_ids[:19].tolist() == [-1] * 19
    assert sequence.next_ids[19:38].tolist() == sequence.token_ids[20:].tolist()
    assert sequence.next_ids[38] == -1
    assert sequence.loss_mask.tolist() == [0] * 19 + [1] * 20
    assert (sequence.prompt_len, sequence.features_len, sequence.last_anchor) == (19, 34, 34)
    assert (sequence.position_offset, sequence.prompt_set, sequence.sequence_index) == (0, "report", 0)
    assert not sequence.features[34:].astype(np.float32).any()
    assert stack_on_host([sequence], width=40, max_new_tokens=None).features_len.tolist() == [34]
    offsets = [open_cache(cache[0]).sequence(i).position_offset for i in range(3)]
    assert offsets == [0, 4096, 65536]


def test_samples_of_rollouts_that_take_turns(tmp_path, target_folder):
    write_windows(tmp_path / "source", target_folder, ROLLOUTS, **SIZES, turns=True)
    result = imported(tmp_path / "source", target_folder, tmp_path / "cache", check_tokens=0)
    assert (result["num_sequences"], result["num_tokens"]) == (3, 3 * (CONTEXT + BLOCK) + STEPS)
    assert result["features_relative_error"] is None


def test_windows_computed_alone_are_stored_as_they_are(tmp_path, target_folder):
    """What a token's features are depends on its window there, so nothing is the same, and nothing may be joined."""
    write_windows(tmp_path / "source", target_folder, ROLLOUTS[:1], **SIZES, fresh=True)
    result = imported(tmp_path / "source", target_folder, tmp_path / "cache")
    assert (result["num_sequences"], result["samples"]) == (4, 4)
    sequence = open_cache(tmp_path / "cache").sequence(2)
    assert (len(sequence.token_ids), sequence.last_anchor) == (CONTEXT + BLOCK, CONTEXT)


def test_positions_that_stay_are_given_back(source, target_folder, tmp_path):
    """Each window said to start at the rollout's offset, as if nothing was before it, on the features of one pass."""
    offsets = np.repeat(np.array([0, 4096, 65536], np.int32), (4, 6, 1))
    change(source, "ctx_pos_start_i32", lambda _: offsets)
    change(source, "anchor_pos_i32", lambda _: offsets + np.int32(CONTEXT))
    result = imported(source, target_folder, tmp_path / "cache")
    assert (result["num_sequences"], result["reproduced"]) == (3, True)
    texts = open_cache(tmp_path / "cache").manifest["records"][0]["windows"]["texts"]
    assert [text["moves"] for text in texts] == [False, False, True]


def test_positions_may_be_absent(source, target_folder, tmp_path):
    for name in ("ctx_pos_start_i32", "anchor_pos_i32"):
        (source / f"{name}.npy").unlink()
    assert imported(source, target_folder, tmp_path / "cache", check_tokens=0)["num_sequences"] == 3


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("context_features_u16", lambda x: x.__setitem__((2, 4, 7), x[2, 4, 7] ^ 1)),
        # the next sample of that rollout lies one token further on, and has three of these labels too
        ("target_ids", lambda x: x.__setitem__((4, 3), (x[4, 3] + 1) % 40)),
        ("ctx_token_ids", lambda x: x.__setitem__((2, 3), (x[2, 3] + 1) % 40)),
    ],
)
def test_samples_that_differ_in_one_bit_are_not_joined(source, target_folder, tmp_path, name, edit):
    """One changed number parts the text, and is given back as it is."""
    change(source, name, lambda array: (edit(array), array)[1])
    result = imported(source, target_folder, tmp_path / "cache", check_tokens=0)
    assert result["num_sequences"] > 3
    assert result["reproduced"] is True


def test_a_label_that_the_text_does_not_follow_is_a_departure(source, target_folder, tmp_path):
    """A whole block was committed, but verification's label of its fourth token was another."""
    change(source, "target_ids", lambda x: (x.__setitem__((1, 3), 2), x)[1])
    result = imported(source, target_folder, tmp_path / "cache", check_tokens=0)
    assert (result["num_sequences"], result["reproduced"]) == (3, True)
    sequence = open_cache(tmp_path / "cache").sequence(0)
    anchor = CONTEXT + 5
    departures = np.flatnonzero(sequence.token_ids[1:] != sequence.next_ids[:-1])
    assert departures.tolist() == [*range(CONTEXT), anchor + 3]  # of the window nothing is known


def meta_with(**changes):
    def edit(folder):
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def cut(name, count):
    def edit(folder):
        path = folder / f"{name}.npy"
        path.write_bytes(path.read_bytes()[:count])

    return edit


def retyped(name, edit):
    return lambda folder: change(folder, name, edit)


def pickled(folder):
    np.save(folder / "target_ids.npy", np.array([{"a": 1}], object), allow_pickle=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no folder .*: name the one with meta.json"),
        (lambda folder: (folder / "meta.json").unlink(), "the windows' meta.json is missing"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "is not a JSON object"),
        (meta_with(ctx_len=0), "ctx_len is 0, a positive number is needed"),
        (meta_with(target_layer_ids=[1, 7]), r"target_layer_ids \[1, 7\] are not all from 0 to 4"),
        (meta_with(target_layer_ids=[1, 1]), "are not num_context_features different layers"),
        (meta_with(target_layer_ids="1,3"), "a list of layers is needed"),
        (meta_with(hidden_size=25), "hidden_size is 25, the target's is 24"),
        (meta_with(dtype="fp8"), "dtype is 'fp8', only bf16_u16 is known"),
        (meta_with(block_size=6), r"target_ids.npy is int32 \[11, 4\], int32 \[11, 5\] is needed"),
        (lambda folder: (folder / "target_ids.npy").unlink(), "the windows' target_ids is missing"),
        (cut("context_features_u16", 5000), "context_features_u16.npy is not a readable .npy file"),
        (cut("anchor_ids", 40), "anchor_ids.npy is not a readable .npy file"),
        (cut("ctx_token_ids", 0), "ctx_token_ids.npy is not a readable .npy file"),
        (pickled, "target_ids.npy is not a readable .npy file"),
        (
            retyped("context_features_u16", lambda x: x.astype(np.int16)),
            r"is int16 .*, uint16 \[11, 19, 48\] is needed",
        ),
        (retyped("ctx_token_ids", lambda x: x[:, :-1]), r"is int32 \[11, 18\], int32 \[11, 19\] is needed"),
        (retyped("anchor_ids", lambda x: x + 1000), "anchor_ids.npy holds token ids outside the target's vocabulary"),
        (retyped("ctx_pos_start_i32", lambda x: x - 1), "holds positions outside 0 to 2"),
        (retyped("anchor_pos_i32", lambda x: x + 1), "an anchor is not 19 positions after its window's start"),
        (retyped("anchor_embedding_u16", lambda x: x ^ 1), "is not the embedding of the anchors by the target"),
        # the layers' columns the other way round: what an id that is off looks like
        (
            retyped("context_features_u16", lambda x: np.roll(x, 24, axis=2)),
            "the layer ids are wrong: .* layer 1 are that",
        ),
        (retyped("context_features_u16", lambda x: x[:, ::-1]), "the hidden states are not of the target"),
        (retyped("context_features_u16", lambda x: x | np.uint16(0x7F80)), "not finite|not of the target"),
    ],
)
def test_bad_sources_are_one_line_and_leave_nothing(source, target_folder, tmp_path, damage, message):
    damage(source)
    with pytest.raises(InputError, match=message) as caught:
        imported(source, target_folder, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("name", ["context_features_u16", "target_ids", "ctx_pos_start_i32"])
def test_the_proof_fails_where_a_bit_differs(source, target_folder, tmp_path, name):
    """A source that changes while it is read: the last that is done is to compare, and nothing is imported."""

    def meddle(_done, _total, note):
        if note == "3 texts":
            array = np.load(source / f"{name}.npy", mmap_mode="r+")
            array[(8, *[0] * (array.ndim - 1))] ^= 1
            array.flush()

    config = CacheImportConfig(
        format="windows", source=source, target=target_folder, out=tmp_path / "cache", check_tokens=0
    )
    with pytest.raises(InputError, match=f"{name} of sample 8 is not what the cache gives back: nothing was imported"):
        import_cache(config, progress=meddle)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_features_that_are_not_finite_are_refused(source, target_folder, tmp_path):
    change(source, "context_features_u16", lambda x: (x.__setitem__((10, 5, 3), 0x7F80), x)[1])
    with pytest.raises(InputError, match="text 2: the features of its token 5 are not finite"):
        imported(source, target_folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_another_target_and_a_taken_folder_are_refused(windows, tmp_path, target_folder):
    other = tiny.write_tiny_target(tmp_path / "other", seed=3)
    with pytest.raises(InputError, match="is not the embedding of the anchors"):
        imported(windows[0], other, tmp_path / "cache")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(InputError, match="taken exists already: choose another --out"):
        imported(windows[0], target_folder, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"]
