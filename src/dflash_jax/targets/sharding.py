"""How a target lies on a mesh: its tensors, its activations, and the computations written by hand for it.

Which axis is split over what is decided by `core.LOGICAL_AXES` alone. Without a mesh everything here is the identity.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from dflash_jax.core import (
    LOGICAL_AXES,
    InputError,
    MeshShape,
    make_mesh,
    mesh_shape,
    parse_mesh,
    replicated_axes,
    split_axes,
)
from dflash_jax.nn import MoE, SwiGLU, TopPart, apply_experts, best_tokens, fold_top
from dflash_jax.targets.config import TargetConfig

Tree = TypeVar("Tree")


def axis_units(config: TargetConfig) -> dict[str, int]:
    """Return how many indivisible parts each logical axis of the weights has: heads, not channels; pairs of gate_up."""
    units = {
        "vocab": config.vocab_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "mlp": config.intermediate_size,
    }
    if config.attention_sinks:
        units["sinks"] = config.num_heads
    if config.num_experts:
        units |= {"gate_up": config.intermediate_size, "experts": config.num_experts}
    return units


def weight_split(config: TargetConfig, axes: tuple[str, ...], shape: MeshShape) -> tuple[tuple[str, ...] | None, ...]:
    """Return the mesh axes that split each dimension of a tensor with these logical axes."""
    units = axis_units(config)
    return split_axes(axes, [units.get(axis, 1) for axis in axes], shape)


def weight_sharding(config: TargetConfig, axes: tuple[str, ...], mesh: Mesh | None) -> NamedSharding | None:
    """Return where the shards of a tensor with these logical axes go; None without a mesh."""
    if mesh is None:
        return None
    return NamedSharding(mesh, PartitionSpec(*weight_split(config, axes, mesh_shape(mesh))))


def check_mesh(config: TargetConfig, shape: MeshShape) -> None:
    """Refuse a mesh whose devices would sit idle.

    Raises:
        InputError: there is an expert axis and the target has no experts.
    """
    if shape.expert > 1 and not config.num_experts:
        raise InputError(f"--mesh {shape}: the target has no experts to split, give those devices to data or model")


def open_mesh(config: TargetConfig, text: str, *, local: bool = False) -> Mesh | None:
    """Return the mesh that a `--mesh` setting describes, for this target; None for one device.

    Args:
        config: the target's.
        text: the setting, such as `data=2,model=4`.
        local: over this process's devices alone, where several processes each run the target for themselves.

    Raises:
        InputError: see `core.parse_mesh`, `core.make_mesh` and `check_mesh`.
    """
    shape = parse_mesh(text)
    check_mesh(config, shape)
    return make_mesh(shape, local=local)


def whole_axes(config: TargetConfig, shape: MeshShape) -> list[str]:
    """Return a line for every axis of the weights that the mesh would split and cannot, because it does not divide."""
    return replicated_axes(axis_units(config), shape)


def constrain(x: Array, axes: tuple[str | None, ...], mesh: Mesh | None) -> Array:
    """Return `x`, pinned to the table's sharding inside a jitted function; units are the array's own sizes.

    Args:
        x: an activation.
        axes: a logical axis per dimension; None is never split.
        mesh: the target's mesh; None pins nothing.
    """
    if mesh is None:
        return x
    split = split_axes(axes, x.shape, mesh_shape(mesh))
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*split)))


def padded_rows(mesh: Mesh | None, rows: int) -> int:
    """Return the number of rows, at least `rows`, that a mesh splits evenly."""
    parts = mesh_shape(mesh).along(LOGICAL_AXES["batch"])
    return -(-rows // parts) * parts


def put_batch(mesh: Mesh | None, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Return arrays whose first axis is the batch on the mesh's devices; every process gives the whole batch.

    Args:
        mesh: the target's mesh; None is the default device.
        arrays: host arrays by name.
    """
    if mesh is None:
        return {name: jnp.asarray(array) for name, array in arrays.items()}
    placed = {}
    for name, array in arrays.items():
        split = split_axes(("batch", *[None] * (array.ndim - 1)), array.shape, mesh_shape(mesh))
        sharding = NamedSharding(mesh, PartitionSpec(*split))
        placed[name] = jax.make_array_from_callback(array.shape, sharding, lambda index, array=array: array[index])
    return placed


def put_whole(mesh: Mesh | None, tree: Tree) -> Tree:
    """Return arrays as every device of a mesh holds them whole: a drafter's weights. Without a mesh, the arrays."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def top_tokens_split(
    hidden: Float[Array, "batch query hidden"], head: Float[Array, "vocab hidden"], mesh: Mesh, *, count: int
) -> tuple[Int32[Array, "batch query {count}"], Float[Array, "batch query {count}"]]:
    """Return `nn.top_tokens` where the head is split over the vocabulary: no device sees another's part of it.

    Each device takes the best tokens of its own rows of the head; their scores and ids and the sum of exponentials,
    `2 * count + 1` numbers a row, are then joined. Parts are in the order of the vocabulary and the first of equal
    scores wins: the lowest id, as on one device.
    """
    shape = mesh_shape(mesh)
    (over,), batch_split = (
        split_axes(("vocab",), head.shape[:1], shape),
        split_axes(("batch",), hidden.shape[:1], shape),
    )

    def local(
        hidden: Float[Array, "batch query hidden"], head: Float[Array, "vocab hidden"]
    ) -> tuple[Int32[Array, "batch query top"], Float[Array, "batch query top"]]:
        part = fold_top(hidden.reshape(-1, hidden.shape[-1]), head, count=count)
        if over:
            tokens = part.tokens + lax.axis_index(over).astype(jnp.int32) * jnp.int32(head.shape[0])
            candidates, ids = (lax.all_gather(x, over, axis=1, tiled=True) for x in (part.scores, tokens))
            scores, place = lax.top_k(candidates, count)
            total = lax.psum(part.total * jnp.exp(part.scores[:, 0] - scores[:, 0]), over)
            part = TopPart(scores=scores, tokens=jnp.take_along_axis(ids, place, axis=-1), total=total)
        rows = hidden.shape[:-1]
        return part.tokens.reshape(*rows, count), part.log_probabilities().reshape(*rows, count)

    rows = PartitionSpec(*batch_split)
    # every device along the model axis ends with the same tokens, which the checker cannot see through the joining
    return jax.shard_map(
        local, mesh=mesh, in_specs=(rows, PartitionSpec(over)), out_specs=(rows, rows), check_vma=False
    )(hidden, head)


def greedy_tokens_split(
    hidden: Float[Array, "batch query hidden"], head: Float[Array, "vocab hidden"], mesh: Mesh
) -> Int32[Array, "batch query"]:
    """Return `nn.greedy_tokens` where the head is split over the vocabulary: no device sees another's part of it.

    Each device takes the best token of its own rows of the head; scores and tokens, two numbers a row, are then
    compared. Parts are in the order of the vocabulary and the first of equal scores wins: the lowest id, as on one
    device.
    """
    vocab_split, _ = split_axes(("vocab", None), head.shape, mesh_shape(mesh))
    batch_split = split_axes(("batch", None, None), hidden.shape, mesh_shape(mesh))
    (over,) = vocab_split or ("model",)
    part_size = head.shape[0] // (mesh.shape[over] if vocab_split else 1)

    def local(
        hidden: Float[Array, "batch query hidden"], head: Float[Array, "vocab hidden"]
    ) -> Int32[Array, "batch query"]:
        scores, tokens = best_tokens(hidden, head)
        if vocab_split is None:
            return tokens
        tokens += lax.axis_index(over).astype(jnp.int32) * jnp.int32(part_size)
        all_scores, all_tokens = lax.all_gather(scores, over), lax.all_gather(tokens, over)
        first_best = jnp.argmax(all_scores, axis=0)[None]
        return jnp.take_along_axis(all_tokens, first_best, axis=0)[0]

    rows = PartitionSpec(*batch_split)
    split_call = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, PartitionSpec(vocab_split, None)),
        out_specs=PartitionSpec(*batch_split[:2]),
        # every device along the model axis ends with the same token, which the checker cannot see through the argmax
        check_vma=False,
    )
    return split_call(hidden, head)


def _matrices(moe: Any) -> tuple[Any, ...]:
    """What is split of a mixture of experts, or of a tree of its shape; its router is not."""
    experts = moe.experts
    return experts.gate_up_proj, experts.gate_up_proj_bias, experts.down_proj, experts.down_proj_bias


def moe_split(moe: MoE, x: Float[Array, "batch query hidden"], mesh: Mesh) -> Float[Array, "batch query hidden"]:
    """Return `moe(x)` where experts are split over devices: each one computes its own experts for its own rows.

    Devices along the expert axis share rows here (elsewhere they take different ones), since any row may need any
    expert; devices along the model axis hold a part of every expert's columns. The router is small and everywhere. One
    sum joins all parts.
    """
    shape = mesh_shape(mesh)
    num_experts, num_columns, _ = moe.experts.down_proj.shape
    over_experts, over_columns = split_axes(("experts", "mlp"), (num_experts, num_columns), shape)
    rows = PartitionSpec(*split_axes(("batch",), x.shape[:1], MeshShape(data=shape.data)))
    specs = (
        PartitionSpec(over_experts, None, over_columns),
        PartitionSpec(over_experts, over_columns),
        PartitionSpec(over_experts, over_columns),
        PartitionSpec(over_experts),
    )
    parts = eqx.tree_at(_matrices, jax.tree.map(lambda _: PartitionSpec(), moe), specs)
    joined = (*(over_experts or ()), *(over_columns or ()))

    def local(part: MoE, x: Float[Array, "batch query hidden"]) -> Float[Array, "batch query hidden"]:
        flat, experts = x.reshape(-1, x.shape[-1]), part.experts
        chosen, shares = part.route(flat)
        if over_experts:
            # experts of other devices then fall outside, and add nothing here
            chosen -= lax.axis_index("expert").astype(jnp.int32) * experts.down_proj.shape[0]
        if over_columns:
            # every part of the columns would add the bias once more
            mine = (lax.axis_index("model") == 0).astype(experts.down_proj_bias.dtype)
            experts = eqx.tree_at(lambda own: own.down_proj_bias, experts, experts.down_proj_bias * mine)
        out = apply_experts(experts, flat, chosen, shares).reshape(x.shape)
        return lax.psum(out, joined) if joined else out

    # the sum makes all parts equal, which the checker cannot see through the experts' loop
    return jax.shard_map(local, mesh=mesh, in_specs=(parts, rows), out_specs=rows, check_vma=False)(moe, x)


def apply_mlp(
    mlp: SwiGLU | MoE, x: Float[Array, "batch query hidden"], mesh: Mesh | None
) -> Float[Array, "batch query hidden"]:
    """Return a layer's MLP output, on a mesh with experts on their own devices."""
    return mlp(x) if mesh is None or isinstance(mlp, SwiGLU) else moe_split(mlp, x, mesh)
