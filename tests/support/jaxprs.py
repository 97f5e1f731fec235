"""What a traced function makes."""

import math

import jax


def largest_array(jaxpr):
    """Elements of the largest array that a jaxpr makes, inside loops and calls too."""
    sizes = [math.prod(out.aval.shape) for equation in jaxpr.eqns for out in equation.outvars]
    inner = [
        largest_array(getattr(value, "jaxpr", value))
        for equation in jaxpr.eqns
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr") or hasattr(v, "eqns")
        )
        if hasattr(value, "jaxpr") or hasattr(value, "eqns")
    ]
    return max(sizes + inner, default=0)
