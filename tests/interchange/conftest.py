import pytest

from support import tiny, tiny_chain


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    with tiny_chain.quick_compiles():
        yield


@pytest.fixture(scope="session")
def target_folder():
    return tiny.tiny_target()
