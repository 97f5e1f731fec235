"""Where there is one CPU device and no mesh, products take other forms: their tests, once more, there.

The other tests run with two devices, and would never enter those branches. These also run as users compile, with every
optimization of XLA, which the others leave out for time.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_jax.nn.product import cpu_says

TESTS = Path(__file__).parent.parent
FILES = [
    f"nn/test_{name}.py" for name in ("product", "norm_mlp", "attention", "blocks", "head", "head_screens", "rope")
]
if "avx512f" in cpu_says("flags").split():
    FILES += ["nn/test_rows_kernel.py", "nn/test_attention_kernel.py"]


@pytest.mark.slow
def test_products_and_caches_on_one_cpu():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not library and not transformers",
        *FILES,
    ]
    environment = os.environ | {"DFLASH_JAX_TEST_DEVICES": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    ran = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "skipped" not in ran.stdout, ran.stdout[-2000:]
