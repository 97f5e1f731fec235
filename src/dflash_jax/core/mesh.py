"""The device mesh, the one table of which logical axis is split over which of its axes, and the start of several hosts.

Importing this module does not import jax: the command line reads meshes before it needs devices.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from dflash_jax.core.errors import InputError

if TYPE_CHECKING:
    import jax

LOGICAL_AXES: Mapping[str, tuple[str, ...]] = {
    # The expert axis carries rows too: outside the experts, its devices would otherwise compute the same rows again.
    "batch": ("data", "expert"),
    "experts": ("expert",),
    "vocab": ("model",),
    "heads": ("model",),
    "kv_heads": ("model",),
    "sinks": ("model",),
    "mlp": ("model",),
    "gate_up": ("model",),
    # A drafter's weights are whole everywhere: without this, the devices along model would draft the same blocks.
    "anchors": ("model",),
    # What an optimizer remembers of a weight is needed by whoever updates it, and by nobody else.
    "moments": ("data", "expert", "model"),
}
"""Mesh axes that split a logical axis. Axes that are not named here (hidden, head_dim, seq, ...) are never split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshShape:
    """How many devices lie along each axis of a mesh.

    Attributes:
        data: groups that each take a part of the batch.
        expert: groups that each hold a part of the experts (and take a part of the batch elsewhere).
        model: devices that share every matrix: heads, MLP columns, vocabulary.
    """

    data: int = 1
    expert: int = 1
    model: int = 1

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.data * self.expert * self.model

    def along(self, axes: Iterable[str]) -> int:
        """Return the number of devices along some of the axes together."""
        product = 1
        for axis in axes:
            product *= getattr(self, axis)
        return product

    def __str__(self) -> str:
        """Return the mesh as `--mesh` takes it: `data=2,model=4`; axes of one device are left out."""
        parts = [f"{field.name}={getattr(self, field.name)}" for field in fields(self)]
        return ",".join(part for part in parts if not part.endswith("=1")) or "data=1"


def parse_mesh(text: str) -> MeshShape:
    """Return the mesh that `data=2,model=4` describes; axes that are left out have one device.

    Raises:
        InputError: an unknown axis, an axis named twice, or a size that is no positive whole number.
    """
    known = [field.name for field in fields(MeshShape)]
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in known or axis in sizes or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise InputError(
                f"--mesh is {text!r}: give each of {', '.join(known)} at most once, with a number of devices, "
                "such as data=2,model=4"
            )
        sizes[axis] = int(size)
    return MeshShape(**sizes)


def split_axes(
    axes: Sequence[str | None], units: Sequence[int], shape: MeshShape
) -> tuple[tuple[str, ...] | None, ...]:
    """Return the mesh axes that split each dimension; None for a dimension that every device holds whole.

    A dimension whose units do not divide by all of its mesh axes is split by the first of them alone, and where that
    does not fit either, by none. On `data=2,expert=2`, 6 rows go over data and are whole along expert; 5 are whole.

    Args:
        axes: logical axis of each dimension; None is never split.
        units: how many indivisible parts a dimension has: heads, not channels.
        shape: the mesh.
    """
    split: list[tuple[str, ...] | None] = []
    for axis, count in zip(axes, units, strict=True):
        over = tuple(name for name in LOGICAL_AXES.get(axis or "", ()) if getattr(shape, name) > 1)
        while over and count % shape.along(over):
            over = over[:-1]
        split.append(over or None)
    return tuple(split)


def replicated_axes(units: Mapping[str, int], shape: MeshShape) -> list[str]:
    """Return a line for every logical axis that the table would split and whose units do not divide.

    Args:
        units: how many indivisible parts each logical axis has.
        shape: the mesh.
    """
    lines = []
    for axis, count in units.items():
        over = tuple(name for name in LOGICAL_AXES.get(axis, ()) if getattr(shape, name) > 1)
        if over and split_axes((axis,), (count,), shape) == (None,):
            sizes = " * ".join(f"{name}={getattr(shape, name)}" for name in over)
            lines.append(f"{axis}: {count} do not divide by {sizes}, every device holds all of them")
    return lines


def make_mesh(shape: MeshShape, *, local: bool = False) -> "jax.sharding.Mesh | None":
    """Return the mesh over this program's devices; None for one device, where nothing is split.

    Args:
        shape: how many devices along each axis.
        local: in a program of several processes, take this one's devices and not those of all.

    Raises:
        InputError: there are fewer devices, or several processes and a mesh that leaves some of their devices out.
    """
    import jax

    if shape.size == 1:
        return None
    devices = jax.local_devices() if local else jax.devices()
    if shape.size > len(devices):
        raise InputError(
            f"--mesh {shape} needs {shape.size} devices, there are {len(devices)} ({devices[0].device_kind}): make it "
            "smaller (on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N simulates N)"
        )
    if jax.process_count() > 1 and not local and shape.size != len(devices):
        raise InputError(
            f"--mesh {shape} has {shape.size} devices, the {jax.process_count()} processes have {len(devices)}: "
            "all of them must take part"
        )
    names = tuple(field.name for field in fields(MeshShape))
    sizes = tuple(getattr(shape, name) for name in names)
    return jax.make_mesh(
        sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names), devices=devices[: shape.size]
    )


def mesh_shape(mesh: "jax.sharding.Mesh | None") -> MeshShape:
    """Return the sizes of a mesh that `make_mesh` made; one device for None."""
    return MeshShape() if mesh is None else MeshShape(**dict(mesh.shape))


def require_one_process(command: str) -> None:
    """Refuse to run as one of several processes.

    Raises:
        InputError: there are others.
    """
    import jax

    if jax.process_count() > 1:
        raise InputError(
            f"{command} runs in one process, this is one of {jax.process_count()}: unset JAX_COORDINATOR_ADDRESS, and "
            "split the input where several machines should work"
        )


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """A variable as a whole number; None where it is not set."""
    text = environment.get(name, "")
    if text and not (text.isascii() and text.isdigit()):
        raise InputError(f"{name} is {text!r}: a whole number is needed")
    return int(text) if text else None


def start_processes(environment: Mapping[str, str] = os.environ) -> bool:
    """Join the other processes of a run that was started as several; return whether there are others.

    Must come before anything else touches a device. A run is one of several when `JAX_COORDINATOR_ADDRESS` (host:port
    of process 0) is set; `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say who this one is, and may be left out on clusters
    that `jax.distributed` detects by itself (Slurm, Open MPI, Kubernetes, TPU pods). A TPU pod slice, told by several
    `TPU_WORKER_HOSTNAMES`, needs no variable at all.

    Raises:
        InputError: a number that is none, or others that did not come.
    """
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    if not pod and not environment.get("JAX_COORDINATOR_ADDRESS"):
        return False
    import jax

    num_processes, process_id = (_number(environment, name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(environment.get("JAX_COORDINATOR_ADDRESS"), num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"this process could not join the others ({' '.join(str(error).split())}): check JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    return jax.process_count() > 1
