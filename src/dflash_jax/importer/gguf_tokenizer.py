"""A GGUF vocabulary as the files of a fast Hugging Face tokenizer."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from dflash_jax.core import InputError
from dflash_jax.importer.gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4
"""GGUF token types: special, and added as whole words but not special."""

_GGUF_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "mask": "mask"}


def _pre_tokenizer(name: str) -> PreTokenizer | None:
    """How text is cut before byte-pair merges, by GGUF's name for it; None for names not known here."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return {
        "gpt-2": byte_level,
        # Every digit is a word of its own before GPT-2's pattern sees the text: numbers never merge.
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }.get(name)


def build_tokenizer(file: GgufFile, *, vocab: int) -> Tokenizer:
    """Return the tokenizer of a GGUF, ids unchanged.

    Args:
        file: the GGUF.
        vocab: rows of the embedding; the vocabulary must not be longer.

    Raises:
        InputError: a tokenizer kind or pre-tokenizer that is not known to cut text as the original does.
    """
    kind, pre = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str)
    if kind != "gpt2":
        raise InputError(f"{file.path} has a {kind!r} tokenizer: only 'gpt2' (byte-level BPE) can be imported")
    pre_tokenizer = _pre_tokenizer(pre)
    if pre_tokenizer is None:
        raise InputError(f"{file.path} has the pre-tokenizer {pre!r}: supported are 'gpt-2' and 'smollm'")
    for flag in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if file.get(f"tokenizer.ggml.{flag}", bool, False):
            raise InputError(f"{file.path} sets tokenizer.ggml.{flag}, which an import cannot express yet")
    tokens, types = file.get("tokenizer.ggml.tokens", list), file.get("tokenizer.ggml.token_type", list)
    ids = {token: index for index, token in enumerate(tokens)}
    if not len(ids) == len(tokens) == len(types) or len(tokens) > vocab:
        raise InputError(
            f"{file.path}: the vocabulary is damaged ({len(tokens)} tokens, {len(ids)} of them distinct, "
            f"{len(types)} types, {vocab} embedding rows)"
        )
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", list)]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{file.path}: the tokenizer's merges cannot be used: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            special = token_type == _CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    return tokenizer


def special_ids(file: GgufFile) -> dict[str, int]:
    """Return the ids of the special roles that a GGUF names: `bos`, `eos`, `pad`, `unk`, `mask`.

    Raises:
        InputError: no end-of-sequence id, or an id outside the vocabulary.
    """
    num_tokens = len(file.get("tokenizer.ggml.tokens", list))
    file.get("tokenizer.ggml.eos_token_id", int)
    keys = {role: f"tokenizer.ggml.{name}_token_id" for role, name in _GGUF_ROLES.items()}
    ids = {role: file.get(key, int) for role, key in keys.items() if key in file.metadata}
    for role, token_id in ids.items():
        if not 0 <= token_id < num_tokens:
            raise InputError(f"{file.path}: {keys[role]} is {token_id}, the vocabulary has {num_tokens} tokens")
    return ids


def tokenizer_config(file: GgufFile, ids: dict[str, int]) -> dict[str, Any]:
    """Return tokenizer_config.json: the class that takes tokenizer.json as it is, special tokens, chat template.

    The class is the generic one on purpose: a model's own class may rebuild the pre-tokenizer from its idea of the
    family.
    """
    tokens = file.get("tokenizer.ggml.tokens", list)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.get("llama.context_length", int),
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": tokens[token_id] for role, token_id in ids.items()},
    }
    if "tokenizer.chat_template" in file.metadata:
        config["chat_template"] = file.get("tokenizer.chat_template", str)
    return config
