import json

import pytest

from support import tiny, tiny_chain


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    with tiny_chain.quick_compiles():
        yield


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory):
    """The tiny target with a context of 28 tokens, so that texts which the tiny drafter knows reach its end."""
    folder = tiny.write_tiny_target(tmp_path_factory.mktemp("target") / "target", seed=tiny.TARGET_SEED)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 28}))
    return folder
