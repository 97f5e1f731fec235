"""Why decoding parts from the replay: one thing is exchanged at a time, in the order of the chain."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from dflash_jax.agree.blocks import Kind, Parting
from dflash_jax.cache import Sequence
from dflash_jax.drafter import Drafter, draft_blocks
from dflash_jax.nn import product
from dflash_jax.targets import Target, prefill

CauseName = Literal["label", "features", "drafter", "numerics"]
SAME_FEATURES = 1e-4
"""Relative difference of features that summing in another order makes (1e-6 in float32), and storing them does not
(1.6e-3 in bfloat16, 1.5e-2 in int8)."""
SAME_LOGITS = 1e-3
"""Margin between two tokens, over the row's largest logit, within which rounding decides."""
_WIDTH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """What is to blame for a difference.

    Attributes:
        name: the first link that is not the same.
        found: one sentence with what was tried.
        tokens: what the two sides have at the slot; None where decoding has none.
        margin: logits between them: the replay's own for a draft, those of decoding's target for a token; None where
            there are not two tokens.
        logit_scale: the largest magnitude of that row's logits.
        feature_drift: root mean square of stored less fresh features over that of the fresh, over the block's context;
            None where it plays no part.
    """

    name: CauseName
    found: str
    tokens: tuple[int, int | None]
    margin: float | None = None
    logit_scale: float | None = None
    feature_drift: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fresh:
    """A stored text through decoding's target in one pass: features, and what the head reads."""

    features: Float[Array, "seq features"]
    hidden: Float[np.ndarray, "seq hidden"]


@eqx.filter_jit
def _prefill(
    target: Target,
    tokens: Int32[Array, "one seq"],
    length: Int32[Array, " one"],
    offset: Int32[Array, " one"],
    layers: tuple[int, ...],
) -> tuple[Float[Array, "seq features"], Float[Array, "seq hidden"]]:
    output = prefill(target, tokens, lengths=length, position_offset=offset, capture_layers=layers)
    return output.features[0], output.hidden[0]


@eqx.filter_jit
def _draft_logits(
    target: Target,
    drafter: Drafter,
    features: Float[Array, "seq features"],
    token_ids: Int32[Array, " seq"],
    place: Int32[Array, " 3"],
    block_size: int,
) -> Float[Array, "drafted vocab"]:
    """Logits of slots 1 to B-1 at one anchor; `place` is anchor, slots of the block, position offset.

    A token outside the draft vocabulary has the least logit of its slot.
    """
    hidden = draft_blocks(
        drafter,
        target.embed_tokens,
        features,
        token_ids,
        place[:1],
        block_lengths=place[1:2],
        block_size=block_size,
        position_offset=place[2],
    )
    logits = product("bh,vh->bv", hidden[0], target.head, out=jnp.float32)
    if drafter.draft_ids is None:
        return logits
    inside = jnp.zeros(logits.shape[1], bool).at[drafter.draft_ids].set(True)
    return jnp.where(inside[None], logits, logits.min(axis=1, keepdims=True))


def _margin(logits: Float[np.ndarray, " vocab"], first: int, second: int) -> tuple[float, float]:
    """How far the first token lies above the second, and the row's largest magnitude."""
    return float(logits[first] - logits[second]), float(np.abs(logits).max())


def judge_draft(
    rows: Mapping[str, Float[np.ndarray, " vocab"]], *, online: int, feature_drift: float, same_drafter: bool
) -> Cause:
    """Return why a slot is drafted otherwise in decoding.

    Args:
        rows: the slot's logits: "stored" (the replay's own), and with the features, the drafter or both of decoding in
            their place ("features", "drafter", "both").
        online: the token that decoding drafts.
        feature_drift: of the stored features.
        same_drafter: whether decoding's drafter is the checked one.
    """
    said = {name: int(np.argmax(logits)) for name, logits in rows.items()}
    offline = said["stored"]
    margin, scale = _margin(rows["stored"], offline, online)
    known: dict[str, Any] = {
        "tokens": (offline, online),
        "margin": margin,
        "logit_scale": scale,
        "feature_drift": feature_drift,
    }
    if offline == online:
        return Cause(name="numerics", found="drafted once more both say the same: a near tie of two passes", **known)
    if feature_drift > SAME_FEATURES and said["features"] == online:
        found = f"features computed here, {feature_drift:.1e} from the stored ones, draft what decoding drafts"
        return Cause(name="features", found=found, **known)
    if not same_drafter and said["drafter"] == online:
        return Cause(name="drafter", found="the drafter that decodes drafts so from the stored features too", **known)
    if not same_drafter and said["both"] == online:
        found = f"the drafter that decodes drafts so from features computed here ({feature_drift:.1e} from the stored)"
        return Cause(name="drafter", found=found, **known)
    if margin <= SAME_LOGITS * scale:
        found = f"stored and fresh features ({feature_drift:.1e} apart) draft the same; the two tokens are a near tie"
        return Cause(name="numerics", found=found, **known)
    found = "from the same text, features and drafter decoding drafts otherwise, by more than rounding: it is its loop"
    return Cause(name="drafter", found=found, **known)


def judge_label(logits: Float[np.ndarray, " vocab"], *, text: int, stored: int, online: int, kind: Kind) -> Cause:
    """Return why decoding's own token at a slot is not the stored label.

    Args:
        logits: of decoding's target at that place, from one pass over the stored text.
        text: the stored token there.
        stored: the stored label there.
        online: what decoding commits there.
        kind: of the parting.
    """
    offline = text if kind == "token" else stored
    margin, scale = abs(float(logits[offline] - logits[online])), float(np.abs(logits).max())
    behind = float(logits.max() - logits[online])
    known: dict[str, Any] = {"tokens": (offline, online), "margin": margin, "logit_scale": scale}
    if stored == online:
        return Cause(name="label", found="the stored text is not greedy here: it leaves its own label", **known)
    if margin <= SAME_LOGITS * scale:
        return Cause(name="numerics", found="to decoding's target the two tokens are a near tie", **known)
    if behind <= SAME_LOGITS * scale:
        found = "decoding's target, over the stored text in one pass, says decoding's token and not the stored label"
        return Cause(name="label", found=found, **known)
    found = "one pass of decoding's target over the stored text does not say what its decoding passes say, by more than"
    return Cause(name="numerics", found=f"{found} rounding: its passes are to blame", **known)


class Examiner:
    """Exchanges features, drafter and labels at an anchor of a stored text."""

    def __init__(self, target: Target, checked: Drafter, served: Drafter, *, block_size: int, longest: int) -> None:
        """Bind what all texts share.

        Args:
            target: decoding's.
            checked: the drafter that the replay drafts with.
            served: the drafter that decodes; the same object where it is the same drafter.
            block_size: positions per block.
            longest: tokens of the longest text that will be examined; all are padded to it, and one shape is compiled.
        """
        self._target, self._checked, self._served, self._block_size = target, checked, served, block_size
        self._width = -(-longest // _WIDTH) * _WIDTH
        self._last: tuple[Sequence, Fresh] | None = None

    def _padded(self, text: Sequence) -> Int32[Array, " seq"]:
        return jnp.asarray(np.pad(np.asarray(text.token_ids), (0, self._width - len(text.token_ids))))

    def fresh(self, text: Sequence) -> Fresh:
        """Return a text through decoding's target; the last one is kept."""
        if self._last is None or self._last[0] is not text:
            tokens = self._padded(text)
            features, hidden = _prefill(
                self._target,
                tokens[None],
                jnp.array([len(text.token_ids)], jnp.int32),
                jnp.array([text.position_offset], jnp.int32),
                self._checked.config.capture_layers,
            )
            self._last = text, Fresh(features=features, hidden=np.asarray(hidden))
        return self._last[1]

    def _logits(
        self, drafter: Drafter, features: Float[Array, "seq features"], text: Sequence, anchor: int, limit: int
    ) -> Float[np.ndarray, "drafted vocab"]:
        slots = max(1, min(self._block_size, limit - anchor))
        place = jnp.array([anchor, slots, text.position_offset], jnp.int32)
        return np.asarray(_draft_logits(self._target, drafter, features, self._padded(text), place, self._block_size))

    def _stored(self, text: Sequence) -> Float[Array, "seq features"]:
        features = np.asarray(text.features, np.float32)
        return jnp.asarray(np.pad(features, ((0, self._width - len(features)), (0, 0))))

    def draft(
        self, text: Sequence, parting: Parting, *, drafted: Int32[np.ndarray, " drafted"] | None, limit: int
    ) -> Cause:
        """Return why both sides are at an anchor and accept differently, their labels being the same.

        Args:
            text: the stored text.
            parting: where.
            drafted: what decoding drafts there, slots 1 to B-1; None where it does not come there a second time.
            limit: most tokens that decoding allows the text.
        """
        stored, fresh = self._stored(text), self.fresh(text).features
        anchor, row = parting.anchor, parting.slot - 1
        wanted = np.asarray(fresh[:anchor], np.float64)
        drift = float(np.sqrt(np.square(np.asarray(stored[:anchor]) - wanted).mean() / np.square(wanted).mean()))
        choices = {
            "stored": (self._checked, stored),
            "features": (self._checked, fresh),
            "drafter": (self._served, stored),
            "both": (self._served, fresh),
        }
        rows = {
            name: self._logits(drafter, features, text, anchor, limit)[row]
            for name, (drafter, features) in choices.items()
        }
        if drafted is None:
            token = int(np.argmax(rows["both"]))
            found = "decoded once more, step by step, it does not come to this anchor: its passes are a near tie"
            return Cause(name="numerics", found=found, tokens=(token, None), feature_drift=drift)
        return judge_draft(
            rows, online=int(drafted[row]), feature_drift=drift, same_drafter=self._served is self._checked
        )

    def label(self, text: Sequence, parting: Parting, *, online: int) -> Cause:
        """Return why decoding's own token at a slot is not the stored label, or not the stored text's.

        Args:
            text: the stored text.
            parting: where.
            online: what decoding commits there.
        """
        at = parting.anchor + parting.slot - 1
        hidden, head = self.fresh(text).hidden[at], np.asarray(self._target.head)
        logits = np.asarray(head, np.float32) @ np.asarray(hidden, np.float32)
        stored, told = int(text.next_ids[at]), int(text.token_ids[at + 1])
        return judge_label(logits, text=told, stored=stored, online=online, kind=parting.kind)
