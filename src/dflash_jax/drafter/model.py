"""The public DFlash graph: features become context keys and values, a block's slots attend to them and to each other.

**Source:** DFlash (arXiv 2602.06036) section 3; z-lab/dflash@44947fb:dflash/model.py. The maths is the same; here the
context's keys and values are made once for all blocks of a sequence, and many anchors of many sequences are drafted in
one forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from dflash_jax.drafter.config import DrafterConfig
from dflash_jax.drafter.remat import rematerialised
from dflash_jax.nn import Linear, RMSNorm, SwiGLU, apply_rope, block_attention, rope_cos_sin

INITIALIZER_RANGE = 0.02
Lookup = Callable[[Array, Array], Array]  # (table [vocab, hidden], ids) -> rows


class ContextKV(eqx.Module):
    """Keys (after k_norm and RoPE) and values of one drafter layer for the context rows of one sequence."""

    k: Float[Array, "*batch kv_heads context head_dim"]
    v: Float[Array, "*batch kv_heads context head_dim"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """How a forward is computed; the maths is the same.

    Attributes:
        dtype: of activations and products; None: that of the weights. Norms, softmax, RoPE and all sums are float32,
            and the gradients of wider weights are of the weights' dtype.
        remat: whether the backward pass makes a layer's activations again from its inputs and does not keep them.
    """

    dtype: jnp.dtype | None = None
    remat: bool = False

    def kept(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, of which the backward pass keeps the arguments alone where `remat` is on."""
        return rematerialised(function) if self.remat else function


AS_STORED = Compute()


class DrafterAttention(eqx.Module):
    """Projections and norms of one layer's attention; k and v serve context rows and block slots alike."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm
    k_norm: RMSNorm


class DrafterLayer(eqx.Module):
    """Pre-norm layer over block slots."""

    input_layernorm: RMSNorm
    self_attn: DrafterAttention
    post_attention_layernorm: RMSNorm
    mlp: SwiGLU


class Drafter(eqx.Module):
    """A DFlash drafter: no embedding and no head of its own, both are the target's and are passed in.

    Attributes:
        fc: features to hidden, no bias.
        hidden_norm: norm of the projected features.
        layers: in order.
        norm: final norm, before the target's head.
        config: sizes.
        draft_ids: the draft vocabulary: ids that drafts are chosen among, rising; None: all. Not trained.
    """

    fc: Linear
    hidden_norm: RMSNorm
    layers: tuple[DrafterLayer, ...]
    norm: RMSNorm
    config: DrafterConfig = eqx.field(static=True)
    draft_ids: Int32[Array, " draft_vocab"] | None = None


def init_drafter(config: DrafterConfig, *, key: PRNGKeyArray) -> Drafter:
    """Return a drafter with float32 weights: matrices N(0, 0.02), biases 0, norms 1 (the public initialisation)."""
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    keys = iter(jax.random.split(key, 7 * config.num_layers + 1))

    def linear(n_out: int, n_in: int, *, bias: bool = False) -> Linear:
        weight = INITIALIZER_RANGE * jax.random.normal(next(keys), (n_out, n_in), jnp.float32)
        return Linear(weight=weight, bias=jnp.zeros(n_out) if bias else None)

    def norm(size: int) -> RMSNorm:
        return RMSNorm(weight=jnp.ones(size), eps=config.rms_norm_eps)

    def layer() -> DrafterLayer:
        bias = config.attention_bias
        attention = DrafterAttention(
            q_proj=linear(config.num_heads * d, hidden, bias=bias),
            k_proj=linear(config.num_kv_heads * d, hidden, bias=bias),
            v_proj=linear(config.num_kv_heads * d, hidden, bias=bias),
            o_proj=linear(hidden, config.num_heads * d, bias=bias),
            q_norm=norm(d),
            k_norm=norm(d),
        )
        mlp = SwiGLU(gate_proj=linear(inner, hidden), up_proj=linear(inner, hidden), down_proj=linear(hidden, inner))
        return DrafterLayer(
            input_layernorm=norm(hidden), self_attn=attention, post_attention_layernorm=norm(hidden), mlp=mlp
        )

    return Drafter(
        fc=linear(hidden, config.num_features),
        hidden_norm=norm(hidden),
        layers=tuple(layer() for _ in range(config.num_layers)),
        norm=norm(hidden),
        config=config,
    )


def _layer_context(
    layer: DrafterLayer,
    rows: Float[Array, "*batch context hidden"],
    cos_sin: tuple[Float[Array, "*batch context half_dim"], Float[Array, "*batch context half_dim"]],
    *,
    head_dim: int,
) -> ContextKV:
    attention = layer.self_attn
    k, v = (
        projection(rows).reshape(*rows.shape[:-1], -1, head_dim) for projection in (attention.k_proj, attention.v_proj)
    )
    k = apply_rope(attention.k_norm(k), cos_sin)
    return ContextKV(k=k.swapaxes(-3, -2), v=v.swapaxes(-3, -2))


def context_kv(
    drafter: Drafter,
    features: Float[Array, "*batch context features"],
    positions: Int32[Array, "*batch context"],
    *,
    compute: Compute = AS_STORED,
) -> tuple[ContextKV, ...]:
    """Return every layer's keys and values of context rows; each row depends on its own features and position only.

    Args:
        drafter: the drafter.
        features: target features, one row per token; cast to the dtype of the computation.
        positions: absolute position of each row.
        compute: how it is computed.
    """
    rows = drafter.hidden_norm(drafter.fc(features.astype(compute.dtype or drafter.fc.weight.dtype)))
    cos_sin = rope_cos_sin(drafter.config.rope, positions)
    one = compute.kept(partial(_layer_context, head_dim=drafter.config.head_dim))
    return tuple(one(layer, rows, cos_sin) for layer in drafter.layers)


def _spread(
    rows: Float[Array, "*batch anchor some channels"], *, block: int
) -> Float[Array, "*batch anchor block channels"]:
    """A row for every slot, of slot 0's and of the one that all masks share; rows of all slots stay as they are."""
    if rows.shape[-2] == block:
        return rows
    masks = jnp.broadcast_to(rows[..., 1:, :], (*rows.shape[:-2], block - 1, rows.shape[-1]))
    return jnp.concatenate([rows[..., :1, :], masks], axis=-2)


def _run_layer(
    layer: DrafterLayer,
    x: Float[Array, "*batch anchor some hidden"],
    kv: ContextKV,
    lengths: tuple[Int32[Array, "*batch anchor"], Int32[Array, "*batch anchor"]],
    cos_sin: tuple[Float[Array, "*batch anchor block half_dim"], Float[Array, "*batch anchor block half_dim"]],
    *,
    head_dim: int,
    first: int = 0,
    window: int | None = None,
    causal: bool = False,
) -> Float[Array, "*batch anchor asked hidden"]:
    """One layer over the slots; `lengths` are the contexts' and the blocks', for the rest see `block_attention`.

    Rows are those of every slot, or of slot 0 and of all masks: what is the same for every mask is then made once.
    Slots before `first` are seen by the others, and get no output of their own.
    """
    block = cos_sin[0].shape[-2]
    attention, y = layer.self_attn, layer.input_layernorm(x)
    q, k, v = (
        _spread(projection(y), block=block) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k, v = (rows.reshape(*rows.shape[:-1], -1, head_dim) for rows in (q, k, v))
    q, k = apply_rope(attention.q_norm(q), cos_sin), apply_rope(attention.k_norm(k), cos_sin)
    attended = block_attention(q, kv.k, kv.v, lengths[0], k, v, lengths[1], window=window, causal=causal)
    attended = attended.reshape(*attended.shape[:-2], -1)
    x = _spread(x, block=block)[..., first:, :] + attention.o_proj(attended[..., first:, :])
    return x + layer.mlp(layer.post_attention_layernorm(x))


def draft_hidden(
    drafter: Drafter,
    context: tuple[ContextKV, ...],
    inputs: Float[Array, "*batch anchor 2 hidden"],
    *,
    positions: Int32[Array, "*batch anchor block"],
    context_lengths: Int32[Array, "*batch anchor"],
    block_lengths: Int32[Array, "*batch anchor"],
    compute: Compute = AS_STORED,
) -> Float[Array, "*batch anchor drafted hidden"]:
    """Return the drafter's output, after its final norm, for slots 1 to B-1 of every block of one sequence.

    Slot 0, the anchor, is seen by the others and drafts nothing: its output is not made.

    Args:
        drafter: the drafter.
        context: one sequence's `context_kv`.
        inputs: of each block, `embed_inputs`: slot 0's embedding, and that of all other slots.
        positions: absolute position of each slot.
        context_lengths: rows each block may see, the first ones: those strictly before its anchor.
        block_lengths: slots that exist, the first ones; the others are computed and mean nothing.
        compute: how it is computed.
    """
    cos_sin = rope_cos_sin(drafter.config.rope, positions)
    x = inputs.astype(compute.dtype or drafter.fc.weight.dtype)
    config = drafter.config
    for number, (layer, kv) in enumerate(zip(drafter.layers, context, strict=True)):
        first = 1 if number == config.num_layers - 1 else 0
        sight = {"window": config.window_of(number), "causal": config.is_causal_layer(number)}
        run = compute.kept(partial(_run_layer, head_dim=config.head_dim, first=first, **sight))
        x = run(layer, x, kv, (context_lengths, block_lengths), cos_sin)
    return drafter.norm(x)


def take_rows(table: Float[Array, "vocab hidden"], ids: Int32[Array, "*ids"]) -> Float[Array, "*ids hidden"]:
    """Return the rows of a table that one device holds whole."""
    return table[ids]


def embed_inputs(
    embed_tokens: Float[Array, "vocab hidden"],
    anchor_tokens: Int32[Array, "*anchors"],
    config: DrafterConfig,
    *,
    lookup: Lookup = take_rows,
) -> Float[Array, "*anchors 2 hidden"]:
    """Return each block's inputs: the anchor token's embedding, of slot 0, and the mask token's, of slots 1 to B-1.

    Args:
        embed_tokens: the target's embedding.
        anchor_tokens: id of each block's first token.
        config: of the drafter.
        lookup: rows of the embedding by id; another one than `take_rows` where devices share the table.
    """
    masks = jnp.full_like(anchor_tokens, config.mask_token_id)
    return lookup(embed_tokens, jnp.stack([anchor_tokens, masks], axis=-1))


def draft_in_context(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    context: tuple[ContextKV, ...],
    token_ids: Int32[Array, "*batch context"],
    anchors: Int32[Array, "*batch anchor"],
    *,
    block_lengths: Int32[Array, "*batch anchor"],
    block_size: int,
    block_offset: Int32[Array, "*batch"],
    compute: Compute = AS_STORED,
    lookup: Lookup = take_rows,
) -> Float[Array, "*batch anchor drafted hidden"]:
    """Return the drafter's output for slots 1 to B-1 of blocks at many anchors of one sequence, given its context.

    Args:
        drafter: the drafter.
        embed_tokens: the target's embedding.
        context: every layer's keys and values of the whole sequence; a block sees the rows strictly before its anchor.
        token_ids: the sequence.
        anchors: index of each block's first token.
        block_lengths: slots of each block that exist, 1 to block_size.
        block_size: slots computed per block.
        block_offset: absolute position of token 0, as the slots' positions count it.
        compute: how it is computed.
        lookup: see `embed_inputs`.
    """
    slot = jnp.arange(block_size, dtype=jnp.int32)
    firsts = block_offset[..., None] + anchors
    return draft_hidden(
        drafter,
        context,
        embed_inputs(embed_tokens, jnp.take_along_axis(token_ids, anchors, axis=-1), drafter.config, lookup=lookup),
        positions=firsts[..., None] + jnp.expand_dims(slot, tuple(range(anchors.ndim))),
        context_lengths=anchors,
        block_lengths=block_lengths,
        compute=compute,
    )


def draft_blocks(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    features: Float[Array, "*batch seq features"],
    token_ids: Int32[Array, "*batch seq"],
    anchors: Int32[Array, "*batch anchor"],
    *,
    block_lengths: Int32[Array, "*batch anchor"],
    block_size: int,
    position_offset: Int32[Array, "*batch"],
    compute: Compute = AS_STORED,
    lookup: Lookup = take_rows,
) -> Float[Array, "*batch anchor drafted hidden"]:
    """Return the drafter's output for slots 1 to B-1 of blocks at many anchors of one sequence, from its features.

    Args:
        drafter: the drafter.
        embed_tokens: the target's embedding.
        features: of every token of the sequence; a block sees those strictly before its anchor, so padding past the
            last anchor changes nothing.
        token_ids: the sequence.
        anchors: index of each block's first token.
        block_lengths: slots of each block that exist, 1 to block_size.
        block_size: slots computed per block.
        position_offset: absolute position of token 0.
        compute: how it is computed.
        lookup: see `embed_inputs`.
    """
    index = jnp.arange(features.shape[-2], dtype=jnp.int32)
    positions = position_offset[..., None] + jnp.expand_dims(index, tuple(range(position_offset.ndim)))
    return draft_in_context(
        drafter,
        embed_tokens,
        context_kv(drafter, features, positions, compute=compute),
        token_ids,
        anchors,
        block_lengths=block_lengths,
        block_size=block_size,
        block_offset=position_offset,
        compute=compute,
        lookup=lookup,
    )
