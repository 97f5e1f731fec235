"""dflash-jax: train, check, decode and export DFlash drafters in JAX.

The rooms (sub-packages) and which may import which are drawn in `docs/design/001-architecture.md`.
"""

__version__ = "0.1.0"
