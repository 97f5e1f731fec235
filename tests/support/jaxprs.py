"""What a traced function makes."""

import math

import jax
import jax.numpy as jnp


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


def equations(jaxpr):
    """Every equation of a jaxpr, those inside loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr") or hasattr(v, "eqns")
        ):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from equations(getattr(value, "jaxpr", value))


def float32_precisions(jaxpr):
    """Of every product of float32 operands: what accelerators are told of their precision."""
    kinds = ("dot_general", "ragged_dot_general", "ragged_dot")
    return [
        equation.params["precision"]
        for equation in equations(jaxpr)
        if equation.primitive.name in kinds and equation.invars[0].aval.dtype == jnp.float32
    ]
