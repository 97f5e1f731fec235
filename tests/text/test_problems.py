import ast
import doctest
import re
from collections import Counter

import pytest

from dflash_jax.text import load_prompts
from dflash_jax.text.humaneval import humaneval_problems


@pytest.fixture(scope="module")
def questions() -> dict[str, str]:
    return {prompt.id: message["content"] for prompt in load_prompts("problems") for message in prompt.messages or ()}


def code(question: str) -> str:
    found = re.fullmatch(r"Write a solution .* passes the tests:\n```python\n(.*)\n```", question, re.DOTALL)
    assert found is not None
    return found[1]


def test_a_known_problem_in_every_form(questions):
    task = "Return the sum of all odd numbers in the list."
    typed = "from typing import List\n\n\ndef sum_of_odd_numbers(numbers: List[int]) -> int:\n"
    begin = code(questions["problems/sum_of_odd_numbers/doctest"])
    assert begin.startswith(f'{typed}    """ {task}\n    >>> sum_of_odd_numbers([')
    arrow = code(questions["problems/sum_of_odd_numbers/arrow"])
    assert arrow.startswith(
        f'def sum_of_odd_numbers(numbers):\n    """\n    {task}\n\n    For example:\n    sum_of_odd_'
    )
    assert code(questions["problems/sum_of_odd_numbers/plain"]) == f'{typed}    """\n    {task}\n    """\n'


SOLUTIONS = {
    "sum_of_odd_numbers": lambda numbers: sum(x for x in numbers if x % 2),
    "running_sum_of_positive_numbers": lambda numbers: [
        sum(max(x, 0) for x in numbers[: end + 1]) for end in range(len(numbers))
    ],
    "list_of_prime_up_to": lambda n: [x for x in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31) if x <= n],
    "largest_of_even_digits": lambda number: max((int(d) for d in str(number) if d in "02468"), default=-1),
    "strip_vowels_text": lambda text: re.sub("[aeiouAEIOU]", "", text),
    "first_of_digits_text": lambda text: found.start() if (found := re.search(r"\d", text)) else -1,
    "reverse_short_words": lambda sentence: " ".join(w if len(w) > 3 else w[::-1] for w in sentence.split()),
    "keys_of_high_scores": lambda scores: sorted(key for key in scores if scores[key] >= 10),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_examples_are_right(questions, name):
    function = ast.parse(code(questions[f"problems/{name}/doctest"])).body[-1]
    assert isinstance(function, ast.FunctionDef)
    examples = doctest.DocTestParser().get_examples(ast.get_docstring(function) or "")
    assert len(examples) in (2, 3)
    for example in examples:
        assert repr(eval(example.source, {name: SOLUTIONS[name]})) == example.want.strip()


def test_there_are_hundreds_that_compile_and_come_in_a_mixed_order(questions):
    assert Counter(key.rsplit("/")[-1] for key in questions) == dict.fromkeys(("doctest", "arrow", "plain"), 284)
    assert len(set(questions.values())) == len(questions)
    for question in questions.values():
        compile(code(question), "problem", "exec")
    first = "\n".join(list(questions.values())[:100])
    assert len(set(re.findall(r"def \w+\((\w+)", first))) == 6, "every family is among them"


def word_runs(text: str) -> set[tuple[str, ...]]:
    """Every eight words in a row."""
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def test_none_is_humanevals(questions):
    held_out = [problem["prompt"] for problem in humaneval_problems()]
    assert word_runs("a b c d e f g h i") == {tuple("abcdefgh"), tuple("bcdefghi")}
    theirs = set().union(*map(word_runs, held_out))
    ours = {key: word_runs(code(question)) & theirs for key, question in questions.items()}
    assert {key: runs for key, runs in ours.items() if runs} == {}
    names = {problem["entry_point"] for problem in humaneval_problems()}
    assert not {key.split("/")[1] for key in questions} & names
