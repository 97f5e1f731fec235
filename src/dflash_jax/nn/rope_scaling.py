"""How a checkpoint stretches its rotary frequencies for long contexts, read from and written to its `config.json`.

transformers 4 writes `rope_theta` and `rope_scaling` at the top level, transformers 5 one object `rope_parameters`;
both are read. A kind or a key that changes the frequencies and is not handled is a problem that names it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float

# keys that say nothing about the frequencies beyond what is read elsewhere
_KINDS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's: long wavelengths are stretched by `factor`, short ones kept, those between blended.

    Attributes:
        factor: stretch of long wavelengths, at least 1.
        low_freq_factor: wavelengths above `original_max_position_embeddings / low_freq_factor` tokens are stretched.
        high_freq_factor: wavelengths below `original_max_position_embeddings / high_freq_factor` tokens are kept.
        original_max_position_embeddings: context of the pretraining, tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    rope_type = "llama3"
    attention_factor_used = 1.0

    def problems(self) -> list[str]:
        """What is wrong with the values."""
        if self.high_freq_factor <= self.low_freq_factor:
            return [f"high_freq_factor {self.high_freq_factor:g} is not above low_freq_factor {self.low_freq_factor:g}"]
        return []

    def scale(self, inverse: Float[np.ndarray, " half_dim"], *, theta: float) -> Float[np.ndarray, " half_dim"]:
        """Return the scaled frequencies (radians per position), in the given precision.

        **Source:** huggingface/transformers `modeling_rope_utils.py`, `_compute_llama3_parameters` (the formula).
        """
        del theta
        turns_in_context = self.original_max_position_embeddings * inverse / (2 * math.pi)
        kept = (turns_in_context - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return (1 - kept) * inverse / self.factor + kept * inverse


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN's: slow channel pairs are stretched by `factor`, fast ones kept, a ramp over pairs between.

    Attributes:
        factor: stretch of slow pairs, at least 1.
        original_max_position_embeddings: context of the pretraining, tokens.
        beta_fast: pairs that turn more often than this within that context are kept.
        beta_slow: pairs that turn less often than this within it are stretched.
        truncate: whether the ramp's ends are rounded outwards to whole pairs.
        attention_factor: multiplies cosines and sines; None for the usual `0.1 ln(factor) + 1`.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    rope_type = "yarn"

    @property
    def attention_factor_used(self) -> float:
        """What cosines and sines are multiplied by."""
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

    def problems(self) -> list[str]:
        """What is wrong with the values."""
        if self.beta_fast <= self.beta_slow:
            return [f"beta_fast {self.beta_fast:g} is not above beta_slow {self.beta_slow:g}"]
        return []

    def ramp_ends(self, *, theta: float, head_dim: int) -> tuple[float, float]:
        """Return the pairs (fractional indices) at which stretching begins and is complete.

        Worked: gpt-oss, theta 150000, 64 channels, 4096 tokens: 8.09 and 17.40; truncated 8 and 18.
        """

        def pair_that_turns(times: float) -> float:
            wavelength = self.original_max_position_embeddings / (times * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(theta))

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = float(math.floor(first)), float(math.ceil(last))
        first, last = max(first, 0.0), min(last, head_dim - 1.0)
        return first, last + 0.001 if first == last else last  # a ramp of no length has no slope

    def scale(self, inverse: Float[np.ndarray, " half_dim"], *, theta: float) -> Float[np.ndarray, " half_dim"]:
        """Return the scaled frequencies (radians per position), in the given precision.

        **Source:** YaRN (arXiv 2309.00071) section 3.2; the ramp's ends as huggingface/transformers
        `modeling_rope_utils.py`, `_compute_yarn_parameters`, has them.
        """
        first, last = self.ramp_ends(theta=theta, head_dim=2 * inverse.shape[0])
        ramp = (np.arange(inverse.shape[0]).astype(inverse.dtype) - first) / (last - first)
        kept = 1 - np.clip(ramp, 0, 1)
        return inverse / self.factor * (1 - kept) + inverse * kept


RopeScaling = Llama3Scaling | YarnScaling
_SCALINGS: dict[str, type[RopeScaling]] = {"llama3": Llama3Scaling, "yarn": YarnScaling}


def _value_problem(name: str, value: Any, wanted: Any) -> str | None:
    """What is wrong with one value of a scaling, or None. `wanted` is the field's type."""
    if wanted is bool:
        return None if type(value) is bool else f"{name} is {value!r}, true or false is needed"
    if wanted is int:
        return None if type(value) is int and value > 0 else f"{name} is {value!r}, a positive whole number is needed"
    least = 1 if name == "factor" else 0
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0 or value < least:
        return f"{name} is {value!r}, a number {'of at least 1' if least else 'above 0'} is needed"
    return None


def _read_scaling(raw: Mapping[str, Any], *, where: str) -> tuple[RopeScaling | None, list[str]]:
    """The scaling of `rope_scaling` or `rope_parameters`, and what is wrong with it."""
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None, [f"{where}.{key} is {raw[key]!r}" for key in sorted(raw.keys() - set(_KINDS)) if raw[key]]
    scaling = _SCALINGS.get(kind) if isinstance(kind, str) else None
    if scaling is None:
        return None, [f"{where}.rope_type is {kind!r}; handled: default, {', '.join(_SCALINGS)}"]
    known = {field.name: field for field in fields(scaling)}
    given = {key: value for key, value in raw.items() if value is not None and key not in _KINDS}
    problems = [f"{where}.{key} is {given[key]!r}" for key in sorted(given.keys() - known.keys())]
    required = [name for name, field in known.items() if field.default is field.default_factory]
    problems += [f"{where}.{name} is missing" for name in required if name not in given]
    for name in known.keys() & given.keys():
        wanted = {"truncate": bool, "original_max_position_embeddings": int}.get(name, float)
        if problem := _value_problem(name, given[name], wanted):
            problems.append(f"{where}.{problem}")
        elif wanted is float:
            given[name] = float(given[name])
    if problems:
        return None, sorted(problems)
    made = scaling(**given)
    return made, [f"{where}: {problem}" for problem in made.problems()]


def read_rope(
    raw: Mapping[str, Any], *, default_theta: float | None = None
) -> tuple[float | None, RopeScaling | None, list[str]]:
    """Return theta, scaling (None: none) and what is wrong with the rotary settings of a `config.json`.

    The problems are phrases for one line, such as "rope_theta is missing"; the values mean nothing where there are any.

    Args:
        raw: the config.
        default_theta: what a config without `rope_theta` means; None: that it is missing.
    """
    problems, found = [], {}
    for name in ("rope_scaling", "rope_parameters"):
        value = raw.get(name)
        if value and not isinstance(value, dict):
            problems.append(f"{name} is {value!r}, an object is needed")
        elif value:
            found[name] = value
    theta = found.get("rope_parameters", {}).get("rope_theta", raw.get("rope_theta"))
    theta = default_theta if theta is None else theta
    if theta is None:
        problems.append("rope_theta is missing")
    elif type(theta) not in (int, float) or not math.isfinite(theta) or theta <= 1:
        problems.append(f"rope_theta is {theta!r}, a number above 1 is needed")
    scalings = set()
    for name, value in found.items():
        partial = value.get("partial_rotary_factor")
        problems += [f"{name}.partial_rotary_factor is {partial!r}"] if partial not in (None, 1) else []
        scaling, wrong = _read_scaling(value, where=name)
        problems += wrong
        scalings.add(scaling)
    problems += [f"{n} is {raw[n]!r}" for n in ("partial_rotary_factor",) if raw.get(n) not in (None, 1)]
    if len(scalings) > 1 and not problems:
        problems.append("rope_scaling and rope_parameters differ")
    if problems or theta is None:
        return None, None, problems
    return float(theta), next(iter(scalings), None), []


def scaling_to_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return the `rope_scaling` of a `config.json`; what is left to its default by None is left out."""
    if scaling is None:
        return None
    values = {field.name: getattr(scaling, field.name) for field in fields(scaling)}
    return {"rope_type": scaling.rope_type} | {name: value for name, value in values.items() if value is not None}
