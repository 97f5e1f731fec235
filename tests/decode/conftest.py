import pytest

from dflash_jax.drafter import Drafter
from dflash_jax.targets import Target, load_target
from dflash_jax.text import load_tokenizer
from support import tiny


@pytest.fixture(scope="session")
def target() -> Target:
    return load_target(tiny.tiny_target())


@pytest.fixture(scope="session")
def drafter() -> Drafter:
    """Often right and often wrong: accepted lengths of every size."""
    return tiny.half_memorised()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Eight of them, of 1 to 39 tokens."""
    tokenizer = load_tokenizer(tiny.tiny_target())
    return [tokenizer.encode(text) for text in tiny.TEXTS]
