"""speculators' own dataset class, `ArrowDataset`, without the models that its package compiles at import (seconds)."""

import importlib.util
import sys
import types
import warnings


def _empty_package(name: str) -> None:
    """Make `import name` give a package with no content but its modules."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed: make .venv-dev/installed"
    module = types.ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[name] = module


for package in ("speculators", "speculators.train", "speculators.data_generation"):
    _empty_package(package)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that it imports
    from speculators.train.data import ArrowDataset

__all__ = ["ArrowDataset"]
