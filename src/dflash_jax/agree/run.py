"""The `agree` command: a cache, a target and a drafter in; equal blocks, differences and their causes out."""

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dflash_jax import targets, text
from dflash_jax.accept import SequenceResult, check_block_size, check_fit, evaluate_cache
from dflash_jax.agree.blocks import Comparison, Parting, compare_chains
from dflash_jax.agree.cause import Cause, Examiner
from dflash_jax.agree.config import AgreeConfig
from dflash_jax.agree.online import Online, Prompt
from dflash_jax.cache import Cache, Sequence, open_cache
from dflash_jax.core import InputError, Move, make_record, no_progress, require_one_process
from dflash_jax.decode import Decoded
from dflash_jax.drafter import Drafter, drafter_fingerprint, load_drafter, read_drafter_config
from dflash_jax.text import Tokenizer

SHOWN_CAUSES = ("label", "features", "drafter", "numerics")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """One stored text at one offset, both ways.

    Attributes:
        stored: the cache's sequence.
        offline: the replay's results.
        online: decoding's outcome.
        compared: one against the other.
    """

    stored: Sequence
    offline: SequenceResult
    online: Decoded
    compared: Comparison

    @property
    def chain(self) -> list[int]:
        """Tokens that each block of the replay commits."""
        return self.offline.committed[self.offline.on_chain].tolist()


def _open(config: AgreeConfig) -> tuple[Cache, list[str]]:
    """The cache, and what in its fingerprint is not the target's or the drafter's.

    Raises:
        InputError: no cache; features or tokens that do not fit the target; an offset that it has not.
    """
    cache, drafter = open_cache(config.cache), read_drafter_config(config.drafter)
    width = cache.manifest["hidden_size"] * len(cache.manifest["capture_layers"])
    if width != drafter.num_features:
        raise InputError(
            f"{config.cache} holds features of {width} columns, the drafter {config.drafter} reads "
            f"{drafter.num_features}"
        )
    stored = cache.manifest["position_offsets"]
    missing = [offset for offset in config.position_offsets or () if offset not in stored]
    if missing:
        raise InputError(f"--position-offsets names {missing[0]}: {config.cache} holds {', '.join(map(str, stored))}")
    wanted = targets.fingerprint(config.target) | text.load_tokenizer(config.target).fingerprint()
    wanted |= {"capture_layers": list(drafter.capture_layers)}
    told = cache.manifest["fingerprint"]
    wrong = [name for name, value in wanted.items() if told.get(name) != value]
    return cache, [f"the cache's fingerprint differs from the target and the drafter in {name}" for name in wrong]


def _check_drafter(folder: Path, config: AgreeConfig) -> int:
    """The block size to use with a drafter.

    Raises:
        InputError: no drafter; one that does not fit the target; a block size it was not trained for.
    """
    sizes = read_drafter_config(folder)
    check_fit(sizes, targets.read_target_config(config.target), where=folder)
    return check_block_size(config.block_size, sizes)


def _rows(cache: Cache, config: AgreeConfig, *, vocab_size: int) -> tuple[set[int], int]:
    """The rows of the responses file to compare, and the longest response.

    Raises:
        InputError: a token that the target has not.
    """
    indices, longest = set(), 1
    for number in range(cache.num_sequences):
        stored = cache.sequence(number)
        if int(stored.token_ids.max()) >= vocab_size:
            raise InputError(f"{config.cache} holds token {int(stored.token_ids.max())}, which {config.target} has not")
        indices.add(stored.sequence_index)
        longest = max(longest, len(stored.token_ids) - stored.prompt_len)
    return set(sorted(indices)[: config.limit]), longest


class _Agreement:
    """Models, settings and what compares with them."""

    def __init__(self, config: AgreeConfig, cache: Cache, *, block_size: int) -> None:
        self.config, self.cache, self.block_size = config, cache, block_size
        self.tokenizer = text.load_tokenizer(config.target)
        mesh = targets.open_mesh(targets.read_target_config(config.target), config.mesh)
        self.target = targets.load_target(config.target, mesh=mesh)
        self.checked = targets.put_whole(mesh, load_drafter(config.drafter))
        self.served = self._served()
        self.rows, longest = _rows(cache, config, vocab_size=self.target.config.vocab_size)
        budget = cache.manifest["max_new_tokens"]
        self.online = Online(
            # the same weights, with the angles of the engine that decodes
            target=replace(self.target, config=replace(self.target.config, rope_precision=config.rope)),
            drafter=self.served,
            block_size=block_size,
            stop_ids=self.tokenizer.stop_ids,
            # where no budget is known the replay shortens no block, and so much lets decoding shorten none either
            max_new_tokens=longest + block_size if budget is None else budget,
            batch_size=config.batch_size,
        )

    def _served(self) -> Drafter:
        """The drafter that decodes: the checked one itself where the weights are the same."""
        folder = self.config.served_drafter
        if folder is None or (
            drafter_fingerprint(folder) == drafter_fingerprint(self.config.drafter)
            and read_drafter_config(folder) == self.checked.config
        ):
            return self.checked
        return targets.put_whole(self.target.mesh, load_drafter(folder))

    def replay(self, progress: Move) -> list[SequenceResult]:
        """The check's results on the texts to compare."""
        embed_tokens, head = targets.put_whole(self.target.mesh, (self.target.embed_tokens, self.target.head))
        return evaluate_cache(
            self.checked,
            embed_tokens,
            head,
            self.cache,
            max_positions=self.target.config.max_positions,
            block_size=self.block_size,
            anchors_per_chunk=self.config.anchors_per_chunk,
            position_offsets=self.config.position_offsets,
            progress=progress,
            rows=self.rows,
        )

    def compare(self, progress: Move) -> list[_Text]:
        """Every text both ways, by offset and row.

        Raises:
            InputError: no text has a block.
        """
        stored = {
            (one.position_offset, one.sequence_index): one
            for one in map(self.cache.sequence, range(self.cache.num_sequences))
        }
        results = sorted(self.replay(progress), key=lambda one: (one.position_offset, one.sequence_index))
        if not results:
            raise InputError(f"no text in {self.config.cache} has a response of two tokens or more: nothing to compare")
        sequences = [stored[one.position_offset, one.sequence_index] for one in results]
        prompts = [_prompt(sequence) for sequence in sequences]
        decoded = self.online.decode(prompts, progress=progress)
        return [
            _Text(stored=sequence, offline=result, online=row, compared=_compare(sequence, result, row))
            for sequence, result, row in zip(sequences, results, decoded, strict=True)
        ]

    def examine(self, texts: SequenceOf[_Text], progress: Move) -> list[dict[str, Any]]:
        """Every difference with its cause."""
        different = [one for one in texts if one.compared.partings]
        if not different:
            return []
        examiner = Examiner(
            self.online.target,
            self.checked,
            self.served,
            block_size=self.block_size,
            longest=max(len(one.stored.token_ids) for one in different),
        )
        width = self.online.width([_prompt(one.stored) for one in different])
        found: list[dict[str, Any]] = []
        for done, one in enumerate(different, start=1):
            anchors = [parting.anchor for parting in one.compared.partings if parting.kind == "draft"]
            drafted = self.online.drafts(_prompt(one.stored), anchors, width=width) if anchors else {}
            for parting in one.compared.partings:
                cause = self._cause(examiner, one, parting, drafted.get(parting.anchor))
                found.append(_difference(one, parting, cause, self.tokenizer))
            progress(done, len(different), f"{len(found):,} differences")
        return found

    def _cause(self, examiner: Examiner, one: _Text, parting: Parting, drafted: np.ndarray | None) -> Cause:
        at = parting.anchor + parting.slot
        if parting.kind == "end":
            said = int(one.stored.token_ids[at])
            found = "decoding is at a stop token or at its budget here, and the stored text goes on"
            return Cause(name="label", found=found, tokens=(said, None))
        online = one.online.tokens[at - one.stored.prompt_len]
        if parting.kind == "token" or int(one.stored.next_ids[at - 1]) != online:
            return examiner.label(one.stored, parting, online=online)
        limit = min(one.stored.prompt_len + self.online.max_new_tokens, self.target.config.max_positions)
        return examiner.draft(one.stored, parting, drafted=drafted, limit=limit)


def _prompt(stored: Sequence) -> Prompt:
    return Prompt(ids=tuple(stored.token_ids[: stored.prompt_len].tolist()), position_offset=stored.position_offset)


def _compare(stored: Sequence, result: SequenceResult, row: Decoded) -> Comparison:
    assert result.on_chain is not None, "every anchor was evaluated"
    anchors, committed = result.anchors[result.on_chain].tolist(), result.committed[result.on_chain].tolist()
    return compare_chains(
        dict(zip(anchors, committed, strict=True)),
        np.asarray(stored.token_ids[: result.length]),
        prompt_len=result.prompt_len,
        tokens=row.tokens,
        committed=row.committed,
    )


def _difference(one: _Text, parting: Parting, cause: Cause, tokenizer: Tokenizer) -> dict[str, Any]:
    """One difference's JSON."""
    offline = dict(zip(one.offline.anchors[one.offline.on_chain].tolist(), one.chain, strict=True))
    online = dict(zip(_anchors(one), one.compared.online, strict=True))
    at = parting.anchor + parting.slot - 1
    tokens = dict(zip(("offline", "online"), cause.tokens, strict=True))
    return {
        "prompt": f"{one.stored.prompt_hash:016x}",
        "sequence_index": one.stored.sequence_index,
        "ctx_pos_start": one.stored.position_offset,
        "anchor": parting.anchor,
        "slot": parting.slot,
        "kind": parting.kind,
        "tokens": tokens,
        "text": {side: None if token is None else tokenizer.pieces([token])[0] for side, token in tokens.items()},
        "label": int(one.stored.next_ids[at]),
        "committed": {"offline": offline.get(parting.anchor), "online": online.get(parting.anchor)},
        "margin": cause.margin,
        "logit_scale": cause.logit_scale,
        "feature_drift": cause.feature_drift,
        "cause": cause.name,
        "found": cause.found,
        "num_blocks": parting.num_blocks,
    }


def _anchors(one: _Text) -> list[int]:
    """Anchors of decoding's compared blocks."""
    starts = np.cumsum([one.offline.prompt_len, *one.compared.online[:-1]])
    return starts[: len(one.compared.online)].tolist()


def _taus(chains: SequenceOf[SequenceOf[int]]) -> dict[str, float | None]:
    """tau_micro (pooled over blocks) and tau_macro (mean of per-text means); None where there is no block."""
    blocks = [count for chain in chains for count in chain]
    means = [float(np.mean(chain)) for chain in chains if chain]
    return {
        "tau_micro": float(np.mean(blocks)) if blocks else None,
        "tau_macro": float(np.mean(means)) if means else None,
    }


def _counts(texts: SequenceOf[_Text]) -> dict[str, int]:
    return {
        "num_blocks": sum(len(one.compared.online) for one in texts),
        "num_equal": sum(one.compared.num_equal for one in texts),
        "num_differences": sum(len(one.compared.partings) for one in texts),
        "num_texts": len(texts),
    }


def _by_offset(texts: SequenceOf[_Text]) -> dict[str, dict[str, Any]]:
    found = {}
    for offset in sorted({one.stored.position_offset for one in texts}):
        some = [one for one in texts if one.stored.position_offset == offset]
        found[str(offset)] = {
            **_counts(some),
            "replay_tau_micro": _taus([one.chain for one in some])["tau_micro"],
            "decode_tau_micro": _taus([one.compared.online for one in some])["tau_micro"],
        }
    return found


def agree(config: AgreeConfig, *, progress: Move = no_progress) -> dict[str, Any]:
    """Decode a cache's prompts, compare with the offline replay, and find out why they part where they do.

    Returns:
        The JSON of docs/design/014: `num_blocks`, `num_equal`, `differences`, `causes`, `replay` and `decode` (tau of
        both), `by_ctx_pos_start` and what was compared.

    Raises:
        InputError: bad target, cache, drafter or mesh; sizes that do not fit; one of several processes; nothing to
            compare.
    """
    require_one_process("agree")
    block_size = _check_drafter(config.drafter, config)
    if config.served_drafter is not None:
        served = _check_drafter(config.served_drafter, config)
        layers = [read_drafter_config(folder).capture_layers for folder in (config.drafter, config.served_drafter)]
        if served != block_size or layers[0] != layers[1]:
            raise InputError(
                f"--served-drafter {config.served_drafter} has blocks of {served} and layers {layers[1]}, --drafter "
                f"{block_size} and {layers[0]}: they must be the same for blocks to be compared"
            )
    cache, warnings = _open(config)
    agreement = _Agreement(config, cache, block_size=block_size)
    texts = agreement.compare(progress)
    differences = agreement.examine(texts, progress)
    causes = Counter(difference["cause"] for difference in differences)
    counts = _counts(texts)
    return {
        "num_blocks": counts["num_blocks"],
        "num_equal": counts["num_equal"],
        "differences": differences,
        "causes": {name: causes[name] for name in SHOWN_CAUSES if causes[name]},
        "replay": _taus([one.chain for one in texts]),
        "decode": _taus([one.compared.online for one in texts]),
        "by_ctx_pos_start": _by_offset(texts),
        "num_prompts": len({one.stored.prompt_hash for one in texts}),
        "num_texts": counts["num_texts"],
        "block_size": block_size,
        "cache": str(config.cache),
        "features_dtype": cache.manifest["features_dtype"],
        "drafter": str(config.drafter),
        "served_drafter": None if config.served_drafter is None else str(config.served_drafter),
        "rope": config.rope,
        "mesh": config.mesh,
        "warnings": warnings,
        "record": make_record(
            "agree",
            config,
            drafter_sha256=drafter_fingerprint(config.drafter),
            target_fingerprint=targets.fingerprint(config.target),
            cache_fingerprint=cache.manifest["fingerprint"],
        ),
    }
