"""Which tensors a config calls for, which logical axes they have, and where in the model they go.

Names and axis orders are the checkpoint's own (Hugging Face's), so that loading transposes and copies nothing. MXFP4
checkpoints hold the experts' matrices as blocks and scales instead; `stored_shapes` says so, `tensor_shapes` does not.
"""

from collections.abc import Callable, Iterable

import jax
from jax.sharding import Mesh

from dflash_jax.nn import Experts, Linear, MoE, RMSNorm, SwiGLU
from dflash_jax.targets.config import TargetConfig
from dflash_jax.targets.decoder import Attention, DecoderLayer, Target
from dflash_jax.targets.mxfp4 import MXFP4_GROUP


def axis_sizes(config: TargetConfig) -> dict[str, int]:
    """Return the size of every logical axis.

    `heads` and `kv_heads` count channels (heads times head_dim), as the rows of projections do; `gate_up` is the
    interleaved gate and up columns of gpt-oss's experts: gate of unit i at column 2i, up at 2i + 1.
    """
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "head_dim": config.head_dim,
        "sinks": config.num_heads,
        "mlp": config.intermediate_size,
        "gate_up": 2 * config.intermediate_size,
        "experts": config.num_experts,
    }


def _attention_axes(config: TargetConfig) -> dict[str, tuple[str, ...]]:
    outputs = {"q_proj": "heads", "k_proj": "kv_heads", "v_proj": "kv_heads"}
    axes: dict[str, tuple[str, ...]] = {f"{name}.weight": (axis, "hidden") for name, axis in outputs.items()}
    axes["o_proj.weight"] = ("hidden", "heads")
    if config.attention_bias:
        axes |= {f"{name}.bias": (axis,) for name, axis in (outputs | {"o_proj": "hidden"}).items()}
    if config.qk_norm:
        axes |= {"q_norm.weight": ("head_dim",), "k_norm.weight": ("head_dim",)}
    if config.attention_sinks:
        axes["sinks"] = ("sinks",)
    return axes


def _mlp_axes(config: TargetConfig) -> dict[str, tuple[str, ...]]:
    if config.num_experts:
        return {
            "router.weight": ("experts", "hidden"),
            "router.bias": ("experts",),
            "experts.gate_up_proj": ("experts", "hidden", "gate_up"),
            "experts.gate_up_proj_bias": ("experts", "gate_up"),
            "experts.down_proj": ("experts", "mlp", "hidden"),
            "experts.down_proj_bias": ("experts", "hidden"),
        }
    axes: dict[str, tuple[str, ...]] = {
        "gate_proj.weight": ("mlp", "hidden"),
        "up_proj.weight": ("mlp", "hidden"),
        "down_proj.weight": ("hidden", "mlp"),
    }
    if config.mlp_bias:
        axes |= {"gate_proj.bias": ("mlp",), "up_proj.bias": ("mlp",), "down_proj.bias": ("hidden",)}
    return axes


def tensor_axes(config: TargetConfig) -> dict[str, tuple[str, ...]]:
    """Return the logical axes of every tensor of the model, by its checkpoint name."""
    axes: dict[str, tuple[str, ...]] = {"model.embed_tokens.weight": ("vocab", "hidden")}
    axes["model.norm.weight"] = ("hidden",)
    if not config.tie_embeddings:
        axes["lm_head.weight"] = ("vocab", "hidden")
    layer: dict[str, tuple[str, ...]] = {
        "input_layernorm.weight": ("hidden",),
        "post_attention_layernorm.weight": ("hidden",),
    }
    layer |= {f"self_attn.{name}": names for name, names in _attention_axes(config).items()}
    layer |= {f"mlp.{name}": names for name, names in _mlp_axes(config).items()}
    for i in range(config.num_layers):
        axes |= {f"model.layers.{i}.{name}": names for name, names in layer.items()}
    return axes


def tensor_shapes(config: TargetConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the model's tensors, which are those of a checkpoint that is not quantised."""
    sizes = axis_sizes(config)
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in tensor_axes(config).items()}


def stored_names(config: TargetConfig, name: str) -> tuple[str, ...]:
    """Return the tensors of the file that make one tensor of the model: itself, or its MXFP4 blocks and scales."""
    if config.mxfp4 and name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return f"{name}_blocks", f"{name}_scales"
    return (name,)


def stored_shapes(config: TargetConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the checkpoint's own tensors.

    An MXFP4 matrix `[experts, in, out]` of the model lies in the file transposed, quantised along `in`: uint8 blocks
    `[experts, out, in / 32, 16]` and uint8 scales `[experts, out, in / 32]`.
    """
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        names = stored_names(config, name)
        if len(names) == 1:
            stored[name] = shape
            continue
        experts, n_in, n_out = shape
        groups = n_in // MXFP4_GROUP
        stored |= {names[0]: (experts, n_out, groups, MXFP4_GROUP // 2), names[1]: (experts, n_out, groups)}
    return stored


def assemble(
    config: TargetConfig,
    take: Callable[[str], jax.Array],
    *,
    mesh: Mesh | None = None,
    layers: Iterable[int] | None = None,
) -> Target:
    """Return the model made of tensors.

    Args:
        config: the architecture.
        take: gives the tensor of a name of `tensor_shapes`; called once for each.
        mesh: the devices the tensors are split over; None is one device.
        layers: those the model gets, in this order; None is all.
    """
    names = tensor_shapes(config).keys()

    def linear(name: str) -> Linear:
        bias = f"{name}.bias"
        return Linear(weight=take(f"{name}.weight"), bias=take(bias) if bias in names else None)

    def norm(name: str) -> RMSNorm:
        return RMSNorm(weight=take(f"{name}.weight"), eps=config.rms_norm_eps, cast_last=config.norm_cast_last)

    def attention(prefix: str, index: int) -> Attention:
        return Attention(
            **{name: linear(f"{prefix}.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
            q_norm=norm(f"{prefix}.q_norm") if config.qk_norm else None,
            k_norm=norm(f"{prefix}.k_norm") if config.qk_norm else None,
            sinks=take(f"{prefix}.sinks") if config.attention_sinks else None,
            head_dim=config.head_dim,
            window=config.sliding_window if index in config.sliding_layers else None,
        )

    def mlp(prefix: str) -> SwiGLU | MoE:
        if not config.num_experts:
            return SwiGLU(**{name: linear(f"{prefix}.{name}") for name in ("gate_proj", "up_proj", "down_proj")})
        matrices = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        return MoE(
            router=linear(f"{prefix}.router"),
            experts=Experts(
                **{name: take(f"{prefix}.experts.{name}") for name in matrices},
                alpha=config.swiglu_alpha,
                limit=config.swiglu_limit,
            ),
            top_k=config.experts_per_token,
        )

    def layer(index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        return DecoderLayer(
            input_layernorm=norm(f"{prefix}.input_layernorm"),
            self_attn=attention(f"{prefix}.self_attn", index),
            post_attention_layernorm=norm(f"{prefix}.post_attention_layernorm"),
            mlp=mlp(f"{prefix}.mlp"),
        )

    return Target(
        embed_tokens=take("model.embed_tokens.weight"),
        layers=tuple(layer(i) for i in (range(config.num_layers) if layers is None else layers)),
        norm=norm("model.norm"),
        lm_head=None if config.tie_embeddings else take("lm_head.weight"),
        config=config,
        mesh=mesh,
    )
