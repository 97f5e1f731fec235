"""The texts that every chain reads: generated here, given, or those of a cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32

from dflash_jax import text
from dflash_jax.cache import Cache, hash_prompt, read_responses
from dflash_jax.cache import Sequence as CachedSequence
from dflash_jax.core import InputError, Move
from dflash_jax.decode import Decoder
from dflash_jax.parity.config import ParityConfig
from dflash_jax.targets import Target

BATCH_SIZE = 32
_NO_LIMIT = np.iinfo(np.int32).max
_WIDTH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A prompt with its response.

    Attributes:
        token_ids: prompt, then response.
        prompt_len: prompt tokens, also the first anchor.
        prompt_hash: identity of the prompt.
        prompt_set: name of the set the prompt belongs to.
        limit: most tokens decoding would have allowed, prompt included.
        features_len: tokens whose features are known, the first ones; fewer than all in some caches.
        cached: the engine's sequence at each offset, where a cache gives it.
    """

    token_ids: Int32[np.ndarray, " seq"]
    prompt_len: int
    prompt_hash: int
    prompt_set: str
    limit: int
    features_len: int
    cached: Mapping[int, CachedSequence] = field(default_factory=dict)

    @property
    def num_anchors(self) -> int:
        """Eligible anchors: response tokens with a token after them, and with features of all tokens before them."""
        return max(0, min(len(self.token_ids) - 2, self.features_len) - self.prompt_len + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextBatch:
    """Texts side by side in a compiled shape; rows past the last text are one token long and forgotten.

    Attributes:
        texts: at least one.
        tokens: their ids, right-padded with zeros.
        lengths: their lengths, and 1 for rows without a text.
    """

    texts: tuple[Text, ...]
    tokens: Int32[np.ndarray, "batch seq"]
    lengths: Int32[np.ndarray, " batch"]


def make_batches(texts: Sequence[Text], *, tokens_per_batch: int) -> list[TextBatch]:
    """Return batches of texts of similar length, longest first, in few shapes: widths are 64 times powers of two."""
    by_width: dict[int, list[Text]] = {}
    for one in sorted(texts, key=lambda each: -len(each.token_ids)):
        width = _WIDTH
        while width < len(one.token_ids):
            width *= 2
        by_width.setdefault(width, []).append(one)
    batches = []
    for width, group in by_width.items():
        rows = min(max(1, tokens_per_batch // width), len(group))
        for first in range(0, len(group), rows):
            some = tuple(group[first : first + rows])
            tokens, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
            for row, one in enumerate(some):
                tokens[row, : len(one.token_ids)], lengths[row] = one.token_ids, len(one.token_ids)
            batches.append(TextBatch(texts=some, tokens=tokens, lengths=lengths))
    return batches


def _generated(config: ParityConfig, target: Target, *, offset: int, progress: Move) -> list[Text]:
    """Greedy responses of the target itself at one offset, with exact angles: they are the same at any."""
    assert config.prompts is not None
    tokenizer = text.load_tokenizer(config.target)
    prompts = text.encode_prompts(
        config.prompts,
        tokenizer,
        max_positions=target.config.max_positions,
        limit=config.limit,
        seed=config.seed,
    )
    decoder = Decoder(
        target,
        stop_ids=tokenizer.stop_ids,
        max_new_tokens=config.max_new_tokens,
        batch_size=min(BATCH_SIZE, len(prompts)),
    )
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].ids))
    texts: dict[int, Text] = {}
    for first in range(0, len(prompts), BATCH_SIZE):
        places = by_length[first : first + BATCH_SIZE]
        batch = [prompts[place] for place in places]
        rows = decoder.decode([item.ids for item in batch], position_offset=offset).rows
        texts |= {
            place: Text(
                token_ids=np.array(item.ids + row.tokens, np.int32),
                prompt_len=len(item.ids),
                prompt_hash=hash_prompt(np.array(item.ids, np.int32)),
                prompt_set=item.prompt.set,
                limit=_limit(len(item.ids), config.max_new_tokens, target.config.max_positions),
                features_len=len(item.ids) + len(row.tokens),
            )
            for place, item, row in zip(places, batch, rows, strict=True)
        }
        progress(len(texts), len(prompts), "responses")
    return [texts[place] for place in range(len(prompts))]


def _given(config: ParityConfig, target: Target) -> list[Text]:
    """The rows of a responses file."""
    assert config.responses is not None
    max_positions = target.config.max_positions
    rows = read_responses(config.responses, vocab_size=target.config.vocab_size, max_length=max_positions)
    return [
        Text(
            token_ids=rows.tokens(row),
            prompt_len=int(rows.prompt_len[row]),
            prompt_hash=int(rows.prompt_hash[row]),
            prompt_set=rows.prompt_sets[int(rows.prompt_set[row])],
            limit=_limit(int(rows.prompt_len[row]), rows.max_new_tokens, max_positions),
            features_len=int(rows.lengths[row]),
        )
        for row in range(rows.num_rows)[: config.limit]
    ]


def _limit(prompt_len: int, max_new_tokens: int | None, max_positions: int) -> int:
    return min(_NO_LIMIT if max_new_tokens is None else prompt_len + max_new_tokens, max_positions)


def _cached(config: ParityConfig, target: Target, cache: Cache, offsets: Sequence[int]) -> list[Text]:
    """The texts of a cache that are stored at each of the offsets."""
    stored: dict[int, dict[int, CachedSequence]] = {}
    for sequence in map(cache.sequence, range(cache.num_sequences)):
        if sequence.position_offset in offsets:
            stored.setdefault(sequence.sequence_index, {})[sequence.position_offset] = sequence
    budget = cache.manifest["max_new_tokens"]
    texts = []
    for index in sorted(stored)[: config.limit]:
        first = stored[index][min(stored[index])]
        if set(stored[index]) != set(offsets) or any(
            not np.array_equal(other.token_ids, first.token_ids) for other in stored[index].values()
        ):
            raise InputError(
                f"{config.cache} has not the same text {index} at each of the offsets {', '.join(map(str, offsets))}: "
                "build it with all of them at once"
            )
        if int(first.token_ids.max()) >= target.config.vocab_size:
            raise InputError(f"{config.cache} holds token {int(first.token_ids.max())}, which {config.target} has not")
        texts.append(
            Text(
                token_ids=np.array(first.token_ids),
                prompt_len=first.prompt_len,
                prompt_hash=first.prompt_hash,
                prompt_set=first.prompt_set,
                limit=_limit(first.prompt_len, budget, target.config.max_positions),
                features_len=min(sequence.features_len for sequence in stored[index].values()),
                cached=stored[index],
            )
        )
    return texts


def load_texts(
    config: ParityConfig, target: Target, *, cache: Cache | None, offsets: Sequence[int], progress: Move
) -> list[Text]:
    """Return the texts of the prompts, the responses file or the cache that a config names, those with an anchor.

    Raises:
        InputError: see `text.encode_prompts` and `cache.read_responses`; a cache whose texts differ between offsets;
            no text with an anchor.
    """
    if cache is not None:
        texts = _cached(config, target, cache, offsets)
    elif config.responses is not None:
        texts = _given(config, target)
    else:
        texts = _generated(config, target, offset=min(offsets), progress=progress)
    usable = [one for one in texts if one.num_anchors > 0]
    if not usable:
        raise InputError("no text has a response of two tokens or more: there is nothing to compare")
    return usable
