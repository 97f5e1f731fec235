"""Prompts that a target makes up: what is a question among sampled texts, and how many texts are sampled for them."""

from pathlib import Path

import pytest

import made_up
import smollm2
from dflash_jax.core import InputError
from dflash_jax.text import Prompt, load_tokenizer
from dflash_jax.text.humaneval import SOLVE_WORDING, humaneval_problems
from made_up import openings
from smollm2 import Recipe, write_lines
from stages import Stages
from support import tiny

GOOD = ' twice(number: int) -> int:\n    """ Return the double of a number. """\n```\nIt is simple.'


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "target"
    tiny.write_tiny_target(folder, seed=tiny.TARGET_SEED, max_position_embeddings=4096)
    return folder


def rows(*texts, start=0):
    return [{"id": f"opening/{start + number}", "text": text} for number, text in enumerate(texts)]


def questions(prompts):
    return [prompt.messages[0]["content"] for prompt in prompts]


def test_an_opening_is_a_users_turn_that_has_not_ended(target):
    tokenizer, found = load_tokenizer(target), openings(target, first=4, count=4)
    assert [row["id"] for row in found] == ["opening/4", "opening/5", "opening/6", "opening/7"]
    # a row is what its number says, whichever round it is made in
    assert openings(target, first=0, count=8)[4:] == found
    for number, row in enumerate(found, 4):
        code = made_up.CODE[number % 3]
        asked = Prompt(
            id="x", messages=({"role": "user", "content": SOLVE_WORDING.format(prompt=f"{code} f()")},), set="x"
        )
        assert tokenizer.render(asked).startswith(row["prompt"])
        assert row["prompt"].endswith(f"```python\n{code}")


def test_a_question_is_the_code_that_a_sampled_text_goes_on_with(target):
    (first, second, third) = made_up.made_up(rows(*[GOOD.replace("twice", f"f{i}_times") for i in range(3)]), target)
    doc = '(number: int) -> int:\n    """ Return the double of a number. """'
    assert (first.id, first.set) == ("self/0", "self")
    assert questions([first, second, third]) == [
        SOLVE_WORDING.format(prompt=f"def f0_times{doc}"),
        SOLVE_WORDING.format(prompt=f"from typing import List\n\n\ndef f1_times{doc}"),
        SOLVE_WORDING.format(prompt=f"def f2_times{doc}"),
    ]


def test_code_that_does_not_end_is_asked_about_up_to_its_last_whole_line(target):
    (prompt,) = made_up.made_up(rows(" double(number):\n    twice = number + number\n    return twi"), target)
    assert questions([prompt]) == [SOLVE_WORDING.format(prompt="def double(number):\n    twice = number + number")]


@pytest.mark.parametrize("quotes", ['"""', "'''"])
def test_what_goes_as_far_as_a_docstring_is_another_question(target, quotes):
    head = f"(n):\n    {quotes}\n    Twice\n    n.\n    {quotes}"
    body = "\n    return 2 * n\n\ndef g(x):\n    return x"
    # the second has no body, the third a docstring in a later function alone
    later = f" g(x):\n    return x\n\ndef h(x):\n    {quotes} x {quotes}\n    return x\n```"
    found = made_up.made_up(rows(f" twice{head}{body}\n```", f" twice{head}\n```", later), target)
    assert [prompt.id for prompt in found] == ["self/0", "self/0/head", "self/1", "self/2"]
    assert questions(found[:2]) == [
        SOLVE_WORDING.format(prompt=f"def twice{head}{body}"),
        SOLVE_WORDING.format(prompt=f"def twice{head}"),
    ]
    assert {made_up.opening_of(prompt) for prompt in found[:2]} == {"0"}


@pytest.mark.parametrize(
    "text",
    [
        " 3 + 4 is the result of the sum that was asked for\n```",  # no function
        " a_function_whose_first_line_is(cut, off",  # no whole line
        " g(x): 1\n```",  # too short
        f" g(x):\n{'    x += 1' * 400}\n```",  # too long
    ],
)
def test_a_text_that_is_no_question_is_left_out(target, text):
    assert made_up.made_up(rows(text), target) == []


def test_no_question_is_humanevals(target):
    problem = humaneval_problems()[0]
    named = GOOD.replace("twice", problem["entry_point"])
    nested = f" outer(x):\n    def {problem['entry_point']}(y):\n        return x + y\n```"
    words = problem["prompt"].split('"""')[1].split()
    # the quotes before the first word are a word too
    quoted, shorter = (f' g(x):\n    """ {" ".join(words[1 : 1 + count])} """\n```' for count in (8, 7))
    found = made_up.made_up(rows(named, nested, quoted, shorter), target)
    assert [prompt.id for prompt in found] == ["self/3"]


def test_a_question_comes_once(target):
    found = made_up.made_up(rows(GOOD, GOOD.replace("int", "str", 1), f"{GOOD}\nAnother ending", GOOD), target)
    # the second begins with an import, the third and the fourth are the first again
    assert [prompt.id for prompt in found] == ["self/0", "self/1"]


def sampled(recipe: Recipe, number: int, size: int, good: int) -> None:
    """A round that has been sampled: so many rows, of which the first are questions."""
    texts = [GOOD.replace("twice", f"f{number}_{row}") if row < good else " nothing" for row in range(size)]
    write_lines(recipe.out / f"sampled-{number}.jsonl", rows(*texts, start=number * size))


def test_rounds_are_sampled_until_there_are_enough(target, tmp_path):
    recipe = Recipe(out=tmp_path, target=target, mix="problems=5,self=8", choosing="self=2")
    for number in range(4):  # of 4 rows each: 0.35 of the 10 prompts that are needed
        sampled(recipe, number, 4, 3)
    stages = Stages(recipe.out, in_process=True)
    found = smollm2.self_prompts(recipe, stages, target)
    assert [prompt.id for prompt in found] == [f"self/{row}" for row in (0, 1, 2, 4, 5, 6, 8, 9, 10, 12)]
    assert list(stages.commands) == ["sampled-0", "sampled-1", "sampled-2", "sampled-3"]
    command = stages.commands["sampled-1"]
    assert "--temperature 0.9 --top-k 32" in command
    begun = (tmp_path / "openings-1.jsonl").read_text().splitlines()
    assert len(begun) == 4
    assert '"opening/4"' in begun[0]
    # the first are trained on, the last chosen by
    mine = smollm2.prompts_of(recipe.mix, of_self=found[:8])
    assert [prompt.id for prompt in mine][5:] == [prompt.id for prompt in found[:8]]
    last = smollm2.prompts_of(recipe.choosing, of_self=found, from_the_end=True)
    assert [prompt.id for prompt in last] == ["self/10", "self/12"]


def test_an_opening_that_is_trained_on_is_not_chosen_by(target, tmp_path):
    recipe = Recipe(out=tmp_path, target=target, mix="self=3", choosing="self=2")
    for number in range(3):  # of 2 rows each, two questions in each row
        texts = [GOOD.replace("twice", f"f{number}{row}").replace("\n```", "\n    return 1\n```") for row in range(2)]
        write_lines(recipe.out / f"sampled-{number}.jsonl", rows(*texts, start=number * 2))
    found = smollm2.self_prompts(recipe, Stages(recipe.out, in_process=True), target)
    assert [prompt.id for prompt in found] == ["self/0", "self/0/head", "self/1", "self/2", "self/2/head"]


def test_a_target_that_makes_up_nothing_is_told(target, tmp_path):
    recipe = Recipe(out=tmp_path, target=target, mix="self=20", choosing="problems=2")
    for number in range(smollm2.MOST_ROUNDS):
        sampled(recipe, number, 7, 1)
    with pytest.raises(InputError, match="20 prompts of self are asked for: the target made up 10"):
        smollm2.self_prompts(recipe, Stages(recipe.out, in_process=True), target)
    with pytest.raises(InputError, match="4 prompts of self are asked for: it has 3"):
        list(smollm2.prompts_of("self=4", of_self=[Prompt(id=f"self/{i}", prompt="x", set="x") for i in range(3)]))


def test_nothing_is_sampled_for_a_mix_without_such_prompts(tmp_path):
    recipe = Recipe(out=tmp_path, mix="problems=5", choosing="problems=2")
    assert smollm2.self_prompts(recipe, Stages(tmp_path), Path("no target is needed")) == []
    assert list(tmp_path.iterdir()) == []
