"""A program that loads a target and tells what memory it took; a program, because memory is counted by process.

python loading_worker.py TARGET DTYPE
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from dflash_jax.targets import load_target


def status(field):
    """A size of this process in bytes, from Linux: VmRSS (resident now) or VmHWM (the most there was)."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) * 1024


def main():
    folder, dtype = Path(sys.argv[1]), sys.argv[2]
    jax.block_until_ready(jnp.zeros(8) + 1)  # what jax takes for itself comes first
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    target = load_target(folder, dtype=jnp.dtype(dtype))
    leaves = jax.tree.leaves(target)
    told = {
        "model_bytes": sum(leaf.nbytes for leaf in leaves),
        "largest_bytes": max(leaf.nbytes for leaf in leaves),
        "peak_bytes": status("VmHWM") - before,
        "after_bytes": status("VmRSS") - before,
    }
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
