"""What `cache import` and `cache export` do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dflash_jax.cache import (
    Cache,
    FeatureLayout,
    NewCache,
    Sequence,
    TextGroup,
    check_fingerprint,
    open_cache,
    write_cache,
)
from dflash_jax.core import (
    InputError,
    Move,
    make_record,
    no_progress,
    sha256_file,
    sha256_json,
    write_record,
)
from dflash_jax.interchange.config import CacheExportConfig, CacheImportConfig
from dflash_jax.interchange.places import check_free, whole_folder
from dflash_jax.interchange.speculators import (
    SpeculatorsRow,
    dataset_files,
    from_speculators_layer,
    read_rows,
    to_speculators_layer,
    write_dataset,
    write_hidden_states,
)
from dflash_jax.interchange.target_side import TargetSide
from dflash_jax.interchange.turns import merge_rows, responses, text_group
from dflash_jax.interchange.windows import (
    Windows,
    WindowText,
    find_texts,
    first_difference,
    open_windows,
    text_sequence,
)


def import_cache(config: CacheImportConfig, *, progress: Move = no_progress) -> dict[str, Any]:
    """Make a cache of another tool's hidden states; it appears whole or not at all.

    Args:
        config: settings.
        progress: told after every text.

    Returns:
        `out`, `format`, `capture_layers`, `num_sequences`, `num_tokens`, `bytes`, `features_relative_error` (against
        the target; null where it was not compared), and of speculators' data `rows`, `rows_merged`,
        `rows_without_hidden_states`, `rows_without_response`; of windows `samples`, `shrink` (source tokens a stored
        token) and `reproduced` (true: every array of the source was made from the cache, equal in every bit).

    Raises:
        InputError: the source is missing, damaged, contradicts itself or is not of this target; `--out` is taken or
            cannot be written.
    """
    check_free(config.out)
    target = TargetSide(config.target)
    return (_import_windows if config.format == "windows" else _import_speculators)(config, target, progress)


def _new_cache(
    config: CacheImportConfig,
    target: TargetSide,
    *,
    capture_layers: tuple[int, ...],
    dtype: str,
    source_sha256: str,
    **facts: Any,
) -> NewCache:
    record = make_record("cache import", config, **facts)
    return NewCache(
        layout=FeatureLayout(num_layers=len(capture_layers), hidden_size=target.config.hidden_size, dtype=dtype),
        capture_layers=capture_layers,
        fingerprint=target.fingerprint(),
        config=record.pop("config"),
        record=record,
        source_sha256=source_sha256,
        tokens_per_shard=config.tokens_per_shard,
    )


def _result(config: CacheImportConfig, cache: Cache, error: float | None, **facts: Any) -> dict[str, Any]:
    return {
        "out": str(config.out),
        "format": config.format,
        "capture_layers": cache.manifest["capture_layers"],
        "num_sequences": cache.num_sequences,
        "num_tokens": cache.num_tokens,
        "bytes": sum(entry["bytes"] for entry in cache.manifest["shards"]),
        "features_relative_error": error,
        **facts,
    }


def _import_windows(config: CacheImportConfig, target: TargetSide, progress: Move) -> dict[str, Any]:
    sizes = target.config
    windows = open_windows(
        config.source, vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, num_layers=sizes.num_layers
    )
    if not np.array_equal(target.embeddings(np.asarray(windows.anchor_ids)), windows.anchor_embedding):
        raise InputError(
            f"{config.source / 'anchor_embedding_u16.npy'} is not the embedding of the anchors by the target "
            f"{config.target}: name the target that the samples were made with"
        )
    progress(0, len(windows.anchor_ids), "looking for texts")
    found = find_texts(windows)
    error = None
    if config.check_tokens:
        count = min(config.check_tokens, windows.context)
        features = np.asarray(windows.context_features[0, :count]).view(ml_dtypes.bfloat16)
        tokens, start = np.asarray(windows.ctx_token_ids[0, :count]), int(windows.ctx_pos_start[0])
        error = target.check_features(tokens, features, start, windows.capture_layers)

    def groups() -> Iterator[TextGroup]:
        for index, text in enumerate(found):
            yield (text_sequence(windows, text, index=index, prompt_set=config.prompt_set),)
            progress(text.samples[-1] + 1, len(windows.anchor_ids), f"{index + 1:,} texts")

    new = _new_cache(
        config,
        target,
        capture_layers=windows.capture_layers,
        dtype="bfloat16",
        source_sha256=sha256_json(windows.sha256()),
        windows=_windows_facts(windows, found),
    )
    with whole_folder(config.out, "cache") as folder:
        write_cache(folder, groups(), new)
        cache = open_cache(folder)
        difference = first_difference(cache, windows, found)
        if difference is not None:
            raise InputError(f"{config.source}: {difference} is not what the cache gives back: nothing was imported")
    samples = len(windows.anchor_ids)
    return _result(
        config,
        cache,
        error,
        samples=samples,
        shrink=samples * windows.context / cache.num_tokens,
        reproduced=True,
    )


def _windows_facts(windows: Windows, found: list[WindowText]) -> dict[str, Any]:
    """What, beside the cache and the target's embedding, the source's arrays are made of again."""
    texts = [{"samples": list(text.samples), "anchors": list(text.anchors), "moves": text.moves} for text in found]
    return {"meta": windows.meta, "context": windows.context, "block_size": windows.block_size, "texts": texts}


class _SpeculatorsImport:
    """Rows to groups of sequences, counted on the way."""

    def __init__(self, config: CacheImportConfig, target: TargetSide, progress: Move) -> None:
        self.config, self.target, self.progress = config, target, progress
        assert config.aux_layers is not None, "the config has checked it"
        self.capture_layers = tuple(map(from_speculators_layer, config.aux_layers))
        self.counts = {"rows": 0, "rows_merged": 0, "rows_without_hidden_states": 0, "rows_without_response": 0}
        self.error: float | None = None
        self.dtype: np.dtype[Any] | None = None
        last = target.config.num_layers - 1
        for layer, named in zip(self.capture_layers, config.aux_layers, strict=True):
            if not 0 <= layer <= last:
                raise InputError(
                    f"--aux-layers names {named}: speculators' ids of this target's layers are 1 to {last + 1} "
                    "(0 is the embedding, which is no layer's output)"
                )

    def rows(self) -> Iterator[SpeculatorsRow]:
        """Rows with hidden states, of one dtype."""
        config, sizes = self.config, self.target.config
        rows = read_rows(
            config.source,
            config.hidden_states or config.source / "hidden_states",
            aux_layers=len(self.capture_layers),
            hidden_size=sizes.hidden_size,
            vocab_size=sizes.vocab_size,
        )
        for row in rows:
            self.counts["rows"] += 1
            if isinstance(row, int):
                self.counts["rows_without_hidden_states"] += 1
                continue
            if self.dtype not in (None, row.aux.dtype):
                raise InputError(f"hs_{row.index}.safetensors holds {row.aux.dtype}, those before it {self.dtype}")
            self.dtype = row.aux.dtype
            # how many there are is not known before the last
            self.progress(self.counts["rows"], self.counts["rows"] + 1, f"{self.counts['rows']:,} rows")
            yield row

    def _check(self, row: SpeculatorsRow) -> None:
        """Compare the first row's features with the target's."""
        if self.error is None and self.config.check_tokens:
            part = slice(0, self.config.check_tokens)
            both = np.concatenate([row.aux[part], row.last[part]], axis=1)
            layers = (*self.capture_layers, self.target.config.num_layers - 1)
            self.error = self.target.check_features(row.token_ids[part], both, 0, layers)

    def groups(self) -> Iterator[TextGroup]:
        """The texts to be stored."""
        index = 0
        for row, stands_for in merge_rows(self.rows()):
            self._check(row)
            self.counts["rows_merged"] += stands_for - 1
            if not responses(row.loss_mask):
                self.counts["rows_without_response"] += stands_for
                continue
            group = text_group(
                row, self.target.greedy_tokens(row.last), first_index=index, prompt_set=self.config.prompt_set
            )
            index += len(group)
            yield group


def _first_then_rest(groups: Iterator[TextGroup], source: Path) -> tuple[TextGroup, Iterator[TextGroup]]:
    first = next(groups, None)
    if first is None:
        raise InputError(f"{source} has no row with hidden states and a response: there is nothing to import")
    return first, groups


def _import_speculators(config: CacheImportConfig, target: TargetSide, progress: Move) -> dict[str, Any]:
    work = _SpeculatorsImport(config, target, progress)
    # the first row is read before anything is written: it has the dtype, and is what most mistakes show in
    first, rest = _first_then_rest(work.groups(), config.source)
    sources = {file.name: sha256_file(file) for file in dataset_files(config.source)}
    new = _new_cache(
        config,
        target,
        capture_layers=work.capture_layers,
        dtype=str(first[0].stored_features.dtype),
        source_sha256=sha256_json(sources),
        sources=sources,
    )

    def groups() -> Iterator[TextGroup]:
        yield first
        yield from rest

    with whole_folder(config.out, "cache") as folder:
        write_cache(folder, groups(), new)
        cache = open_cache(folder)
    return _result(config, cache, work.error, **work.counts)


class _SpeculatorsExport:
    """Which columns of a cache go where in speculators' files."""

    def __init__(self, cache: Cache, target: TargetSide) -> None:
        self.target = target
        captured = cache.manifest["capture_layers"]
        self.last_layer = target.config.num_layers - 1
        self.aux = [place for place, layer in enumerate(captured) if layer != self.last_layer]
        self.last = captured.index(self.last_layer) if self.last_layer in captured else None
        self.aux_layers = [to_speculators_layer(captured[place]) for place in self.aux]
        self.hidden_size = cache.manifest["hidden_size"]

    def hidden_states(self, sequence: Sequence) -> np.ndarray:
        """`[T, n+1, H]` of a sequence, in bfloat16."""
        rows = sequence.features.reshape(len(sequence.token_ids), -1, self.hidden_size)
        if self.last is not None:
            last = rows[:, self.last]
        else:
            last = self.target.last_layer(sequence.token_ids, sequence.position_offset)
        parts = [rows[:, self.aux], last[:, None]]
        return np.concatenate([part.astype(ml_dtypes.bfloat16) for part in parts], axis=1)


def _exported(cache: Cache, position_offset: int) -> list[int]:
    """The sequences to export."""
    offsets = set()
    indices = []
    for index in range(cache.num_sequences):
        sequence = cache.sequence(index)
        offsets.add(sequence.position_offset)
        if sequence.position_offset == position_offset:
            indices.append(index)
            if sequence.features_len < len(sequence.token_ids):
                raise InputError(
                    f"{cache.path}: text {sequence.sequence_index} ends with tokens that have no features, as imported "
                    "windows do: they cannot be exported"
                )
    if not indices:
        raise InputError(
            f"{cache.path} has no sequence at position offset {position_offset}: name one of {sorted(offsets)} by "
            "--position-offset (speculators' rows have no positions, they are written as if they began at 0)"
        )
    # speculators' data is in the order of the responses, and row i is file i
    return sorted(indices, key=lambda index: cache.sequence(index).sequence_index)


def export_cache(config: CacheExportConfig, *, progress: Move = no_progress) -> dict[str, Any]:
    """Write a cache as speculators' offline hidden states; the folder appears whole or not at all.

    Args:
        config: settings.
        progress: told after every sequence.

    Returns:
        `out`, `format`, `rows`, `num_tokens`, `aux_hidden_state_layer_ids` (what speculators is to be told), and
        `last_layer`: "stored", or "computed" by the target where the cache does not hold it.

    Raises:
        InputError: the cache is not of this target, has no sequence at the offset, or only the last layer; `--out` is
            taken or cannot be written.
    """
    check_free(config.out)
    cache, target = open_cache(config.cache), TargetSide(config.target)
    check_fingerprint(cache.manifest, target.fingerprint(), what=f"the target {config.target}")
    work = _SpeculatorsExport(cache, target)
    if not work.aux:
        raise InputError(f"{config.cache} holds the last layer alone: speculators needs one before it")
    indices = _exported(cache, config.position_offset)
    num_tokens = 0
    with whole_folder(config.out, "hidden states") as folder:
        (folder / "hidden_states").mkdir()

        def rows() -> Iterator[tuple[list[int], list[int]]]:
            nonlocal num_tokens
            for row, index in enumerate(indices):
                sequence = cache.sequence(index)
                write_hidden_states(folder / "hidden_states", row, sequence.token_ids, work.hidden_states(sequence))
                num_tokens += len(sequence.token_ids)
                progress(row + 1, len(indices), f"{num_tokens:,} tokens")
                yield sequence.token_ids.tolist(), sequence.loss_mask.tolist()

        count = write_dataset(folder, rows(), fingerprint=cache.manifest["manifest_sha256"][:16])
        result = {
            "out": str(config.out),
            "format": config.format,
            "rows": count,
            "num_tokens": num_tokens,
            "aux_hidden_state_layer_ids": work.aux_layers,
            "last_layer": "computed" if work.last is None else "stored",
        }
        write_record(folder, make_record("cache export", config, **result))
    return result
