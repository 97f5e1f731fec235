"""Rotary angles from 45-digit decimals: what they are in the real numbers."""

import math
from decimal import Decimal, localcontext

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def turns(theta: float, head_dim: int, pair: int, position: int) -> Decimal:
    """How often a channel pair has turned at a position: `position * theta^(-2 pair / head_dim) / 2 pi`."""
    with localcontext() as context:
        context.prec = 45
        exponent = Decimal(-2 * pair) / Decimal(head_dim)
        return Decimal(position) * (exponent * Decimal(theta).ln()).exp() / (2 * PI)


def angle(theta: float, head_dim: int, pair: int, position: int) -> float:
    """The angle within [-pi, pi], radians."""
    with localcontext() as context:
        context.prec = 45
        whole = turns(theta, head_dim, pair, position)
        return float((whole - whole.to_integral_value()) * 2 * PI)


def distance(a: float, b: float) -> float:
    """How far apart two angles are on the circle, radians."""
    return abs(math.remainder(a - b, 2 * math.pi))
