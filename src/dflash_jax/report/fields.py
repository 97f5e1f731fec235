"""Typed access to a JSON object from outside: getters return what they say or raise one line with path and key."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dflash_jax.core import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A 95 % interval; `low <= high`."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        """Whether the value lies in the closed interval."""
        return self.low <= value <= self.high


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number (true and false are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object and where it came from.

    Getters raise `InputError` when a required key is missing or a value has another kind; `optional_*` return None for
    a missing key and for null.
    """

    where: str
    value: Mapping[str, Any]

    def bad(self, key: str, wanted: str) -> InputError:
        """The error that names this object's key, what it holds and what was wanted."""
        if key not in self.value:
            return InputError(f"{self.where}: the key {key!r} is missing, {wanted} is needed: write the record again")
        found = repr(self.value[key])
        shown = found if len(found) <= 60 else found[:57] + "..."
        return InputError(f"{self.where}: {key!r} is {shown}, {wanted} is needed: write the record again")

    def number(self, key: str) -> float:
        """A finite number."""
        if not is_number(self.value.get(key)):
            raise self.bad(key, "a finite number")
        return float(self.value[key])

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None."""
        return None if self.value.get(key) is None else self.number(key)

    def integer(self, key: str) -> int:
        """An integer of at least 0."""
        value = self.value.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.bad(key, "an integer of at least 0")
        return value

    def optional_integer(self, key: str) -> int | None:
        """An integer of at least 0, or None."""
        return None if self.value.get(key) is None else self.integer(key)

    def boolean(self, key: str) -> bool:
        """True or false."""
        if not isinstance(self.value.get(key), bool):
            raise self.bad(key, "true or false")
        return self.value[key]

    def optional_boolean(self, key: str) -> bool | None:
        """True, false or None."""
        return None if self.value.get(key) is None else self.boolean(key)

    def text(self, key: str) -> str:
        """A string."""
        if not isinstance(self.value.get(key), str):
            raise self.bad(key, "a string")
        return self.value[key]

    def optional_text(self, key: str) -> str | None:
        """A string, or None."""
        return None if self.value.get(key) is None else self.text(key)

    def optional_texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty for a missing key and for null."""
        value = self.value.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.bad(key, "a list of strings")
        return tuple(value or ())

    def optional_numbers(self, key: str) -> tuple[float, ...] | None:
        """A list of finite numbers, or None."""
        value = self.value.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(is_number(item) for item in value):
            raise self.bad(key, "a list of finite numbers")
        return tuple(float(item) for item in value)

    def optional_interval(self, key: str) -> Interval | None:
        """Two numbers in order, or None."""
        numbers = self.optional_numbers(key)
        if numbers is None:
            return None
        if len(numbers) != 2 or numbers[0] > numbers[1]:
            raise self.bad(key, "an interval [low, high]")
        return Interval(low=numbers[0], high=numbers[1])

    def optional_object(self, key: str) -> "Fields | None":
        """A nested object, or None."""
        value = self.value.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(key, "an object")
        return Fields(f"{self.where}: {key}", value)

    def objects(self, key: str) -> "tuple[Fields, ...]":
        """A list of objects; empty for a missing key and for null."""
        value = self.value.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise self.bad(key, "a list of objects")
        return tuple(Fields(f"{self.where}: {key} {place}", item) for place, item in enumerate(value or (), start=1))

    def named_objects(self, key: str) -> "dict[str, Fields]":
        """The sub-objects of an object, in its order, those that are null left out; empty for a missing key."""
        nested = self.optional_object(key)
        if nested is None:
            return {}
        found = {name: nested.optional_object(name) for name in nested.value}
        return {name: item for name, item in found.items() if item is not None}

    def by_offset(self, key: str) -> "dict[int, Fields]":
        """The sub-objects of an object keyed by position offsets, rising."""
        named = self.named_objects(key)
        bad = [name for name in named if not name.isdecimal()]
        if bad:
            raise InputError(f"{self.where}: {key}: {bad[0]!r} is no position offset: write the record again")
        return {int(name): named[name] for name in sorted(named, key=int)}
