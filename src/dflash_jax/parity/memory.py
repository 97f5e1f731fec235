"""Memorisation: does the drafter know its training prompts alone?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dflash_jax.core import RECORD_NAME, InputError, read_json, read_jsonl
from dflash_jax.parity.cause import Cause
from dflash_jax.parity.examine import Evidence

_SHARE = 0.5
"""Unseen prompts that get less than this share of what seen ones get are a matter of memory, not of generalising."""
_LAST_STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What a drafter's own run says.

    Attributes:
        prompts: hashes of all prompts it was trained on; None where it has no record of them.
        step: the checkpoint's step; None where it has no record.
        token_acc: accuracy on the training batches of the last steps before it; None without a curve.
    """

    prompts: frozenset[int] | None = None
    step: int | None = None
    token_acc: float | None = None


def read_training(drafter: Path) -> Training:
    """Return what is known of a drafter's training: its record, and the curve of its run folder.

    Raises:
        InputError: the record or the curve is damaged.
    """
    if not (drafter / RECORD_NAME).is_file():
        return Training()
    record = read_json(drafter / RECORD_NAME, what="the drafter's record")
    if not isinstance(record, dict):
        raise InputError(f"the drafter's record is a JSON {type(record).__name__}, an object is needed: {drafter}")
    hashes, step = record.get("trained_prompt_hashes"), record.get("step")
    curve, token_acc = drafter.parent / "metrics.jsonl", None
    if isinstance(step, int) and curve.is_file():
        rows = [row for row in read_jsonl(curve, what="the run's curve") if row.get("step", step + 1) <= step]
        last = [row["accuracy"] for row in rows[-_LAST_STEPS:] if isinstance(row.get("accuracy"), float)]
        token_acc = float(np.mean(last)) if last else None
    return Training(
        prompts=None if hashes is None else frozenset(int(value, 16) for value in hashes),
        step=step if isinstance(step, int) else None,
        token_acc=token_acc,
    )


def memory_cause(seen: dict[str, Any] | None, unseen: dict[str, Any] | None, training: Training) -> Cause:
    """Return memorisation, where the drafter knows little but what it was trained on.

    With seen and unseen prompts among the texts: the whole interval of the unseen ones' accept_len lies below half of
    the seen ones'. With unseen ones alone: their token_acc is below half of the training batches' in the run's curve.

    Args:
        seen: `accept.summarise` of prompts the drafter was trained on.
        unseen: of other prompts.
        training: what its run says.
    """
    if unseen is None:
        return Cause()
    if seen is not None:
        if unseen["accept_len_ci95"][1] >= _SHARE * seen["accept_len_ci95"][0]:
            return Cause()
        sides = [
            f"{name} {group['accept_len_mean']:.3f} [{group['accept_len_ci95'][0]:.3f}, "
            f"{group['accept_len_ci95'][1]:.3f}] ({group['num_prompts']} prompts)"
            for name, group in (("seen", seen), ("unseen", unseen))
        ]
        evidence = [Evidence(test="accept_len of the reference on seen and on unseen prompts", result=", ".join(sides))]
    else:
        if training.token_acc is None or unseen["token_acc_mean"] >= _SHARE * training.token_acc:
            return Cause()
        sides = [f"training {training.token_acc:.3f}", f"unseen {unseen['token_acc_mean']:.3f}"]
        evidence = [
            Evidence(
                test=f"token_acc on the training batches before step {training.step} and on unseen prompts",
                result=", ".join(sides),
            )
        ]
    return Cause(
        cause_id="memorisation",
        sentence="positions are not to blame, every offset is as the smallest; the drafter knows the prompts it was "
        f"trained on and little else: {', '.join(sides)}",
        evidence=evidence,
    )
