"""The bytes on disk, against docs/cache-format.md worked by hand."""

import hashlib
import json
import shutil
import struct

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dflash_jax.cache import cache_info, check_fingerprint, open_cache, verify_cache
from dflash_jax.cache.manifest import write_manifest
from dflash_jax.core import InputError, sha256_file
from support import toy_cache


def test_one_shard_by_hand(tmp_path):
    # two texts, longest first; each batch at 0, then at 1000
    toy_cache.write_inputs(tmp_path, [([1, 2], [3]), ([4], [5, 6, 7])])
    (tmp_path / "responses.jsonl.record.json").write_text('{"config": {"max_new_tokens": 9}}')
    toy_cache.build_toy(tmp_path)
    path = tmp_path / "cache" / "shard-00000.safetensors"
    with safe_open(path, framework="numpy") as file:
        names = set(file.keys())
        features, rest = file.get_tensor("features"), {n: file.get_tensor(n) for n in names - {"features"}}
    assert {name: tensor.dtype.name for name, tensor in rest.items()} == {
        "token_ids": "int32",
        "next_ids": "int32",
        "loss_mask": "uint8",
        "seq_starts": "int64",
        "position_offset": "int32",
        "prompt_len": "int32",
        "prompt_hash": "uint64",
        "sequence_index": "int32",
        "prompt_set": "uint16",
        "prefix_start": "int64",
        "prefix_len": "int32",
    }
    assert rest["token_ids"].tolist() == [4, 5, 6, 7, 1, 2, 3] * 2
    # 5 * token + place, modulo 97
    assert rest["next_ids"].tolist() == [20, 26, 32, 38, 5, 11, 17] * 2
    assert rest["loss_mask"].tolist() == [0, 1, 1, 1, 0, 0, 1] * 2
    assert rest["seq_starts"].tolist() == [0, 4, 7, 11, 14]
    assert rest["position_offset"].tolist() == [0, 0, 1000, 1000]
    assert rest["prompt_len"].tolist() == [1, 2, 1, 2]
    assert rest["sequence_index"].tolist() == [1, 0, 1, 0]
    assert rest["prompt_set"].tolist() == [1, 0, 1, 0]
    assert rest["prefix_len"].tolist() == [0, 0, 0, 0]
    four = int.from_bytes(hashlib.sha256(struct.pack("<i", 4)).digest()[:8], "little")
    one_two = int.from_bytes(hashlib.sha256(struct.pack("<ii", 1, 2)).digest()[:8], "little")
    assert rest["prompt_hash"].tolist() == [four, one_two] * 2
    assert (features.dtype.name, features.shape) == ("bfloat16", (14, 6))
    # 3 * token + place + offset / 1000 + column
    assert features[2].tolist() == [20, 21, 22, 23, 24, 25]
    assert features[9].tolist() == [21, 22, 23, 24, 25, 26]

    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    records = manifest.pop("records")
    assert [record["command"] for record in records] == ["cache build"]
    assert len(manifest.pop("plan_sha256")) == 64
    content = {name: value for name, value in manifest.items() if name not in ("config", "manifest_sha256")}
    assert content == {
        "format": "dflash-jax-cache",
        "format_version": 2,
        "fingerprint": toy_cache.FINGERPRINT | {"capture_layers": [1, 3], "features_dtype": "bfloat16"},
        "responses_sha256": sha256_file(tmp_path / "responses.jsonl"),
        "hidden_size": 3,
        "capture_layers": [1, 3],
        "position_offsets": [0, 1000],
        "features_dtype": "bfloat16",
        "prompt_sets": ["toy-0", "toy-1"],
        "max_new_tokens": 9,
        "max_length": 4,
        "num_shards": 1,
        "num_sequences": 4,
        "num_tokens": 14,
        "shards": [
            {
                "file": "shard-00000.safetensors",
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "sequences": 4,
                "tokens": 14,
            }
        ],
        "complete": True,
    }
    # 6 columns * 2 + 4 + 4 + 1 per token, 42 per sequence, 8, and the header
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert path.stat().st_size == 14 * 21 + 4 * 42 + 8 + 8 + header
    assert cache_info(tmp_path / "cache")["bytes_per_token"] == 21


def test_info(toy):
    info = cache_info(toy / "cache")
    assert (info["complete"], info["num_sequences"], info["num_texts"]) == (True, 24, 12)
    assert (info["position_offsets"], info["capture_layers"], info["max_new_tokens"]) == ([0, 1000], [1, 3], None)
    assert info["bytes"] == sum(path.stat().st_size for path in (toy / "cache").glob("*.safetensors"))
    assert info["shards"] == info["num_shards"] == 3


def test_fingerprint_differences_are_all_named():
    manifest = {"fingerprint": {"target_weights": "aa", "capture_layers": [1, 3], "tokenizer_sha256": "t"}}
    check_fingerprint(manifest, {"target_weights": "aa", "capture_layers": (1, 3)}, what="the drafter d")
    with pytest.raises(InputError) as error:
        check_fingerprint(manifest, {"target_weights": "bb", "tokenizer_sha256": "t", "rope": 1}, what="the drafter d")
    assert str(error.value) == (
        "the cache was not made for the drafter d: target_weights is 'aa' in the cache, 'bb' in the drafter d; "
        "rope is None in the cache, 1 in the drafter d: build a cache for it"
    )


@pytest.fixture
def cache(toy, tmp_path):
    return shutil.copytree(toy / "cache", tmp_path / "cache")


def rewrite(cache, change):
    """Change the manifest and sign it again, as someone would who means it."""
    manifest = json.loads((cache / "manifest.json").read_text())
    change(manifest)
    write_manifest(cache, manifest)


def edit_shard(cache, edit):
    """Change shard 0's tensors, and its ledger entry with it, so that only the content can tell."""
    path = cache / "shard-00000.safetensors"
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    entry = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    rewrite(cache, lambda manifest: manifest["shards"][0].update(entry))


MANIFEST_PROBLEMS = [
    (lambda m: m.update(format="other"), "is not a dflash-jax-cache manifest"),
    (lambda m: m.update(format_version=3), "is a cache of format_version 3, this dflash-jax reads up to 2: upgrade"),
    (lambda m: m.update(format_version="1"), "format_version '1' is not a positive number"),
    (lambda m: m.pop("fingerprint"), "fingerprint is missing or of the wrong type"),
    (lambda m: m.pop("prompt_sets"), "prompt_sets is missing or of the wrong type"),
    (lambda m: m["prompt_sets"].append(7), "prompt_sets holds something that is not a name"),
    (lambda m: m.update(features_dtype="int3"), "features_dtype 'int3' is unknown"),
    (
        lambda m: m["shards"][0].update(file="../shard-00000.safetensors"),
        "'../shard-00000.safetensors' is not a shard's name",
    ),
    (lambda m: m["shards"][0].update(file="/etc/passwd"), "'/etc/passwd' is not a shard's name"),
    (lambda m: m["shards"][0].update(file="shard-00000.safetensors\n"), "is not a shard's name"),
    (lambda m: m["shards"][0].pop("sha256"), "shard entry 0 lacks one of file, bytes, sha256, sequences, tokens"),
    (lambda m: m["shards"][0].update(tokens=0), "shard-00000.safetensors is entered with a count below 1"),
    (lambda m: m["shards"].reverse(), "its shards are not in order"),
    (lambda m: m["shards"].pop(), "it calls itself complete, with . of . shards"),
    (lambda m: m.update(num_tokens=7), "its shards do not add up to num_tokens 7"),
]


@pytest.mark.parametrize(("change", "message"), MANIFEST_PROBLEMS)
def test_bad_manifest(cache, change, message):
    rewrite(cache, change)
    with pytest.raises(InputError, match=message) as error:
        open_cache(cache)
    assert "\n" not in str(error.value)
    assert verify_cache(cache)["problems"] == [str(error.value)]


def test_manifest_that_was_edited_is_refused(cache):
    path = cache / "manifest.json"
    path.write_text(path.read_text().replace('"target_weights": "w1"', '"target_weights": "w2"'))
    with pytest.raises(InputError, match="it was changed or damaged after it was written"):
        open_cache(cache)


def test_not_a_cache(tmp_path):
    with pytest.raises(InputError, match="no cache at .*nowhere: make one with"):
        open_cache(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a cache: it has no manifest.json"):
        verify_cache(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="the cache's manifest is not JSON"):
        cache_info(tmp_path)


def test_every_flipped_byte_is_found(cache):
    draw = np.random.default_rng(3)
    for path in [cache / "manifest.json", cache / "shard-00001.safetensors"]:
        whole = path.read_bytes()
        for place in [0, 9, len(whole) - 1, *draw.integers(0, len(whole), 25)]:
            changed = bytearray(whole)
            changed[place] ^= 1
            path.write_bytes(changed)
            problems = verify_cache(cache)["problems"]
            assert len(problems) == 1, (path, place)
            assert path.name in problems[0]
        path.write_bytes(whole)
    assert verify_cache(cache) == {"cache": str(cache), "ok": True, "problems": []} | {
        name: cache_info(cache)[name] for name in ("num_shards", "num_sequences", "num_tokens", "bytes")
    }


def test_every_kind_of_place_is_found_when_one_bit_flips(cache):
    """Length of the header, header, each tensor's first and last byte; each line of the manifest."""
    path = cache / "shard-00001.safetensors"
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    entries = json.loads(whole[8 : 8 + header])
    places = [0, 7, 8, 7 + header]
    for name, entry in entries.items():
        if name != "__metadata__":
            places += [8 + header + entry["data_offsets"][0], 7 + header + entry["data_offsets"][1]]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        assert verify_cache(cache)["problems"] == [f"{path} is damaged: its sha256 is not the ledger's"], place
    path.write_bytes(whole)
    manifest = cache / "manifest.json"
    text = manifest.read_bytes()
    for place in [text.index(line) + len(line) // 2 for line in text.splitlines() if line.strip()]:
        manifest.write_bytes(text[:place] + bytes([text[place] ^ 64]) + text[place + 1 :])
        problems = verify_cache(cache)["problems"]
        assert len(problems) == 1, place
        assert str(manifest) in problems[0]


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "manifest.json"])
def test_links_out_of_the_folder_are_refused(cache, tmp_path, name):
    outside = (cache / name).rename(tmp_path / name)
    (cache / name).symlink_to(outside)
    problems = verify_cache(cache)["problems"]
    assert len(problems) == 1
    assert f"{cache / name} is a symbolic link" in problems[0]
    with pytest.raises(InputError, match=f"{name} is a symbolic link"):
        open_cache(cache).prompt_hashes()


def test_white_space_of_the_manifest_is_part_of_it(cache):
    path = cache / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"\n  ", b"\n\t ", 1))
    open_cache(cache)
    assert verify_cache(cache)["problems"] == [f"{path} was changed after it was written"]


def test_truncated_missing_and_foreign_files_are_all_named(cache):
    first, second = cache / "shard-00000.safetensors", cache / "shard-00001.safetensors"
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    (cache / "shard-99999.safetensors").write_bytes(b"")
    (cache / ".shard-00002.safetensors.x.partial").write_bytes(b"")
    done = verify_cache(cache)
    assert not done["ok"]
    assert done["problems"] == [
        f"{first} has {first.stat().st_size} bytes, the ledger says {first.stat().st_size + 1}",
        f"{second} is missing",
        f"{cache / '.shard-00002.safetensors.x.partial'} does not belong to the cache",
        f"{cache / 'shard-99999.safetensors'} does not belong to the cache",
    ]


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


def at(index, number):
    return lambda tensor: np.concatenate([tensor[:index], np.asarray([number], tensor.dtype), tensor[index + 1 :]])


CONTENT_PROBLEMS = [
    (lambda t: t.pop("next_ids"), "next_ids is missing"),
    (lambda t: t.update(extra=np.zeros(2, np.int32)), "unexpected tensor extra"),
    (lambda t: t.update(extra=np.zeros(2, np.int16)), "extra is of dtype I16, no shard has that"),
    (put("features", lambda x: x.astype(np.float32)), r"features is float32 \[\d+, 6\], bfloat16 \[\d+, 6\] is needed"),
    (put("features", lambda x: x[:, :5].copy()), r"features is bfloat16 \[\d+, 5\], bfloat16 \[\d+, 6\] is needed"),
    (put("token_ids", lambda x: x[:-1]), "token_ids is int32"),
    (put("seq_starts", at(1, 0)), "seq_starts does not rise from 0 to"),
    (put("seq_starts", at(0, 1)), "seq_starts does not rise from 0 to"),
    (put("seq_starts", at(-1, 10**6)), "seq_starts is int64|seq_starts does not rise"),
    (put("prompt_set", at(1, 3)), "a prompt_set is not one of the manifest's 3"),
    (put("prefix_len", at(0, 1)), "a prefix does not lie before its sequence"),
    (put("prefix_len", at(1, -1)), "a prefix does not lie before its sequence"),
    (put("prefix_start", at(1, 10**6)), "a prefix does not lie before its sequence"),
    (put("prefix_len", at(2, 61)), "a prefix_len is more than its sequence's prompt_len"),
    (put("prompt_len", at(0, 0)), "a prompt_len is not between 1 and its sequence's length"),
    (put("prompt_len", at(0, 150)), "a prompt_len is not between 1 and its sequence's length"),
]


def test_version_1_is_still_read(cache):
    wanted = [open_cache(cache).sequence(i) for i in range(24)]
    toy_cache.as_version_1(cache)
    assert verify_cache(cache)["problems"] == []
    assert cache_info(cache)["format_version"] == 1
    for i, sequence in enumerate(wanted):
        got = open_cache(cache).sequence(i)
        assert np.array_equal(got.features, sequence.features)
        assert got.token_ids.tolist() == sequence.token_ids.tolist()
        assert (got.sequence_index, got.prompt_set) == (sequence.sequence_index, "unknown")


@pytest.mark.parametrize(("edit", "message"), CONTENT_PROBLEMS)
def test_content_that_disagrees_with_the_manifest(cache, edit, message):
    edit_shard(cache, edit)
    problems = verify_cache(cache)["problems"]
    assert len(problems) == 1
    with pytest.raises(InputError, match=f"shard-00000.safetensors: ({message})"):
        open_cache(cache).sequence(0)


def test_ledger_that_lies_about_the_longest_sequence(cache):
    rewrite(cache, lambda manifest: manifest.update(max_length=3))
    assert "a sequence is longer than the manifest's max_length 3" in verify_cache(cache)["problems"][0]


def test_shard_that_is_not_safetensors(cache):
    path = cache / "shard-00000.safetensors"
    path.write_bytes(b"[]" * 40)
    entry = {"bytes": 80, "sha256": sha256_file(path)}
    rewrite(cache, lambda manifest: manifest["shards"][0].update(entry))
    assert "is not a readable safetensors file" in verify_cache(cache)["problems"][0]
