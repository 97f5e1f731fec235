"""The baseline report's experiment on SmolLM2, with the controls it lacked: one command, resumable.

    python recipes/positional_parity.py --out OUT

The report (gpt-oss-20b): a drafter trained on 16 prompts of 1024 tokens accepts 6.95 of 7 tokens on the cache it was
trained on, 0.17 on a cache of other prompts at offsets 0, 4096, 65536 and 131072, and 2.59 there after a fine-tune of
200 steps. It blamed the offsets. Here the same is done at the same settings, and each suspect alone:

    memorised   16 contexts of 1024 tokens, 64 anchors each, 2000 steps     what the report trained
    same        its own 16 contexts at the four offsets                     positions change, prompts do not
    other       8 other contexts at the four offsets                        the report's offset cache: both change
    held-out    HumanEval at the four offsets                               many prompts per bucket
    mixed       the 8 other contexts, two at each offset, 8 anchors each    the report's buckets: 16 blocks of 2 prompts
    general     a drafter trained on enough prompts, on the held-out ones   what a user would train

Every stage is a `dflash-jax` command, printed as it is run, and skipped where its record exists: a killed run goes on.
`OUT/results.json` and the tables of docs/positional-parity.md come out.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dflash_jax.core import InputError, read_json, read_jsonl, write_json
from dflash_jax.text import Prompt, Tokenizer, load_prompts, load_tokenizer
from stages import Stages

BLOCK_SIZE = 8
CAPTURE_LAYERS = "1,10,18,27"  # K = 4, the default of a target of 30 layers
OFFSETS = "0,4096,65536,131072"
PARITY_OFFSETS = "0,4096,65536,131072,1048576"
FAR = "0,131072"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Settings; the defaults are the report's, and what two cores can add to them in two hours."""

    out: Path
    """Folder of everything that is made; a partial one is continued."""
    context: int = 1024
    """Tokens of a packed context, prompt and response together."""
    rollout: int = 64
    """Anchors of a context whose blocks have a label at every slot."""
    contexts: int = 16
    """Packed contexts to train on."""
    other_contexts: int = 8
    """Packed contexts of the offset cache, of other prompts."""
    steps: int = 2000
    """Training steps of the memorised drafter; it is checked at three quarters, as the report's was."""
    fine_tune_steps: int = 200
    """Steps of the fine-tune on the offset cache."""
    early_steps: int = 30
    """Steps of a fine-tune that is stopped where acceptance is half-way, as the report's was."""
    general_prompts: int = 384
    """Prompts of the general drafter."""
    general_steps: int = 800
    """Its steps; 0 leaves the general drafter out."""
    general_new_tokens: int = 128
    """Most tokens of a response, of its prompts and of the held-out ones."""
    held_out: int = 64
    """HumanEval prompts that the drafters are checked on."""
    parity_texts: int = 8
    """Texts that a parity reads, at every offset."""
    batch: int = 64
    """Anchors per step."""

    @property
    def rollout_tokens(self) -> int:
        """Tokens of a packed context's response: its last B-1 anchors have a slot without a label."""
        return self.rollout + BLOCK_SIZE - 1


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def pack(pieces: list[tuple[str, str]], tokenizer: Tokenizer, *, room: int) -> list[dict[str, str]]:
    """Take pieces off the list until a conversation that ends with a question fills `room` tokens as well as it can.

    Args:
        pieces: (question, answer) of single prompts; those used are removed.
        tokenizer: the target's, with its chat template.
        room: most tokens of the conversation, the opening of the assistant's turn included.
    """

    def tokens(messages: list[dict[str, str]]) -> int:
        return len(tokenizer.encode_prompt(Prompt(id="packed", messages=tuple(messages), set="packed")))

    def asked(question: str) -> dict[str, str]:
        return {"role": "user", "content": question}

    def longer(index: int) -> list[dict[str, str]]:
        question, answer = pieces[index]
        return [*turns, asked(question), {"role": "assistant", "content": answer}]

    turns: list[dict[str, str]] = []
    reserve = room // 10  # for the last question
    while True:
        tried = range(min(50, len(pieces)))
        index = next((i for i in tried if tokens([*longer(i), asked("?")]) + reserve <= room), None)
        if index is None:
            break
        turns = longer(index)
        pieces.pop(index)
    # the question that fills the rest best
    sizes = [(tokens([*turns, asked(question)]), index) for index, (question, _) in enumerate(pieces)]
    _, index = max((pair for pair in sizes if pair[0] <= room), default=(0, -1))
    if index < 0:
        raise InputError(f"no prompt fits into the last {room} tokens of a context: raise --context")
    return [*turns, asked(pieces.pop(index)[0])]


def packed_prompts(recipe: Recipe, responses: Path, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Half as many packed contexts again as are needed: those whose response ends early are dropped."""
    questions = {prompt.id: prompt for prompt in load_prompts("stdlib")}
    pieces = []
    for row in read_jsonl(responses, what="the responses"):
        messages = questions[row["id"]].messages
        assert messages, "stdlib prompts are conversations"
        pieces.append((messages[0]["content"], row["text"].strip()))
    random.Random(0).shuffle(pieces)
    count = (recipe.contexts + recipe.other_contexts) * 3 // 2
    room = recipe.context - recipe.rollout_tokens
    return [
        {"id": f"packed/{i:02d}", "messages": pack(pieces, tokenizer, room=room), "set": "packed"} for i in range(count)
    ]


def split(out: Path, *, each: int) -> None:
    """Give every offset contexts of its own, as the report's buckets had."""
    rows = read_jsonl(out / "other.jsonl", what="the responses")
    for bucket, offset in enumerate(BUCKETS):
        path = out / f"mixed-{offset}.jsonl"
        if not path.exists():
            write_lines(path, rows[bucket * each : (bucket + 1) * each])
            record = read_json(out / "other.jsonl.record.json", what="the responses' record")
            write_json(path.with_name(path.name + ".record.json"), record)


def prepare(recipe: Recipe, stages: Stages) -> Path:
    """Target, responses, packed contexts; return the target folder."""
    out, target = recipe.out, recipe.out / "target"
    stages.run("target", "target", "import", "--smollm2", "--out", target)
    new_tokens = ("--max-new-tokens", recipe.general_new_tokens)
    responses = out / "general.jsonl"
    stages.run(
        "responses-general", "responses", "--target", target, "--prompts", "stdlib", "--out", responses,
        "--limit", recipe.general_prompts, *new_tokens,
    )  # fmt: skip
    stages.run(
        "responses-held-out", "responses", "--target", target, "--prompts", "humaneval",
        "--out", out / "held-out.jsonl", "--limit", recipe.held_out, *new_tokens,
    )  # fmt: skip
    rollout = ("--max-new-tokens", recipe.rollout_tokens)
    tried = out / "prompts-tried.jsonl"
    if not tried.exists():
        write_lines(tried, packed_prompts(recipe, responses, load_tokenizer(target)))
    stages.run(
        "responses-tried", "responses", "--target", target, "--prompts", tried, "--out", out / "tried.jsonl", *rollout
    )
    whole = {row["id"] for row in read_jsonl(out / "tried.jsonl", what="the responses") if row["finish"] == "length"}
    rows = [row for row in read_jsonl(tried, what="the packed prompts") if row["id"] in whole]
    if len(rows) < recipe.contexts + recipe.other_contexts:
        raise InputError(f"only {len(rows)} packed contexts have a response of {recipe.rollout_tokens} tokens")
    parts = {
        "base": rows[: recipe.contexts],
        "other": rows[recipe.contexts : recipe.contexts + recipe.other_contexts],
    }
    for name, part in parts.items():
        prompts = out / f"prompts-{name}.jsonl"
        if not prompts.exists():
            write_lines(prompts, part)
        stages.run(
            f"responses-{name}", "responses", "--target", target, "--prompts", prompts, "--out", out / f"{name}.jsonl",
            *rollout,
        )  # fmt: skip
    split(out, each=max(1, recipe.other_contexts // len(BUCKETS)))
    return target


BUCKETS = tuple(OFFSETS.split(","))
CACHES = {  # its responses and offsets
    **{f"mixed-{offset}": (f"mixed-{offset}", offset) for offset in BUCKETS},
    "base": ("base", "0"),
    "same": ("base", OFFSETS),
    "other": ("other", OFFSETS),
    "held-out": ("held-out", OFFSETS),
    "general": ("general", "0"),
}


def cache(recipe: Recipe, stages: Stages, target: Path, name: str) -> Path:
    """One of the caches."""
    source, offsets = CACHES[name]
    folder = recipe.out / f"cache-{name}"
    stages.run(
        f"cache-{name}", "cache", "build", "--target", target, "--responses", recipe.out / f"{source}.jsonl",
        "--out", folder, "--capture-layers", CAPTURE_LAYERS, "--position-offsets", offsets,
    )  # fmt: skip
    return folder


def train(recipe: Recipe, stages: Stages, target: Path) -> dict[str, Path]:
    """The drafters, by name."""
    out = recipe.out
    common = ("--target", target, "--warmup-ratio", "0.04", "--adam-b2", "0.95")
    shape = ("--block-size", BLOCK_SIZE, "--num-layers", 2)
    kept = recipe.steps // 4  # run-500, run-1000, run-1500 and run-2000

    stages.run(
        "train-memorised", "train", *common, *shape, "--cache", cache(recipe, stages, target, "base"),
        "--out", out / "memorised",
        "--steps", recipe.steps, "--sequences-per-step", 2, "--anchors-per-sequence", recipe.batch // 2,
        "--checkpoint-every", kept, "--learning-rate", "1e-3", resumes=out / "memorised",
    )  # fmt: skip
    memorised = out / "memorised" / f"run-{3 * kept}"
    for name, steps in (("fine-tuned", recipe.fine_tune_steps), ("early", recipe.early_steps)):
        stages.run(
            f"train-{name}", "train", *common, "--cache", cache(recipe, stages, target, "other"), "--out", out / name,
            "--steps", steps, "--sequences-per-step", 2, "--anchors-per-sequence", recipe.batch // 2,
            "--learning-rate", "5e-4", "--init-from", memorised, resumes=out / name,
        )  # fmt: skip
    drafters = {
        "memorised": memorised,
        "fine-tuned": out / "fine-tuned" / f"run-{recipe.fine_tune_steps}",
        "early": out / "early" / f"run-{recipe.early_steps}",
    }
    if recipe.general_steps:
        stages.run(
            "train-general", "train", *common, *shape, "--cache", cache(recipe, stages, target, "general"),
            "--out", out / "general",
            "--steps", recipe.general_steps, "--sequences-per-step", 8, "--anchors-per-sequence", recipe.batch // 8,
            "--learning-rate", "1e-3", resumes=out / "general",
        )  # fmt: skip
        drafters["general"] = out / "general" / f"run-{recipe.general_steps}"
    return drafters


def measure(recipe: Recipe, stages: Stages, target: Path, drafters: dict[str, Path]) -> dict[str, Any]:
    """Every check and every parity."""
    out = recipe.out

    def check(name: str, drafter: str, on: str, *more: str | int) -> dict[str, Any]:
        return stages.run(
            f"check-{name}", "check", "--target", target, "--cache", cache(recipe, stages, target, on),
            "--drafter", drafters[drafter], *more,
        )  # fmt: skip

    def parity(name: str, drafter: str, responses: str, offsets: str, *more: str) -> dict[str, Any]:
        return stages.run(
            f"parity-{name}", "parity", "--target", target, "--drafter", drafters[drafter], "--responses",
            out / f"{responses}.jsonl", "--position-offsets", offsets,
            "--limit", recipe.parity_texts, *more, allowed=(0, 1),
        )  # fmt: skip

    checks = {
        f"{drafter} on {on}": check(f"{drafter}-{on}", drafter, on)
        for drafter, caches in (
            ("memorised", ("base", "other", "same", "held-out")),
            ("fine-tuned", ("other", "base", "held-out")),
            ("general", ("held-out",)),
        )
        if drafter in drafters
        for on in caches
    }
    checks["early on other"] = check("early-other", "early", "other")
    for offset in BUCKETS:
        # 16 blocks of two prompts per bucket, as the report had
        checks[f"early on mixed, {offset}"] = check(
            f"early-mixed-{offset}", "early", f"mixed-{offset}", "--anchors", f"every:{recipe.rollout // 8}"
        )
    parities = {
        "memorised, its own contexts": parity("memorised-base", "memorised", "base", FAR),
        "memorised, other contexts": parity("memorised-other", "memorised", "other", FAR),
    }
    if "general" in drafters:
        parities["general"] = parity("general", "general", "held-out", PARITY_OFFSETS)
        for rope in ("bfloat16", "table:8192"):
            name = f"general-{rope.replace(':', '-')}"
            parities[f"general, {rope} angles"] = parity(name, "general", "held-out", FAR, "--rope", rope)
    return {"checks": checks, "parity": parities}


REPORT = {  # what the baseline report printed, gpt-oss-20b
    "memorised on base": {"all": (6.95, 0.998)},
    "memorised on other": {"all": (0.17, 0.04), "0": (0.0,), "4096": (0.0,), "65536": (0.0,), "131072": (0.69,)},
    "fine-tuned on other": {"all": (2.59, 0.72), "0": (4.0,), "4096": (1.63,), "65536": (3.69,), "131072": (1.06,)},
    "fine-tuned on base": {"all": (6.85, 0.994)},
}


def _interval(group: dict[str, Any]) -> str:
    low, high = group["accept_len_ci95"]
    return f"{group['accept_len_mean']:.2f} [{low:.2f}, {high:.2f}]"


def table(results: dict[str, Any]) -> str:
    """The checks in Markdown, the report's figures beside ours."""
    lines = [
        "| drafter on cache | prompts | anchors | offset | accept_len | token_acc | replay tau | the report |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, check in results["checks"].items():
        groups = {"all": check} | (check["by_ctx_pos_start"] if len(check["by_ctx_pos_start"]) > 1 else {})
        for offset, group in groups.items():
            tau = "-" if group["replay"] is None else f"{group['replay']['tau_micro']:.3f}"
            theirs = ", ".join(map(str, REPORT.get(name, {}).get(offset, ()))) or "-"
            lines.append(
                f"| {name if offset == 'all' else ''} | {group['num_prompts']} | {group['num_anchors']} | {offset} | "
                f"{_interval(group)} | {group['token_acc_mean']:.3f} | {tau} | {theirs} |"
            )
    return "\n".join(lines)


def parity_table(results: dict[str, Any]) -> str:
    """The parities in Markdown."""
    lines = [
        "| parity of | offset | verdict | accept_len difference | feature drift | argmax agreement | cause |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, parity in results["parity"].items():
        for offset, group in parity["by_ctx_pos_start"].items():
            low, high = group["ci95"]
            lines.append(
                f"| {name} | {offset} | {group['verdict']} | {group['accept_len_difference']:+.3f} "
                f"[{low:+.3f}, {high:+.3f}] | {group['feature_drift']:.1e} | {group['argmax_agreement']:.4f} | "
                f"{parity.get('cause_id') or '-'} |"
            )
    return "\n".join(lines)


def main(recipe: Recipe) -> None:
    """Run what is missing, then write `results.json` and print the tables."""
    stages = Stages(recipe.out)
    target = prepare(recipe, stages)
    drafters = train(recipe, stages, target)
    results = measure(recipe, stages, target, drafters)
    results |= {"seconds": stages.seconds, "commands": stages.commands}
    write_json(recipe.out / "results.json", results)
    inputs = [
        recipe.out / "records" / f"{name}.json" for name in stages.commands if name.startswith(("check-", "parity-"))
    ]
    sys.stdout.write(f"{table(results)}\n\n{parity_table(results)}\n")
    stages.run(
        "report", "report", "--inputs", *inputs, recipe.out / "memorised", "--out", recipe.out / "report.html",
        "--title", "Positional parity: the baseline experiment on SmolLM2",
    )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Recipe))
