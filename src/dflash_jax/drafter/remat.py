"""Making activations again in the backward pass instead of keeping them, in a way that XLA does not undo."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def rematerialised(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function(parameters, inputs, *others)`, of which the backward pass keeps the arguments alone.

    `jax.checkpoint` sets a barrier between the two passes, which XLA for CPUs drops before it merges equal
    computations: nothing is then made again, and everything kept (measured, jax 0.10: temporaries equal to the byte).
    Here the inputs of the second pass are other values to XLA: zero times a number of the backward pass is added.

    It must not be mapped over by `jax.vmap`, which would make the parameters' gradients once per mapped element.

    Args:
        function: of arrays and pytrees of them; all that it computes depends on `inputs`.
    """

    @jax.custom_vjp
    def run(*arguments: Any) -> Any:
        return function(*arguments)

    def forward(*arguments: Any) -> Any:
        return function(*arguments), arguments

    def backward(arguments: Any, slope: Any) -> Any:
        parameters, inputs, *others = arguments
        some = jax.tree_util.tree_leaves(slope)[0]
        zero = jnp.float32(0) * some[(0,) * some.ndim].astype(jnp.float32)
        inputs = jax.tree_util.tree_map(
            lambda leaf: leaf + zero.astype(leaf.dtype) if _is_float(leaf) else leaf, inputs
        )
        return jax.vjp(function, parameters, inputs, *others)[1](slope)

    run.defvjp(forward, backward)
    return run
