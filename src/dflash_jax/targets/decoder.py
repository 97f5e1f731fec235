"""The decoder: one forward for prefill and for blocks, with the features of captured layers.

Families differ by which parts a layer has (biases, q/k norms, sinks, a window, experts), never by another forward.
"""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from dflash_jax.nn import (
    Linear,
    MoE,
    RMSNorm,
    Rope,
    Screen,
    SwiGLU,
    apply_rope,
    causal_attention,
    greedy_tokens,
    make_screen,
    on_one_cpu,
    prefill_attention,
    rope_cos_sin,
    screen_pays,
    top_tokens,
    write_first_rows,
    write_rows,
)
from dflash_jax.targets.config import TargetConfig
from dflash_jax.targets.sharding import apply_mlp, constrain, greedy_tokens_split, top_tokens_split


class LayerKV(eqx.Module):
    """Keys (after RoPE) and values of one layer, by cache row."""

    k: Float[Array, "batch kv_heads capacity head_dim"]
    v: Float[Array, "batch kv_heads capacity head_dim"]


_ROWS = ("batch", None, None)  # logical axes of what is [batch, query, ...]
_KV = ("batch", "kv_heads", None, None)


def _pin_kv(kv: LayerKV, mesh: Mesh | None) -> LayerKV:
    return LayerKV(k=constrain(kv.k, _KV, mesh), v=constrain(kv.v, _KV, mesh))


class KVCache(eqx.Module):
    """What a target remembers of a batch of sequences. Rows at and past a sequence's length are garbage and never seen.

    Rejecting tokens is a smaller length: a copy with other `lengths` rolls back without touching a buffer.

    Attributes:
        layers: keys and values per decoder layer.
        lengths: rows in use per sequence.
        position_offset: absolute position of each sequence's token 0.
    """

    layers: tuple[LayerKV, ...]
    lengths: Int32[Array, " batch"]
    position_offset: Int32[Array, " batch"]

    @property
    def capacity(self) -> int:
        """Rows a sequence has room for."""
        return self.layers[0].k.shape[2]


def pin_cache(kv: KVCache, mesh: Mesh | None) -> KVCache:
    """Return the cache, pinned to the table's sharding inside a jitted function; a mesh of None pins nothing."""
    rows = lambda x: constrain(x, ("batch",), mesh)
    return KVCache(
        layers=tuple(_pin_kv(layer, mesh) for layer in kv.layers),
        lengths=rows(kv.lengths),
        position_offset=rows(kv.position_offset),
    )


class TargetOutput(eqx.Module):
    """What a forward gives for every token it was fed.

    Attributes:
        hidden: the last layer's output after the final norm: what the head reads.
        features: outputs of the captured layers (residual stream), concatenated in listed order; no columns when none
            is listed.
        kv: the cache with the new tokens' rows; its lengths are the old ones plus the valid new tokens.
    """

    hidden: Float[Array, "batch query hidden"]
    features: Float[Array, "batch query features"]
    kv: KVCache


class Attention(eqx.Module):
    """Causal grouped-query attention over the cache.

    Attributes:
        q_proj: queries, with a bias where the family has one; k_proj, v_proj and o_proj likewise.
        q_norm: RMSNorm over every head's channels before RoPE, k_norm likewise; None: none.
        sinks: one logit per head that joins the softmax and gives no value; None: none.
        head_dim: channels per head.
        window: tokens seen, the query's own included; None: all before it.
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    sinks: Float[Array, " heads"] | None
    head_dim: int = eqx.field(static=True)
    window: int | None = eqx.field(static=True)

    def __call__(
        self,
        x: Float[Array, "batch query hidden"],
        *,
        cos_sin: tuple[Float[Array, "batch query half_dim"], Float[Array, "batch query half_dim"]],
        kv: LayerKV,
        starts: Int32[Array, " batch"],
        from_empty: bool,
    ) -> tuple[Float[Array, "batch query hidden"], LayerKV]:
        """Return the attention output and the layer's cache with the new rows.

        `from_empty` says, when the program is made, that `starts` are zeros: there is nothing before the new rows.
        """
        batch, query, _ = x.shape
        q, k, v = (proj(x).reshape(batch, query, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        q, k = apply_rope(q, cos_sin), apply_rope(k, cos_sin)
        if from_empty:
            kv = LayerKV(k=write_first_rows(kv.k, k), v=write_first_rows(kv.v, v))
            attended = prefill_attention(q, k, v, window=self.window, sinks=self.sinks)
        else:
            kv = LayerKV(k=write_rows(kv.k, k, starts), v=write_rows(kv.v, v, starts))
            attended = causal_attention(q, kv.k, kv.v, starts, window=self.window, sinks=self.sinks)
        return self.o_proj(attended.reshape(batch, query, -1)), kv


class DecoderLayer(eqx.Module):
    """Pre-norm attention and MLP on a residual stream."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: SwiGLU | MoE


class Target(eqx.Module):
    """A decoder-only LLM whose inside can be read.

    Attributes:
        embed_tokens: embedding table.
        layers: decoder layers in order.
        norm: final norm.
        lm_head: vocabulary head, or None when it is tied to the embedding.
        config: sizes.
        mesh: the devices the tensors are split over; None is one device. It travels with the target, so that its
            forward and its cache are split the same way wherever it is used.
        screen: of the head, for `next_ids`; None: none, see `with_screen`.
    """

    embed_tokens: Float[Array, "vocab hidden"]
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    lm_head: Float[Array, "vocab hidden"] | None
    config: TargetConfig = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True, default=None)
    screen: Screen | None = None

    @property
    def head(self) -> Float[Array, "vocab hidden"]:
        """The vocabulary head, tied or not."""
        return self.embed_tokens if self.lm_head is None else self.lm_head


_make_screen = jax.jit(make_screen, static_argnames=("for_few_rows",))


def with_screen(target: Target, *, for_few_rows: bool = True) -> Target:
    """Return the target with a screen of its head where `next_ids` is faster for it, else as it is.

    A screen takes three quarters of the head's bytes, and pays where one target answers many times: in decoding.

    Args:
        target: the model.
        for_few_rows: whether few rows are asked for often, as in decoding; else a screen takes half the head's bytes.
    """
    if target.screen is not None or target.mesh is not None or not screen_pays(target.head.dtype, target.head):
        return target
    return replace(target, screen=_make_screen(target.head, for_few_rows=for_few_rows))


def empty_kv(target: Target, *, capacity: int, position_offset: Int32[Array, " batch"]) -> KVCache:
    """Return a cache of length 0. Bytes: `2 * layers * batch * kv_heads * capacity * head_dim * itemsize`.

    Its rows are in the target's dtype, and in float32 on one CPU, where XLA writes no 16-bit rows in place.
    """
    config, dtype = target.config, jnp.float32 if on_one_cpu() else target.embed_tokens.dtype
    shape = (position_offset.shape[0], config.num_kv_heads, capacity, config.head_dim)
    # two arrays, not one twice: donated buffers must be distinct
    layers = tuple(
        _pin_kv(
            LayerKV(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype)),
            target.mesh,
        )
        for _ in range(config.num_layers)
    )
    return KVCache(layers=layers, lengths=jnp.zeros_like(position_offset), position_offset=position_offset)


def extend(
    target: Target,
    kv: KVCache,
    tokens: Int32[Array, "batch query"],
    *,
    num_valid: Int32[Array, " batch"] | None = None,
    capture_layers: tuple[int, ...] = (),
) -> TargetOutput:
    """Feed every sequence its next tokens.

    Token i of a row is fed at cache row `lengths + i`, absolute position `position_offset + lengths + i`, and sees rows
    0 to `lengths + i`, in sliding layers the last `sliding_window` of them (`nn.causal_attention` draws it).

    Args:
        target: the model.
        kv: its memory so far; `lengths + query` must not exceed its capacity.
        tokens: ids, right-padded.
        num_valid: how many of each row's tokens are real; default all. Padding is computed and then forgotten.
        capture_layers: 0-based layers whose outputs are returned as features, in this order.

    Returns:
        Hidden states, features and the longer cache. Nothing of size tokens x vocabulary: see `next_ids`.
    """
    return _forward(target, kv, tokens, num_valid=num_valid, capture_layers=capture_layers, from_empty=False)


@eqx.filter_jit
def _run_layer(
    layer: DecoderLayer,
    x: Float[Array, "batch query hidden"],
    *,
    cos_sin: tuple[Float[Array, "batch query half_dim"], Float[Array, "batch query half_dim"]],
    kv: LayerKV,
    starts: Int32[Array, " batch"],
    from_empty: bool,
    mesh: Mesh | None,
) -> tuple[Float[Array, "batch query hidden"], LayerKV]:
    """The residual stream after a layer, and the layer's cache.

    A program of its own: layers of one kind are traced once, and compiled once where a forward runs operation by
    operation. Within a larger program XLA inlines it.
    """
    attended, kv = layer.self_attn(
        layer.input_layernorm(x), cos_sin=cos_sin, kv=kv, starts=starts, from_empty=from_empty
    )
    x = constrain(x + attended, _ROWS, mesh)
    x = constrain(x + apply_mlp(layer.mlp, layer.post_attention_layernorm(x), mesh), _ROWS, mesh)
    return x, _pin_kv(kv, mesh)


@eqx.filter_jit
def _begin(
    embed_tokens: Float[Array, "vocab hidden"],
    tokens: Int32[Array, "batch query"],
    starts: Int32[Array, " batch"],
    position_offset: Int32[Array, " batch"],
    *,
    rope: Rope,
    mesh: Mesh | None,
) -> tuple[
    Float[Array, "batch query hidden"],
    tuple[Float[Array, "batch query half_dim"], Float[Array, "batch query half_dim"]],
]:
    """The residual stream before the first layer, and the angles of its rows. A program of its own, as `_run_layer`."""
    rows = starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    cos_sin = rope_cos_sin(rope, position_offset[:, None] + rows)
    return constrain(embed_tokens[tokens], _ROWS, mesh), cos_sin


@eqx.filter_jit
def _finish(
    norm: RMSNorm,
    x: Float[Array, "batch query hidden"],
    captured: tuple[Float[Array, "batch query hidden"], ...],
    *,
    mesh: Mesh | None,
) -> tuple[Float[Array, "batch query hidden"], Float[Array, "batch query features"]]:
    """What the head reads, and the features side by side. A program of its own, as `_run_layer`."""
    features = captured or (jnp.zeros((*x.shape[:-1], 0), x.dtype),)
    return norm(x), constrain(jnp.concatenate(features, axis=-1), _ROWS, mesh)


def _forward(
    target: Target,
    kv: KVCache,
    tokens: Int32[Array, "batch query"],
    *,
    num_valid: Int32[Array, " batch"] | None,
    capture_layers: tuple[int, ...],
    from_empty: bool,
) -> TargetOutput:
    """`extend`; `from_empty` says that all lengths of the cache are zero."""
    query = tokens.shape[1]
    assert query <= kv.capacity, f"{query} tokens do not fit a cache of {kv.capacity} rows"
    x, cos_sin = _begin(
        target.embed_tokens, tokens, kv.lengths, kv.position_offset, rope=target.config.rope, mesh=target.mesh
    )
    layer_caches, captured = [], {}
    for index, (layer, layer_kv) in enumerate(zip(target.layers, kv.layers, strict=True)):
        x, layer_kv = _run_layer(
            layer, x, cos_sin=cos_sin, kv=layer_kv, starts=kv.lengths, from_empty=from_empty, mesh=target.mesh
        )
        layer_caches.append(layer_kv)
        captured[index] = x
    hidden, features = _finish(target.norm, x, tuple(captured[index] for index in capture_layers), mesh=target.mesh)
    lengths = kv.lengths + (jnp.int32(query) if num_valid is None else num_valid)
    return TargetOutput(
        hidden=hidden,
        features=features,
        kv=KVCache(layers=tuple(layer_caches), lengths=lengths, position_offset=kv.position_offset),
    )


def prefill(
    target: Target,
    tokens: Int32[Array, "batch seq"],
    *,
    lengths: Int32[Array, " batch"],
    position_offset: Int32[Array, " batch"],
    capture_layers: tuple[int, ...] = (),
    capacity: int | None = None,
) -> TargetOutput:
    """Feed whole prompts to an empty cache: `extend` from length 0, with attention that knows it.

    Args:
        target: the model.
        tokens: ids, right-padded to a bucket.
        lengths: real tokens per row.
        position_offset: absolute position of each row's token 0; `position_offset + seq` stays below 2^31.
        capture_layers: 0-based layers whose outputs are returned as features.
        capacity: rows of the cache; default just the tokens given (enough where nothing follows).
    """
    kv = empty_kv(target, capacity=capacity or tokens.shape[1], position_offset=position_offset)
    return _forward(target, kv, tokens, num_valid=lengths, capture_layers=capture_layers, from_empty=True)


def next_ids(target: Target, hidden: Float[Array, "*rows hidden"]) -> Int32[Array, "*rows"]:
    """Return the target's greedy token after each row of `TargetOutput.hidden`.

    Logits are float32, and never more than `nn.head` allows at once.
    """
    if target.mesh is None:
        return greedy_tokens(hidden, target.head, screen=target.screen)
    flat = hidden.reshape(-1, 1, hidden.shape[-1]) if hidden.ndim != 3 else hidden
    return greedy_tokens_split(flat, target.head, target.mesh).reshape(hidden.shape[:-1])


def next_top(
    target: Target, hidden: Float[Array, "batch query hidden"], *, count: int
) -> tuple[Int32[Array, "batch query {count}"], Float[Array, "batch query {count}"]]:
    """Return the target's likeliest tokens after each row of `TargetOutput.hidden`; see `nn.top_tokens`."""
    if target.mesh is None:
        return top_tokens(hidden, target.head, count=count)
    return top_tokens_split(hidden, target.head, target.mesh, count=count)
