from pathlib import Path

import pytest

from dflash_jax.drafter import save_drafter
from support import tiny


@pytest.fixture(scope="session")
def target() -> Path:
    return tiny.tiny_target()


@pytest.fixture(scope="session")
def drafter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drafter")
    save_drafter(tiny.half_memorised(), folder)
    return folder


@pytest.fixture
def prompts(tmp_path) -> str:
    return str(tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS))
