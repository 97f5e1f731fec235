"""Mixture of experts: every token is worked on by the few experts that its router chooses, and by no other.

Tokens are sorted by expert, so that each expert meets its own rows as one small matrix. Two computations of the same
numbers: on TPU `jax.lax.ragged_dot`, which is grouped there; elsewhere blocks of rows, since XLA lowers `ragged_dot` on
CPU to the full product of all rows with all experts (measured: as many times the FLOPs as there are experts).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from dflash_jax.nn.mlp import Linear

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
        gate_up = jnp.einsum("bh,hg->bg", x[row_tokens[index]], experts.gate_up_proj[own])
        gated = experts.gated(gate_up + experts.gate_up_proj_bias[own][None])
        rows = jnp.einsum("bm,mh->bh", gated, experts.down_proj[own]) + experts.down_proj_bias[own][None]
        return lax.dynamic_update_slice_in_dim(out, rows, index * block, axis=0)

    out = jnp.zeros((plan.pairs.size, hidden), x.dtype)
    out = lax.fori_loop(jnp.int32(0), plan.num_blocks, one, out)
    return out.at[plan.places].get(mode="fill", fill_value=0)


def _by_ragged_dot(
    experts: Experts, x: Float[Array, "rows hidden"], tokens: Int32[Array, " pairs"], owners: Int32[Array, " pairs"]
) -> Float[Array, "pairs hidden"]:
    """Each sorted pair's expert output by grouped matrix products."""
    num_experts = experts.down_proj.shape[0]
    sizes = jnp.bincount(owners, length=num_experts).astype(jnp.int32)
    own = jnp.minimum(owners, num_experts - 1)
    gate_up = lax.ragged_dot(x[tokens], experts.gate_up_proj, sizes) + experts.gate_up_proj_bias[own]
    rows = lax.ragged_dot(experts.gated(gate_up), experts.down_proj, sizes) + experts.down_proj_bias[own]
    # rows of no group are zero in a ragged product, but not their biases
    return jnp.where((owners < num_experts)[:, None], rows, 0)


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
    rows = lax.platform_dependent(experts, x, order // top_k, owners[order], tpu=_by_ragged_dot, default=_by_blocks)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    per_row = rows[back].reshape(*chosen.shape, -1)
    return jnp.einsum("rkh,rk->rh", per_row, shares, preferred_element_type=jnp.float32).astype(x.dtype)


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
