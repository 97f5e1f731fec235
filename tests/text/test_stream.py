"""Text of tokens that are still coming: whole characters only, and in the end all of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from dflash_jax.text import TextStream, Tokenizer

SPECIAL = "<end>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Every byte is a token, so that any character but ASCII is several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([SPECIAL])
    return Tokenizer(
        target=tmp_path_factory.mktemp("tokenizer"), backend=backend, chat_template=None, special_tokens={}, stop_ids=()
    )


def test_a_character_comes_out_whole_with_its_last_byte(tokenizer):
    stream = TextStream(tokenizer)
    parts = [stream.feed([token]) for token in tokenizer.encode("a€é!")]
    assert parts == ["a", "", "", "€", "", "é", "!"]
    assert stream.finish() == ""


def test_what_is_cut_off_is_told_at_the_end(tokenizer):
    stream = TextStream(tokenizer)
    assert stream.feed(tokenizer.encode("ab€")[:-1]) == "ab"
    assert stream.finish() == "�"


def test_special_tokens_are_left_out_or_shown(tokenizer):
    ids = tokenizer.encode(f"a{SPECIAL}")
    assert TextStream(tokenizer).feed(ids) == "a"
    assert TextStream(tokenizer, skip_special_tokens=False).feed(ids) == f"a{SPECIAL}"
    assert TextStream(tokenizer).finish() == ""


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12), st.integers(0, 12), st.data())
def test_any_text_in_any_parts_is_that_text(tokenizer, text, end, data):
    ids = tokenizer.encode(text)
    ids = ids[: len(ids) - end] if end < len(ids) else ids  # it may end inside a character
    stream, parts, rest = TextStream(tokenizer), [], ids
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        parts.append(stream.feed(rest[:size]))
        rest = rest[size:]
        assert not parts[-1].endswith("�")
    assert "".join(parts) + stream.finish() == tokenizer.decode(ids)
