"""Making activations again in the backward pass instead of keeping them, in a way that XLA does not undo."""

from collections.abc import Callable
from typing import Any

import jax

from dflash_jax.nn import as_another_value


def rematerialised(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function(parameters, inputs, *others)`, of which the backward pass keeps the arguments alone.

    `jax.checkpoint` sets a barrier between the two passes, which XLA for CPUs drops before it merges equal
    computations: nothing is then made again, and everything kept (measured, jax 0.10: temporaries equal to the byte).
    Here the inputs of the second pass are other values to XLA.

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
        return jax.vjp(function, parameters, as_another_value(inputs, slope), *others)[1](slope)

    run.defvjp(forward, backward)
    return run
