"""How a training step lies on a mesh: its rows, its state, and its head; `core.LOGICAL_AXES` says what goes where."""

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from dflash_jax.core import InputError, MeshShape, mesh_shape, split_axes
from dflash_jax.drafter import Lookup, take_rows
from dflash_jax.nn import (
    HeadPart,
    LinearCrossEntropy,
    OnlinePass,
    draw_sample,
    fold_head,
    named_tokens,
    online_pass,
)

Tree = TypeVar("Tree")
BLOCKS = ("batch", "anchors")  # logical axes of what is [batch, anchor, ...]
MOMENTS = ("moments",)
WHOLE: tuple[str | None, ...] = ()


def check_batch(shape: MeshShape, sequences_per_step: int, *, parts: int = 1) -> None:
    """Refuse a batch that some devices would have no part of.

    Args:
        shape: of the mesh.
        sequences_per_step: of all parts together.
        parts: that are taken one after the other.

    Raises:
        InputError: the sequences do not divide.
    """
    devices = shape.data * shape.expert
    if sequences_per_step % (devices * parts):
        turns = f" in {parts} parts (--accumulate)" if parts > 1 else ""
        raise InputError(
            f"--sequences-per-step is {sequences_per_step}, --mesh {shape} splits it into {devices}{turns}: make it a "
            f"multiple of {devices * parts}"
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


def _sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Where an array with these logical axes lies; axes that are not named are whole."""
    named = (*axes, *[None] * (len(shape) - len(axes)))[: len(shape)]
    return NamedSharding(mesh, PartitionSpec(*split_axes(named, shape, mesh_shape(mesh))))


def pin(tree: Tree, axes: tuple[str | None, ...], mesh: Mesh | None) -> Tree:
    """Return arrays that a compiled step keeps where the table says; without a mesh, the arrays.

    Args:
        tree: arrays whose first dimensions have the logical axes `axes`.
        axes: names of them; further dimensions are whole.
        mesh: the run's.
    """
    if mesh is None:
        return tree
    return jax.tree_util.tree_map(
        lambda leaf: lax.with_sharding_constraint(leaf, _sharding(mesh, axes, leaf.shape)), tree
    )


def put(tree: Tree, axes: tuple[str | None, ...], mesh: Mesh | None) -> Tree:
    """Return arrays on the devices that the table says, before the first step; every process has all of them.

    Args:
        tree: arrays, on one device of each process or spread over all.
        axes: see `pin`.
        mesh: the run's; None leaves them where they are.
    """
    if mesh is None:
        return tree

    def one(leaf: jax.Array) -> jax.Array:
        sharding = _sharding(mesh, axes, leaf.shape)
        if leaf.is_fully_addressable:
            value = np.asarray(leaf)
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: value[index])
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)

    return jax.tree_util.tree_map(one, tree)


def _join(part: HeadPart, first: Int32[Array, ""], axis: str) -> tuple[LinearCrossEntropy, Float[Array, "row hidden"]]:
    """`nn.online_pass` from the parts of all devices along an axis: one combine of maxima, sums and expected rows."""
    top = lax.pmax(part.top, axis)
    scale = jnp.exp(part.top - top)
    total, label_logit = lax.psum((part.total * scale, part.label_logit), axis)
    gradient = lax.psum(part.expected * (scale / total)[:, None] - part.label_row, axis)
    # the lowest id of those that reach the top, as on one device
    nowhere = jnp.int32(np.iinfo(np.int32).max)
    tokens = lax.pmin(jnp.where(part.top == top, part.token + first, nowhere), axis)
    return LinearCrossEntropy(loss=top + jnp.log(total) - label_logit, tokens=tokens), gradient


def head_pass(mesh: Mesh | None, vocab_size: int, *, sampled: int | None = None) -> OnlinePass:
    """Return `nn.online_pass` for a head that may be split over its vocabulary: no device sees another's part of it.

    Each device folds its own rows of the head for all rows of hidden states of its data group, or its share of
    `sampled` of them. A sample then depends on the mesh; what it estimates does not.

    Args:
        mesh: the run's.
        vocab_size: rows of the head; where the mesh cannot divide them, every device has all.
        sampled: see `nn.online_pass`; all devices together.
    """
    whole = online_pass if sampled is None else partial(online_pass, sampled=sampled)
    if mesh is None:
        return whole
    shape = mesh_shape(mesh)
    (over,) = split_axes(("vocab",), (vocab_size,), shape)
    if over is None:
        return whole
    (axis,) = over

    def one_pass(
        hidden: Float[Array, "row hidden"],
        head: Float[Array, "vocab hidden"],
        ids: Int32[Array, "row label"],
        probabilities: Float[Array, "row label"],
        key: PRNGKeyArray | None = None,
    ) -> tuple[LinearCrossEntropy, Float[Array, "row hidden"]]:
        def local(
            hidden: Array, head: Array, ids: Array, probabilities: Array, key: Array | None
        ) -> tuple[LinearCrossEntropy, Array]:
            size, part = head.shape[0], lax.axis_index(axis).astype(jnp.int32)
            first = part * jnp.int32(size)
            own = ids - first
            here = (own >= 0) & (own < size)
            ids, probabilities = jnp.clip(own, 0, size - 1), jnp.where(here, probabilities, 0.0)
            sample = None
            if sampled is not None:
                assert key is not None
                named, count = named_tokens(ids, probabilities, size), min(-(-sampled // shape.along(over)), size)
                sample = draw_sample(named, count, key=jax.random.fold_in(key, part))
            return _join(fold_head(hidden, head, ids, probabilities, sample=sample), first, axis)

        # the batch is outermost in the rows, and divides by its devices
        rows = PartitionSpec(*split_axes(("batch",), hidden.shape[:1], shape))
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, PartitionSpec(axis), rows, rows, PartitionSpec()),
            out_specs=(rows, rows),  # of every leaf
            # every device along the axis ends with the same numbers, which the checker cannot see through the loop
            check_vma=False,
        )(hidden, head, ids, probabilities, key)

    return one_pass


def split_lookup(mesh: Mesh | None, vocab_size: int) -> Lookup:
    """Return `drafter.take_rows` for a table that is split over its rows: each device gives the rows it has.

    Args:
        mesh: the run's.
        vocab_size: rows of the table; where the mesh cannot divide them, every device has all.
    """
    over = None if mesh is None else split_axes(("vocab",), (vocab_size,), mesh_shape(mesh))[0]
    if mesh is None or over is None:
        return take_rows
    (axis,) = over

    def local(table: Array, ids: Array) -> Array:
        own = ids - lax.axis_index(axis).astype(jnp.int32) * jnp.int32(table.shape[0])
        here = (own >= 0) & (own < table.shape[0])
        rows = table[jnp.clip(own, 0, table.shape[0] - 1)]
        return lax.psum(jnp.where(here[..., None], rows, 0), axis)

    def lookup(table: Array, ids: Array) -> Array:
        batch = PartitionSpec(*split_axes(("batch",), ids.shape[:1], mesh_shape(mesh)))
        split = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(axis), batch), out_specs=batch, check_vma=False)
        return split(table, ids)

    return lookup
