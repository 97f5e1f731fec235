"""New drafters: from nothing, or warm-started from the target's own layers."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dflash_jax.core import InputError
from dflash_jax.drafter import Drafter, DrafterConfig, DrafterLayer, check_not_last_layer, init_drafter
from dflash_jax.nn import Linear, RMSNorm, SwiGLU
from dflash_jax.targets import DecoderLayer, Target, TargetConfig


def drafter_config(
    target: Target | TargetConfig,
    *,
    capture_layers: tuple[int, ...],
    num_layers: int,
    block_size: int,
    mask_token_id: int,
    sliding_window: int | None = None,
    full_layers: tuple[int, ...] = (),
) -> DrafterConfig:
    """Return the config of a drafter shaped like its target's layers, with its biases and its rotary embedding.

    A target of experts has no dense MLP to take the width from: 8/3 of the hidden size then, as published gpt-oss
    drafters have it (7680 of 2880). With a `sliding_window` all layers but `full_layers` slide.

    Raises:
        InputError: the target's last layer is captured; layers are named that the drafter has not.
    """
    config = target if isinstance(target, TargetConfig) else target.config
    check_not_last_layer(capture_layers, config.num_layers, what="the drafter")
    if not set(full_layers) <= set(range(num_layers)):
        raise InputError(
            f"--full-layers is {','.join(map(str, full_layers))}: the drafter has layers 0 to {num_layers - 1}"
        )
    sliding = tuple(layer for layer in range(num_layers) if layer not in full_layers) if sliding_window else ()
    return DrafterConfig(
        hidden_size=config.hidden_size,
        intermediate_size=8 * config.hidden_size // 3 if config.num_experts else config.intermediate_size,
        num_layers=num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        attention_bias=config.attention_bias,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
        max_positions=config.max_positions,
        block_size=block_size,
        mask_token_id=mask_token_id,
        capture_layers=capture_layers,
        num_target_layers=config.num_layers,
        vocab_size=config.vocab_size,
        sliding_window=sliding_window if sliding else None,
        sliding_layers=sliding,
    )


def _channel_rms(weight: Float[Array, "out hidden"], head_dim: int) -> Float[Array, " head_dim"]:
    """Typical size of each head channel of a projection whose inputs have unit variance, averaged over heads."""
    return jnp.sqrt(jnp.square(weight).sum(axis=1).reshape(-1, head_dim).mean(axis=0))


def _head_norm(norm: RMSNorm | None, projection: Linear, head_dim: int) -> Float[Array, " head_dim"]:
    """The target's own weight of a head norm, or in a family without one each channel's typical size."""
    return _channel_rms(projection.weight, head_dim) if norm is None else norm.weight


def _warm_layer(layer: DrafterLayer, source: DecoderLayer, *, head_dim: int) -> DrafterLayer:
    """A drafter layer that starts as one of the target's; see `warm_start`."""
    attention, scale = source.self_attn, source.input_layernorm.weight[None]
    q, k, v = (
        Linear(weight=projection.weight * scale, bias=projection.bias)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return eqx.tree_at(
        lambda x: (
            x.self_attn.q_proj,
            x.self_attn.k_proj,
            x.self_attn.v_proj,
            x.self_attn.o_proj,
            x.self_attn.q_norm.weight,
            x.self_attn.k_norm.weight,
            x.post_attention_layernorm.weight,
            x.mlp,
        ),
        layer,
        (
            q,
            k,
            v,
            attention.o_proj,
            _head_norm(attention.q_norm, q, head_dim),
            _head_norm(attention.k_norm, k, head_dim),
            source.post_attention_layernorm.weight,
            source.mlp if isinstance(source.mlp, SwiGLU) else layer.mlp,
        ),
    )


def warm_layers(num_layers: int, *, num_target_layers: int) -> tuple[int, ...]:
    """Return the target's layers that `warm_start` copies: the first half, rounded down, from its front.

    Worked: 3 layers from a target of 30: (0, 28, 29).
    """
    first = num_layers // 2
    return (*range(first), *range(num_target_layers - (num_layers - first), num_target_layers))


def warm_start(drafter: Drafter, target: Target) -> Drafter:
    """Return the drafter with layers copied from the target's two ends, reading the deepest captured layer.

    The first half of the drafter's layers takes the target's first layers, which are made for what a block's slots are,
    token embeddings; the second half (the larger where n is odd) takes its last ones, which are made for the head. The
    target norms a layer's input with that layer's own weight, the drafter norms the context once for all layers: the
    weight is moved into q, k and v, and the layer's norm starts at 1. q_norm and k_norm are the target's; a family
    without them (Llama, gpt-oss) starts them at each channel's typical size, so attention logits keep their scale. A
    mixture of experts is not copied: the drafter's MLP is dense and keeps its random weights. `fc` starts as the
    identity on the last captured layer. All of it is trained on.

    **Source:** none; the ablation against random weights is in `docs/log.md`.
    """
    config = drafter.config
    hidden = config.hidden_size
    first = config.num_layers // 2
    # of a target of which `warm_layers` alone were loaded, these are all
    chosen = target.layers[:first] + target.layers[len(target.layers) - (config.num_layers - first) :]
    layers = tuple(_warm_layer(*pair, head_dim=config.head_dim) for pair in zip(drafter.layers, chosen, strict=True))
    deepest = max(range(len(config.capture_layers)), key=lambda i: config.capture_layers[i])
    fc = drafter.fc.weight.at[:, deepest * hidden : (deepest + 1) * hidden].add(jnp.eye(hidden))
    return eqx.tree_at(lambda x: (x.fc.weight, x.layers, x.norm.weight), drafter, (fc, layers, target.norm.weight))


def new_drafter(config: DrafterConfig, target: Target, *, init: str, key: PRNGKeyArray) -> Drafter:
    """Return a float32 drafter: `init` is "random", or "target" for `warm_start` on top of it."""
    drafter = jax.jit(lambda k: init_drafter(config, key=k))(key)
    if init == "random":
        return drafter
    # copies: the train step donates its state, the target must survive it
    with jax.numpy_dtype_promotion("standard"):  # the target may be bfloat16
        warm = warm_start(drafter, target)
    return jax.tree_util.tree_map(lambda leaf: jnp.array(leaf, jnp.float32), warm)
