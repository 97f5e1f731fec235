"""Prompts that a target makes up itself: it goes on with a user's turn that has been begun, sampled, and never ends.

Prompts of one's own are few and alike; those a target thinks of are of what it knows, as many as one asks for.

**Source:** Magpie (arXiv 2406.08464) gets instructions from a model that is given nothing but the beginning of the
user's turn. Here the turn is begun with a question's wording and the first word of its code, so that questions are of
the kind the drafter is for, and what is a question is read off the text.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dflash_jax.text import Prompt, Tokenizer, load_prompts, load_tokenizer
from dflash_jax.text.humaneval import SOLVE_WORDING, humaneval_problems

SET = "self"
CODE = ("def", "from typing import List\n\n\ndef", "def")
"""How the code of a question begins, in turn. A word that ends with a space would cut the next token in two."""
FENCE = "```"
"""What ends a question's code; one token of SmolLM2's."""
FEWEST_CHARACTERS, MOST_TOKENS = 24, 224
"""Of a question's code, and of a prompt with its template: as long as most of HumanEval's."""
HELD_OUT_WORDS = 8
DOCUMENTED_HEAD = re.compile(r"""(?:from typing import List\n+)?def \w+\([^\n]*:\n\s+(\"{3}|'{3}).*?\1""", re.DOTALL)
"""A function as far as its docstring goes: how HumanEval asks."""


def openings(target: Path, *, first: int, count: int) -> list[dict[str, Any]]:
    """Return rows of a prompt file, each a user's turn that has been begun.

    Args:
        target: whose chat template is written.
        first: number of the first row; a row's samples depend on its number alone.
        count: rows.
    """
    tokenizer = load_tokenizer(target)
    texts = [_begun_turn(tokenizer, SOLVE_WORDING.partition("{prompt}")[0] + code) for code in CODE]
    return [
        {"id": f"opening/{number}", "prompt": texts[number % len(CODE)], "set": SET}
        for number in range(first, first + count)
    ]


def _begun_turn(tokenizer: Tokenizer, content: str) -> str:
    """The chat template up to the end of a user's unfinished message."""
    prompt = Prompt(id="opening", messages=({"role": "user", "content": content},), set=SET)
    text = tokenizer.render(prompt)
    return text[: text.rindex(content) + len(content)]


def made_up(sampled: Sequence[dict[str, Any]], target: Path) -> list[Prompt]:
    """Return the questions that sampled texts hold, in their order, no two of the same function and length.

    A question's code defines a function. It is what the text has up to its closing fence, or up to its last whole line
    where sampling ended before that; and, where a docstring is followed by a body, what goes as far as the docstring is
    another. It is none of HumanEval's: neither the function's name nor `HELD_OUT_WORDS` words in a row are there.

    Args:
        sampled: rows of a responses file, made of `openings`.
        target: whose tokens a prompt's length is counted in.
    """
    tokenizer, held_out_names = load_tokenizer(target), {problem["entry_point"] for problem in humaneval_problems()}
    held_out_words = {words for prompt in load_prompts("humaneval") for words in _in_a_row(_content(prompt))}
    found, seen = [], set()
    for row in sampled:
        number = row["id"].rpartition("/")[2]
        for id, code in _codes(f"{SET}/{number}", CODE[int(number) % len(CODE)] + row["text"]):
            names = re.findall(r"def ([A-Za-z_]\w*)\(", code)
            if not names or len(code) < FEWEST_CHARACTERS or (names[0], len(code)) in seen:
                continue
            if not held_out_names.isdisjoint(names) or not held_out_words.isdisjoint(_in_a_row(code)):
                continue
            prompt = Prompt(id=id, messages=({"role": "user", "content": SOLVE_WORDING.format(prompt=code)},), set=SET)
            if len(tokenizer.encode_prompt(prompt)) <= MOST_TOKENS:
                seen.add((names[0], len(code)))
                found.append(prompt)
    return found


def opening_of(prompt: Prompt) -> str:
    """The number of the opening that a made-up prompt is of; two of one opening share their first words."""
    return prompt.id.split("/")[1]


def _codes(id: str, text: str) -> Iterator[tuple[str, str]]:
    """The pieces of code in a text that can be asked about, and their ids."""
    code, fence, _ = text.partition(f"\n{FENCE}")
    if not fence:
        code = code.rpartition("\n")[0]
    yield id, code
    head = DOCUMENTED_HEAD.match(code)
    if head and code[head.end() :].strip():
        yield f"{id}/head", head[0]


def _content(prompt: Prompt) -> str:
    """The code that a HumanEval prompt asks about."""
    assert prompt.messages is not None
    return prompt.messages[0]["content"].partition("```python\n")[2]


def _in_a_row(text: str) -> Iterator[tuple[str, ...]]:
    words = text.split()
    return (tuple(words[start : start + HELD_OUT_WORDS]) for start in range(len(words) - HELD_OUT_WORDS + 1))
