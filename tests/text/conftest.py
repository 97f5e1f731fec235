import pytest

from dflash_jax.text import Prompt, load_prompts


@pytest.fixture(scope="session")
def stdlib_prompts() -> list[Prompt]:
    """The built-in training prompts; making them takes 3 s."""
    return load_prompts("stdlib")
