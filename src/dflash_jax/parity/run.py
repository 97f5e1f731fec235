"""The `parity` command: texts, a target, a drafter and an engine in; a verdict per offset and a cause out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dflash_jax import targets, text
from dflash_jax.accept import SequenceResult, by_context_length, check_block_size, check_fit, summarise
from dflash_jax.cache import Cache, open_cache
from dflash_jax.core import InputError, Move, make_record, no_progress, require_one_process
from dflash_jax.drafter import DrafterConfig, drafter_fingerprint, load_drafter, read_drafter_config
from dflash_jax.parity.cause import Cause, Exchange, engine_cause, exchange, probe_cause
from dflash_jax.parity.chain import Chain, Outcome
from dflash_jax.parity.config import DEFAULT_OFFSETS, ParityConfig
from dflash_jax.parity.engine import Engine, check_positions
from dflash_jax.parity.examine import MATCH
from dflash_jax.parity.measure import (
    Measured,
    as_results,
    measure,
    paired_sums,
    whole_blocks,
)
from dflash_jax.parity.memory import Training, memory_cause, read_training
from dflash_jax.parity.texts import Text, load_texts, make_batches
from dflash_jax.parity.verdict import Difference, judge, worst

DIAGNOSIS_PROMPTS = 32
"""Texts on which links are exchanged: finding a cause needs fewer than bounding a difference."""
_LITTLE = 5
"""A reference of fewer margins than this has hardly anything to lose."""


def _open_engine_cache(config: ParityConfig, drafter: DrafterConfig) -> tuple[Cache | None, list[str]]:
    """The cache that stands for the engine, and what in its fingerprint is not as it should be.

    Raises:
        InputError: features of another width than the drafter reads.
    """
    if config.cache is None:
        return None, []
    cache = open_cache(config.cache)
    width = cache.manifest["hidden_size"] * len(cache.manifest["capture_layers"])
    if width != drafter.num_features:
        raise InputError(
            f"{config.cache} holds features of {width} columns, the drafter {config.drafter} reads "
            f"{drafter.num_features}"
        )
    wanted = targets.fingerprint(config.target) | text.load_tokenizer(config.target).fingerprint()
    wanted |= {"capture_layers": list(drafter.capture_layers)}
    stored = cache.manifest["fingerprint"]
    wrong = [name for name, value in wanted.items() if stored.get(name) != value]
    return cache, [f"the cache's fingerprint differs from the target and the drafter in {name}" for name in wrong]


def _offsets(config: ParityConfig, cache: Cache | None) -> tuple[int, ...]:
    """The offsets to compare, rising.

    Raises:
        InputError: the cache has not all of them.
    """
    if cache is None:
        return tuple(sorted(config.position_offsets or DEFAULT_OFFSETS))
    stored = cache.manifest["position_offsets"]
    missing = [offset for offset in config.position_offsets or () if offset not in stored]
    if missing:
        raise InputError(f"--position-offsets names {missing[0]}: {config.cache} holds {', '.join(map(str, stored))}")
    return tuple(sorted(config.position_offsets or stored))


def _notes(engine: Engine) -> list[str]:
    """What a reader might take for a fault, and is none."""
    moved = [o for o in engine.offsets if len(set(engine.config.starts(o))) == 1 and engine.config.starts(o)[0] != o]
    if not moved:
        return []
    return [
        "the engine's drafter places context and block together elsewhere than the target's tokens are (at offset "
        f"{moved[-1]:,} from {engine.config.starts(moved[-1])[0]:,}): a shift of both is an identity under RoPE and "
        "breaks nothing"
    ]


class _Parity:
    """One comparison: the models, the texts and how to judge."""

    def __init__(self, config: ParityConfig, chain: Chain, engine: Engine, texts: list[Text]) -> None:
        self.config, self.chain, self.engine, self.texts = config, chain, engine, texts
        self.judging = {"margin": config.margin, "samples": config.bootstrap_samples, "seed": config.seed}
        # in the texts' own order, so that it is no choice by length
        self.some = make_batches(texts[:DIAGNOSIS_PROMPTS], tokens_per_batch=config.tokens_per_batch)

    def group(self, results: Sequence[SequenceResult]) -> dict[str, Any] | None:
        """`summarise` with this comparison's resampling."""
        return summarise(results, samples=self.config.bootstrap_samples, seed=self.config.seed)

    def offset_row(
        self, offset: int, measured: Measured, masks: Sequence[Any], *, whole: bool
    ) -> tuple[dict[str, Any], Difference]:
        """One offset's entry in the JSON, without what is only known for broken ones."""
        ours = measured.engine[offset]

        def difference(other: Sequence[Outcome]) -> Difference:
            return judge(paired_sums(measured.texts, ours, other, masks), **self.judging)

        to_reference, to_near = difference(measured.reference), difference(measured.engine[self.engine.near])
        group = self.group(as_results(measured.texts, ours, measured.reference, whole=whole, offset=offset))
        assert group is not None, "whole_blocks leaves an anchor"
        drift = measured.drift[offset]
        differing = sum(
            int((a.accepted != b.accepted)[mask].sum())
            for a, b, mask in zip(ours, measured.reference, masks, strict=True)
        )
        return {
            "verdict": to_reference.verdict,
            "accept_len_difference": to_reference.mean,
            "ci95": list(to_reference.ci95),
            "offset_difference": to_near.mean,
            "offset_ci95": list(to_near.ci95),
            "feature_drift": drift.features,
            "argmax_agreement": drift.argmax_agreement,
            "drafter_drift": drift.drafter,
            "accept_len_mean": group["accept_len_mean"],
            "accept_len_ci95": group["accept_len_ci95"],
            "tau": None if group["replay"] is None else group["replay"]["tau_micro"],
            "num_anchors": group["num_anchors"],
            "num_anchors_differing": differing,
            "more_prompts_needed": to_reference.more_prompts_needed,
            "swaps": None,
            "spoils": None,
        }, to_reference

    def diagnose(self, rows: dict[int, dict[str, Any]], progress: Move) -> Cause:
        """Exchange links at every broken offset, enter what came out in its row, and name the cause at the farthest."""
        broken = [offset for offset in self.engine.offsets if rows[offset]["verdict"] == "broken"]
        cause = Cause()
        for done, offset in enumerate(broken, start=1):
            swaps = self.exchange(self.engine.swaps(offset))
            spoils = self.exchange(self.engine.spoils(offset))
            rows[offset] |= {"swaps": dict(swaps.accepted), "spoils": dict(spoils.accepted)}
            progress(done, len(broken), f"exchanging links at {offset:,}")
            if offset == broken[-1]:
                # a batch whose shape is compiled already
                cause = engine_cause(self.chain, self.engine, self.some[0], offset=offset, swaps=swaps, spoils=spoils)
        return cause

    def exchange(self, choices: Mapping[str, Any]) -> Exchange:
        """Run the diagnosed texts through some choices of links."""
        return exchange(self.chain, self.some, choices, self.engine.reference, **self.judging)

    def probe(self) -> Exchange:
        """Move the reference's layers and block by one: what the drafter may have been trained for."""
        return self.exchange(self.engine.probes(tuple(s for s in (-1, 1) if self.chain.has_layers(s))))


def _split(
    texts: Sequence[Text], results: Sequence[SequenceResult], training: Training
) -> tuple[list[SequenceResult], list[SequenceResult]]:
    """Results of prompts the drafter was trained on, and of others; none of either where it is not known."""
    if training.prompts is None:
        return [], []
    seen = [one.prompt_hash in training.prompts for one in texts]
    return (
        [result for result, known in zip(results, seen, strict=True) if known],
        [result for result, known in zip(results, seen, strict=True) if not known],
    )


def _doubts(rows: Mapping[int, Mapping[str, Any]], reference: Mapping[str, Any], margin: float) -> list[str]:
    """Where a verdict says less than it seems to."""
    lines = []
    if reference["accept_len_mean"] < _LITTLE * margin:
        lines.append(
            f"the reference accepts {reference['accept_len_mean']:.3f} tokens, and the margin is {margin:g}: "
            "with hardly anything to lose, *holds* says little; compare prompts on which the drafter works"
        )
    far = [f"{offset:,}" for offset, row in rows.items() if row["verdict"] != "broken" and row["feature_drift"] > MATCH]
    if far:
        lines.append(
            f"the target's features are far off at offset {', '.join(far)}, whatever accept_len says: the engine does "
            "not compute the target that is checked here"
        )
    return lines


def _warnings(seen: Any, unseen: Any, training: Training, *, whole: bool) -> list[str]:
    lines = []
    if training.prompts is None:
        lines.append("the drafter has no record of its training prompts: seen and unseen cannot be told apart")
    elif seen is not None and unseen is None:
        lines.append(
            "ONLY PROMPTS THE DRAFTER WAS TRAINED ON were compared: these numbers say nothing about new prompts"
        )
    if not whole:
        lines.append(
            "most texts leave the target's greedy path or are shorter than a block: every anchor counts, by its "
            "labelled slots alone, and accept_len is a lower bound"
        )
    return lines


def parity(config: ParityConfig, *, progress: Move = no_progress) -> dict[str, Any]:
    """Compare an engine at every offset with the reference, and name what is wrong where it is broken.

    Returns:
        The parity JSON of docs/design/005.

    Raises:
        InputError: bad target, drafter, prompts, responses or cache; a drafter that does not fit the target; a cache of
            another width; an offset the cache has not; positions below 0 or beyond 2^31 - 1; a mesh that is not there,
            or one of several processes.
    """
    require_one_process("parity")
    drafter_config, target_config = read_drafter_config(config.drafter), targets.read_target_config(config.target)
    check_fit(drafter_config, target_config, where=config.drafter)
    mesh = targets.open_mesh(target_config, config.mesh)
    block_size = check_block_size(config.block_size, drafter_config)
    training = read_training(config.drafter)
    cache, warnings = _open_engine_cache(config, drafter_config)
    engine = Engine(config=config, offsets=_offsets(config, cache))
    check_positions(engine, longest=0, block_size=block_size)
    target = targets.load_target(config.target, mesh=mesh)
    texts = load_texts(config, target, cache=cache, offsets=engine.offsets, progress=progress)
    check_positions(engine, longest=max(len(one.token_ids) for one in texts), block_size=block_size)
    chain = Chain(
        target, load_drafter(config.drafter), block_size=block_size, anchors_per_chunk=config.anchors_per_chunk
    )
    measured = measure(chain, engine, make_batches(texts, tokens_per_batch=config.tokens_per_batch), progress=progress)
    return _report(_Parity(config, chain, engine, texts), measured, training, warnings=warnings, progress=progress)


def _report(
    this: _Parity, measured: Measured, training: Training, *, warnings: list[str], progress: Move
) -> dict[str, Any]:
    """Judge what was measured, look for the cause, and lay it all out as JSON."""
    config, engine = this.config, this.engine
    masks, whole = whole_blocks(measured.texts, measured.reference)
    rows = {offset: this.offset_row(offset, measured, masks, whole=whole)[0] for offset in engine.offsets}
    sound = as_results(measured.texts, measured.reference, measured.reference, whole=whole, offset=engine.near)
    reference = this.group(sound)
    assert reference is not None, "whole_blocks leaves an anchor"
    seen, unseen = (this.group(part) for part in _split(measured.texts, sound, training))
    cause, probes = this.diagnose(rows, progress), this.probe()
    if cause.cause_id is None:
        cause = probe_cause(probes, layers=this.chain.layers, reference=reference["accept_len_mean"])
    if cause.cause_id is None:
        cause = memory_cause(seen, unseen, training)
    near = as_results(measured.texts, measured.engine[engine.near], measured.reference, whole=whole, offset=engine.near)
    warnings = [
        *warnings,
        *_warnings(seen, unseen, training, whole=whole),
        *_doubts(rows, reference, config.margin),
    ]
    return {
        "verdict": worst([row["verdict"] for row in rows.values()]),
        "cause": cause.sentence,
        "cause_id": cause.cause_id,
        "evidence": [asdict(item) for item in cause.evidence],
        "by_ctx_pos_start": {str(offset): row for offset, row in rows.items()},
        "reference": reference,
        "probes": dict(probes.accepted),
        "seen": seen,
        "unseen": unseen,
        "training": None if training.step is None else {"step": training.step, "token_acc": training.token_acc},
        "by_context_length": by_context_length(near, samples=config.bootstrap_samples, seed=config.seed),
        "margin": config.margin,
        "num_prompts": reference["num_prompts"],
        "num_anchors": reference["num_anchors"],
        "block_size": this.chain.block_size,
        **{
            name: getattr(config, name)
            for name in ("mesh", "rope", "drafter_rope", "drafter_positions", "context_shift", "block_shift")
        },
        "cache": None if config.cache is None else str(config.cache),
        "drafter": str(config.drafter),
        "notes": _notes(engine),
        "warnings": warnings,
        "record": make_record(
            "parity",
            config,
            seed=config.seed,
            drafter_sha256=drafter_fingerprint(config.drafter),
            target_fingerprint=targets.fingerprint(config.target),
        ),
    }
