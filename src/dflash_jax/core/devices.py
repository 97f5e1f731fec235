"""What accelerators can do, by their makers' figures: the one table that estimates read."""

import re
from dataclasses import dataclass

from dflash_jax.core.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One chip.

    Attributes:
        flops_per_s: dense products of bfloat16 with float32 sums.
        bytes_per_s: of its memory.
        memory_bytes: of its memory.
        link_bytes_per_s: to other chips of the same machine or slice, one direction, all links together.
        cores: how many of them its cloud's names count: a v5p-64 has 32 chips.
    """

    flops_per_s: float
    bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    cores: int = 1


DEVICES = {
    # NVIDIA's data sheets (SXM): without sparsity; NVLink 900 GB/s both ways together
    "h100": Device(flops_per_s=989e12, bytes_per_s=3.35e12, memory_bytes=80e9, link_bytes_per_s=450e9),
    "h200": Device(flops_per_s=989e12, bytes_per_s=4.8e12, memory_bytes=141e9, link_bytes_per_s=450e9),
    # docs.cloud.google.com/tpu/docs/v5p and /v6e: interchip links 1200 and 800 GB/s both ways together
    "v5p": Device(flops_per_s=459e12, bytes_per_s=2.765e12, memory_bytes=95e9, link_bytes_per_s=600e9, cores=2),
    "v6e": Device(flops_per_s=918e12, bytes_per_s=1.64e12, memory_bytes=32e9, link_bytes_per_s=400e9),
}
"""By name. A figure for a whole slice is written `v6e-8`, see `parse_device`."""


def parse_device(text: str) -> tuple[Device, int]:
    """Return the chip that a name such as `h100`, `v6e-8` or `v5p-64` means, and how many of them there are.

    The number counts as the cloud's names do: chips for v6e and GPUs, cores for v5p, of which a chip has two. Worked:
    `v5p-64` is 32 chips.

    Raises:
        InputError: no such device, or a number that is no whole number of chips.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?:-([0-9]+))?", text)
    if match is None or match[1] not in DEVICES:
        raise InputError(
            f"--device is {text!r}: choose one of {', '.join(DEVICES)}, with a number such as v6e-8 or not"
        )
    device = DEVICES[match[1]]
    cores = int(match[2]) if match[2] else device.cores
    if not cores or cores % device.cores:
        raise InputError(f"--device is {text!r}: a {match[1]} chip counts as {device.cores}, give a multiple of it")
    return device, cores // device.cores
