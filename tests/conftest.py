"""What holds in every test: strict jax settings, two CPU devices, the imported SmolLM2.

No persistent compilation cache: a test that passes because of what an earlier run compiled is not a test of this run.
"""

import os
from pathlib import Path

import jax
import pytest

from support.smollm2 import smollm2_target

# Before any test touches a device. Mixed dtypes and silent broadcasting over ranks are where numerical bugs hide.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The target folder of SmolLM2-135M-Instruct, imported once for all tests and processes; do not write into it."""
    return smollm2_target()
