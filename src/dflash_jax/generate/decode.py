"""The `decode` command: speculative decoding of a prompt file, and the comparison with plain decoding."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from dflash_jax.accept import check_block_size, check_fit, rate_ratio_interval
from dflash_jax.core import (
    Move,
    atomic_file,
    make_record,
    mesh_shape,
    no_progress,
    require_one_process,
    write_json,
)
from dflash_jax.decode import Decoded, Decoder, Flip, explain_flip
from dflash_jax.drafter import Drafter, drafter_fingerprint, load_drafter, read_drafter_config
from dflash_jax.generate.config import DecodeConfig
from dflash_jax.generate.prompts import EncodedPrompt, by_length, encode_prompts, sample_stream
from dflash_jax.generate.stream import TextPiece, text_pieces
from dflash_jax.targets import (
    Target,
    load_target,
    open_mesh,
    padded_rows,
    put_whole,
    read_target_config,
    whole_axes,
)
from dflash_jax.text import Tokenizer, load_tokenizer

BOOTSTRAP_SAMPLES = 2000
Show = Callable[[TextPiece], None]
"""Takes the pieces of texts in the order in which they come."""


@dataclass
class _Totals:
    """What a whole run came to."""

    tokens: int = 0
    batches: list[tuple[int, float]] = field(default_factory=list)
    """Tokens and seconds of each batch's loop."""

    def add(self, rows: list[Decoded], seconds: float) -> None:
        """Count a batch's prompts; time counts the loop alone, from after the prompts' pass."""
        self.tokens += sum(len(row.tokens) for row in rows)
        self.batches.append((sum(sum(row.committed) for row in rows), seconds))

    def rate(self) -> float:
        """Tokens per second of the loop."""
        seconds = sum(seconds for _, seconds in self.batches)
        return sum(tokens for tokens, _ in self.batches) / seconds if seconds else 0.0


def _speedup(speculative: _Totals, plain: _Totals, *, seed: int) -> dict[str, Any]:
    """How many times as fast, None without plain decoding, and a bootstrap interval, None with fewer than two batches.

    Batches are resampled, which at a batch size of 1 are prompts. Their wall times hold the machine's noise too.
    """
    if not plain.rate():
        return {"speedup": None, "speedup_ci95": None}
    ours, theirs = np.array(speculative.batches, float), np.array(plain.batches, float)
    # a batch whose texts all end with their first token has no loop to time
    has_loop = (ours > 0).all(axis=1) & (theirs > 0).all(axis=1)
    interval = None
    if has_loop.sum() > 1:
        interval = list(rate_ratio_interval(ours[has_loop], theirs[has_loop], samples=BOOTSTRAP_SAMPLES, seed=seed))
    return {"speedup": speculative.rate() / plain.rate(), "speedup_ci95": interval}


def _row(item: EncodedPrompt, row: Decoded, tokenizer: Tokenizer, plain: Decoded | None) -> dict[str, Any]:
    return {
        "id": item.prompt.id,
        "set": item.prompt.set,
        "prompt": tokenizer.decode(item.ids, skip_special_tokens=False),
        "text": tokenizer.decode(row.tokens),
        "response_ids": row.tokens,
        "pieces": tokenizer.pieces(row.tokens),
        "accepted": row.committed,
        "tau": float(np.mean(row.committed)) if row.committed else None,
        "finish": "stop" if row.stopped else "length",
        "tokens_equal": None if plain is None else row.tokens == plain.tokens,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What all batches of a run share."""

    config: DecodeConfig
    target: Target
    drafter: Drafter
    tokenizer: Tokenizer
    decoder: Decoder
    prompt_bucket: int
    batch_size: int
    block_size: int
    show: Show

    def options(self, batch: list[EncodedPrompt]) -> dict[str, Any]:
        """What `Decoder.decode` is told of a batch, with a drafter or without."""
        return {
            "position_offset": self.config.position_offset,
            "sampling": self.config.sampling,
            "streams": [sample_stream(item.prompt.id) for item in batch],
        }

    def speculative(self, batch: list[EncodedPrompt]) -> tuple[list[Decoded], float]:
        """Decode a batch with the drafter, shown as it comes or when it is there; its rows and the loop's seconds."""
        options = self.options(batch) | {"drafter": self.drafter, "block_size": self.block_size}
        if not self.config.stream:
            done = self.decoder.decode([item.ids for item in batch], **options)
            if self.config.show_blocks:
                for item, row in zip(batch, done.rows, strict=True):
                    self._show([row], item)
            return done.rows, done.loop_s
        (item,), parts, moments = batch, [], []

        def remembered() -> Iterator[Decoded]:
            for step in self.decoder.stream([item.ids], **options):
                moments.append(time.perf_counter())
                parts.append(step.rows[0])
                yield step.rows[0]

        self._show(remembered(), item)
        return [_joined(parts)], moments[-1] - moments[0]

    def plain(self, batch: list[EncodedPrompt]) -> tuple[list[Decoded], float]:
        """Decode a batch without a drafter."""
        done = self.decoder.decode([item.ids for item in batch], **self.options(batch))
        return done.rows, done.loop_s

    def flip(self, item: EncodedPrompt, ours: Decoded, theirs: Decoded) -> dict[str, Any] | None:
        """Where and why a prompt's two outcomes differ; None where they do not."""
        found = explain_flip(
            self.target,
            item.ids,
            theirs,
            ours,
            block_size=self.block_size,
            rows=self.batch_size,
            prompt_bucket=self.prompt_bucket,
            max_new_tokens=self.config.max_new_tokens,
            position_offset=self.config.position_offset,
            sampling=self.config.sampling,
            stream=sample_stream(item.prompt.id),
        )
        return None if found is None else _told(found, item, self.tokenizer)

    def _show(self, parts: Any, item: EncodedPrompt) -> None:
        # stop tokens and their like are of interest where one looks at blocks, and noise in a text
        pieces = text_pieces(
            parts, self.tokenizer, prompt_id=item.prompt.id, skip_special_tokens=not self.config.show_blocks
        )
        for piece in pieces:
            self.show(piece)


def _joined(parts: list[Decoded]) -> Decoded:
    """A streamed text's parts as one outcome."""
    return Decoded(
        tokens=[token for part in parts for token in part.tokens],
        committed=[count for part in parts for count in part.committed],
        accepted=[count for part in parts for count in part.accepted],
        stopped=parts[-1].stopped,
    )


def _told(flip: Flip, item: EncodedPrompt, tokenizer: Tokenizer) -> dict[str, Any]:
    """A flip as JSON, with the two tokens as text."""
    values = asdict(flip)
    texts = {
        f"{way}_text": tokenizer.decode([values[f"{way}_token"]], skip_special_tokens=False)
        for way in ("plain", "speculative")
    }
    return {"id": item.prompt.id, **values, **texts}


def _ignore(piece: TextPiece) -> None:
    del piece


def _open(config: DecodeConfig, show: Show) -> tuple[_Run, list[EncodedPrompt]]:
    """Everything loaded and checked, and the prompts."""
    require_one_process("decode")
    target_config, drafter_config = read_target_config(config.target), read_drafter_config(config.drafter)
    check_fit(drafter_config, target_config, where=config.drafter)
    block_size = check_block_size(config.block_size, drafter_config)
    mesh = open_mesh(target_config, config.mesh)
    tokenizer = load_tokenizer(config.target)
    prompts = encode_prompts(
        config.prompts,
        tokenizer,
        target_config,
        limit=config.limit,
        seed=config.seed,
        position_offset=config.position_offset,
    )
    dtype = jnp.dtype(config.dtype)
    target = load_target(config.target, rope=config.rope, dtype=dtype, mesh=mesh)
    # few prompts: compiling a shape for each width would take longer than the padding costs
    bucket = -(-max(len(item.ids) for item in prompts) // 64) * 64
    batch_size = padded_rows(mesh, min(config.batch_size, len(prompts)))
    run = _Run(
        config=config,
        target=target,
        drafter=put_whole(mesh, load_drafter(config.drafter, dtype=dtype)),
        tokenizer=tokenizer,
        decoder=Decoder(
            target,
            stop_ids=tokenizer.stop_ids,
            max_new_tokens=config.max_new_tokens,
            batch_size=batch_size,
            prompt_bucket=bucket,
        ),
        prompt_bucket=bucket,
        batch_size=batch_size,
        block_size=block_size,
        show=show,
    )
    return run, prompts


def decode_prompts(config: DecodeConfig, *, progress: Move = no_progress, show: Show = _ignore) -> dict[str, Any]:
    """Decode prompts with a drafter and say how well it went; with `compare`, decode plainly too.

    Args:
        config: what to do.
        progress: told after every batch.
        show: told the texts' pieces where `stream` or `show_blocks` asks for them.

    Returns:
        The `decode --compare` JSON of the design: `tokens_equal`, `tau_micro` (tokens committed per target pass, pooled
        over blocks), `tau_macro` (mean of per-prompt means), `tokens_per_s`, `plain_tokens_per_s` and `speedup` (of the
        decoding loops: prompts' passes and compiling are outside), `speedup_ci95` (see `_speedup`), `num_prompts`,
        `num_tokens`, `block_size`, `draft_vocab_size` (None: drafts are of all tokens), `mesh`, `whole_axes` (what the
        mesh cannot split, and why), and `text` of the first prompt; `differences`: for every prompt whose tokens
        differ, the first one that does and why (`decode.Flip`). Keys of the comparison are None without it.

    Raises:
        InputError: bad target, drafter, prompts or mesh; one of several processes; a drafter that does not fit; a block
            size it was not trained for.
    """
    run, prompts = _open(config, show)
    rows, differences, speculative, plain = _decode_all(run, prompts, progress)
    if config.out is not None:
        with atomic_file(config.out) as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        record = make_record("decode", config, seed=config.seed, drafter_sha256=drafter_fingerprint(config.drafter))
        write_json(config.out.with_name(config.out.name + ".record.json"), record)
    return {
        "tokens_equal": all(row["tokens_equal"] for row in rows) if config.compare else None,
        **_taus(rows),
        "tokens_per_s": speculative.rate(),
        "plain_tokens_per_s": plain.rate() if config.compare else None,
        **(
            _speedup(speculative, plain, seed=config.seed)
            if config.compare
            else {"speedup": None, "speedup_ci95": None}
        ),
        "num_prompts": len(rows),
        "num_tokens": speculative.tokens,
        "block_size": run.block_size,
        "draft_vocab_size": run.drafter.config.draft_vocab_size,
        "batch_size": config.batch_size,
        "position_offset": config.position_offset,
        "dtype": config.dtype,
        "mesh": str(mesh_shape(run.target.mesh)),
        "whole_axes": whole_axes(run.target.config, mesh_shape(run.target.mesh)),
        "sampling": None if config.sampling is None else asdict(config.sampling),
        "differences": differences if config.compare else None,
        "text": rows[0]["text"],
    }


def _taus(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Tokens committed per target pass, pooled over blocks (micro) and as the mean of prompts' means (macro)."""
    committed = [block for row in rows for block in row["accepted"]]
    means = [row["tau"] for row in rows if row["tau"] is not None]
    return {
        "tau_micro": float(np.mean(committed)) if committed else None,
        "tau_macro": float(np.mean(means)) if means else None,
    }


def _decode_all(
    run: _Run, prompts: list[EncodedPrompt], progress: Move
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], _Totals, _Totals]:
    """Decode every batch, both ways side by side where asked, so that a slow moment of the machine hits both."""
    rows: dict[str, dict[str, Any]] = {}
    differences: list[dict[str, Any]] = []
    speculative, plain = _Totals(), _Totals()
    for batch in by_length(prompts, batch_size=run.config.batch_size):
        ours, seconds = run.speculative(batch)
        speculative.add(ours, seconds)
        theirs: list[Decoded | None] = [None] * len(batch)
        if run.config.compare:
            found, seconds = run.plain(batch)
            plain.add(found, seconds)
            theirs = [*found]
        for item, our, their in zip(batch, ours, theirs, strict=True):
            rows[item.prompt.id] = _row(item, our, run.tokenizer, their)
            flip = None if their is None else run.flip(item, our, their)
            differences += [] if flip is None else [flip]
        progress(len(rows), len(prompts), f"{speculative.rate():.1f} tokens/s")
    return [rows[item.prompt.id] for item in prompts], differences, speculative, plain
