"""Every anchor against a plain forward, the replay against real decoding, the command's JSON and its messages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dflash_jax import targets
from dflash_jax.accept import evaluate_cache, replay_blocks
from dflash_jax.cache import open_cache
from dflash_jax.check import CheckConfig, check
from dflash_jax.core import InputError, load_tensors, no_progress, read_json, read_jsonl, sha256_file, write_json
from dflash_jax.decode import Decoder
from dflash_jax.drafter import load_drafter, save_drafter, with_draft_vocabulary
from dflash_jax.generate import ResponsesConfig, generate_responses
from dflash_jax.targets import load_target
from dflash_jax.text import load_tokenizer
from oracles import blocks
from support import tiny, tiny_chain

FAR = 70000
BUDGET, CONTEXT = 24, 28
# their responses end with a stop token, at the context's end and at the budget
TEXTS = (*tiny.TEXTS[:4], tiny.TEXTS[6])


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory, target_folder):
    folder = tmp_path_factory.mktemp("chain") / "all"
    return tiny_chain.make_cache(folder, target_folder, TEXTS, max_new_tokens=BUDGET, position_offsets=(0, FAR))


@pytest.fixture(scope="module")
def cache(cache_folder):
    return open_cache(cache_folder)


@pytest.fixture(scope="module")
def target(target_folder):
    return load_target(target_folder)


@pytest.fixture(scope="module")
def drafter_folder(tmp_path_factory):
    """Often right and often wrong, of nobody knows which training."""
    folder = tmp_path_factory.mktemp("drafter")
    save_drafter(tiny.half_memorised(), folder)
    return folder


@pytest.fixture(scope="module")
def results(target, cache, drafter_folder):
    return evaluate_cache(
        load_drafter(drafter_folder),
        target.embed_tokens,
        target.head,
        cache,
        max_positions=CONTEXT,
        block_size=5,
        anchors_per_chunk=8,
        position_offsets=None,
        progress=no_progress,
    )


def drafted_in_float64(drafter_folder, target, stored, anchor, slots):
    """The tokens a plain float64 drafter puts behind an anchor, from the features before it alone."""
    weights = load_tensors(drafter_folder / "model.safetensors", what="weights")
    embed, head = (np.asarray(part, np.float64) for part in (target.embed_tokens, target.head))
    hidden = blocks.draft_block(
        {name: weight.astype(np.float64) for name, weight in weights.items()},
        read_json(drafter_folder / "config.json", what="config"),
        slots=embed[[stored.token_ids[anchor], *[tiny.MASK_ID] * (slots - 1)]],
        features=np.asarray(stored.features[:anchor], np.float64),
        first_position=stored.position_offset,
    )
    return np.argmax(hidden[1:] @ head.T, axis=-1).tolist()


def test_every_anchor_is_drafted_and_judged_as_by_a_plain_loop(results, cache, target, drafter_folder):
    seen, by_text = set(), {(result.sequence_index, result.position_offset): result for result in results}
    for stored in map(cache.sequence, range(cache.num_sequences)):
        found, length = by_text[stored.sequence_index, stored.position_offset], len(stored.token_ids)
        limit = min(stored.prompt_len + BUDGET, CONTEXT)
        anchors = blocks.eligible(stored.prompt_len, length)
        assert len(found.accepted) == len(found.correct) == len(anchors) > 3
        for row, anchor in enumerate(anchors):
            slots, labels = blocks.labels(
                stored.token_ids.tolist(), stored.next_ids.tolist(), length=length, limit=limit, anchor=anchor,
                block_size=5,
            )  # fmt: skip
            known = [label for label in labels if label is not None]
            drafted = drafted_in_float64(drafter_folder, target, stored, anchor, slots)
            assert found.labelled[row].tolist() == [label is not None for label in labels]
            hits = [ours == label for ours, label in zip(drafted, known, strict=False)]
            assert found.correct[row].tolist() == hits + [False] * (4 - len(hits))
            assert found.accepted[row] == blocks.accept_len(drafted[: len(known)], known, len(known))
            seen.add(int(found.accepted[row]))
    assert seen == {0, 1, 2, 3, 4}


@pytest.mark.slow
def test_replay_is_what_decoding_does(results, target, target_folder, drafter_folder):
    tokenizer = load_tokenizer(target_folder)
    decoder = Decoder(target, stop_ids=tokenizer.stop_ids, max_new_tokens=BUDGET, batch_size=len(TEXTS))
    drafter = load_drafter(drafter_folder)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    ends = set()
    for offset in (0, FAR):
        decoded = decoder.decode(prompts, drafter=drafter, position_offset=offset).rows
        ends |= {
            "stop" if row.stopped else ("budget" if len(row.tokens) == BUDGET else len(row.tokens) + len(prompt))
            for row, prompt in zip(decoded, prompts, strict=True)
        }
        offline = {r.sequence_index: replay_blocks(r) for r in results if r.position_offset == offset}
        assert offline == {i: row.committed for i, row in enumerate(decoded) if row.committed}
        assert {size for chain in offline.values() for size in chain} == {1, 2, 3, 4, 5}
    assert ends == {"stop", "budget", CONTEXT}


def test_offsets_can_be_chosen(target, cache, drafter_folder, results):
    moves = []
    found = evaluate_cache(
        load_drafter(drafter_folder), target.embed_tokens, target.head, cache, max_positions=CONTEXT,
        block_size=5, anchors_per_chunk=8, position_offsets=(FAR,), progress=lambda *move: moves.append(move),
    )  # fmt: skip
    wanted = [result for result in results if result.position_offset == FAR]
    assert [r.accepted.tolist() for r in found] == [r.accepted.tolist() for r in wanted]
    assert [move[:2] for move in moves] == [(len(wanted), len(wanted))]


REPLAY = {"tau_micro", "tau_macro", "tau_ci95", "survival", "num_blocks", "accept_len_mean", "why"}
GROUP = {
    "accept_len_mean", "accept_len_p50", "accept_len_p90", "accept_len_p99", "accept_len_ci95", "token_acc_mean",
    "survival", "replay", "num_anchors", "num_prompts", "num_unlabelled",
}  # fmt: skip


def recorded(tmp_path, drafter_folder, cache, *, trained):
    """A copy of the drafter with the record of one trained on some texts of a cache."""
    folder = shutil.copytree(drafter_folder, tmp_path / "drafter")
    hashes = {r.prompt_hash for r in map(cache.sequence, range(cache.num_sequences)) if r.sequence_index in trained}
    record = {
        "trained_prompt_hashes": [f"{value:016x}" for value in hashes],
        "cache_fingerprint": cache.manifest["fingerprint"],
    }
    write_json(folder / "record.json", record)
    return folder


def some_config(target_folder, cache_folder, drafter, **changes):
    return CheckConfig(
        target=target_folder, cache=cache_folder, drafter=drafter, anchors_per_chunk=8, bootstrap_samples=200, **changes
    )


def test_json(tmp_path, target_folder, cache_folder, cache, drafter_folder, results):
    folder = recorded(tmp_path, drafter_folder, cache, trained={0, 1})
    found = check(some_config(target_folder, cache_folder, folder))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == GROUP | {
        "seen", "unseen", "by_ctx_pos_start", "block_size", "draft_vocab_size", "cache", "drafter",
        "accept_len_by_offset_difference", "by_context_length", "by_prompt_set", "by_slot", "anchors", "num_departures",
        "num_response_tokens", "comparison", "checks", "warnings", "record",
    }  # fmt: skip
    offsets = found["by_ctx_pos_start"]
    assert list(offsets) == ["0", str(FAR)]
    for group in (found["seen"], found["unseen"], *offsets.values()):
        assert set(group) == GROUP
        assert set(group["replay"]) == REPLAY
    assert (found["block_size"], found["cache"], found["drafter"]) == (5, str(cache_folder), str(folder))
    assert found["draft_vocab_size"] is None
    assert found["warnings"] == []
    assert found["record"]["drafter_sha256"] == sha256_file(folder / "model.safetensors")
    # what the groups hold
    assert (found["seen"]["num_prompts"], found["unseen"]["num_prompts"]) == (2, len(TEXTS) - 2)
    assert found["seen"]["num_anchors"] + found["unseen"]["num_anchors"] == found["num_anchors"]
    whole = np.concatenate([r.accepted[r.labelled.all(axis=1)] for r in results if r.sequence_index in (0, 1)])
    assert found["seen"]["accept_len_mean"] == pytest.approx(whole.mean())
    assert sum(group["num_anchors"] for group in offsets.values()) == found["num_anchors"]
    assert found["anchors"] == "all"
    assert (found["comparison"], found["checks"]) == ([], [])
    # the buckets part the same anchors
    for name in ("by_context_length", "by_prompt_set"):
        assert sum(group["num_anchors"] for group in found[name].values()) == found["num_anchors"]
        assert sum(group["replay"]["num_blocks"] for group in found[name].values()) == found["replay"]["num_blocks"]
    assert list(found["by_context_length"]) == ["0-63"]
    assert list(found["by_prompt_set"]) == [cache.sequence(0).prompt_set]
    labelled = np.sum([result.labelled.sum(axis=0) for result in results], axis=0)
    assert [slot["num_labelled"] for slot in found["by_slot"]] == labelled.tolist()
    assert found["by_slot"][0]["token_acc"] > found["by_slot"][3]["token_acc"] > 0
    assert (found["num_departures"], found["num_response_tokens"]) == (0, sum(len(r.accepted) + 1 for r in results))
    # the chain lands behind rejections
    assert 0 < found["replay"]["accept_len_mean"] < found["accept_len_mean"]
    assert "only the replay predicts" in found["replay"]["why"]
    # texts at two offsets draft the same here
    difference = found["accept_len_by_offset_difference"]
    assert set(difference) == {str(FAR)}
    assert difference[str(FAR)]["num_anchors"] == offsets["0"]["num_anchors"]
    assert difference[str(FAR)]["mean"] == pytest.approx(
        offsets[str(FAR)]["accept_len_mean"] - offsets["0"]["accept_len_mean"], abs=1e-9
    )


def test_no_layer_of_the_target_is_loaded(monkeypatch, target_folder, cache_folder, drafter_folder):
    """A check needs the target's ends: one of gpt-oss-20b runs where its 42 GB would not fit."""
    loaded = []
    monkeypatch.setattr(
        targets, "load_target", lambda *given, **named: loaded.append(load_target(*given, **named)) or loaded[-1]
    )
    check(some_config(target_folder, cache_folder, drafter_folder, anchors="random:1"))
    assert [target.layers for target in loaded] == [()]


@pytest.mark.slow
def test_drafters_and_caches_are_compared(tmp_path, target_folder, cache_folder, drafter_folder):
    """Two drafters on two caches of which one holds some of the other's texts: four checks, four comparisons."""
    rows = read_jsonl(cache_folder.parent / "responses.jsonl", what="responses")
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:3]))
    (tmp_path / "some.jsonl.record.json").write_bytes(
        (cache_folder.parent / "responses.jsonl.record.json").read_bytes()
    )
    some = tiny_chain.build_cache(tmp_path / "some", target_folder, tmp_path / "some.jsonl")
    other = tmp_path / "other"
    other.mkdir()
    save_drafter(tiny.random_drafter(tiny.tiny_drafter_config()), other)
    found = check(
        some_config(target_folder, cache_folder, drafter_folder, compare_drafters=(other,), compare_caches=(some,))
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [(one["drafter"], one["cache"]) for one in found["checks"]] == [
        (str(drafter), str(one)) for drafter in (drafter_folder, other) for one in (cache_folder, some)
    ]
    assert found["checks"][0] == {key: value for key, value in found.items() if key not in ("comparison", "checks")}
    pairs = {tuple((pair[side]["drafter"], pair[side]["cache"]) for side in "ab"): pair for pair in found["comparison"]}
    assert len(pairs) == len(found["comparison"]) == 4
    good, bad = ((str(drafter_folder), str(cache_folder)), (str(other), str(cache_folder)))
    drafters = pairs[good, bad]
    assert (drafters["paired"], drafters["num_prompts"]) == (True, len(TEXTS))
    assert drafters["num_anchors"] == found["num_anchors"]
    assert drafters["accept_len"]["a"] == found["accept_len_mean"]
    assert drafters["accept_len"]["b"] == found["checks"][2]["accept_len_mean"]
    assert drafters["tau"]["a"] == found["replay"]["tau_micro"]
    # five prompts: the interval is wide, and the verdict must follow it
    low, high = drafters["accept_len"]["ci95"]
    assert low <= drafters["accept_len"]["difference"] <= high
    assert drafters["verdict"].startswith("no difference can be told" if low <= 0 <= high else "a accepts ")
    # the second cache has two of the texts, at one of the offsets: of those two, nothing changes
    caches = pairs[good, (str(drafter_folder), str(some))]
    assert (caches["paired"], caches["num_prompts"]) == (True, 2)
    assert caches["num_anchors"] == found["checks"][1]["num_anchors"]
    assert caches["accept_len"]["difference"] == pytest.approx(0, abs=1e-12)
    assert found["checks"][1]["num_prompts"] == 2


def test_chosen_anchors_are_some_of_all(target_folder, cache_folder, drafter_folder, results):
    found = check(some_config(target_folder, cache_folder, drafter_folder, anchors="every:3"))
    assert (found["anchors"], found["replay"]) == ("every:3", None)
    whole = [result.at(np.arange(len(result.anchors)) % 3 == 0) for result in results]
    accepted = np.concatenate([result.accepted[result.whole] for result in whole])
    assert found["num_anchors"] == len(accepted)
    assert found["accept_len_mean"] == pytest.approx(accepted.mean())
    some = check(some_config(target_folder, cache_folder, drafter_folder, anchors="random:4", seed=3))
    # the same text has the same anchors at both offsets
    assert len({group["num_anchors"] for group in some["by_ctx_pos_start"].values()}) == 1
    assert (
        some["accept_len_by_offset_difference"][str(FAR)]["num_anchors"] == some["by_ctx_pos_start"]["0"]["num_anchors"]
    )
    assert some["num_anchors"] < found["num_anchors"]


def test_text_that_is_not_greedy_is_a_warning(tmp_path, target_folder, cache_folder, drafter_folder):
    rows = read_jsonl(cache_folder.parent / "responses.jsonl", what="responses")
    ids = rows[2]["response_ids"]
    rows[2]["response_ids"] = [*ids[:6], ids[6] + 1 if ids[6] < 40 else ids[6] - 1, *ids[7:]]
    (tmp_path / "sampled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = tiny_chain.build_cache(tmp_path / "cache", target_folder, tmp_path / "sampled.jsonl")
    found = check(some_config(target_folder, cache, drafter_folder))
    # the text goes on as it was, which is not what the target says after the changed token
    assert 1 <= found["num_departures"] <= len(ids)
    (_, warning) = found["warnings"]
    tokens = sum(len(row["response_ids"]) for row in rows)
    assert warning.startswith(f"{found['num_departures']} of {tokens} response tokens (")
    assert f"({found['num_unlabelled']:,} have none, those past the texts' ends included)" in warning
    assert "replay (tau) assumes greedy text" in warning


@pytest.mark.slow
def test_sampled_responses_are_a_warning(tmp_path, target_folder, drafter_folder):
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", TEXTS)
    sampled = tmp_path / "sampled.jsonl"
    settings = {"target": target_folder, "prompts": str(prompts), "out": sampled, "max_new_tokens": BUDGET}
    generate_responses(ResponsesConfig(**settings, temperature=1.0))
    # a random target samples the mask token too, which no cache may hold
    kept = [
        line for line in sampled.read_bytes().split(b"\n")[:-1] if tiny.MASK_ID not in json.loads(line)["response_ids"]
    ]
    assert len(kept) > 2
    sampled.write_bytes(b"\n".join(kept) + b"\n")
    cache = tiny_chain.build_cache(tmp_path / "cache", target_folder, sampled)
    found = check(some_config(target_folder, cache, drafter_folder))
    assert found["num_departures"] > found["num_response_tokens"] / 4
    assert "replay (tau) assumes greedy text" in found["warnings"][-1]


@pytest.mark.slow
def test_smaller_blocks_than_trained_for(target_folder, cache_folder, drafter_folder):
    small, whole = (
        check(some_config(target_folder, cache_folder, drafter_folder, block_size=size)) for size in (3, None)
    )
    assert (small["block_size"], len(small["survival"])) == (3, 2)
    assert small["num_anchors"] > whole["num_anchors"]
    assert 1 < small["replay"]["tau_micro"] < whole["replay"]["tau_micro"]


@pytest.mark.slow
def test_a_draft_vocabulary_is_compared_with_the_whole(tmp_path, target_folder, cache_folder, cache, drafter_folder):
    """Labels outside it are lost where the whole vocabulary had them, and nothing else is."""
    labels = np.concatenate([one.next_ids[one.prompt_len :] for one in map(cache.sequence, range(cache.num_sequences))])
    ids = np.setdiff1d(np.arange(len(tiny.TOKENS)), [np.bincount(labels).argmax()])
    save_drafter(with_draft_vocabulary(load_drafter(drafter_folder), ids), tmp_path)
    found = check(some_config(target_folder, cache_folder, tmp_path, compare_drafters=(drafter_folder,)))
    assert [one["draft_vocab_size"] for one in found["checks"]] == [len(ids), None]
    reduced, whole = found["checks"]
    assert reduced["token_acc_mean"] < whole["token_acc_mean"]
    assert reduced["num_unlabelled"] == whole["num_unlabelled"]


def test_a_foreign_drafter_at_one_offset(target_folder, cache_folder, drafter_folder):
    found = check(some_config(target_folder, cache_folder, drafter_folder, position_offsets=(FAR,)))
    assert list(found["by_ctx_pos_start"]) == [str(FAR)]
    assert found["accept_len_by_offset_difference"] == {}
    assert (found["seen"], found["unseen"]) == (None, None)
    assert found["warnings"] == [
        "the drafter has no record of its training prompts: seen and unseen cannot be told apart"
    ]


def test_only_seen_prompts_is_a_warning(tmp_path, target_folder, cache_folder, cache, drafter_folder):
    folder = recorded(tmp_path, drafter_folder, cache, trained=set(range(len(TEXTS))))
    found = check(some_config(target_folder, cache_folder, folder))
    assert found["unseen"] is None
    assert found["seen"]["num_anchors"] == found["num_anchors"]
    assert found["warnings"] == [
        "ONLY PROMPTS THE DRAFTER WAS TRAINED ON were checked: these numbers say nothing about new prompts. "
        "Check on a cache of other prompts"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 1}, r"--block-size is 1: at least 2 are needed \(the anchor and one drafted token\)"),
        ({"anchors_per_chunk": 0}, "--anchors-per-chunk and --bootstrap-samples need positive numbers"),
        ({"bootstrap_samples": 0}, "--anchors-per-chunk and --bootstrap-samples need positive numbers"),
        ({"anchors": "some"}, "--anchors is 'some': choose all, every:N or random:N, with N from 1 up"),
        (
            {"compare_drafters": (Path("a"), Path("a"))},
            "--compare-drafters: a is named twice: name each of the others once",
        ),
        ({"compare_caches": (Path("c"),), "cache": Path("c")}, "--compare-caches: c is named twice: name each .*"),
    ],
)
def test_bad_number_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        CheckConfig(**{"target": tmp_path, "cache": tmp_path, "drafter": tmp_path, **changes})


def refused(message, *paths, **changes):
    with pytest.raises(InputError, match=message) as error:
        check(some_config(*paths, **changes))
    assert "\n" not in str(error.value)


def test_settings_that_the_cache_or_the_drafter_has_not(target_folder, cache_folder, drafter_folder):
    paths = target_folder, cache_folder, drafter_folder
    refused("^--block-size is 6: the drafter was trained for blocks of 5, at most that$", *paths, block_size=6)
    refused(r"^--position-offsets names 7: .*cache holds 0, 70000$", *paths, position_offsets=(0, 7))


def test_what_is_compared_must_fit_too(tmp_path, target_folder, cache_folder, drafter_folder):
    paths = target_folder, cache_folder, drafter_folder
    refused("^no drafter folder at .*gone$", *paths, compare_drafters=(tmp_path / "gone",))
    refused("^no cache at .*gone", *paths, compare_caches=(tmp_path / "gone",))
    other = changed(tmp_path, drafter_folder, vocab_size=54)
    refused("^the drafter .*changed does not fit the target: vocab_size is 54", *paths, compare_drafters=(other,))


def test_a_flipped_byte_is_found_when_its_shard_is_first_touched(tmp_path, target_folder, cache_folder, drafter_folder):
    damaged = shutil.copytree(cache_folder, tmp_path / "cache")
    path = max(damaged.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(f"{path.name} is damaged: its sha256 is not the ledger's", target_folder, damaged, drafter_folder)


def test_another_target_is_named(tmp_path, cache_folder, drafter_folder):
    other = tiny.write_tiny_target(tmp_path / "other", seed=99)
    refused("^the cache was not made for the target .*other: target_weights is", other, cache_folder, drafter_folder)


def changed(tmp_path, drafter_folder, **changes):
    folder = shutil.copytree(drafter_folder, tmp_path / "changed")
    config = read_json(folder / "config.json", what="config")
    write_json(folder / "config.json", config | changes)
    return folder


def test_a_drafter_of_other_layers_or_sizes_is_named(tmp_path, target_folder, cache_folder, drafter_folder):
    layers = changed(tmp_path / "a", drafter_folder, dflash_config={"mask_token_id": 3, "target_layer_ids": [1, 2]})
    message = r"not made for the drafter .*: capture_layers is \[1, 3\] in the cache, \[1, 2\] in the drafter"
    refused(message, target_folder, cache_folder, layers)
    sizes = changed(tmp_path / "b", drafter_folder, hidden_size=25, vocab_size=54, num_target_layers=6)
    message = (
        r"^the drafter .*changed does not fit the target: hidden_size is 25, the target's is 24; "
        r"vocab_size is 54, the target's is 53; num_target_layers is 6, the target's is 5$"
    )
    refused(message, target_folder, cache_folder, sizes)


def test_a_drafter_trained_on_another_target_is_named(tmp_path, target_folder, cache_folder, cache, drafter_folder):
    folder = recorded(tmp_path, drafter_folder, cache, trained=set())
    record = read_json(folder / "record.json", what="record")
    record["cache_fingerprint"]["chat_template_sha256"] = "another"
    write_json(folder / "record.json", record)
    message = r"not made for the drafter .*: chat_template_sha256 is '\w+' in the cache, 'another' in the drafter"
    refused(message, target_folder, cache_folder, folder)


@pytest.mark.slow
def test_responses_too_short_for_a_block(tmp_path, target_folder, cache_folder, drafter_folder):
    rows = read_jsonl(cache_folder.parent / "responses.jsonl", what="responses")
    short = [row | {"response_ids": row["response_ids"][:4]} for row in rows]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    cache = tiny_chain.build_cache(tmp_path / "cache", target_folder, tmp_path / "short.jsonl")
    message = "^no response in .*cache is long enough for one whole block of 5 positions$"
    refused(message, target_folder, cache, drafter_folder)


def test_no_drafter_and_no_cache(tmp_path, target_folder, cache_folder, drafter_folder):
    refused("^no drafter folder at .*gone$", target_folder, cache_folder, tmp_path / "gone")
    refused("^no cache at .*gone", target_folder, tmp_path / "gone", drafter_folder)
