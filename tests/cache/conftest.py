"""A toy cache that tests read; those that change it build their own."""

from pathlib import Path

import pytest

from support import toy_cache


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """Folder with `target`, `responses.jsonl` and the complete `cache` of 12 sequences at offsets 0 and 1000."""
    folder = tmp_path_factory.mktemp("toy")
    toy_cache.write_inputs(folder, toy_cache.toy_rows(12))
    toy_cache.build_toy(folder)
    return folder
