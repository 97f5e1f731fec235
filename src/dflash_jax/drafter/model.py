"""The public DFlash graph: features become context keys and values, a block's slots attend to them and to each other.

**Source:** DFlash (arXiv 2602.06036) section 3; z-lab/dflash@44947fb:dflash/model.py. The maths is the same; here the
context's keys and values are made once for all blocks of a sequence, and many anchors are drafted in one forward.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from dflash_jax.drafter.config import DrafterConfig
from dflash_jax.nn import Linear, RMSNorm, SwiGLU, apply_rope, block_attention, rope_cos_sin

INITIALIZER_RANGE = 0.02


class ContextKV(eqx.Module):
    """Keys (after k_norm and RoPE) and values of one drafter layer for the context rows of one sequence."""

    k: Float[Array, "*batch kv_heads context head_dim"]
    v: Float[Array, "*batch kv_heads context head_dim"]


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
    """

    fc: Linear
    hidden_norm: RMSNorm
    layers: tuple[DrafterLayer, ...]
    norm: RMSNorm
    config: DrafterConfig = eqx.field(static=True)


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


def context_kv(
    drafter: Drafter, features: Float[Array, "context features"], positions: Int32[Array, " context"]
) -> tuple[ContextKV, ...]:
    """Return every layer's keys and values of context rows; each row depends on its own features and position only.

    Args:
        drafter: the drafter.
        features: target features, one row per token; cast to the drafter's dtype.
        positions: absolute position of each row.
    """
    rows = drafter.hidden_norm(drafter.fc(features.astype(drafter.fc.weight.dtype)))
    cos_sin = rope_cos_sin(drafter.config.rope, positions)

    def one(attention: DrafterAttention) -> ContextKV:
        k = attention.k_proj(rows).reshape(rows.shape[0], -1, drafter.config.head_dim)
        v = attention.v_proj(rows).reshape(k.shape)
        k = apply_rope(attention.k_norm(k), cos_sin)
        return ContextKV(k=k.swapaxes(0, 1), v=v.swapaxes(0, 1))

    return tuple(one(layer.self_attn) for layer in drafter.layers)


def draft_hidden(
    drafter: Drafter,
    context: tuple[ContextKV, ...],
    slots: Float[Array, "anchor block hidden"],
    *,
    positions: Int32[Array, "anchor block"],
    context_visible: Bool[Array, "anchor context"],
    slot_visible: Bool[Array, "anchor block"],
) -> Float[Array, "anchor block hidden"]:
    """Return the drafter's output, after its final norm, for every slot of every block of one sequence.

    Args:
        drafter: the drafter.
        context: one sequence's `context_kv`.
        slots: embeddings of the block inputs: the anchor token, then mask tokens.
        positions: absolute position of each slot.
        context_visible: rows each block may see: those strictly before its anchor.
        slot_visible: slots that exist; the others are computed and mean nothing.
    """
    cos_sin = rope_cos_sin(drafter.config.rope, positions)
    x = slots
    for layer, kv in zip(drafter.layers, context, strict=True):
        attention, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            projection(y).reshape(*y.shape[:2], -1, drafter.config.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rope(attention.q_norm(q), cos_sin), apply_rope(attention.k_norm(k), cos_sin)
        attended = block_attention(q, kv.k, kv.v, context_visible, k, v, slot_visible)
        x = x + attention.o_proj(attended.reshape(*y.shape[:2], -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return drafter.norm(x)


def embed_slots(
    embed_tokens: Float[Array, "vocab hidden"],
    anchor_tokens: Int32[Array, "*anchors"],
    config: DrafterConfig,
    *,
    block_size: int,
) -> Float[Array, "*anchors block hidden"]:
    """Return block inputs: the anchor token's embedding in slot 0, the mask token's in slots 1 to B-1."""
    masks = jnp.full((*anchor_tokens.shape, block_size - 1), config.mask_token_id, jnp.int32)
    return embed_tokens[jnp.concatenate([anchor_tokens[..., None], masks], axis=-1)]


def draft_in_context(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    context: tuple[ContextKV, ...],
    token_ids: Int32[Array, " context"],
    anchors: Int32[Array, " anchor"],
    *,
    block_lengths: Int32[Array, " anchor"],
    block_size: int,
    block_offset: Int32[Array, ""],
) -> Float[Array, "anchor block hidden"]:
    """Return the drafter's output for blocks at many anchors of one sequence whose `context_kv` is there already.

    Args:
        drafter: the drafter.
        embed_tokens: the target's embedding.
        context: every layer's keys and values of the whole sequence; a block sees the rows strictly before its anchor.
        token_ids: the sequence.
        anchors: index of each block's first token.
        block_lengths: slots of each block that exist, 1 to block_size.
        block_size: slots computed per block.
        block_offset: absolute position of token 0, as the slots' positions count it.
    """
    index = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    slot = jnp.arange(block_size, dtype=jnp.int32)
    return draft_hidden(
        drafter,
        context,
        embed_slots(embed_tokens, token_ids[anchors], drafter.config, block_size=block_size).astype(
            drafter.fc.weight.dtype
        ),
        positions=block_offset + anchors[:, None] + slot[None],
        context_visible=index[None] < anchors[:, None],
        slot_visible=slot[None] < block_lengths[:, None],
    )


def draft_blocks(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    features: Float[Array, "seq features"],
    token_ids: Int32[Array, " seq"],
    anchors: Int32[Array, " anchor"],
    *,
    block_lengths: Int32[Array, " anchor"],
    block_size: int,
    position_offset: Int32[Array, ""],
) -> Float[Array, "anchor block hidden"]:
    """Return the drafter's output for blocks at many anchors of one sequence: what training and the check both run.

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
    """
    index = jnp.arange(features.shape[0], dtype=jnp.int32)
    return draft_in_context(
        drafter,
        embed_tokens,
        context_kv(drafter, features, position_offset + index),
        token_ids,
        anchors,
        block_lengths=block_lengths,
        block_size=block_size,
        block_offset=position_offset,
    )
