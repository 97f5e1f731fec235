import pytest

from support import parity_world, tiny_chain


@pytest.fixture(autouse=True, scope="session")
def quick_compiles():
    with tiny_chain.quick_compiles():
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory, quick_compiles):  # noqa: ARG001  (it must come first)
    return parity_world.make_world(tmp_path_factory.mktemp("parity"))
