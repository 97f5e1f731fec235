"""Features made where they are used: the target's prefill as a part of the training step, nothing stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from dflash_jax import targets
from dflash_jax.cache import Responses, epoch_order, read_responses
from dflash_jax.core import InputError
from dflash_jax.drafter import StoredSequence
from dflash_jax.train.config import TrainConfig
from dflash_jax.train.grouping import bucket, make_groups
from dflash_jax.train.offsets import Offsets
from dflash_jax.train.sharding import local_rows, put_rows
from dflash_jax.train.step import frozen_ends

_MAX_POSITION = 2**31 - 1
_OFFSETS_KEY = 1 << 127  # keeps the draw of offsets apart from that of the order, whose keys are smaller


class Texts(eqx.Module):
    """A batch of responses on the devices, right-padded: what `StoredSequence` has without the target's part.

    Attributes:
        token_ids: prompt, then response.
        length: tokens that are real.
        prompt_len: tokens of the prompt.
        limit: most tokens decoding would have allowed, prompt included.
        position_offset: absolute position of token 0.
    """

    token_ids: Int32[Array, "batch seq"]
    length: Int32[Array, " batch"]
    prompt_len: Int32[Array, " batch"]
    limit: Int32[Array, " batch"]
    position_offset: Int32[Array, " batch"]


def live_sequences(
    target: targets.Target, texts: Texts, *, capture_layers: tuple[int, ...], top_k: int = 0
) -> StoredSequence:
    """Return what a cache would have stored of a batch: features and next_ids by a prefill, in the target's dtype.

    Args:
        target: frozen; nothing is differentiated through it.
        texts: the batch.
        capture_layers: 0-based layers whose outputs are the features, in this order.
        top_k: likeliest tokens after each token to store too, log-probabilities rounded as a cache rounds them.
    """
    output = targets.prefill(
        target,
        texts.token_ids,
        lengths=texts.length,
        position_offset=texts.position_offset,
        capture_layers=capture_layers,
    )
    ids, logprobs = targets.next_top(target, output.hidden, count=top_k) if top_k else (None, None)
    return StoredSequence(
        features=output.features,
        token_ids=texts.token_ids,
        next_ids=targets.next_ids(target, output.hidden) if ids is None else ids[..., 0],
        top_ids=ids,
        top_logprobs=None if logprobs is None else logprobs.astype(jnp.float16),
        length=texts.length,
        features_len=texts.length,
        prompt_len=texts.prompt_len,
        limit=texts.limit,
        position_offset=texts.position_offset,
    )


def draw_offset(largest: int, *, seed: int, element: int) -> int:
    """Return the position offset of element `element` of a run's stream of sequences, 0 to `largest`."""
    raw = np.random.Philox(key=_OFFSETS_KEY + (element << 32) + seed).random_raw()
    return int(raw) % (largest + 1)


class LiveSource:
    """Responses whose features the target computes in every step."""

    def __init__(
        self, responses: Responses, *, capture_layers: tuple[int, ...], offsets: Offsets, fingerprint: dict[str, Any]
    ) -> None:
        """Take checked responses, what is captured, and what the target and its tokenizer are."""
        self._responses, self._offsets = responses, offsets
        self._capture_layers, self._fingerprint = capture_layers, fingerprint

    @property
    def capture_layers(self) -> tuple[int, ...]:
        """Those asked for."""
        return self._capture_layers

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a cache of the same target and layers would have, but for how features are stored."""
        return self._fingerprint | {"capture_layers": list(self._capture_layers)}

    @property
    def identity(self) -> dict[str, str]:
        """The hash of the responses file."""
        return {"responses_sha256": self._responses.sha256}

    def prompt_hashes(self) -> list[int]:
        """Return that of every row."""
        return self._responses.prompt_hash.tolist()

    def _element(self, index: int, seed: int) -> tuple[int, int]:
        """Row and position offset of an element of the endless stream; an epoch has each row at each listed offset."""
        fixed = self._offsets.fixed
        count = self._responses.num_rows * max(len(fixed), 1)
        epoch, place = divmod(index, count)
        offset, row = divmod(int(epoch_order(count, seed, epoch)[place]), self._responses.num_rows)
        return row, fixed[offset] if fixed else draw_offset(self._offsets.largest, seed=seed, element=index)

    def batches(
        self, *, sequences_per_step: int, max_positions: int, seed: int, mesh: Mesh | None, widths: int = 1
    ) -> Callable[[int], Texts]:
        """Return the function that gives a step's texts; each process reads its own rows. See `make_groups`."""
        responses, rows = self._responses, local_rows(mesh, sequences_per_step)
        groups = make_groups(
            responses.lengths.astype(np.int64),
            lambda element: self._element(element, seed)[0],
            per_epoch=responses.num_rows * max(len(self._offsets.fixed), 1),
            sequences_per_step=sequences_per_step,
            widths=widths,
            seed=seed,
        )
        budget = responses.max_new_tokens

        def batch(step: int) -> Texts:
            elements, width = groups(step)
            chosen = [self._element(elements[index], seed) for index in rows]
            token_ids = np.zeros((len(chosen), width), np.int32)
            for place, (row, _) in enumerate(chosen):
                ids = responses.tokens(row)
                token_ids[place, : len(ids)] = ids
            numbers = np.array([row for row, _ in chosen])
            prompt_len = responses.prompt_len[numbers].astype(np.int32)
            limit = np.full(len(chosen), max_positions) if budget is None else prompt_len + budget
            arrays = {
                "token_ids": token_ids,
                "length": responses.lengths[numbers].astype(np.int32),
                "prompt_len": prompt_len,
                "limit": np.minimum(limit, max_positions).astype(np.int32),
                "position_offset": np.array([offset for _, offset in chosen], np.int32),
            }
            return Texts(**put_rows(mesh, arrays, first=rows[0], batch=sequences_per_step))

        return batch


def open_live(
    path: Path,
    *,
    target: targets.TargetConfig,
    capture_layers: tuple[int, ...],
    offsets: Offsets,
    fingerprint: dict[str, Any],
) -> LiveSource:
    """Return the source of a responses file.

    Args:
        path: `--responses`.
        target: sizes.
        capture_layers: layers whose outputs are the features.
        offsets: where sequences lie.
        fingerprint: of the target and its tokenizer.

    Raises:
        InputError: see `read_responses`; a layer that is not there; positions past 2^31 - 1.
    """
    responses = read_responses(path, vocab_size=target.vocab_size, max_length=target.max_positions)
    wrong = [layer for layer in capture_layers if not 0 <= layer < target.num_layers]
    if wrong:
        raise InputError(f"--capture-layers names {wrong[0]}: the target's layers are 0 to {target.num_layers - 1}")
    if offsets.largest + bucket(int(responses.lengths.max())) > _MAX_POSITION:
        raise InputError(
            f"--position-offsets reaches {offsets.largest}: the longest sequence ends past {_MAX_POSITION}"
        )
    own = fingerprint | {"rope": target.rope.to_json()}
    return LiveSource(responses, capture_layers=capture_layers, offsets=offsets, fingerprint=own)


def make_live_step(
    step: Callable[..., Any], config: TrainConfig, *, capture_layers: tuple[int, ...]
) -> Callable[..., Any]:
    """Return a cached step as one that makes its features first: `(state, target, texts) -> (state, StepResult)`.

    One program: nothing of the features outlives the step. The state is donated.
    """

    def whole(state: Any, target: targets.Target, texts: Texts) -> Any:
        sequences = live_sequences(target, texts, capture_layers=capture_layers, top_k=config.live_top_k)
        return step(state, *frozen_ends(target.embed_tokens, target.head, config), sequences)

    return jax.jit(whole, donate_argnums=(0,))
