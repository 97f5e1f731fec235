import json
from pathlib import Path

import pytest

from dflash_jax.core import InputError
from dflash_jax.text import BUILT_IN_SETS, Prompt, load_prompts


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_rows_of_both_kinds(tmp_path: Path):
    source = write(
        tmp_path / "mine.jsonl",
        '{"id": "a", "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]}',
        "",
        '{"id": "b", "prompt": "Once upon", "set": "tales"}',
    )
    assert load_prompts(source) == [
        Prompt(id="a", messages=({"role": "system", "content": ""}, {"role": "user", "content": "Hi"}), set="mine"),
        Prompt(id="b", prompt="Once upon", set="tales"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "a", "prompt": "x"', "line 3 is not JSON"),
        ('["a"]', "line 3 is a JSON list, an object is needed"),
        ('{"id": "first", "prompt": "x"}', "line 3: id 'first' is that of line 1 already"),
        ('{"prompt": "x"}', "line 3: 'id' is missing"),
        ('{"id": 7, "prompt": "x"}', "line 3: 'id' must be a non-empty string, found 7"),
        ('{"id": "", "prompt": "x"}', "line 3: 'id' must be a non-empty string, found ''"),
        ('{"id": "a", "prompt": ""}', "line 3: 'prompt' must be a non-empty string"),
        ('{"id": "a", "prompt": null}', "line 3: 'prompt' must be a non-empty string, found None"),
        ('{"id": "a", "prompt": "x", "set": 1}', "line 3: 'set' must be a non-empty string, found 1"),
        ('{"id": "a"}', "line 3: .*this row has neither 'messages' nor 'prompt'"),
        ('{"id": "a", "prompt": "x", "messages": []}', "line 3: .*this row has both 'messages' and 'prompt'"),
        ('{"id": "a", "messages": []}', "line 3: 'messages' must be a list of at least one"),
        ('{"id": "a", "messages": {"role": "user"}}', "line 3: 'messages' must be a list"),
        ('{"id": "a", "messages": ["Hi"]}', r"line 3: messages\[0\] must be an object"),
        ('{"id": "a", "messages": [{"role": "user"}]}', "line 3: 'content' is missing"),
        ('{"id": "a", "messages": [{"role": "user", "content": ["Hi"]}]}', "line 3: 'content' must be a string"),
        (
            '{"id": "a", "messages": [{"rôle": "user", "content": "Hi"}]}',
            r"'rôle' in messages\[0\]: did you mean 'role'",
        ),
        ('{"id": "a", "message": []}', "line 3: unknown key 'message' in a prompt: did you mean 'messages'"),
        (
            '{"id": "a", "temperature": 1}',
            "unknown key 'temperature' in a prompt: known keys are id, messages, prompt, set",
        ),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: str, message: str):
    source = write(tmp_path / "p.jsonl", '{"id": "first", "prompt": "x"}', "", row)
    with pytest.raises(InputError, match=message) as caught:
        load_prompts(source)
    assert "p.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neither_a_file_nor_a_set(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"human-eval is neither a file nor a built-in prompt set \(humaneval, problems, stdlib\)"
    ):
        load_prompts("human-eval")
    with pytest.raises(InputError, match="the prompt file holds no rows"):
        load_prompts(write(tmp_path / "empty.jsonl", ""))
    assert BUILT_IN_SETS == ("humaneval", "problems", "stdlib")


def test_humaneval_has_164_problems_in_z_labs_words():
    prompts = load_prompts("humaneval")
    assert len(prompts) == len({prompt.id for prompt in prompts}) == 164
    assert {prompt.set for prompt in prompts} == {"humaneval"}
    assert prompts[53].id == "HumanEval/53"
    # As z-lab/dflash's benchmark.py formats the dataset's row.
    question = (
        "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
        '\n\ndef add(x: int, y: int):\n    """Add two numbers x and y\n    >>> add(2, 3)\n    5\n'
        '    >>> add(5, 7)\n    12\n    """\n\n```'
    )
    assert prompts[53].messages == ({"role": "user", "content": question},)
    # Messages are plain JSON, as the responses file needs them.
    assert json.loads(json.dumps(prompts[53].messages)) == [{"role": "user", "content": question}]
