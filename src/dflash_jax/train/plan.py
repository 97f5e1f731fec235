"""What a run will take, from shapes alone: memory, FLOPs, traffic and a roofline's time, before anything is started."""

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax import targets
from dflash_jax.cache import DEFAULT_CAPTURE_COUNT, open_cache, read_responses
from dflash_jax.core import Device, InputError, MeshShape, parse_device, parse_mesh, split_axes
from dflash_jax.drafter import DrafterConfig, read_drafter_config
from dflash_jax.train.config import TrainConfig
from dflash_jax.train.grouping import bucket
from dflash_jax.train.init import drafter_config
from dflash_jax.train.memory import most_at_once, num_parameters, step_bytes, table_bytes, tables_are_wide
from dflash_jax.train.sharding import check_batch

DEFAULT_BLOCK_SIZE, DEFAULT_NUM_LAYERS = 8, 4
_WIDE = 4  # bytes of float32
_MOST_SCORES = 1 << 26  # of a sequence's blocks at once on an accelerator, see nn.blocks
_TRY_SIZE = 1536  # of the square product that this machine is tried with
_TRY_BYTES = 1 << 27


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What the sizes of a step are made of.

    Attributes:
        config: the run's.
        target: the target's.
        drafter: the drafter's.
        width: tokens per sequence, padding included.
        features_itemsize: bytes of a feature on the device.
        mesh: devices.
    """

    config: TrainConfig
    target: targets.TargetConfig
    drafter: DrafterConfig
    width: int
    features_itemsize: int
    mesh: MeshShape

    @property
    def anchors(self) -> int:
        """Anchors per sequence."""
        return min(self.config.anchors_per_sequence, self.width)

    @property
    def groups(self) -> int:
        """Devices that share out the sequences."""
        return self.mesh.data * self.mesh.expert

    @property
    def block_parts(self) -> int:
        """Devices of a group that share out its blocks."""
        (split,) = split_axes(("anchors",), (self.anchors,), self.mesh)
        return self.mesh.along(split or ())

    @property
    def head_parts(self) -> int:
        """Devices of a group that share out the vocabulary."""
        (split,) = split_axes(("vocab",), (self.target.vocab_size,), self.mesh)
        return self.mesh.along(split or ())

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return jnp.dtype(self.config.dtype).itemsize

    @property
    def tokens(self) -> int:
        """Context tokens of a step."""
        return self.config.sequences_per_step * self.width

    @property
    def slots(self) -> int:
        """Slots of a step, the anchors' included."""
        return self.config.sequences_per_step * self.anchors * self.drafter.block_size

    @property
    def columns(self) -> int:
        """Tokens of the vocabulary that a step's loss computes."""
        return min(self.config.sampled_vocab or self.target.vocab_size, self.target.vocab_size)

    @property
    def drafted(self) -> int:
        """Slots that meet the head."""
        return self.config.sequences_per_step * self.anchors * (self.drafter.block_size - 1)


def step_flops(shapes: Shapes) -> dict[str, float]:
    """Return the FLOPs of a step by part, all devices together: products alone, 2 per multiply and add.

    `context`: `fc` forward and for its weights (features are frozen: `4 C F H` for C tokens of F features), every
    layer's keys and values of the context, three times (`6 C H 2kv`). `layers`: `6 N P` for N slots and P weights in
    matrices that slots meet (8 with --remat). `attention`: over the whole width, as it is computed, two products
    forward and five backward, which makes the scores again. `head`: `4 R H V`, loss and gradient in one pass over R
    drafted slots and V tokens, sampled or all. `target`: its prefill, with live features.
    """
    drafter, hidden = shapes.drafter, shapes.drafter.hidden_size
    query, kv = drafter.num_heads * drafter.head_dim, drafter.num_kv_heads * drafter.head_dim
    matrices = drafter.num_layers * hidden * (2 * query + 2 * kv + 3 * drafter.intermediate_size)
    seen = shapes.width + drafter.block_size
    target = targets.prefill_flops(shapes.target, batch=shapes.config.sequences_per_step, length=shapes.width)
    return {
        "context": 4.0 * shapes.tokens * drafter.num_features * hidden
        + 12.0 * shapes.tokens * hidden * kv * drafter.num_layers,
        "layers": (8.0 if shapes.config.remat else 6.0) * shapes.slots * matrices,
        "attention": 14.0 * shapes.slots * seen * query * drafter.num_layers,
        "head": 4.0 * shapes.drafted * hidden * shapes.columns,
        "target": target if shapes.config.features == "live" else 0.0,
    }


def flops_per_device(shapes: Shapes, flops: dict[str, float]) -> float:
    """Return what of a step's FLOPs falls to the device that has most: the context is made once per group."""
    group = {name: value / shapes.groups for name, value in flops.items()}
    return (
        group["context"]
        + (group["layers"] + group["attention"]) / shapes.block_parts
        + group["head"] / shapes.head_parts
        + group["target"] / shapes.mesh.model
    )


def memory_bytes(shapes: Shapes) -> dict[str, int]:
    """Return what a device holds in a step, by part, and what it holds while the run starts.

    `start`: beside the state, the layers of the target that new weights are copied from, in the dtype they are read in
    (`tables_are_wide`); with live features the whole target, which stays and is `target` of the step too.
    """
    config, groups = shapes.config, shapes.groups
    tied, parts = shapes.target.tie_embeddings, shapes.head_parts
    # what scales with blocks is shared out within a group, what meets the head is not: a part of it meets all rows
    own, blocks = (
        step_bytes(
            shapes.drafter,
            replace(config, anchors_per_sequence=anchors),
            width=shapes.width,
            sequences=config.sequences_per_step // groups,
            features_itemsize=shapes.features_itemsize,
            tied=tied,
        )
        for anchors in (shapes.anchors, shapes.anchors // shapes.block_parts)
    )
    dtype = "float32" if tables_are_wide(config) else config.dtype
    whole = targets.describe_target(config.target, mesh=shapes.mesh)["memory"][dtype]["weight_bytes_per_device"]
    is_live = config.features == "live"
    found = {
        "weights": own.weights,
        "moments": own.moments // shapes.mesh.size,
        "embedding_and_head": 0 if is_live else own.embedding_and_head // parts,
        "target": whole if is_live else 0,
        "batch": own.batch,
        "gradient": own.gradient,
        "added": own.added // shapes.mesh.size,
        "activations": blocks.activations,
        "head_scratch": own.head_scratch,
        "attention_scratch": _attention_scratch(shapes) if config.device else blocks.attention_scratch,
    }
    held = sum(found[name] for name in ("weights", "moments", "embedding_and_head", "target", "batch"))
    ends = own.embedding_and_head // parts
    copied = shapes.drafter.num_layers if config.init == "target" and config.init_from is None else 0
    numbers = shapes.drafter.vocab_size * shapes.drafter.hidden_size
    layers = whole - table_bytes(config, numbers=numbers, tied=tied)[0] // parts
    loaded = whole if is_live else ends + layers * copied // shapes.target.num_layers
    # the new weights and the state's own, for a moment
    return found | {"step": held + most_at_once(found), "start": 2 * found["weights"] + found["moments"] + loaded}


def _attention_scratch(shapes: Shapes) -> int:
    """Scores of a chunk of blocks and their slopes on an accelerator, which this process need not run on."""
    of_a_sequence = shapes.anchors // shapes.block_parts * shapes.drafter.block_size
    scores = min(of_a_sequence * shapes.drafter.num_heads * shapes.width, _MOST_SCORES)
    return 4 * _WIDE * shapes.config.sequences_per_step // shapes.groups // shapes.config.parts * scores


def memory_traffic(shapes: Shapes, memory: dict[str, int]) -> dict[str, float]:
    """Return the bytes that a step moves through a device's memory, by part, where products are not fused.

    `weights`: read forward and twice backward, the gradient written and read; for every part of --accumulate.
    `optimizer`: weights, gradient and two moments read, three written, of the device's share. `activations`: written
    and read. `scores`: float32, written and read in each of three passes. `logits`: float32, they and their
    exponentials written and read. `head`: read once for every part.
    """
    drafter, parts = shapes.drafter, shapes.config.parts
    weights, _ = num_parameters(drafter)
    devices = shapes.groups * shapes.block_parts
    scores = shapes.slots * drafter.num_heads * shapes.width * drafter.num_layers / devices
    logits = shapes.drafted / shapes.groups * shapes.columns / shapes.head_parts
    return {
        "weights": 5.0 * _WIDE * weights * parts,
        "optimizer": 7.0 * _WIDE * weights / shapes.mesh.size,
        "activations": 2.0 * memory["activations"] * parts,
        "scores": 6.0 * _WIDE * scores,
        "logits": 4.0 * _WIDE * logits,
        "head": float(parts * shapes.columns * drafter.hidden_size * shapes.itemsize / shapes.head_parts),
        "target": float(memory["target"]),
    }


def link_traffic(shapes: Shapes) -> dict[str, float]:
    """Return the bytes that a device sends to others in a step: `(n - 1) / n` of what each collective joins.

    `gradient`: reduce-scattered over all devices, for every part of --accumulate; `weights`: gathered after the
    update; `head`: drafted rows gathered within the group, expected rows and a few numbers per row joined.
    """
    weights, _ = num_parameters(shapes.drafter)
    every, parts = shapes.mesh.size, shapes.head_parts
    rows = shapes.drafted / shapes.groups * shapes.drafter.hidden_size
    return {
        "gradient": shapes.config.parts * _WIDE * weights * (every - 1) / every,
        "weights": _WIDE * weights * (every - 1) / every,
        "head": rows * (shapes.itemsize + 2 * _WIDE) * (parts - 1) / parts,
    }


def try_here() -> tuple[Device, str]:
    """Return what this machine's first device reaches, measured in a second or two, and what it is."""
    device = jax.devices()[0]
    square = jnp.asarray(np.random.default_rng(0).standard_normal((_TRY_SIZE, _TRY_SIZE)), jnp.float32)
    flat = jnp.zeros(_TRY_BYTES // _WIDE, jnp.float32)

    def fastest(function: Any, given: jax.Array) -> float:
        jax.block_until_ready(function(given))
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            jax.block_until_ready(function(given))
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    product_s = fastest(jax.jit(lambda x: x @ x), square)
    copy_s = fastest(jax.jit(lambda x: x + 1), flat)
    memory = (device.memory_stats() or {}).get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    )
    # a device sends to another on this machine no faster than through its memory
    rate = 2 * _TRY_BYTES / copy_s
    measured = Device(
        flops_per_s=2 * _TRY_SIZE**3 / product_s, bytes_per_s=rate, memory_bytes=float(memory), link_bytes_per_s=rate
    )
    return measured, f"{device.device_kind}, float32 products and memory timed here"


def _shapes(config: TrainConfig) -> Shapes:
    """The shapes of a run, as far as they are there."""
    target, itemsize = targets.read_target_config(config.target), _WIDE
    layers, width = config.capture_layers, config.length
    if config.cache is not None:
        manifest = open_cache(config.cache).manifest
        layers, width = tuple(manifest["capture_layers"]), manifest["max_length"]
        itemsize = _WIDE if manifest["features_dtype"] == "float32" else 2
    elif config.features == "cached":
        itemsize = 2
    elif config.responses is not None:
        lengths = read_responses(config.responses, vocab_size=target.vocab_size, max_length=target.max_positions)
        width = int(lengths.lengths.max())
    if config.features == "live":
        itemsize = jnp.dtype(config.dtype).itemsize
    assert width is not None
    if config.init_from is not None:
        drafter = read_drafter_config(config.init_from)
    else:
        drafter = drafter_config(
            target,
            capture_layers=layers or targets.default_capture_layers(target.num_layers, DEFAULT_CAPTURE_COUNT),
            num_layers=config.num_layers or DEFAULT_NUM_LAYERS,
            block_size=config.block_size or DEFAULT_BLOCK_SIZE,
            mask_token_id=config.mask_token_id or 0,
            sliding_window=config.sliding_window,
            full_layers=config.full_layers or (),
        )
    mesh = parse_mesh(config.mesh)
    check_batch(mesh, config.sequences_per_step, parts=config.parts)
    return Shapes(
        config=config,
        target=target,
        drafter=drafter,
        width=bucket(width),
        features_itemsize=itemsize,
        mesh=mesh,
    )


def _device(config: TrainConfig, mesh: MeshShape) -> tuple[Device, float, str]:
    """The device, the share of its FLOP/s to count on, and how it is known.

    Raises:
        InputError: a number of devices that the mesh does not have.
    """
    if config.device is None:
        device, how = try_here()
        return device, 1.0, how
    device, count = parse_device(config.device)
    if count != mesh.size:
        raise InputError(f"--device {config.device} is {count} chips, --mesh {mesh} is {mesh.size}: make them equal")
    share = config.utilisation if config.dtype == "bfloat16" else config.utilisation / 2
    kind = "" if config.dtype == "bfloat16" else ", float32 at half the bfloat16 rate"
    return device, share, f"data sheet of {config.device}, products at {config.utilisation:.0%} of it{kind}"


def plan_run(config: TrainConfig) -> dict[str, Any]:
    """Return what a run will take; nothing is written, and with `device` no weight is read.

    Returns:
        `target`, `drafter` (sizes), `batch` (of a step), `device`, `num_devices`, `mesh`, `memory` (bytes on a device:
        parts, `step`, `start`, `available`), `fits`, `flops` (of a step: parts, `total`, `per_device`), `traffic`
        (bytes a device moves in a step: `memory`, `links`, `input` from the host), `time` (`compute_s`, `memory_s`,
        `links_s`, `step_s`, `run_s`), `bound_by`, `anchors_per_s`, `tokens_per_s`, `how`.

    Raises:
        InputError: a bad target, cache or responses; devices that do not fit the mesh; sequences that do not divide.
    """
    shapes = _shapes(config)
    device, share, how = _device(config, shapes.mesh)
    memory, flops = memory_bytes(shapes), step_flops(shapes)
    through, links = memory_traffic(shapes, memory), link_traffic(shapes)
    own = flops_per_device(shapes, flops)
    compute_s, memory_s = own / (device.flops_per_s * share), sum(through.values()) / device.bytes_per_s
    links_s = sum(links.values()) / device.link_bytes_per_s
    step_s = max(compute_s, memory_s) + links_s
    anchors = config.sequences_per_step * shapes.anchors
    return {
        "target": str(config.target),
        "drafter": {
            "num_parameters": num_parameters(shapes.drafter)[0],
            "num_layers": shapes.drafter.num_layers,
            "block_size": shapes.drafter.block_size,
            "hidden_size": shapes.drafter.hidden_size,
            "capture_layers": list(shapes.drafter.capture_layers),
        },
        "batch": {
            "sequences": config.sequences_per_step,
            "tokens_per_sequence": shapes.width,
            "anchors": anchors,
            "slots": shapes.slots,
        },
        "memory": memory | {"available": int(device.memory_bytes)},
        "flops": flops | {"total": sum(flops.values()), "per_device": own},
        "memory_traffic": through | {"total": sum(through.values())},
        "link_traffic": links | {"total": sum(links.values())},
        "time": {
            "compute_s": _rounded(compute_s),
            "memory_s": _rounded(memory_s),
            "links_s": _rounded(links_s),
            "step_s": _rounded(step_s),
            "run_s": _rounded(step_s * config.steps),
        },
        "device": config.device or jax.devices()[0].device_kind,
        "num_devices": shapes.mesh.size,
        "mesh": str(shapes.mesh),
        "fits": max(memory["step"], memory["start"]) <= device.memory_bytes,
        "bound_by": "memory" if memory_s > compute_s else "products",
        "anchors_per_s": _rounded(anchors / step_s),
        "tokens_per_s": _rounded(shapes.tokens / step_s),
        "model_flops_share": _rounded(own / (device.flops_per_s * step_s)),
        "how": how,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
