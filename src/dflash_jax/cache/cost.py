"""What a cache will cost before any of it is built: bytes exactly, time by calibration or by a device's data sheet."""

import math
import shutil
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dflash_jax.cache.build import BuildPlan, plan_build, plan_sequences, resolve_layers
from dflash_jax.cache.capture import TargetCapture, target_capture
from dflash_jax.cache.config import CacheBuildConfig, ComputeDtype
from dflash_jax.cache.features import FeatureLayout, FeaturesDtype
from dflash_jax.cache.manifest import FORMAT_VERSION
from dflash_jax.cache.responses import Responses
from dflash_jax.cache.selftest import self_test_shapes
from dflash_jax.cache.shards import bytes_per_token, shard_bytes, tensor_bytes, tensor_layout, write_shard
from dflash_jax.core import DEVICES, InputError, parse_mesh
from dflash_jax.targets import (
    TargetConfig,
    describe_target,
    num_active_parameters,
    open_mesh,
    prefill_flops,
    read_target_config,
)

# Most tokens of the timed batch on a CPU: a second on two cores. A row of 320 reaches 0.9 of the rate of 8 such rows;
# of longer rows the first so many are fed.
_CALIBRATION_TOKENS = 512
_CALIBRATION_BYTES = 1 << 26
# What a further layer adds to compiling a program, of what compiling its parts takes. SmolLM2's 30 layers on two cores:
# the parts 1.7 s, the program 4.5 s.
_FURTHER_LAYER = 0.055
# The baseline report's rollouts: 64 steps of a block of 8 behind a context of 1024, each step a sample of its own.
_BASELINE_CONTEXT, _BASELINE_BLOCK, _BASELINE_STEPS = 1024, 8, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheCostConfig:
    """Say what a cache will take, bytes and time, before anything is built. Flags of `cache build` mean the same."""

    target: Path
    """Target folder; for an estimate by --device, one with `config.json` alone will do."""
    responses: Path | None = None
    """Responses JSONL; or give --num-sequences and --length."""
    num_sequences: int | None = None
    """Sequences of a build whose responses are not there yet."""
    length: int | None = None
    """Tokens of each of them, prompt and response."""
    out: Path = Path("cache")
    """Cache folder to be; its disk is tried."""
    device: str | None = None
    """Estimate for this device from its data sheet (h100, h200, v5p, v6e), instead of trying this machine."""
    utilisation: float = 0.4
    """Share of the data sheet's FLOP/s that the forward is taken to reach, with --device."""
    capture_layers: tuple[int, ...] | None = None
    """See `cache build`."""
    position_offsets: tuple[int, ...] = (0,)
    """See `cache build`."""
    features: FeaturesDtype = "bfloat16"
    """See `cache build`."""
    top_k: int = 0
    """See `cache build`."""
    dtype: ComputeDtype = "float32"
    """See `cache build`."""
    mesh: str = "data=1"
    """See `cache build`; with --device, devices that need not be here."""
    rope: str = "exact"
    """See `cache build`."""
    tokens_per_batch: int = 4096
    """See `cache build`."""
    tokens_per_shard: int = 65536
    """See `cache build`."""
    share_prompts: bool = True
    """See `cache build`."""

    def __post_init__(self) -> None:
        """Check what can be checked without the target."""
        counts = (self.num_sequences, self.length)
        if (self.responses is None) != (None not in counts) or (self.responses and counts != (None, None)):
            raise InputError("cache cost needs the texts: give either --responses, or --num-sequences and --length")
        if (None not in counts and (self.num_sequences or 0) < 1) or (self.length is not None and self.length < 2):
            raise InputError(
                f"--num-sequences is {self.num_sequences}, --length is {self.length}: at least 1 and 2 are needed"
            )
        if self.device is not None and self.device not in DEVICES:
            raise InputError(f"--device is {self.device!r}: choose one of {', '.join(DEVICES)}")
        if not 0 < self.utilisation <= 1:
            raise InputError(f"--utilisation is {self.utilisation}: more than 0 and at most 1 is needed")
        if self.device is None and self.responses is None:
            raise InputError("without --responses there is nothing to try here: name a --device")
        self.build()

    def build(self) -> CacheBuildConfig:
        """Return the build that is asked about."""
        shared = {field.name for field in fields(CacheBuildConfig)} & {field.name for field in fields(type(self))}
        values: dict[str, Any] = {name: getattr(self, name) for name in shared}
        values["responses"] = self.responses or Path("unknown")
        return CacheBuildConfig(**values)


def _uniform(config: CacheCostConfig, target: TargetConfig) -> Responses:
    """Responses of equal lengths that do not exist, each to a prompt of its own."""
    count, length = config.num_sequences or 0, config.length or 0
    if length > target.max_positions:
        raise InputError(f"--length is {length}, the target's context is {target.max_positions}: lower it")
    return Responses(
        path=Path("unknown"),
        sha256="",
        line_starts=np.zeros(count, np.int64),
        lengths=np.full(count, length, np.int64),
        prompt_len=np.ones(count, np.int32),
        prompt_hash=np.arange(count, dtype=np.uint64),
        prompt_sets=("unknown",),
        prompt_set=np.zeros(count, np.uint16),
        max_new_tokens=None,
    )


def _bytes(plan: BuildPlan) -> dict[str, Any]:
    """What the shards will take, to the byte, and what of it."""
    parts: Counter[str] = Counter()
    total = 0
    for shard in plan.shards:
        layout = plan.layout(shard)
        total += shard_bytes(layout)
        parts.update(tensor_bytes(layout))
    scales = {"feature_scales": parts["feature_scales"]} if "feature_scales" in parts else {}
    tops = {"top_ids_top_logprobs": parts["top_ids"] + parts["top_logprobs"]} if "top_ids" in parts else {}
    known = {"features": parts["features"], **scales, **tops}
    tokens = sum(parts[name] for name in ("token_ids", "next_ids", "loss_mask"))
    rest = total - sum(known.values()) - tokens
    return {"total": total, **known, "token_ids_next_ids_loss_mask": tokens, "per_sequence_and_headers": rest}


def _baseline(layout: FeatureLayout) -> dict[str, Any]:
    """A rollout of the baseline report stored by sample and by token.

    Worked, K = 4, H = 2880, bfloat16: 64 samples of 1023 context rows of 23040 bytes are 1508474880 bytes; the text is
    1024 + 64 * 8 = 1536 tokens, 35.4 MB: 42.6 times fewer.
    """
    contexts = _BASELINE_STEPS * (_BASELINE_CONTEXT - 1) * layout.columns * 2
    length = _BASELINE_CONTEXT + _BASELINE_STEPS * _BASELINE_BLOCK
    tensors = tensor_bytes(tensor_layout(version=FORMAT_VERSION, tokens=length, sequences=1, features=layout))
    once = sum(tensors.values())
    return {
        "settings": f"ctx {_BASELINE_CONTEXT}, block {_BASELINE_BLOCK}, {_BASELINE_STEPS} rollout steps, "
        f"K={layout.num_layers}, H={layout.hidden_size}",
        "one_context_per_sample_bytes": contexts,
        "sum": f"{_BASELINE_STEPS} x {_BASELINE_CONTEXT - 1} x {layout.columns} x 2",
        "token_once_bytes": once,
        "times_fewer": round(contexts / once, 1),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """The forwards of a plan: how often each compiled shape runs, and what a run of it takes.

    Attributes:
        runs: by (rows, tokens fed per row, tokens before them): how often.
        target: sizes.
    """

    runs: Counter[tuple[int, int, int]]
    target: TargetConfig

    def flops(self, shape: tuple[int, int, int]) -> float:
        """FLOPs of one run, padding included: whole sequences, less those of what was there before."""
        rows, fed, before = shape
        whole = prefill_flops(self.target, batch=rows, length=before + fed)
        return whole - (prefill_flops(self.target, batch=rows, length=before) if before else 0.0)

    @property
    def total_flops(self) -> float:
        return sum(count * self.flops(shape) for shape, count in self.runs.items())

    @property
    def padded_tokens(self) -> int:
        return sum(count * rows * fed for (rows, fed, _), count in self.runs.items())

    def head_flops(self) -> float:
        return 2.0 * self.padded_tokens * self.target.vocab_size * self.target.hidden_size


def _work(plan: BuildPlan) -> _Work:
    runs: Counter[tuple[int, int, int]] = Counter()
    for step in (step for shard in plan.shards for step in shard.steps):
        runs[step.padded_rows, step.padded_length, 0] += 1
        for extension in step.extensions:
            before = step.padded_length - extension.padded_length
            runs[step.padded_rows, extension.padded_length, before] += 1
    return _Work(runs=runs, target=plan.target)


def _nearest(folder: Path) -> Path:
    """The folder that exists nearest above one that need not."""
    return next(path for path in folder.absolute().parents if path.is_dir())


def _write_bytes_per_s(folder: Path) -> float:
    """What hashing and writing a shard reaches on the disk of a folder that need not exist yet."""
    nearest = _nearest(folder)
    layout = FeatureLayout(num_layers=1, hidden_size=1024, dtype="bfloat16")
    tensors = tensor_layout(version=1, tokens=_CALIBRATION_BYTES // 2048, sequences=0, features=layout)
    path = nearest / ".cache-cost.safetensors"
    try:
        started = time.perf_counter()
        size, _ = write_shard(path, tensors, _filled(tensors))
        return size / (time.perf_counter() - started)
    except OSError as error:
        raise InputError(f"cannot write to {nearest}: {error}: choose another --out") from error
    finally:
        path.unlink(missing_ok=True)


def _filled(layout: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Noise of a layout's sizes: a disk that compresses must not be flattered."""
    draw = np.random.default_rng(0)
    return {name: draw.integers(0, 256, size, np.uint8) for name, size in tensor_bytes(layout).items()}


def _calibrate(plan: BuildPlan, capture: TargetCapture) -> dict[str, float]:
    """Load the target, compile its parts and time one batch: seconds of what a build does once, and FLOP/s.

    The build's own program holds every layer and is compiled for longer than all of this takes. So the layers run as
    programs of their own, one compile for each kind; what the whole programs and the self-test take follows from that.
    """
    steps = [step for shard in plan.shards for step in shard.steps]
    (padded_rows, padded_length), _ = Counter((step.padded_rows, step.padded_length) for step in steps).most_common(1)[
        0
    ]
    rows, length = padded_rows, padded_length
    if jax.default_backend() == "cpu":  # large batches are no faster there, only longer
        length = min(padded_length, _CALIBRATION_TOKENS)
        rows = max(1, min(padded_rows, _CALIBRATION_TOKENS // length))
    started = time.perf_counter()
    _ = capture.target
    load_s = time.perf_counter() - started

    def run() -> float:
        began = time.perf_counter()
        tokens = np.zeros((rows, length), np.int32)
        lengths, offsets = np.full(rows, length, np.int32), np.zeros(rows, np.int32)
        captured, _ = capture.start(tokens, lengths, offsets, keep=plan.extends, by_layers=True)
        np.asarray(captured.features)
        return time.perf_counter() - began

    first = run()
    second = min(run(), run())
    parts_s = max(first - second, 0.0)
    flops_per_s = prefill_flops(plan.target, batch=rows, length=length) / second
    shapes = self_test_shapes(plan)
    tested = sum(prefill_flops(plan.target, batch=batch, length=tokens) * n for (batch, tokens), n in shapes.items())
    return {
        "load_s": load_s,
        "self_test_s": len(shapes) * parts_s + tested / flops_per_s,
        "compile_s": parts_s * (1 + _FURTHER_LAYER * (plan.target.num_layers - 1)),
        "flops_per_s": flops_per_s,
    }


def _measured_time(plan: BuildPlan, work: _Work, config: CacheCostConfig, size: int) -> dict[str, Any]:
    mesh = open_mesh(plan.target, plan.config.mesh, local=True)
    tried = _calibrate(plan, target_capture(plan.config, plan.target, mesh=mesh))
    write_rate = _write_bytes_per_s(config.out)
    forward_s, write_s = work.total_flops / tried["flops_per_s"], size / write_rate
    compile_s = tried["compile_s"] * len(work.runs)
    last = write_s / len(plan.shards)
    return {
        "total_s": tried["load_s"] + tried["self_test_s"] + compile_s + max(forward_s, write_s) + last,
        "load_s": tried["load_s"],
        "self_test_s": tried["self_test_s"],
        "compile_s": compile_s,
        "forward_s": forward_s,
        "write_s": write_s,
        "tokens_per_s": work.padded_tokens / forward_s,
        "flops_per_s": tried["flops_per_s"],
        "write_bytes_per_s": write_rate,
        "how": f"one batch timed on {jax.devices()[0].device_kind}, load and disk too; self-test and compile counted "
        "from compiling one layer of a kind; writing overlaps the forwards",
    }


def _sheet_time(work: _Work, config: CacheCostConfig) -> dict[str, Any]:
    """A roofline: every forward takes what its FLOPs or its reading of the weights takes, whichever is more."""
    assert config.device is not None
    device = DEVICES[config.device]
    flops_per_s, bytes_per_s, memory = device.flops_per_s, device.bytes_per_s, device.memory_bytes
    if config.dtype == "float32":
        flops_per_s /= 2  # TensorFloat-32's
    mesh = parse_mesh(config.mesh)
    described = describe_target(config.target, mesh=mesh, rope=config.rope)
    weights = described["memory"][config.dtype]["weight_bytes_per_device"]
    ideal = {shape: max(work.flops(shape) / (flops_per_s * mesh.size), weights / bytes_per_s) for shape in work.runs}
    read_bound = sum(weights / bytes_per_s > work.flops(s) / (flops_per_s * mesh.size) for s in work.runs)
    ideal_s = sum(count * ideal[shape] for shape, count in work.runs.items())
    forward_s = sum(
        count * max(work.flops(shape) / (flops_per_s * mesh.size * config.utilisation), weights / bytes_per_s)
        for shape, count in work.runs.items()
    )
    return {
        "total_s": forward_s,
        "forward_s": forward_s,
        "forward_s_at_full_utilisation": ideal_s,
        "tokens_per_s": work.padded_tokens / forward_s,
        "device": config.device,
        "num_devices": mesh.size,
        "mesh": str(mesh),
        "weight_bytes_per_device": weights,
        "fits": bool(weights < memory),
        "shapes_bound_by_reading_weights": read_bound,
        "how": f"{config.dtype} roofline at {config.utilisation:.0%} of the data sheet, "
        "without loading, compiling, writing",
    }


def _plan(config: CacheCostConfig) -> BuildPlan:
    build = config.build()
    if config.responses is not None:
        return plan_build(build)
    target = read_target_config(build.target, rope=build.rope)
    build = replace(build, capture_layers=resolve_layers(build, target.num_layers))
    return plan_sequences(build, target, _uniform(config, target))


def cache_cost(config: CacheCostConfig) -> dict[str, Any]:
    """Return what a cache will take.

    Returns:
        `bytes` (`total` is to the byte what `cache build` will report, and of what it consists), `bytes_per_token`,
        `num_sequences`, `num_tokens`, `num_shards`, `padded_tokens`, `compiled_shapes`, `flops` (`total`, `layers`,
        `head`; padding included), `active_parameters`, `time` (seconds: `total_s` and of what it consists), `baseline`
        (the same bytes against one context per sample), `free_bytes` on the disk of --out.

    Raises:
        InputError: see `plan_build`; a device that is not in the table; a disk that cannot be written.
    """
    plan = _plan(config)
    work, sizes = _work(plan), _bytes(plan)
    layout = plan.config.feature_layout(plan.target.hidden_size)
    seconds = _sheet_time(work, config) if config.device else _measured_time(plan, work, config, sizes["total"])
    return {
        "target": str(config.target),
        "num_sequences": sum(shard.sequences for shard in plan.shards),
        "num_tokens": sum(shard.tokens for shard in plan.shards),
        "num_shards": len(plan.shards),
        "padded_tokens": work.padded_tokens,
        "compiled_shapes": len(work.runs),
        "active_parameters": num_active_parameters(plan.target),
        "bytes_per_token": bytes_per_token(layout),
        "free_bytes": shutil.disk_usage(_nearest(config.out)).free,
        "baseline": _baseline(layout),
        "flops": {
            "total": work.total_flops,
            "layers": work.total_flops - work.head_flops(),
            "head": work.head_flops(),
        },
        "time": {name: _rounded(value) for name, value in seconds.items()},
        "bytes": sizes,
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value
