"""Screens of a head: what says, at a fraction of its cost, which few of its columns can be a row's largest logit."""

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int32

from dflash_jax.nn.head_screen8 import Screen8, can_screen8, make_screen8, screened_tokens8
from dflash_jax.nn.head_screen16 import Screen16, can_screen16, make_screen16, screened_tokens16
from dflash_jax.nn.product import has_tiles

# Rows up to which 8 bits are faster, with AMX and by vectors alone. Two levels of hidden states are two products, whose
# sums are made apart: with many rows that costs more than reading the head in 16 bits.
_FEW_ROWS, _FEW_ROWS_BY_VECTORS = 32, 8


class Screen(eqx.Module):
    """A head in fewer bits, for many rows and for few.

    Attributes:
        sixteen: half the head's bytes.
        eight: a quarter of them, for a few rows; None: those meet 16 bits too.
    """

    sixteen: Screen16
    eight: Screen8 | None = None


def few_rows_for_8_bits() -> int:
    """Return up to how many rows meet 8 bits on this CPU; more meet 16."""
    return _FEW_ROWS if has_tiles() else _FEW_ROWS_BY_VECTORS


def can_screen(head: Float[Array, "vocab hidden"]) -> bool:
    """Whether a head has a shape that screens are made of."""
    return can_screen16(head) and can_screen8(head)


def make_screen(head: Float[Array, "vocab hidden"], *, for_few_rows: bool = True) -> Screen:
    """Return the screens of a float32 head: three quarters of its bytes, or half of them.

    Args:
        head: the vocabulary head, one row per token, float32.
        for_few_rows: whether few rows are asked for often enough to have 8 bits of their own.
    """
    return Screen(sixteen=make_screen16(head), eight=make_screen8(head) if for_few_rows else None)


def screened_tokens(
    hidden: Float[Array, "row hidden"], head: Float[Array, "vocab hidden"], screen: Screen
) -> tuple[Int32[Array, " row"], Bool[Array, " row"]]:
    """Return `greedy_tokens` of every row that the faster screen settles, and whether it does.

    Args:
        hidden: rows after the model's final norm, float32.
        head: the vocabulary head, one row per token, float32.
        screen: of this head.
    """
    if screen.eight is not None and hidden.shape[0] <= few_rows_for_8_bits():
        return screened_tokens8(hidden, head, screen.eight)
    return screened_tokens16(hidden, head, screen.sixteen)
