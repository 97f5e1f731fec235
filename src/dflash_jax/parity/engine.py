"""The engine under test as a choice of links at every offset, and that choice with one link exchanged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dflash_jax.core import InputError
from dflash_jax.nn import MAX_POSITION
from dflash_jax.parity.chain import CACHE, EXACT, Links, Source, reference_links
from dflash_jax.parity.config import ParityConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """What serves, and where.

    Attributes:
        config: its settings.
        offsets: position offsets, rising; the first is where the reference stands.
    """

    config: ParityConfig
    offsets: tuple[int, ...]

    @property
    def near(self) -> int:
        """The smallest offset."""
        return self.offsets[0]

    @property
    def reference(self) -> Links:
        """The sound chain at the smallest offset, which every offset is compared with."""
        return reference_links(self.near)

    def links(self, offset: int) -> Links:
        """Return the engine's chain at an offset."""
        source = Source(kind=CACHE if self.config.cache is not None else self.config.rope, offset=offset)
        context, block = self.config.starts(offset)
        return Links(
            features=source,
            labels=source,
            context_start=context,
            block_start=block,
            drafter_rope=self.config.drafter_rope,
        )

    def swaps(self, offset: int) -> Mapping[str, Links]:
        """Return the engine's chain at an offset with one link mended: none, each, pairs, all.

        Positions are mended to what is sound at this offset, and together to where the engine puts them near.
        """
        ours, sound = self.links(offset), self.reference
        near = self.links(self.near)
        return {
            "none": ours,
            "features": replace(ours, features=sound.features),
            "labels": replace(ours, labels=sound.labels),
            "target": replace(ours, features=sound.features, labels=sound.labels),
            "context_positions": replace(ours, context_start=offset),
            "block_positions": replace(ours, block_start=offset),
            "positions": replace(ours, context_start=offset, block_start=offset),
            "near_positions": replace(ours, context_start=near.context_start, block_start=near.block_start),
            "drafter": replace(ours, drafter_rope=EXACT),
            "all": sound,
        }

    def spoils(self, offset: int) -> Mapping[str, Links]:
        """Return the sound chain with one link taken from the engine at an offset."""
        ours, sound = self.links(offset), self.reference
        return {
            "features": replace(sound, features=ours.features),
            "labels": replace(sound, labels=ours.labels),
            "positions": replace(sound, context_start=ours.context_start, block_start=ours.block_start),
            # angles go wrong where positions are large: these are as large as the engine's, and fit each other
            "drafter": replace(
                sound,
                context_start=ours.context_start,
                block_start=ours.context_start,
                drafter_rope=ours.drafter_rope,
            ),
        }

    def probes(self, layer_shifts: tuple[int, ...]) -> Mapping[str, Links]:
        """Return the sound chain with layers or block moved by one: what the drafter may have been trained for."""
        sound = self.reference
        layers = {
            f"layers{shift:+d}": replace(sound, features=replace(sound.features, layer_shift=shift))
            for shift in layer_shifts
        }
        start = max(self.near, 1)  # both starts one up where a block would begin below 0: a uniform shift is nothing
        blocks = {
            f"block{shift:+d}": replace(sound, context_start=start, block_start=start + shift) for shift in (-1, 1)
        }
        return layers | blocks


def check_positions(engine: Engine, *, longest: int, block_size: int) -> None:
    """Raise where a position would be below 0 or beyond 2^31 - 1.

    Raises:
        InputError: which, and what to do.
    """
    for offset in engine.offsets:
        starts = engine.config.starts(offset)
        if min(starts) < 0:
            raise InputError(
                f"at offset {offset} the engine's positions begin at {min(starts)}: shift the other one of context and "
                "block up instead (only their difference matters)"
            )
        if max(*starts, offset) + longest + block_size > MAX_POSITION:
            raise InputError(
                f"--position-offsets {offset} + the longest text's {longest} tokens are more than {MAX_POSITION}: "
                "lower the offset"
            )
