"""Record files as the commands write them, at the size of a small demo: two cores, block 8, four offsets."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

OFFSETS = (0, 4096, 65536, 131072)
WORDS = [
    "def",
    " has",
    "_close",
    "_elements",
    "(",
    "numbers",
    ":",
    " List",
    "[",
    "float",
    "]",
    ")",
    " ->",
    " bool",
    ":\n",
]
WORDS += [
    "    ",
    "for",
    " i",
    " in",
    " range",
    "(len",
    "(numbers",
    ")):",
    "\n",
    "        ",
    "if",
    " a < b",
    " & c",
    ":",
    "\n\n",
]


def bucket(accept_len: float, *, anchors: int, prompts: int, half: float = 0.04) -> dict[str, Any]:
    """One group's statistics whose survival sums to `accept_len` on every anchor, and to a bit less along the chain."""
    share = accept_len / (1 + accept_len)  # geometric: the sum of share**k over all k is accept_len
    survival = [round(share**slot, 4) for slot in range(1, 8)]
    chain = [round(0.94 * value, 4) for value in survival]
    tau = 1 + sum(chain)
    return {
        "accept_len_mean": round(sum(survival), 4),
        "accept_len_p50": 0.0,
        "accept_len_p90": 2.0,
        "accept_len_p99": 5.0,
        "accept_len_ci95": [round(sum(survival) - half, 4), round(sum(survival) + half, 4)],
        "token_acc_mean": round(share / 2.2, 4),
        "survival": survival,
        "replay": {
            "tau_micro": round(tau, 4),
            "tau_macro": round(tau + 0.03, 4),
            "tau_ci95": [round(tau - half, 4), round(tau + half, 4)],
            "survival": chain,
            "num_blocks": round(anchors / tau),
        },
        "num_anchors": anchors,
        "num_prompts": prompts,
        "num_unlabelled": 0,
    }


def check(**changes: Any) -> dict[str, Any]:
    """A check of a drafter that learned a little and keeps parity."""
    unseen = bucket(0.55, anchors=4 * 15744, prompts=164)
    by_offset = {str(offset): bucket(0.55, anchors=15744, prompts=164) for offset in OFFSETS}
    differences = {"4096": [-0.0011, 0.0009], "65536": [-0.0002, 0.0021], "131072": [-0.0018, 0.0007]}
    document = unseen | {
        "seen": None,
        "unseen": unseen,
        "by_ctx_pos_start": by_offset,
        "accept_len_by_offset_difference": {
            offset: {"mean": round(sum(interval) / 2, 5), "ci95": interval} for offset, interval in differences.items()
        },
        "untrained": bucket(0.012, anchors=15744, prompts=164, half=0.004),
        "block_size": 8,
        "cache": "demo/cache-heldout",
        "drafter": "demo/run/run-600",
    }
    return document | changes


def parity(**changes: Any) -> dict[str, Any]:
    """A parity that is broken far away, as an engine with rounded angles makes it."""

    def offset(verdict: str, mean: float, drift: float, **more: Any) -> dict[str, Any]:
        row = {"verdict": verdict, "accept_len_difference": mean, "ci95": [mean - 0.04, mean + 0.04]}
        row |= {"offset_difference": mean, "offset_ci95": [mean - 0.05, mean + 0.05], "feature_drift": drift}
        row |= {"drafter_drift": 0.0, "argmax_agreement": 1.0 - min(drift, 0.5), "accept_len_mean": 0.55 + mean}
        row |= {"accept_len_ci95": [0.51 + mean, 0.59 + mean], "tau": 1.52 + mean, "num_anchors": 15744}
        row |= {
            "num_anchors_differing": round(-9000 * mean),
            "more_prompts_needed": None,
            "swaps": None,
            "spoils": None,
        }
        return row | more

    swaps = {"none": 0.15, "features": 0.53, "labels": 0.16, "drafter": 0.15, "all": 0.55}
    far = offset("broken", -0.4, 0.8, swaps=swaps, spoils={"features": 0.17, "drafter": 0.55})
    document = {
        "verdict": "broken",
        "cause": "the target's rotary angles are rounded to bfloat16",
        "cause_id": "bfloat16_angles",
        "evidence": [{"test": "angles of each kind", "result": "bfloat16 0, exact 1"}],
        "by_ctx_pos_start": {
            "0": offset("holds", 0.0, 0.0),
            "65536": offset("undecided", -0.08, 3e-7, more_prompts_needed=40),
            "131072": far,
        },
        "reference": bucket(0.55, anchors=15744, prompts=164),
        "probes": {"layers-1": 0.1, "layers+1": 0.12},
        "seen": None,
        "unseen": bucket(0.55, anchors=15744, prompts=164),
        "by_context_length": {
            "128-255": bucket(0.5, anchors=744, prompts=64),
            "64-127": bucket(0.6, anchors=9, prompts=4),
        },
        "margin": 0.1,
        "num_prompts": 164,
        "num_anchors": 15744,
        "block_size": 8,
        "rope": "bfloat16",
        "drafter": "demo/run/run-600",
        "notes": [],
        "warnings": [],
    }
    return document | changes


def agree(**changes: Any) -> dict[str, Any]:
    """An agreement that two near ties of a bfloat16 cache spoil, and one label."""

    def difference(cause: str, **more: Any) -> dict[str, Any]:
        one = {"prompt": "00c0ffee00c0ffee", "sequence_index": 3, "ctx_pos_start": 4096, "anchor": 131, "slot": 2}
        one |= {"kind": "draft", "tokens": {"offline": 260, "online": 284}, "text": {"offline": " a", "online": "\n"}}
        one |= {"label": 260, "committed": {"offline": 3, "online": 2}, "margin": 0.0123, "logit_scale": 21.5}
        one |= {"feature_drift": 1.6e-3, "cause": cause, "found": f"what was found of {cause}", "num_blocks": 2}
        return one | more

    def offset(equal: int, differences: int) -> dict[str, Any]:
        row = {"num_blocks": 400, "num_equal": equal, "num_differences": differences, "num_texts": 12}
        return row | {"replay_tau_micro": 1.5, "decode_tau_micro": 1.502}

    label = difference(
        "label", kind="token", tokens={"offline": 5, "online": None}, text={"offline": "x", "online": None}
    )
    document = {
        "num_blocks": 800,
        "num_equal": 794,
        "differences": [difference("features"), difference("features", margin=None), label],
        "causes": {"label": 1, "features": 2},
        "replay": {"tau_micro": 1.5, "tau_macro": 1.51},
        "decode": {"tau_micro": 1.501, "tau_macro": 1.512},
        "by_ctx_pos_start": {"4096": offset(394, 3), "0": offset(400, 0)},
        "num_prompts": 12,
        "num_texts": 24,
        "block_size": 8,
        "cache": "demo/cache-heldout",
        "features_dtype": "bfloat16",
        "drafter": "demo/run/run-600",
        "served_drafter": None,
        "rope": "exact",
        "warnings": ["the cache's fingerprint differs in rope"],
    }
    return document | changes


def decode(**changes: Any) -> dict[str, Any]:
    """A decode --compare record."""
    document = {"tokens_equal": True, "tau_micro": 1.482, "tau_macro": 1.513, "tokens_per_s": 71.4}
    document |= {"plain_tokens_per_s": 58.9, "speedup": 1.212, "num_prompts": 24, "num_tokens": 2304, "block_size": 8}
    return document | changes


def flip(name: str, **changes: Any) -> dict[str, Any]:
    """One entry of a decode record's `differences`: a near tie that rounding explains."""
    row = {"id": name, "index": 17, "plain_token": 260, "speculative_token": 284, "plain_text": " a"}
    row |= {"plain_margin": 0.03125, "speculative_margin": 0.0625, "speculative_text": "\n", "reproduced": True}
    row |= {"difference_here": 0.1, "difference_p50": 0.05, "difference_max": 0.125, "explained": True}
    return row | changes


def held_out(tau: float, **changes: Any) -> dict[str, Any]:
    """The `eval` of a step."""
    row = {"tau_micro": tau, "tau_ci95": [tau - 0.05, tau + 0.05], "tau_macro": tau + 0.02, "accept_len_mean": tau - 1}
    row |= {"token_acc_mean": 0.25, "num_prompts": 24, "num_seen": 0, "seconds": 3.0}
    return row | changes


def detail(number: int, **changes: Any) -> dict[str, Any]:
    """One row of decode details: blocks of 1 to 5 tokens over made-up code."""
    accepted = [1 + (number * 7 + 3 * place * place) % 5 * (place % 3 == 0) for place in range(40)]
    pieces = [WORDS[(place * (number + 1) + number) % len(WORDS)] for place in range(1 + sum(accepted))]
    row = {
        "id": f"HumanEval/{number}",
        "prompt": "Write a solution to the following problem:\n```python\ndef f(): ...\n```",
    }
    row |= {"pieces": pieces, "accepted": accepted, "tokens_equal": True, "tau": sum(accepted) / len(accepted)}
    return row | changes


def metrics(count: int) -> list[dict[str, Any]]:
    """A curve that falls and levels off, every 10 steps."""
    rows = []
    for place in range(1, count + 1):
        done = place / count
        accuracy = [round(0.62 * (1 - math.exp(-4 * done)) * 0.72**slot, 4) for slot in range(7)]
        wobble = 0.12 * math.sin(place * 1.7) * math.cos(place * 0.31)
        row = {
            "step": 10 * place,
            "loss": round(3.4 + 6.6 * math.exp(-5 * done) + wobble, 4),
            "accuracy_by_slot": accuracy,
        }
        row |= {"accuracy": round(sum(accuracy) / 7, 4), "learning_rate": 6e-4 * (1 - done), "grad_norm": 1.2 + wobble}
        rows.append(row | {"anchors_per_s": 410.0 + 9 * wobble, "seconds": 6.2 * place})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_json(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def write_run(folder: Path, *, count: int = 60) -> Path:
    """A run folder: config, curve, two kept drafters with their records."""
    config = {
        "target": "demo/target",
        "cache": "demo/cache-train",
        "out": str(folder),
        "steps": 10 * count,
        "block_size": 8,
    }
    versions = {"dflash-jax": "0.1.0", "python": "3.11.2", "jax": "0.10.2", "equinox": "0.13.1", "optax": "0.2.8"}
    record = {"command": "train", "config": config, "argv": ["dflash-jax", "train", "--out", "my run"], "seed": 0}
    record |= {"created_utc": "2026-11-23T18:00:00+00:00", "versions": versions, "devices": ["TFRT_CPU_0"]}
    record |= {"git_revision": "f7c5e02", "trained_prompt_hashes": list(range(4000))}
    record |= {"fingerprint": {"target_sha256": "9f2c" * 16, "tokenizer_sha256": "ab01" * 16}}
    for step in (50, 100):
        (folder / f"run-{step}").mkdir(parents=True)
        write_json(folder / f"run-{step}" / "record.json", record)
    write_json(folder / "config.json", config)
    write_jsonl(folder / "metrics.jsonl", metrics(count))
    return folder


class Builder:
    """The functions above, for tests: pytest's importlib mode does not let them import this file."""

    bucket = staticmethod(bucket)
    check = staticmethod(check)
    agree = staticmethod(agree)
    parity = staticmethod(parity)
    decode = staticmethod(decode)
    detail = staticmethod(detail)
    flip = staticmethod(flip)
    held_out = staticmethod(held_out)
    metrics = staticmethod(metrics)
    write_json = staticmethod(write_json)
    write_jsonl = staticmethod(write_jsonl)
    write_run = staticmethod(write_run)


@pytest.fixture(scope="session")
def build() -> type[Builder]:
    return Builder
