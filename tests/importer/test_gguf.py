"""GGUF files made from random transformers models, imported, and compared with the model they came from."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from dflash_jax.core import InputError
from dflash_jax.importer import import_gguf
from support.tiny_gguf import MERGES, TOKENS, TYPES, gguf_tensors, tiny_model, write_gguf


@pytest.fixture(scope="module")
def tied_model():
    return tiny_model(tied=True)


@pytest.fixture(scope="module")
def tensors(tied_model):
    return gguf_tensors(tied_model)


@pytest.mark.parametrize("tied", [True, False])
def test_imported_folder_is_the_model_it_came_from(tmp_path: Path, tied: bool):
    model = tiny_model(tied=tied)
    summary = import_gguf(write_gguf(tmp_path / "m.gguf", gguf_tensors(model)), tmp_path / "out")

    loading: Any = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    loaded, problems = loading
    assert not any(problems.values()), problems
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    names = (
        "head_dim rms_norm_eps rope_parameters max_position_embeddings tie_word_embeddings num_key_value_heads "
        "intermediate_size bos_token_id eos_token_id pad_token_id"
    )
    for name in names.split():
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    assert loaded.dtype == torch.float32
    assert summary["num_parameters"] == model.num_parameters()
    assert summary["num_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_record_names_the_source(tmp_path: Path, tensors):
    source = write_gguf(tmp_path / "m.gguf", tensors)
    summary = import_gguf(source, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["command"] == "target import"
    assert record["config"] == {"gguf": str(source), "out": str(tmp_path / "out")}
    assert record["source_sha256"] == summary["source_sha256"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "record.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 5e-4), ("BF16", 4e-3)])
def test_half_precision_weights_come_back_in_float32(tmp_path: Path, tensors, kind: str, tolerance: float):
    quantise = lambda _: gguf.GGMLQuantizationType[kind]
    import_gguf(write_gguf(tmp_path / "m.gguf", tensors, quantise=quantise), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.mlp.down_proj.weight"]
    assert found.dtype == np.float32
    wanted = tensors["blk.2.ffn_down.weight"]
    difference = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert 0 < difference < tolerance


def test_quantised_blocks_are_dequantised(tmp_path: Path, tensors):
    # By hand: a Q8_0 block is 32 signed bytes and one scale, max / 127. The file needs rows of a multiple of 32.
    wide = dict(tensors)
    sizes = {"llama.feed_forward_length": 64}
    rng = np.random.default_rng(3)
    for layer in range(3):
        wide[f"blk.{layer}.ffn_down.weight"] = rng.standard_normal((40, 64)).astype(np.float32)
        for name in ("gate", "up"):
            wide[f"blk.{layer}.ffn_{name}.weight"] = rng.standard_normal((64, 40)).astype(np.float32)
    kinds = gguf.GGMLQuantizationType
    source = write_gguf(
        tmp_path / "m.gguf", wide, changes=sizes, quantise=lambda name: kinds.Q8_0 if "ffn_down" in name else kinds.F32
    )
    import_gguf(source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    blocks = wide["blk.1.ffn_down.weight"].reshape(40, 2, 32)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / 127
    wanted = (np.round(blocks / scales) * scales.astype(np.float16).astype(np.float32)).reshape(40, 64)
    np.testing.assert_allclose(found, wanted, atol=float(scales.max()) * 1e-3)


def test_tokenizer_cuts_digits_one_by_one_and_keeps_added_tokens(tmp_path: Path, tensors):
    import_gguf(write_gguf(tmp_path / "m.gguf", tensors), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # "01" is a merge of the vocabulary that the digit rule must keep from being used.
    assert tokenizer.tokenize("ab ab01") == ["ab", "Ġab", "0", "1"]
    assert tokenizer("<s>ab[word]ab</s>").input_ids == [1, 24, 4, 24, 2]
    assert tokenizer.decode([1, 24, 4, 24, 2], skip_special_tokens=True) == "ab[word]ab"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<s>", "</s>", "<unk>", "<unk>",
    )  # fmt: skip
    text = tokenizer.apply_chat_template([{"role": "user", "content": "cd"}], tokenize=False)
    assert text == "<s>cd"


def test_gpt2_pre_tokenizer_merges_digits(tmp_path: Path, tensors):
    source = write_gguf(tmp_path / "m.gguf", tensors, changes={"tokenizer.ggml.pre": "gpt-2"})
    import_gguf(source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("ab ab01") == ["ab", "Ġab", "01"]


def test_end_of_turn_token_stops_too(tmp_path: Path, tensors):
    source = write_gguf(tmp_path / "m.gguf", tensors, changes={"tokenizer.ggml.eot_token_id": 3})
    import_gguf(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, "has the pre-tokenizer 'llama-bpe': supported are 'gpt-2' and 'smollm'"),
        ({"tokenizer.ggml.model": "llama"}, "has a 'llama' tokenizer: only 'gpt2'"),
        ({"tokenizer.ggml.add_bos_token": True}, "sets tokenizer.ggml.add_bos_token"),
        ({"tokenizer.ggml.eos_token_id": 27}, "eos_token_id is 27, the vocabulary has 27 tokens"),
        ({"tokenizer.ggml.tokens": ["a", *TOKENS[1:]]}, "27 tokens, 26 of them distinct"),
        ({"tokenizer.ggml.token_type": TYPES[:-1]}, "26 types"),
        ({"tokenizer.ggml.tokens": [*TOKENS, "gh"], "tokenizer.ggml.token_type": [*TYPES, 1]}, "27 embedding rows"),
        ({"tokenizer.ggml.merges": [*MERGES, "e z"]}, "merges cannot be used"),
        ({"llama.expert_count": 8}, "a mixture of 8 experts"),
        ({"llama.rope.scaling.type": "yarn"}, "uses RoPE scaling 'yarn'"),
        ({"llama.rope.dimension_count": 4}, "rotates 4 of 6 dimensions per head"),
        ({"llama.block_count": 4}, r"9 tensor\(s\) do not fit its config: missing blk.3.attn_k.weight \[12, 40\]"),
        ({"llama.block_count": "3"}, "GGUF key llama.block_count is a str, int is needed"),
        ({"llama.embedding_length": 44}, r"blk.0.attn_k.weight is \[12, 40\], \[12, 44\] is needed"),
        ({"split.count": 2}, "is one of 2 parts: join them"),
    ],
)
def test_what_cannot_be_translated_is_refused(tmp_path: Path, tensors, changes: dict, message: str):
    source = write_gguf(tmp_path / "m.gguf", tensors, changes=changes)
    assert_refused(source, message)


@pytest.mark.parametrize(
    "key",
    ["llama.block_count", "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.merges",
     "tokenizer.ggml.eos_token_id", "tokenizer.ggml.pre"],
)  # fmt: skip
def test_missing_key_is_named(tmp_path: Path, tensors, key: str):
    assert_refused(write_gguf(tmp_path / "m.gguf", tensors, drop=[key]), f"lacks the GGUF key {key}")


def test_other_architectures_are_named(tmp_path: Path, tensors):
    assert_refused(write_gguf(tmp_path / "m.gguf", tensors, architecture="qwen3"), "is of architecture 'qwen3'")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rope_freqs.weight", r"has RoPE scaling factors \(rope_freqs.weight\)"),
        ("blk.0.attn_q.bias", r"unexpected blk.0.attn_q.bias \[24\]"),
    ],
)
def test_tensors_that_plain_llama_lacks_are_refused(tmp_path: Path, tensors, name: str, message: str):
    assert_refused(write_gguf(tmp_path / "m.gguf", tensors | {name: np.ones(24, np.float32)}), message)


def test_missing_tensors_are_all_named(tmp_path: Path, tensors):
    few = {name: value for name, value in tensors.items() if name not in ("output_norm.weight", "blk.1.ffn_up.weight")}
    assert_refused(
        write_gguf(tmp_path / "a.gguf", few), r"missing blk.1.ffn_up.weight \[56, 40\]; missing output_norm.w"
    )
    del few["token_embd.weight"]
    assert_refused(write_gguf(tmp_path / "b.gguf", few), "has no tensor token_embd.weight")


def test_files_that_are_not_whole_gguf(tmp_path: Path, tensors):
    whole = write_gguf(tmp_path / "m.gguf", tensors).read_bytes()
    # Cuts in the header, the metadata, the tensor list and the data.
    for size in (0, 3, 12, 30, 200, 1500, 3000, len(whole) // 2, len(whole) - 64):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        assert_refused(cut, r"cut.gguf is not a GGUF file, or is truncated \(.+\): fetch it again")
    text = tmp_path / "text.gguf"
    text.write_text("no weights here, only words")
    assert_refused(text, "text.gguf is not a GGUF file")
    assert_refused(tmp_path / "absent.gguf", "GGUF file is missing: .*absent.gguf")


def test_a_taken_folder_is_left_alone(tmp_path: Path, tensors):
    source = write_gguf(tmp_path / "m.gguf", tensors)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        import_gguf(source, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def assert_refused(source: Path, message: str) -> None:
    """One line, and nothing half-written beside the file."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        import_gguf(source, source.parent / "out")
    assert "\n" not in str(caught.value)
    assert sorted(source.parent.iterdir()) == before
