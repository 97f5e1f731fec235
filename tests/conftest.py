"""What holds in every test: strict jax settings, two CPU devices (or `$DFLASH_JAX_TEST_DEVICES`), the imported SmolLM2.

Compiled programs are kept for this run of pytest alone, in a folder that its processes share: the workers, and the
commands that tests start by the dozen to kill them. Nothing of an earlier run is there: a test that passes because of
what an earlier run compiled is not a test of this run.

Most of the suite's time went to XLA's compiler (36 of 52 s in two files), so it compiles with few optimizations here
(12 of 27 s). `XLA_FLAGS` in the environment, set to anything or to nothing, gives the compiler that users have, as does
nn/test_one_cpu.py for what it runs again.
"""

import atexit
import os
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

# in the environment, before jax reads it: workers and commands inherit it
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
        "--xla_llvm_disable_expensive_passes=true"
    )
if "PYTEST_XDIST_WORKER" not in os.environ and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="dflash-jax-tests-")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# a shell that starts the tests in the background has them ignore interrupts, and every command they start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

from support.smollm2 import smollm2_target

# Before any test touches a device. Mixed dtypes and silent broadcasting over ranks are where numerical bugs hide.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", int(os.environ.get("DFLASH_JAX_TEST_DEVICES", "2")))
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a worker that begins one last leaves the other idle for minutes.

    Files with a test on the real target take longest, then those with the most tests that are marked slow.
    """
    real: set[Path] = set()
    slow: Counter[Path] = Counter()
    for item in items:
        slow[item.path] += item.get_closest_marker("slow") is not None
        if "smollm2" in getattr(item, "fixturenames", ()):
            real.add(item.path)
    items.sort(key=lambda item: (item.path not in real, -slow[item.path]))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The target folder of SmolLM2-135M-Instruct, imported once for all tests and processes; do not write into it."""
    return smollm2_target()
