"""The `decode` command: speculative decoding of a prompt file, and the comparison with plain decoding."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from dflash_jax.accept import check_block_size, check_fit
from dflash_jax.core import Move, atomic_file, make_record, no_progress, write_json
from dflash_jax.decode import Decoded, DecodedBatch, Decoder
from dflash_jax.drafter import Drafter, drafter_fingerprint, load_drafter, read_drafter_config
from dflash_jax.generate.config import DecodeConfig
from dflash_jax.generate.prompts import EncodedPrompt, by_length, encode_prompts
from dflash_jax.targets import load_target, read_target_config
from dflash_jax.text import Tokenizer, load_tokenizer


@dataclass
class _Totals:
    """What a whole run came to."""

    tokens: int = 0
    loop_tokens: int = 0
    seconds: float = 0.0

    def add(self, batch: DecodedBatch, *, rows: int) -> None:
        """Count a batch's first `rows` prompts; time counts the loop alone, from after the prompts' pass."""
        self.tokens += sum(len(row.tokens) for row in batch.rows[:rows])
        self.loop_tokens += sum(sum(row.committed) for row in batch.rows[:rows])
        self.seconds += batch.loop_s

    def rate(self) -> float:
        """Tokens per second of the loop."""
        return self.loop_tokens / self.seconds if self.seconds else 0.0


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


def decode_prompts(config: DecodeConfig, *, progress: Move = no_progress) -> dict[str, Any]:
    """Decode prompts greedily with a drafter and say how well it went; with `compare`, decode plainly too.

    Returns:
        The `decode --compare` JSON of the design: `tokens_equal`, `tau_micro` (tokens committed per target pass, pooled
        over blocks), `tau_macro` (mean of per-prompt means), `tokens_per_s`, `plain_tokens_per_s` and `speedup` (of the
        decoding loops: prompts' passes and compiling are outside), `num_prompts`, `num_tokens`, `block_size`, and
        `text` of the first prompt. Keys of the comparison are None without it.

    Raises:
        InputError: bad target, drafter or prompts; a drafter that does not fit; a block size it was not trained for.
    """
    target_config, drafter_config = read_target_config(config.target), read_drafter_config(config.drafter)
    check_fit(drafter_config, target_config, where=config.drafter)
    block_size = check_block_size(config.block_size, drafter_config)
    tokenizer = load_tokenizer(config.target)
    prompts = encode_prompts(
        config.prompts,
        tokenizer,
        target_config,
        limit=config.limit,
        seed=config.seed,
        position_offset=config.position_offset,
    )
    drafter = load_drafter(config.drafter)
    decoder = Decoder(
        load_target(config.target, rope=config.rope),
        stop_ids=tokenizer.stop_ids,
        max_new_tokens=config.max_new_tokens,
        batch_size=min(config.batch_size, len(prompts)),
        # few prompts: compiling a shape for each width would take longer than the padding costs
        prompt_bucket=-(-max(len(item.ids) for item in prompts) // 64) * 64,
    )
    rows, speculative, plain = _decode_all(config, prompts, decoder, drafter, tokenizer, block_size, progress)
    if config.out is not None:
        with atomic_file(config.out) as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        record = make_record("decode", config, seed=config.seed, drafter_sha256=drafter_fingerprint(config.drafter))
        write_json(config.out.with_name(config.out.name + ".record.json"), record)
    committed = [block for row in rows for block in row["accepted"]]
    means = [row["tau"] for row in rows if row["tau"] is not None]
    return {
        "tokens_equal": all(row["tokens_equal"] for row in rows) if config.compare else None,
        "tau_micro": float(np.mean(committed)) if committed else None,
        "tau_macro": float(np.mean(means)) if means else None,
        "tokens_per_s": speculative.rate(),
        "plain_tokens_per_s": plain.rate() if config.compare else None,
        "speedup": speculative.rate() / plain.rate() if config.compare and plain.rate() else None,
        "num_prompts": len(rows),
        "num_tokens": speculative.tokens,
        "block_size": block_size,
        "batch_size": config.batch_size,
        "position_offset": config.position_offset,
        "text": rows[0]["text"],
    }


def _decode_all(
    config: DecodeConfig,
    prompts: list[EncodedPrompt],
    decoder: Decoder,
    drafter: Drafter,
    tokenizer: Tokenizer,
    block_size: int,
    progress: Move,
) -> tuple[list[dict[str, Any]], _Totals, _Totals]:
    """Decode every batch, both ways side by side where asked, so that a slow moment of the machine hits both."""
    rows: dict[str, dict[str, Any]] = {}
    speculative, plain = _Totals(), _Totals()
    for batch in by_length(prompts, batch_size=config.batch_size):
        ids = [item.ids for item in batch]
        ours = decoder.decode(ids, drafter=drafter, block_size=block_size, position_offset=config.position_offset)
        speculative.add(ours, rows=len(batch))
        theirs = decoder.decode(ids, position_offset=config.position_offset) if config.compare else None
        if theirs is not None:
            plain.add(theirs, rows=len(batch))
        for index, item in enumerate(batch):
            rows[item.prompt.id] = _row(item, ours.rows[index], tokenizer, theirs.rows[index] if theirs else None)
        progress(len(rows), len(prompts), f"{speculative.rate():.1f} tokens/s")
    return [rows[item.prompt.id] for item in prompts], speculative, plain
