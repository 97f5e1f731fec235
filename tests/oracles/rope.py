"""Rotary angles from 45-digit decimals: what they are in the real numbers."""

import math
from decimal import Decimal, localcontext

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def frequency(theta: float, head_dim: int, pair: int) -> Decimal:
    """Radians per position of a channel pair: `theta^(-2 pair / head_dim)`."""
    with localcontext() as context:
        context.prec = 45
        return (Decimal(-2 * pair) / Decimal(head_dim) * Decimal(theta).ln()).exp()


def llama3(plain: Decimal, *, factor: int, low: int, high: int, original: int) -> Decimal:
    """A frequency after Llama 3.1's scaling, by its wavelength: long ones slowed, short ones kept, else blended."""
    with localcontext() as context:
        context.prec = 45
        wavelength = 2 * PI / plain
        if wavelength > Decimal(original) / low:
            return plain / factor
        if wavelength < Decimal(original) / high:
            return plain
        smooth = (original / wavelength - low) / (high - low)
        return (1 - smooth) * plain / factor + smooth * plain


def yarn(plain: Decimal, pair: int, *, factor: int, first: Decimal, last: Decimal) -> Decimal:
    """A frequency after YaRN's scaling, where the ramp from kept to slowed runs from pair `first` to pair `last`."""
    with localcontext() as context:
        context.prec = 45
        slowed = min(max((pair - first) / (last - first), Decimal(0)), Decimal(1))
        return plain / factor * slowed + plain * (1 - slowed)


def yarn_pair(theta: float, head_dim: int, *, turns: int, original: int) -> Decimal:
    """The fractional pair that turns so often within the original context."""
    with localcontext() as context:
        context.prec = 45
        return head_dim * (Decimal(original) / (turns * 2 * PI)).ln() / (2 * Decimal(theta).ln())


def angle(radians_per_position: Decimal, position: int) -> float:
    """The angle at a position, within [-pi, pi], radians."""
    with localcontext() as context:
        context.prec = 45
        whole = Decimal(position) * radians_per_position / (2 * PI)
        return float((whole - whole.to_integral_value()) * 2 * PI)


def distance(a: float, b: float) -> float:
    """How far apart two angles are on the circle, radians."""
    return abs(math.remainder(a - b, 2 * math.pi))
