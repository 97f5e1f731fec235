import pytest

from support import tiny_chain


@pytest.fixture(autouse=True, scope="session")
def quick_compiles():
    with tiny_chain.quick_compiles():
        yield
