"""Which anchors of a text are evaluated: all, every n-th, or some by chance."""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int32

from dflash_jax.core import InputError

_FORM = re.compile(r"(every|random):([1-9][0-9]{0,8})")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorChoice:
    """How anchors are chosen from the eligible ones of a text; `str` gives the form that `parse_anchors` reads.

    Attributes:
        kind: "all"; "every": the first response token and every `number`-th after it; "random": `number` of them (all
            where there are fewer), drawn without repetition.
        number: of "every" and "random".
        seed: of "random".
    """

    kind: Literal["all", "every", "random"] = "all"
    number: int = 1
    seed: int = 0

    def __str__(self) -> str:
        """`all`, `every:N` or `random:N`."""
        return self.kind if self.kind == "all" else f"{self.kind}:{self.number}"

    def choose(self, *, prompt_len: int, length: int, text_hash: int) -> Int32[np.ndarray, " anchor"]:
        """Return the chosen anchors of one text, rising.

        The draw depends on the seed and the text alone: the same text has the same anchors at every offset and in every
        cache. Worked: prompt_len 3, length 9 has the eligible anchors 3 to 7; `every:2` takes [3, 5, 7].

        Args:
            prompt_len: tokens of the prompt, also the first eligible anchor.
            length: tokens in all; `length - 2` is the last eligible anchor.
            text_hash: `hash_text` of the text.
        """
        eligible = np.arange(prompt_len, length - 1, dtype=np.int32)
        if self.kind == "every":
            return eligible[:: self.number]
        if self.kind == "random" and self.number < len(eligible):
            draw = np.random.default_rng([self.seed, text_hash])
            return np.sort(draw.choice(eligible, self.number, replace=False))
        return eligible


def parse_anchors(text: str, *, seed: int = 0) -> AnchorChoice:
    """Return the choice that `all`, `every:N` or `random:N` means.

    Raises:
        InputError: any other text.
    """
    if text == "all":
        return AnchorChoice()
    match = _FORM.fullmatch(text)
    if match is None:
        raise InputError(f"--anchors is {text!r}: choose all, every:N or random:N, with N from 1 up")
    return AnchorChoice(kind="every" if match[1] == "every" else "random", number=int(match[2]), seed=seed)


def hash_text(token_ids: Int32[np.ndarray, " seq"]) -> int:
    """Return the identity of a text, prompt and response: the first 8 bytes of its BLAKE2b, little-endian ids."""
    digest = hashlib.blake2b(np.asarray(token_ids, "<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
