"""Prompts: one row each, from a JSON-lines file or a built-in set."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax.core import InputError, read_jsonl
from dflash_jax.text.humaneval import humaneval_questions
from dflash_jax.text.problems import problem_questions
from dflash_jax.text.stdlib import stdlib_questions

_ROW_KEYS = ("id", "messages", "prompt", "set")
_MESSAGE_KEYS = ("role", "content")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt: either a conversation for the chat template, or text that is given to the target as it is."""

    id: str
    """Unique within its file or set."""
    messages: tuple[dict[str, str], ...] | None = None
    """The conversation, each message `{"role", "content"}`; None where `prompt` is given."""
    prompt: str | None = None
    """The text; None where `messages` is given."""
    set: str
    """Name of the set it belongs to, by which results are grouped."""

    def __post_init__(self) -> None:
        assert (self.messages is None) != (self.prompt is None), "a prompt has messages or text, and not both"


def _question_set(name: str, questions: Callable[[], Mapping[str, str]]) -> Callable[[], list[Prompt]]:
    """A built-in set in which every prompt is one user message."""
    return lambda: [
        Prompt(id=key, messages=({"role": "user", "content": question},), set=name)
        for key, question in questions().items()
    ]


_BUILT_IN: dict[str, Callable[[], list[Prompt]]] = {
    "humaneval": _question_set("humaneval", humaneval_questions),
    "problems": _question_set("problems", problem_questions),
    "stdlib": _question_set("stdlib", stdlib_questions),
}
BUILT_IN_SETS = tuple(_BUILT_IN)
"""Names that `load_prompts` takes in place of a path."""


def load_prompts(source: str) -> list[Prompt]:
    """Return the prompts of a built-in set or of a JSON-lines file, in their order.

    Args:
        source: `humaneval` (164 held-out problems), `stdlib` (thousands of training prompts) and `problems` (hundreds),
            both shuffled, so that any prefix is a fair sample, or the path of a file with rows
            `{"id", "messages": [{"role", "content"}]}` or `{"id", "prompt"}`, each with an optional `"set"` (default:
            the file's name without its ending).

    Raises:
        InputError: no such set or file, or a bad row (the message gives its line number).
    """
    if source in _BUILT_IN:
        return _BUILT_IN[source]()
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{source} is neither a file nor a built-in prompt set ({', '.join(BUILT_IN_SETS)})")
    rows = read_jsonl(path, what="the prompt file")
    with path.open(encoding="utf-8") as file:
        numbers = [number for number, line in enumerate(file, start=1) if line.strip()]
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    for number, row in zip(numbers, rows, strict=True):
        try:
            prompt = _parse_row(row, default_set=path.stem)
        except InputError as error:
            raise InputError(f"{path} line {number}: {error}") from None
        if prompt.id in line_of:
            raise InputError(f"{path} line {number}: id {prompt.id!r} is that of line {line_of[prompt.id]} already")
        line_of[prompt.id] = number
        prompts.append(prompt)
    return prompts


def _parse_row(row: dict[str, Any], *, default_set: str) -> Prompt:
    """One row as a `Prompt`; errors leave out where, which the caller adds."""
    _check_keys(row, _ROW_KEYS, what="a prompt")
    has_messages, has_prompt = "messages" in row, "prompt" in row
    if has_messages == has_prompt:
        both = "both 'messages' and 'prompt'" if has_messages else "neither 'messages' nor 'prompt'"
        raise InputError(f"a prompt needs one of 'messages' and 'prompt', this row has {both}")
    return Prompt(
        id=_text(row, "id"),
        messages=_parse_messages(row["messages"]) if has_messages else None,
        prompt=_text(row, "prompt") if has_prompt else None,
        set=_text(row, "set") if "set" in row else default_set,
    )


def _parse_messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise InputError("'messages' must be a list of at least one {'role', 'content'} object")
    parsed = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InputError(f"{where} must be an object with 'role' and 'content'")
        _check_keys(message, _MESSAGE_KEYS, what=where)
        # An empty content is fine for a template (an empty system message switches a default one off).
        parsed.append({"role": _text(message, "role"), "content": _text(message, "content", may_be_empty=True)})
    return tuple(parsed)


def _text(row: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    """A required string of a row."""
    if key not in row:
        raise InputError(f"{key!r} is missing")
    value = row[key]
    if not isinstance(value, str) or not (value or may_be_empty):
        raise InputError(f"{key!r} must be {'a' if may_be_empty else 'a non-empty'} string, found {value!r}")
    return value


def _check_keys(row: dict[str, Any], known: tuple[str, ...], *, what: str) -> None:
    """Raise for a key that nothing reads, with the known key nearest to it."""
    for key in row:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
            raise InputError(f"unknown key {key!r} in {what}: {hint}")
