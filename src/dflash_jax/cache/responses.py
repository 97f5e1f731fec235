"""Responses read for a build: every row checked before anything is written, its tokens read when they are needed."""

import hashlib
import json
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt16, UInt64

from dflash_jax.core import InputError, read_json, sha256_json

_WHAT = "the responses file"
UNKNOWN_SET = "unknown"
"""Prompt set of a response whose row names none."""
MAX_PROMPT_SETS = 2**16  # their indices are uint16 in a shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Responses:
    """Prompts with their responses, one sequence per row of the file.

    The tokens stay in the file, of which every row was checked: what is kept of a row is 30 bytes, so that a build's
    memory does not grow with the number of sequences.

    Attributes:
        path: the file.
        sha256: of the file's bytes.
        line_starts: first byte of each row's line.
        lengths: tokens per row, prompt and response.
        prompt_len: prompt tokens per row.
        prompt_hash: first 8 bytes, little endian, of SHA-256 over the prompt's ids as little-endian int32.
        prompt_sets: names of the prompt sets, sorted.
        prompt_set: index into `prompt_sets` per row.
        max_new_tokens: the responses' token budget; None where no record tells.
    """

    path: Path
    sha256: str
    line_starts: Int64[np.ndarray, " rows"]
    lengths: Int64[np.ndarray, " rows"]
    prompt_len: Int32[np.ndarray, " rows"]
    prompt_hash: UInt64[np.ndarray, " rows"]
    prompt_sets: tuple[str, ...]
    prompt_set: UInt16[np.ndarray, " rows"]
    max_new_tokens: int | None

    @property
    def num_rows(self) -> int:
        """Rows of the file, blank lines not counted."""
        return len(self.lengths)

    def _row(self, row: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(int(self.line_starts[row]))
            return json.loads(file.readline())

    def name(self, row: int) -> str:
        """Return the `id` of a row."""
        return self._row(row)["id"]

    def tokens(self, row: int) -> Int32[np.ndarray, " seq"]:
        """Return the token ids of a row, read from the file: prompt, then response.

        Raises:
            InputError: the file is not the one that was checked.
        """
        try:
            content = self._row(row)
            ids = np.asarray([*content["prompt_ids"], *content["response_ids"]], np.int32)
            same = len(ids) == self.lengths[row] and hash_prompt(ids[: self.prompt_len[row]]) == self.prompt_hash[row]
        except (OSError, ValueError, KeyError, TypeError):
            same, ids = False, np.zeros(0, np.int32)
        if not same:
            raise InputError(f"{_WHAT} {self.path} was changed while it was in use: run the command again")
        return ids


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


@dataclass(kw_only=True, slots=True)
class _Columns:
    """What is kept of the rows, one after the other, in packed arrays."""

    line_starts: array = field(default_factory=lambda: array("q"))
    lengths: array = field(default_factory=lambda: array("q"))
    prompt_len: array = field(default_factory=lambda: array("i"))
    prompt_hash: array = field(default_factory=lambda: array("Q"))
    prompt_set: array = field(default_factory=lambda: array("i"))
    row_hash: array = field(default_factory=lambda: array("Q"))
    line_number: array = field(default_factory=lambda: array("q"))
    set_index: dict[str, int] = field(default_factory=dict)

    def add(
        self, start: int, number: int, row: dict[str, Any], prompt: Int32[np.ndarray, " prompt"], length: int
    ) -> None:
        name = row.get("set", UNKNOWN_SET)
        content = [row["id"], row["prompt_ids"], row["response_ids"]]
        self.row_hash.append(int(sha256_json(content)[:16], 16))
        self.line_number.append(number)
        self.line_starts.append(start)
        self.lengths.append(length)
        self.prompt_len.append(len(prompt))
        self.prompt_hash.append(hash_prompt(prompt))
        self.prompt_set.append(self.set_index.setdefault(name, len(self.set_index)))


def _refuse_repeated(path: Path, columns: _Columns) -> None:
    """Refuse a row that is there twice, as after `cat a b b`. Other responses of one id are no mistake."""
    hashes = np.frombuffer(columns.row_hash, np.uint64)
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if again.size:
        second = int(order[again + 1].min())
        first = int(np.flatnonzero(hashes == hashes[second])[0])
        lines = columns.line_number
        raise InputError(
            f"{_WHAT}: {path} line {lines[second]}: the id and the tokens are those of line {lines[first]} already "
            f"({again.size} rows are there twice): drop one of them"
        )


def _checked_row(line: bytes, *, vocab_size: int, max_length: int) -> tuple[dict[str, Any], np.ndarray, int]:
    """A row, its prompt and its length, or a ValueError that says what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, an object is needed")
    if not isinstance(row.get("id"), str):
        raise ValueError("id is missing or not a string")
    if not isinstance(row.get("set", UNKNOWN_SET), str):
        raise ValueError("set is not a string")
    prompt, response = (_ids(row, key, vocab_size) for key in ("prompt_ids", "response_ids"))
    if len(prompt) + len(response) > max_length:
        raise ValueError(f"{len(prompt)} + {len(response)} tokens are more than the target's context of {max_length}")
    return row, prompt, len(prompt) + len(response)


def read_responses(path: Path, *, vocab_size: int, max_length: int) -> Responses:
    """Check every row of a responses file and return where the rows are.

    Args:
        path: JSONL with `id`, `prompt_ids`, `response_ids`, and mostly `set`.
        vocab_size: of the target.
        max_length: longest sequence the target was made for, tokens.

    Raises:
        InputError: the file is missing or empty; a line is not JSON, lacks a key, has no prompt or no response tokens,
            a token outside the vocabulary, is longer than the context, or is there twice; more than 65536 sets. The
            message gives the line's number.
    """
    if not path.is_file():
        raise InputError(f"{_WHAT} is missing: {path}")
    digest, columns, start = hashlib.sha256(), _Columns(), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            try:
                if line.strip():
                    columns.add(start, number, *_checked_row(line, vocab_size=vocab_size, max_length=max_length))
            except ValueError as error:  # a UnicodeDecodeError too
                raise InputError(f"{_WHAT}: {path} line {number}: {error}: fix or drop that row") from error
            start += len(line)
    if not columns.lengths:
        raise InputError(f"{_WHAT} holds no rows: {path}")
    _refuse_repeated(path, columns)
    prompt_sets = tuple(sorted(columns.set_index))
    if len(prompt_sets) > MAX_PROMPT_SETS:
        raise InputError(f"{_WHAT}: {path} names {len(prompt_sets)} sets, {MAX_PROMPT_SETS} are the most: join some")
    order = {name: index for index, name in enumerate(prompt_sets)}
    place = np.asarray([order[name] for name in columns.set_index], np.uint16)
    return Responses(
        path=path,
        sha256=digest.hexdigest(),
        line_starts=np.frombuffer(columns.line_starts, np.int64),
        lengths=np.frombuffer(columns.lengths, np.int64),
        prompt_len=np.frombuffer(columns.prompt_len, np.int32),
        prompt_hash=np.frombuffer(columns.prompt_hash, np.uint64),
        prompt_sets=prompt_sets,
        prompt_set=place[np.asarray(columns.prompt_set)],
        max_new_tokens=_budget(path),
    )
