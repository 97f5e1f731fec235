"""How a training step lies on a mesh: its rows, its state, and its head; `core.LOGICAL_AXES` says what goes where."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dflash_jax.core import InputError, MeshShape, mesh_shape, split_axes


def check_batch(shape: MeshShape, sequences_per_step: int) -> None:
    """Refuse a batch that some devices would have no part of.

    Raises:
        InputError: the sequences do not divide.
    """
    parts = shape.data * shape.expert
    if sequences_per_step % parts:
        raise InputError(
            f"--sequences-per-step is {sequences_per_step}, --mesh {shape} splits it into {parts}: make it a multiple"
        )


def _row_sharding(mesh: Mesh, rank: int, rows: int) -> NamedSharding:
    split = split_axes(("batch", *[None] * (rank - 1)), (rows, *[1] * (rank - 1)), mesh_shape(mesh))
    return NamedSharding(mesh, PartitionSpec(*split))


def local_rows(mesh: Mesh | None, rows: int) -> range:
    """Return which rows of a batch this process's devices need; all of them without a mesh."""
    if mesh is None:
        return range(rows)
    indices = _row_sharding(mesh, 1, rows).addressable_devices_indices_map((rows,)).values()
    spans = [index[0].indices(rows) for index in indices if index is not None]
    return range(min(start for start, _, _ in spans), max(end for _, end, _ in spans))


def put_rows(mesh: Mesh | None, arrays: Mapping[str, np.ndarray], *, first: int, batch: int) -> dict[str, jax.Array]:
    """Return arrays whose first axis is the batch on the devices; each process gives its own rows of it.

    Without a mesh, nothing is copied on a CPU.

    Args:
        mesh: the run's; None is the default device.
        arrays: host arrays of the rows that `local_rows` names, by name.
        first: which row of the batch is their first.
        batch: rows of the whole batch.
    """
    if mesh is None:
        # device_put and not jnp.asarray, which copies, at a twentieth of the speed
        return {name: jax.device_put(array) for name, array in arrays.items()}

    def put(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, end, _ = index[0].indices(batch)
            return array[start - first : end - first]

        shape = (batch, *array.shape[1:])
        return jax.make_array_from_callback(shape, _row_sharding(mesh, array.ndim, batch), part)

    return {name: put(array) for name, array in arrays.items()}
