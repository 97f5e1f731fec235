"""Mixture of experts: every token is worked on by the few experts that its router chooses, and by no other.

Tokens are sorted by expert, so that each expert meets its own rows as one small matrix. Three computations of the same
numbers: on TPU `jax.lax.ragged_dot`, which is grouped there; on NVIDIA's Hopper in 16 bits jax's own grouped kernel;
elsewhere blocks of rows, since XLA lowers `ragged_dot` on CPU to the full product of all rows with all
experts (measured: as many times the FLOPs as there are experts).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from dflash_jax.nn.mlp import Linear
from dflash_jax.nn.product import product

LARGEST_BLOCK = 256  # rows: beyond it a product is as fast as it gets, and more rows are wasted per expert
SMALLEST_BLOCK = 8


class Experts(eqx.Module):
    """The matrices of all experts, stored as checkpoints of gpt-oss store them: inputs before outputs.

    Attributes:
        gate_up_proj: gate of unit i in column 2i, up in column 2i + 1.
        gate_up_proj_bias: its biases.
        down_proj: back to the residual stream.
        down_proj_bias: its biases.
        alpha: sigmoid gain of the gate.
        limit: bound of gate (from above) and up (from both sides).
    """

    gate_up_proj: Float[Array, "experts hidden gate_up"]
    gate_up_proj_bias: Float[Array, "experts gate_up"]
    down_proj: Float[Array, "experts mlp hidden"]
    down_proj_bias: Float[Array, "experts hidden"]
    alpha: float = eqx.field(static=True)
    limit: float = eqx.field(static=True)

    def gated(self, gate_up: Float[Array, "rows gate_up"]) -> Float[Array, "rows mlp"]:
        """Return the clamped SwiGLU: `(up + 1) * gate * sigmoid(alpha * gate)`.

        Worked, alpha 1.702, limit 7: gate 100 and up -100 give (-7 + 1) * 7 * sigmoid(11.914) = -41.9997.

        **Source:** huggingface/transformers `models/gpt_oss/modeling_gpt_oss.py`, `GptOssExperts._apply_gate`.
        """
        gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


def rows_per_block(num_pairs: int, num_experts: int) -> int:
    """Return the rows of a block: the power of two at or above an expert's fair share, within bounds.

    So the rows wasted to fill up blocks stay below the rows in use, however many experts there are.
    """
    share = -(-num_pairs // num_experts)
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (share - 1).bit_length()))


class BlockPlan(eqx.Module):
    """Which rows each block works on: the pairs of token and expert, sorted by expert, cut into blocks per expert.

    For three experts with 3, 0 and 2 pairs and blocks of 2 rows (numbers are sorted pairs, `.` an unused row):

        block 0 (expert 0)   0 1
        block 1 (expert 0)   2 .
        block 2 (expert 2)   3 4

    Attributes:
        num_blocks: blocks in use; those after them exist only in shape.
        experts: expert of each block.
        pairs: sorted pair of each row; rows not in use name one past the last pair.
        places: row, counted over all blocks, of each sorted pair; pairs of no expert here name one past the last row.
    """

    num_blocks: Int32[Array, ""]
    experts: Int32[Array, " blocks"]
    pairs: Int32[Array, "blocks block"]
    places: Int32[Array, " pairs"]


def plan_blocks(sorted_experts: Int32[Array, " pairs"], *, num_experts: int, block: int) -> BlockPlan:
    """Return the plan for pairs sorted by expert.

    Args:
        sorted_experts: expert of each pair, ascending; `num_experts` and above are nobody's and come last.
        num_experts: experts here.
        block: rows of a block.
    """
    num_pairs = sorted_experts.shape[0]
    # every block in use holds a pair, and every expert leaves at most one block not full
    most = min(num_pairs, num_pairs // block + min(num_experts, num_pairs))
    sizes = jnp.bincount(sorted_experts, length=num_experts).astype(jnp.int32)
    blocks = -(-sizes // block)
    pair_ends, block_ends = jnp.cumsum(sizes), jnp.cumsum(blocks)
    index = jnp.arange(most, dtype=jnp.int32)
    experts = jnp.searchsorted(block_ends, index, side="right", method="compare_all").astype(jnp.int32)
    experts = jnp.minimum(experts, num_experts - 1)
    first_pair = (pair_ends - sizes)[experts] + (index - (block_ends - blocks)[experts]) * block
    pairs = first_pair[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
    used = (pairs < pair_ends[experts][:, None]) & (index < block_ends[-1])[:, None]
    own = jnp.minimum(sorted_experts, num_experts - 1)
    order = jnp.arange(num_pairs, dtype=jnp.int32)
    places = (block_ends - blocks)[own] * block + order - (pair_ends - sizes)[own]
    return BlockPlan(
        num_blocks=block_ends[-1],
        experts=experts,
        pairs=jnp.where(used, pairs, num_pairs),
        places=jnp.where(sorted_experts < num_experts, places, most * block),
    )


def _by_blocks(
    experts: Experts, x: Float[Array, "rows hidden"], tokens: Int32[Array, " pairs"], owners: Int32[Array, " pairs"]
) -> Float[Array, "pairs hidden"]:
    """Each sorted pair's expert output: a loop over the blocks in use, no longer than the routing needs."""
    num_experts, hidden = experts.down_proj.shape[0], x.shape[1]
    block = rows_per_block(owners.shape[0], num_experts)
    plan = plan_blocks(owners, num_experts=num_experts, block=block)
    # rows not in use read token 0: what they compute is never looked at
    row_tokens = jnp.append(tokens, 0)[plan.pairs]

    def one(index: Int32[Array, ""], out: Float[Array, "places hidden"]) -> Float[Array, "places hidden"]:
        own = plan.experts[index]
        gate_up = product("bh,hg->bg", x[row_tokens[index]], experts.gate_up_proj[own])
        gated = experts.gated(gate_up + experts.gate_up_proj_bias[own][None])
        rows = product("bm,mh->bh", gated, experts.down_proj[own]) + experts.down_proj_bias[own][None]
        return lax.dynamic_update_slice_in_dim(out, rows, index * block, axis=0)

    out = jnp.zeros((plan.pairs.size, hidden), x.dtype)
    out = lax.fori_loop(jnp.int32(0), plan.num_blocks, one, out)
    return out.at[plan.places].get(mode="fill", fill_value=0)


Grouped = Callable[[Array, Array, Array], Array]
"""`(rows [pairs, k], weights [experts, k, n], sizes [experts]) -> [pairs, n]`, rows sorted by expert."""


def _by_groups(
    grouped: Grouped,
    experts: Experts,
    x: Float[Array, "rows hidden"],
    tokens: Int32[Array, " pairs"],
    owners: Int32[Array, " pairs"],
) -> Float[Array, "pairs hidden"]:
    """Each sorted pair's expert output by grouped matrix products."""
    num_experts = experts.down_proj.shape[0]
    sizes = jnp.bincount(owners, length=num_experts).astype(jnp.int32)
    own = jnp.minimum(owners, num_experts - 1)
    gate_up = grouped(x[tokens], experts.gate_up_proj, sizes) + experts.gate_up_proj_bias[own]
    rows = grouped(experts.gated(gate_up), experts.down_proj, sizes) + experts.down_proj_bias[own]
    # rows of no group are zero or anything in a grouped product, and have no bias
    return jnp.where((owners < num_experts)[:, None], rows, 0)


def _ragged_dot(
    rows: Float[Array, "pairs k"], weights: Float[Array, "experts k n"], sizes: Int32[Array, " experts"]
) -> Float[Array, "pairs n"]:
    return lax.ragged_dot(rows, weights, sizes, precision=lax.Precision.HIGHEST)


HOPPER_TILE = 64  # rows, columns and depth of the least tile of Hopper's matrix unit
# The kernel reads every expert's weights, also of those that no row chose: with a few rows, blocks are faster. H100,
# shapes of gpt-oss-20b: 4 pairs 0.45 ms by blocks, 0.83 by the kernel; 256 pairs 3.5 and 0.94.
HOPPER_FEWEST_PAIRS = 16


def hopper_tiles(pairs: int, columns: int) -> dict[str, Any]:
    """Return the grouped kernel's tile sizes for `pairs` rows and a matrix of `columns` (a multiple of 64).

    Fewer rows than a large tile waste it where every expert has few, and are bound by the weights' bytes anyway. Tiles
    of 128 x 192, three side by side, were the fastest of six on an H100 with gpt-oss-20b's shapes (591 TFLOP/s).
    """
    across = next(size for size in (192, 128, HOPPER_TILE) if columns % size == 0)
    tiles = columns // across
    return {
        "block_m": 128 if pairs >= 4096 else HOPPER_TILE,
        "block_n": across,
        "block_k": HOPPER_TILE,
        "max_concurrent_steps": 4,
        "grid_block_n": next(size for size in (3, 5, 2, 1) if tiles % size == 0),
    }


def _hopper_dot(
    rows: Float[Array, "pairs k"], weights: Float[Array, "experts k n"], sizes: Int32[Array, " experts"]
) -> Float[Array, "pairs n"]:
    """A grouped product by jax's Mosaic GPU kernel; rows past the groups hold anything."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu  # its own imports want a GPU build of jax

    pairs = rows.shape[0]
    rows = jnp.pad(rows, ((0, max(0, HOPPER_TILE - pairs)), (0, 0)))
    tiles = hopper_tiles(pairs, weights.shape[-1])
    return ragged_dot_mgpu.ragged_dot(rows, weights, group_sizes=sizes, **tiles)[:pairs]


def _has_hopper_kernel(experts: Experts, num_pairs: int) -> bool:
    """Whether jax's kernel for Hopper fits and pays: the device, 16-bit weights, sizes in whole tiles, enough rows."""
    return (
        jax.default_backend() == "gpu"
        and num_pairs >= HOPPER_FEWEST_PAIRS
        and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
        and experts.down_proj.dtype.itemsize == 2
        and all(size % HOPPER_TILE == 0 for size in (*experts.down_proj.shape[1:], experts.gate_up_proj.shape[-1]))
    )


def apply_experts(
    experts: Experts,
    x: Float[Array, "rows hidden"],
    chosen: Int32[Array, "rows top_k"],
    shares: Float[Array, "rows top_k"],
) -> Float[Array, "rows hidden"]:
    """Return every row's sum of its chosen experts' outputs times their shares.

    Args:
        experts: the experts here.
        x: the rows.
        chosen: experts of each row; numbers outside 0 to E-1 are experts held elsewhere and add nothing here.
        shares: their weights.
    """
    num_experts, top_k = experts.down_proj.shape[0], chosen.shape[1]
    owners = chosen.reshape(-1)
    owners = jnp.where((owners >= 0) & (owners < num_experts), owners, num_experts)
    order = jnp.argsort(owners, stable=True).astype(jnp.int32)
    pairs = order // top_k, owners[order]
    if _has_hopper_kernel(experts, order.shape[0]):
        rows = _by_groups(_hopper_dot, experts, x, *pairs)
    else:
        rows = lax.platform_dependent(experts, x, *pairs, tpu=partial(_by_groups, _ragged_dot), default=_by_blocks)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    per_row = rows[back].reshape(*chosen.shape, -1)
    return product("rkh,rk->rh", per_row, shares, out=jnp.float32).astype(x.dtype)


class MoE(eqx.Module):
    """A router and its experts.

    Attributes:
        router: a logit per expert.
        experts: all of them.
        top_k: experts that work on a token.
    """

    router: Linear
    experts: Experts
    top_k: int = eqx.field(static=True)

    def route(self, x: Float[Array, "rows hidden"]) -> tuple[Int32[Array, "rows top_k"], Float[Array, "rows top_k"]]:
        """Return each row's chosen experts, best first, and their shares: a softmax over the chosen, float32.

        **Source:** huggingface/transformers `models/gpt_oss/modeling_gpt_oss.py`, `GptOssTopKRouter`; it differs in
        that the softmax is float32 whatever the activations are.
        """
        logits, chosen = lax.top_k(self.router(x).astype(jnp.float32), self.top_k)
        return chosen.astype(jnp.int32), jax.nn.softmax(logits, axis=-1)

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        """Return the MLP's output, not added to the residual stream."""
        flat = x.reshape(-1, x.shape[-1])
        chosen, shares = self.route(flat)
        return apply_experts(self.experts, flat, chosen, shares).reshape(x.shape)
