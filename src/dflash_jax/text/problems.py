"""Training prompts of HumanEval's kind: small problems put together from parts, their examples computed.

The standard library's docstrings speak of files and protocols; HumanEval asks for little functions of numbers, strings
and lists, with examples. The problems are ours: none is HumanEval's, and its functions' names are left out.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dflash_jax.text.humaneval import SOLVE_WORDING, humaneval_problems

_Keep = Callable[[Any], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """Problems over one type of argument: every act on every kind of its parts.

    Attributes:
        name: of the family, which ends a function's name.
        parameter: name and type of the one argument.
        parts: an argument's parts, as a list.
        kinds: `key: (the parts of the kind in words, which those are)`.
        acts: `key: (a sentence with a place for the words, type of the result, the result of all parts and of what
            says whether a part is of the kind)`.
        arguments: of the examples.
    """

    name: str
    parameter: tuple[str, str]
    parts: Callable[[Any], Sequence[Any]]
    kinds: dict[str, tuple[str, _Keep]]
    acts: dict[str, tuple[str, str, Callable[[Sequence[Any], _Keep], Any]]]
    arguments: tuple[Any, ...]


def _kept(parts: Sequence[Any], keep: _Keep) -> list[Any]:
    return [part for part in parts if keep(part)]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, number))


_NUMBER_KINDS: dict[str, tuple[str, _Keep]] = {
    "even": ("even numbers", lambda x: x % 2 == 0),
    "odd": ("odd numbers", lambda x: x % 2 == 1),
    "multiples_of_three": ("multiples of 3", lambda x: x % 3 == 0),
    "multiples_of_seven": ("multiples of 7", lambda x: x % 7 == 0),
    "two_digit": ("numbers with exactly two digits", lambda x: 10 <= abs(x) <= 99),
    "above_ten": ("numbers greater than 10", lambda x: x > 10),
    "below_five": ("numbers less than 5", lambda x: x < 5),
    "ending_in_one": ("numbers whose last digit is 1", lambda x: abs(x) % 10 == 1),
    "prime": ("prime numbers", _is_prime),
}
_SIGNED_KINDS: dict[str, tuple[str, _Keep]] = {
    "positive": ("positive numbers", lambda x: x > 0),
    "negative": ("negative numbers", lambda x: x < 0),
    "nonzero": ("numbers that are not zero", lambda x: x != 0),
}
_FAMILIES = (
    _Family(
        name="numbers",
        parameter=("numbers", "List[int]"),
        parts=list,
        kinds=_NUMBER_KINDS | _SIGNED_KINDS,
        acts={
            "sum_of": ("Return the sum of all {} in the list.", "int", lambda p, k: sum(_kept(p, k))),
            "count": ("Count how many {} there are in the given list.", "int", lambda p, k: len(_kept(p, k))),
            "largest_of": (
                "Find the largest of the {} in the list. If there are none, return None.",
                "Optional[int]",
                lambda p, k: max(_kept(p, k), default=None),
            ),
            "smallest_of": (
                "Look through a list of integers and return the smallest of its {}, or None if it has none.",
                "Optional[int]",
                lambda p, k: min(_kept(p, k), default=None),
            ),
            "squares_of": (
                "Return a list with the squares of the {}, in the order in which they appear.",
                "List[int]",
                lambda p, k: [x * x for x in _kept(p, k)],
            ),
            "sorted": (
                "Given a list of integers, return the {} sorted in descending order.",
                "List[int]",
                lambda p, k: sorted(_kept(p, k), reverse=True),
            ),
            "drop": ("Return the list without its {}.", "List[int]", lambda p, k: [x for x in p if not k(x)]),
            "double": (
                "Return a new list in which the {} are doubled and everything else stays the same.",
                "List[int]",
                lambda p, k: [2 * x if k(x) else x for x in p],
            ),
            "positions_of": (
                "Return the indices at which the list has {}.",
                "List[int]",
                lambda p, k: [i for i, x in enumerate(p) if k(x)],
            ),
            "are_all": ("Check whether all elements of the list are {}.", "bool", lambda p, k: all(map(k, p))),
            "running_sum_of": (
                "For each element, give the sum of the {} seen so far, that element included.",
                "List[int]",
                lambda p, k: [sum(_kept(p[: i + 1], k)) for i in range(len(p))],
            ),
        },
        arguments=(
            [3, -2, 8, 5, 0], [1, 2, 3, 4, 5, 6], [-7, 12, 9, -4], [10, 15, 21, 25], [], [6, 6, 1, -1, 14], [2],
            [31, 7, -12, 11, 4, 9], [-5, -3], [100, 50, 21],
        ),
    ),
    _Family(
        name="up_to",
        parameter=("n", "int"),
        parts=lambda n: range(1, n + 1),
        kinds=_NUMBER_KINDS,
        acts={
            "sum_of": ("Calculate the sum of all {} from 1 to n.", "int", lambda p, k: sum(_kept(p, k))),
            "count": ("How many {} are there between 1 and n, n included?", "int", lambda p, k: len(_kept(p, k))),
            "list_of": ("Return a list of all {} from 1 up to and including n.", "List[int]", _kept),
            "reversed": (
                "Return the {} that are not greater than the positive integer n, the largest first.",
                "List[int]",
                lambda p, k: _kept(p, k)[::-1],
            ),
        },
        arguments=(12, 5, 1, 22, 31, 9),
    ),
    _Family(
        name="digits",
        parameter=("number", "int"),
        parts=lambda number: [int(digit) for digit in str(number)],
        kinds={
            "even": ("even digits", lambda x: x % 2 == 0),
            "odd": ("odd digits", lambda x: x % 2 == 1),
            "above_four": ("digits greater than 4", lambda x: x > 4),
            "nonzero": ("digits other than zero", lambda x: x != 0),
        },
        acts={
            "sum_of": ("Return the sum of the {} of a non-negative integer.", "int", lambda p, k: sum(_kept(p, k))),
            "count": ("Count the {} of the given non-negative integer.", "int", lambda p, k: len(_kept(p, k))),
            "list_of": ("Return the {} of a non-negative integer as a list, from left to right.", "List[int]", _kept),
            "largest_of": (
                "Return the largest of the {} of a non-negative integer. If it has none, return -1.",
                "int",
                lambda p, k: max(_kept(p, k), default=-1),
            ),
        },
        arguments=(1234, 7, 90210, 48, 5550, 316),
    ),
    _Family(
        name="text",
        parameter=("text", "str"),
        parts=list,
        kinds={
            "vowels": ("vowels", lambda c: c.lower() in "aeiou"),
            "digits": ("digits", str.isdigit),
            "capitals": ("uppercase letters", str.isupper),
            "small_letters": ("lowercase letters", str.islower),
            "spaces": ("spaces", str.isspace),
            "letters": ("letters", str.isalpha),
        },
        acts={
            "number_of": ("Count the {} that occur in the string.", "int", lambda p, k: len(_kept(p, k))),
            "strip": ("Return the string with all {} removed.", "str", lambda p, k: "".join(c for c in p if not k(c))),
            "only": ("Return a string of the {} of the text only.", "str", lambda p, k: "".join(_kept(p, k))),
            "mask": (
                "Replace each of the {} in the given string with an asterisk and return the result.",
                "str",
                lambda p, k: "".join("*" if k(c) else c for c in p),
            ),
            "repeat": (
                "Given a string, return it with its {} written twice.",
                "str",
                lambda p, k: "".join(c + c if k(c) else c for c in p),
            ),
            "first_of": (
                "Find the position of the first of the {} in the string. Return -1 if it has none.",
                "int",
                lambda p, k: next((i for i, c in enumerate(p) if k(c)), -1),
            ),
            "has_more": (
                "Check whether more than half of the characters of the string are {}.",
                "bool",
                lambda p, k: 2 * len(_kept(p, k)) > len(p),
            ),
        },
        arguments=(
            "hello world", "Python is fun", "", "a1b2c3", "Banana Bread", "OpenSky 42", "the quick brown fox",
            "AbCdE", "2024",
        ),
    ),
    _Family(
        name="words",
        parameter=("sentence", "str"),
        parts=str.split,
        kinds={
            "long": ("words with more than three letters", lambda w: len(w) > 3),
            "short": ("words with fewer than four letters", lambda w: len(w) < 4),
            "even": ("words of even length", lambda w: len(w) % 2 == 0),
            "with_e": ("words that contain the letter 'e'", lambda w: "e" in w.lower()),
            "vowel": ("words that start with a vowel", lambda w: w[0].lower() in "aeiou"),
            "capitalized": ("words that start with a capital letter", lambda w: w[0].isupper()),
        },
        acts={
            "count": ("Count the {} in a sentence.", "int", lambda p, k: len(_kept(p, k))),
            "list_of": (
                "Given a sentence whose words are separated by spaces, return a list of the {}.",
                "List[str]",
                _kept,
            ),
            "join": ("Return the {} of the sentence, joined by hyphens.", "str", lambda p, k: "-".join(_kept(p, k))),
            "reverse": (
                "Reverse the {} of the sentence and leave the other words as they are.",
                "str",
                lambda p, k: " ".join(w[::-1] if k(w) else w for w in p),
            ),
            "drop": ("Return the sentence without its {}.", "str", lambda p, k: " ".join(w for w in p if not k(w))),
            "lengths_of": (
                "Return a dictionary from the {} of the sentence to their lengths.",
                "Dict[str, int]",
                lambda p, k: {w: len(w) for w in _kept(p, k)},
            ),
            "last_of": (
                "Return the last of the {} in the sentence, or an empty string if there are none.",
                "str",
                lambda p, k: [*[""], *_kept(p, k)][-1],
            ),
        },
        arguments=(
            "the cat sat on the mat", "Bright stars shine at night", "", "go", "red Green blue", "apples and oranges",
            "Winter is coming soon", "every Apple has a core",
        ),
    ),
    _Family(
        name="scores",
        parameter=("scores", "Dict[str, int]"),
        parts=lambda scores: list(scores.items()),
        kinds={
            "even": ("entries with an even value", lambda e: e[1] % 2 == 0),
            "high": ("entries whose value is at least 10", lambda e: e[1] >= 10),
            "negative": ("entries with a negative value", lambda e: e[1] < 0),
            "short": ("entries whose key has at most three letters", lambda e: len(e[0]) <= 3),
        },
        acts={
            "only": ("Return a dictionary with only those {}.", "Dict[str, int]", lambda p, k: dict(_kept(p, k))),
            "keys_of": (
                "Return the sorted list of the keys of the {} in the dictionary.",
                "List[str]",
                lambda p, k: sorted(key for key, _ in _kept(p, k)),
            ),
            "total_of": (
                "Add up the values of the {} in a dictionary.",
                "int",
                lambda p, k: sum(value for _, value in _kept(p, k)),
            ),
            "drop": (
                "Remove the {} from the dictionary and return it.",
                "Dict[str, int]",
                lambda p, k: dict(e for e in p if not k(e)),
            ),
        },
        arguments=({"a": 1, "b": 12, "cd": 3}, {"pear": 14, "fig": -9}, {}, {"x": -1, "y": 0, "zebra": 25}),
    ),
)  # fmt: skip


def problem_questions() -> dict[str, str]:
    """Return `{"problems/sum_of_even_numbers/doctest": question}`, hundreds, in a fixed shuffled order.

    Forms: `doctest` (types and `>>>` examples), `arrow` (neither types nor `>>>`: `f(2) => 4`) and `plain` (types and
    no examples), all in HumanEval's wording.

    Raises:
        InputError: HumanEval's wheel is not installed, so that its names cannot be left out.
    """
    held_out = {problem["entry_point"] for problem in humaneval_problems()}
    questions = {
        f"problems/{name}/{form}": SOLVE_WORDING.format(prompt=prompt)
        for family in _FAMILIES
        for name, form, prompt in _prompts(family)
        if name not in held_out
    }
    return {key: questions[key] for key in sorted(questions, key=lambda key: hashlib.sha256(key.encode()).digest())}


def _prompts(family: _Family) -> Iterator[tuple[str, str, str]]:
    """Name, form and prompt of every problem of a family."""
    argument, of_type = family.parameter
    for act, (sentence, returns, solve) in family.acts.items():
        for kind, (words, keep) in family.kinds.items():
            name, task = f"{act}_{kind}_{family.name}", sentence.format(words)
            chosen = _choose(name, family.arguments)
            examples = [(repr(value), repr(solve(family.parts(value), keep))) for value in chosen]
            typed = f"{_imports(of_type, returns)}def {name}({argument}: {of_type}) -> {returns}:"
            doctest = "\n".join(f"    >>> {name}({value})\n    {result}" for value, result in examples)
            arrows = "\n".join(f"    {name}({value}) => {result}" for value, result in examples)
            yield name, "doctest", f'{typed}\n    """ {task}\n{doctest}\n    """\n'
            yield (
                name,
                "arrow",
                f'def {name}({argument}):\n    """\n    {task}\n\n    For example:\n{arrows}\n    """\n',
            )
            yield name, "plain", f'{typed}\n    """\n    {task}\n    """\n'


def _choose(name: str, arguments: tuple[Any, ...]) -> list[Any]:
    """Two or three arguments, others for every problem."""
    digest = hashlib.sha256(name.encode()).digest()
    ranked = sorted(range(len(arguments)), key=lambda i: digest[i])
    return [arguments[i] for i in ranked[: 2 + digest[-1] % 2]]


def _imports(*types: str) -> str:
    """The import line of the types that need one, and two empty lines."""
    names = [name for name in ("Dict", "List", "Optional") if any(name in kind for kind in types)]
    return f"from typing import {', '.join(names)}\n\n\n" if names else ""
