"""Responses read for a build: flat arrays of tokens, every row checked before anything is written."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt16, UInt64

from dflash_jax.core import InputError, read_json, read_jsonl, sha256_file

_WHAT = "the responses file"
UNKNOWN_SET = "unknown"
"""Prompt set of a response whose row names none."""
MAX_PROMPT_SETS = 2**16  # their indices are uint16 in a shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Responses:
    """Prompts with their responses, one sequence per row of the file.

    Attributes:
        path: the file.
        sha256: of the file's bytes.
        ids: name of each row.
        token_ids: prompt and response of row i at `starts[i]` to `starts[i + 1]`.
        starts: first token of each row, and the end.
        prompt_len: prompt tokens per row.
        prompt_hash: first 8 bytes, little endian, of SHA-256 over the prompt's ids as little-endian int32.
        prompt_sets: names of the prompt sets, sorted.
        prompt_set: index into `prompt_sets` per row.
        max_new_tokens: the responses' token budget; None where no record tells.
    """

    path: Path
    sha256: str
    ids: tuple[str, ...]
    token_ids: Int32[np.ndarray, " tokens"]
    starts: Int64[np.ndarray, " rows_and_end"]
    prompt_len: Int32[np.ndarray, " rows"]
    prompt_hash: UInt64[np.ndarray, " rows"]
    prompt_sets: tuple[str, ...]
    prompt_set: UInt16[np.ndarray, " rows"]
    max_new_tokens: int | None

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Tokens per row, prompt and response."""
        return np.diff(self.starts)

    def tokens(self, row: int) -> Int32[np.ndarray, " seq"]:
        """Token ids of a row, a view."""
        return self.token_ids[self.starts[row] : self.starts[row + 1]]


def hash_prompt(prompt_ids: Int32[np.ndarray, " prompt"]) -> int:
    """Return a prompt's 64-bit hash, see `Responses.prompt_hash`. Worked: ids [1, 2] hash `01000000 02000000`."""
    return int.from_bytes(hashlib.sha256(prompt_ids.astype("<i4").tobytes()).digest()[:8], "little")


def _ids(row: dict[str, Any], key: str, vocab_size: int) -> Int32[np.ndarray, " ids"]:
    """Token ids of a row, or a ValueError that says what is wrong with them."""
    value = row.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} is {'missing' if key not in row else 'not a list of token ids, or empty'}")
    if any(type(token) is not int for token in value):
        raise ValueError(f"{key} holds something that is not a whole number")
    wrong = next((token for token in value if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"{key} holds token {wrong}, the target's vocabulary is 0 to {vocab_size - 1}")
    return np.asarray(value, np.int32)


def _budget(path: Path) -> int | None:
    """max_new_tokens of the responses' record beside them."""
    record = path.with_name(path.name + ".record.json")
    if not record.exists():
        return None
    content = read_json(record, what="the responses' record")
    config = content.get("config") if isinstance(content, dict) else None
    budget = config.get("max_new_tokens") if isinstance(config, dict) else None
    return budget if isinstance(budget, int) else None


def read_responses(path: Path, *, vocab_size: int, max_length: int) -> Responses:
    """Return the rows of a responses file.

    Args:
        path: JSONL with `id`, `prompt_ids`, `response_ids`, and mostly `set`.
        vocab_size: of the target.
        max_length: longest sequence the target was made for, tokens.

    Raises:
        InputError: the file is missing or empty; a line is not JSON, lacks a key, has no prompt or no response tokens,
            a token outside the vocabulary, or is longer than the context. The message gives the line's number.
    """
    rows = read_jsonl(path, what=_WHAT)
    with path.open(encoding="utf-8") as file:
        numbers = [number for number, line in enumerate(file, start=1) if line.strip()]
    tokens, prompt_len = [], []
    for number, row in zip(numbers, rows, strict=True):
        try:
            if not isinstance(row.get("id"), str):
                raise ValueError("id is missing or not a string")
            if not isinstance(row.get("set", UNKNOWN_SET), str):
                raise ValueError("set is not a string")
            prompt, response = (_ids(row, key, vocab_size) for key in ("prompt_ids", "response_ids"))
            if len(prompt) + len(response) > max_length:
                raise ValueError(
                    f"{len(prompt)} + {len(response)} tokens are more than the target's context of {max_length}"
                )
        except ValueError as error:
            raise InputError(f"{_WHAT}: {path} line {number}: {error}: fix or drop that row") from error
        tokens.append(np.concatenate([prompt, response]))
        prompt_len.append(len(prompt))
    sets = [row.get("set", UNKNOWN_SET) for row in rows]
    prompt_sets = tuple(sorted(set(sets)))
    if len(prompt_sets) > MAX_PROMPT_SETS:
        raise InputError(f"{_WHAT}: {path} names {len(prompt_sets)} sets, {MAX_PROMPT_SETS} are the most: join some")
    set_index = {name: index for index, name in enumerate(prompt_sets)}
    hashes = [hash_prompt(ids[:length]) for ids, length in zip(tokens, prompt_len, strict=True)]
    return Responses(
        path=path,
        sha256=sha256_file(path),
        ids=tuple(row["id"] for row in rows),
        token_ids=np.concatenate(tokens),
        starts=np.cumsum([0] + [len(ids) for ids in tokens], dtype=np.int64),
        prompt_len=np.asarray(prompt_len, np.int32),
        prompt_hash=np.asarray(hashes, np.uint64),
        prompt_sets=prompt_sets,
        prompt_set=np.asarray([set_index[name] for name in sets], np.uint16),
        max_new_tokens=_budget(path),
    )
