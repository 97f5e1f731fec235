import pytest

from support import tiny, tiny_chain


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    with tiny_chain.quick_compiles():
        yield


@pytest.fixture(scope="session")
def target_folder():
    return tiny.tiny_target()


@pytest.fixture(scope="session")
def cache(tmp_path_factory, target_folder):
    """Eight texts, float32 features, offset 0."""
    with tiny_chain.quick_compiles():
        return tiny_chain.make_cache(tmp_path_factory.mktemp("chain") / "all", target_folder, tiny.TEXTS)
