r"""The best drafter for SmolLM2-135M-Instruct that two cores can make in 2.5 hours, and what each ingredient is worth.

    python recipes/smollm2.py --out OUT                                  the drafter: 2.2 h on two quiet cores
    python recipes/smollm2.py --out OUT --without all                    then a run without each ingredient
    python recipes/smollm2.py --out OUT --vary num_layers=3 --vary learning_rate=1e-3,loss=d-pace      other settings

Prompts to responses to caches to a drafter, checked and decoded on the held-out prompts of HumanEval, none of which is
trained on or chosen by. Every stage is a `dflash-jax` command, printed as it is run and skipped where its record
exists: a killed run goes on. Runs share what they have in common (responses, caches). `OUT/results.json` is written
after every run, the table at the end. On an accelerator, where starting and compiling take most of the time:

    python recipes/smollm2.py --out OUT --without all --in-process --dtype bfloat16 --response-batch 800 \
        --tokens-per-batch 32768 --until-s 400

Why these settings: docs/design/015-smollm2-recipe.md; what came out: docs/log.md.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tyro

from dflash_jax.core import InputError, atomic_file, read_json, read_jsonl, write_json
from dflash_jax.text import Prompt, load_prompts, load_tokenizer
from made_up import FENCE, made_up, opening_of, openings
from made_up import SET as SELF
from stages import StageError, Stages

prompts_in = functools.cache(load_prompts)  # the built-in sets take seconds to make

HELD_OUT = "humaneval"

# What two idle cores do (docs/log.md), and SmolLM2's sizes: the budget is counted from these.
RESPONSE_TOKENS_PER_S = {"float32": 115, "bfloat16": 200}  # of text, in a batch of 64 that is refilled
CACHE_TOKENS_PER_S = {"float32": 430, "bfloat16": 700}
GFLOP_PER_S = {"float32": 150, "bfloat16": 250}  # of a training step, on a CPU with AMX; its updates apart
PROMPT_TOKENS, HELD_OUT_PROMPT_TOKENS = 117, 191  # with the chat template
OPENING_TOKENS, OPENING_SHARE = 46, 0.62  # of a turn that is begun, and of the most tokens sampled for it
PROMPTS_OF_OPENING = 0.98  # 1,479 of 1,497, a quarter of them of unfinished code, a seventh heads alone
COPIED_TOKENS = 149  # of a copied text: 93 of its prompt, 56 of the copy
RESPONSE_SHARE = 0.8  # of the most tokens that a response may have: 0.82 of 128, 0.79 of 192
HEAD_GFLOP, LAYER_GFLOP = 0.80, 0.21  # an anchor of 8 slots, forward and backward, over the whole vocabulary
VOCAB = 49152
CONTEXT_GFLOP, REACH_GFLOP = 5.3, 0.08  # a sequence's 290 rows, padding too, and an anchor's attention over them
ADAMW_S = 0.06  # a step
MUON_S_PER_LAYER, MUON_S_PER_CAPTURED = 0.52, 0.04  # a step
EVALUATION_ANCHORS_PER_S = 200
START_S = 15  # a command: imports, compiling
EVALUATIONS = 4  # of a run, to choose its best


OPENINGS_PER_ROUND, MOST_ROUNDS = 0.35, 10  # in prompts that are needed

COPY_WORDINGS = (
    "Repeat the following text exactly:\n",
    "Copy this:\n",
    "Write this again, word for word:\n\n",
    "Print the following once more.\n",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Settings; the defaults are what two cores can do in 2.5 hours (`budget_s` counts it)."""

    out: Path
    """Folder of everything that is made; a partial one is continued."""
    target: Path | None = None
    """Target folder; default: SmolLM2, imported from its wheel into OUT/target."""
    without: tuple[str, ...] = ()
    """Ingredients to leave out, a run for each, or "all"."""
    vary: tuple[str, ...] = ()
    """Further runs, each with other settings: FIELD=VALUE[,FIELD=VALUE...]."""
    until_s: float = float("inf")
    """No further run is begun when so many seconds have passed; the first always is, and those made are read."""
    in_process: bool = False
    """Run the stages in this process: imports and compiling are paid once. Their output goes to OUT/logs."""

    mix: str = "problems=600,self=1400"
    """Training prompts: SET[/FORM][@CHARACTERS]=COUNT, the first so many of each that have so many characters; of self,
    prompts that the target makes up."""
    copied: str = "stdlib/complete=600,stdlib/implement=400"
    """Texts to be copied, of prompts that --mix leaves: asked to repeat one, the response is that text. The target
    reads it and generates nothing. "": none."""
    choosing: str = "self=32"
    """Prompts that RUN/best is chosen by, the last so many of each; of self, further ones."""
    opening_tokens: int = 160
    """Most tokens sampled for a prompt that the target makes up."""
    opening_temperature: float = 0.9
    """They are sampled at."""
    opening_top_k: int = 32
    """They are sampled among so many likeliest tokens."""
    max_new_tokens: int = 128
    """Most tokens of a response."""
    response_batch: int = 64
    """Prompts decoded side by side."""
    target_dtype: str = "bfloat16"
    """Of the target where it makes what is trained on and chosen by; what is held out is float32's."""

    capture_layers: str = "1,7,13,19,25,28"
    """Target layers whose outputs the drafter reads; "": the four that `cache build` takes."""
    tokens_per_batch: int = 4096
    """Tokens in one pass of the target."""
    top_k: int = 32
    """Tokens of the target's distribution that caches hold."""
    block_size: int = 8
    """Positions per block, the anchor included."""
    num_layers: int = 5
    """Drafter layers."""
    init: str = "target"
    """Where weights start: the target's own layers, or random."""
    loss: str = "kl"
    """See `train --loss`."""
    decay_gamma: float = 2.0
    """See `train --decay-gamma`."""
    sampled_vocab: int = 4096
    """See `train --sampled-vocab`; 0: all tokens."""
    optimizer: str = "adamw"
    """See `train --optimizer`."""
    learning_rate: float = 1.25e-3
    """At its peak."""
    schedule: str = "cosine"
    """See `train --schedule`."""
    warmup_ratio: float = 0.04
    """See `train --warmup-ratio`."""
    adam_b2: float = 0.95
    """See `train --adam-b2`."""
    weight_decay: float = 0.0
    """See `train --weight-decay`."""
    steps: int = 9000
    """Optimizer steps."""
    sequences_per_step: int = 4
    """Sequences in a step."""
    anchors_per_sequence: int = 16
    """Anchors drawn from each."""
    length_buckets: int = 3
    """See `train --length-buckets`."""
    dtype: str = "bfloat16"
    """Of the drafter's activations in training; see docs/training.md, "On a CPU"."""
    seed: int = 0
    """Of weights, order and anchors."""

    held_out: int = 164
    """HumanEval prompts that drafters are checked on; 164 is all."""
    decode_prompts: int = 24
    """Of them, those decoded with the drafter and plainly."""
    held_out_tokens: int = 128
    """Most tokens of a held-out response."""
    decode_block_size: int = 4
    """Positions per block there: at batch 1 four rows cost two cores hardly more than one, eight cost half as much
    again."""
    draft_vocab: int = 4096
    """Tokens that drafts are chosen among there, by the labels trained on; 0: all."""


SETTINGS = tuple(field.name for field in fields(Recipe))[6:]
SHARED = {
    "choosing", "opening_tokens", "opening_temperature", "opening_top_k", "response_batch", "target_dtype",
    "tokens_per_batch", "held_out", "decode_prompts", "held_out_tokens", "decode_block_size", "draft_vocab",
}  # fmt: skip
"""Settings that all runs have in common: what they are made from, chosen by and checked on, and what is decoded."""
VARIED = tuple(name for name in SETTINGS if name not in SHARED)
"""Settings that runs may differ in."""

LEFT_OUT: dict[str, Callable[[Recipe], dict[str, Any]]] = {
    "warm-start": lambda _: {"init": "random"},
    "problems": lambda recipe: {"mix": _without(recipe.mix, "problems")},
    "self-prompts": lambda recipe: {"mix": recipe.mix.replace(f"{SELF}=", "stdlib/complete=")},
    "data-size": lambda recipe: {"mix": ",".join(f"{source}={count // 4}" for source, count in parts_of(recipe.mix))},
    "copied-texts": lambda _: {"copied": ""},
    "loss": lambda _: {"loss": "cross-entropy"},
    "anchors": lambda recipe: {"anchors_per_sequence": max(1, recipe.anchors_per_sequence // 4)},
    "depth": lambda _: {"num_layers": 2},
    "captured-layers": lambda _: {"capture_layers": ""},
    "sampled-vocab": lambda _: {"sampled_vocab": 0},
    "small-steps": lambda recipe: {
        "sequences_per_step": 8 * recipe.sequences_per_step,
        "steps": max(1, recipe.steps // 8),
    },
}
"""What a run has in place of an ingredient."""


def budget_s(recipe: Recipe) -> dict[str, float]:
    """Seconds that two idle cores take for a recipe, by stage, from the rates above; nothing is measured."""
    prompts, choosing, copied = map(num_prompts, (recipe.mix, recipe.choosing, recipe.copied))
    of_self = count_of(recipe.mix, SELF) + count_of(recipe.choosing, SELF)
    begun = math.ceil(1 / PROMPTS_OF_OPENING / OPENINGS_PER_ROUND) * OPENINGS_PER_ROUND * of_self
    new, held_out_new = RESPONSE_SHARE * recipe.max_new_tokens, RESPONSE_SHARE * recipe.held_out_tokens
    captured = len(recipe.capture_layers.split(",")) if recipe.capture_layers else 4
    slots = (recipe.block_size - 1) / 7
    head = HEAD_GFLOP * slots * (recipe.sampled_vocab or VOCAB) / VOCAB
    anchor = head + LAYER_GFLOP * recipe.num_layers * recipe.block_size / 8 + REACH_GFLOP
    muon = MUON_S_PER_LAYER * recipe.num_layers + MUON_S_PER_CAPTURED * captured
    answered, cached = RESPONSE_TOKENS_PER_S[recipe.target_dtype], CACHE_TOKENS_PER_S[recipe.target_dtype]
    held_out_answered, held_out_cached = RESPONSE_TOKENS_PER_S["float32"], CACHE_TOKENS_PER_S["float32"]
    products = recipe.sequences_per_step * (CONTEXT_GFLOP + recipe.anchors_per_sequence * anchor)
    step = products / GFLOP_PER_S[recipe.dtype] + (muon if recipe.optimizer == "muon" else ADAMW_S)
    evaluated = EVALUATIONS * choosing * new / EVALUATION_ANCHORS_PER_S
    return {
        "target": START_S,
        "prompts": bool(of_self) * 3 * START_S
        + begun * (OPENING_SHARE * recipe.opening_tokens / answered + OPENING_TOKENS / cached),
        "responses": 3 * START_S
        + (prompts + choosing) * (new / answered + PROMPT_TOKENS / cached)
        + recipe.held_out * (held_out_new / held_out_answered + HELD_OUT_PROMPT_TOKENS / held_out_cached),
        "caches": 3 * START_S
        + ((prompts + choosing) * (PROMPT_TOKENS + new) + copied * COPIED_TOKENS) / cached
        + recipe.held_out * (HELD_OUT_PROMPT_TOKENS + held_out_new) / held_out_cached,
        "train": START_S + recipe.steps * step + evaluated,
        "check": START_S + recipe.held_out * held_out_new / EVALUATION_ANCHORS_PER_S,
        # plainly at 28 tokens a second, and with a drafter that is not slower
        "decode": START_S + 2 * recipe.decode_prompts * held_out_new / 28,
    }


def main(recipe: Recipe) -> int:
    """Run what is missing, write `results.json` after every run, print the tables; 1 where a run failed."""
    started, stages, results = time.monotonic(), Stages(recipe.out, in_process=recipe.in_process), {}
    runs = variants(recipe)
    check_apart(recipe)
    if recipe.in_process:
        keep_compiled(recipe.out / "compiled")
    for name, changes in runs.items():
        is_made = (recipe.out / "records" / f"check-{_tag(name)}.stage.json").exists()
        if results and not is_made and time.monotonic() - started > recipe.until_s:
            sys.stderr.write(f"[{name}] not begun: {recipe.until_s:.0f} s are over\n")
            continue
        run = replace(recipe, **changes)
        results[name] = {"changes": changes, "budget_s": budget_s(run)}
        try:
            results[name] |= measure(recipe, run, name, stages)
        except StageError as error:
            if name == "full":
                raise
            results[name]["failed"] = str(error)
            sys.stderr.write(f"[{name}] failed: {error}\n")
        settings = {key: value for key, value in asdict(recipe).items() if key in SETTINGS}
        write_json(
            recipe.out / "results.json",
            {"settings": settings, "runs": results, "seconds": stages.seconds, "commands": stages.commands},
        )
    sys.stdout.write(f"{table(results)}\n")
    return int(any("failed" in run for run in results.values()))


def check_apart(recipe: Recipe) -> None:
    """Hold the prompts that drafters are chosen by apart from those they are trained on.

    Raises:
        InputError: a prompt is among both.
    """
    for mix in (recipe.mix, recipe.choosing):
        parts_of(mix)
    # the target's own are apart as they are made: the first are trained on, the last chosen by
    mix, choosing = _without(recipe.mix, SELF), _without(recipe.choosing, SELF)
    chosen_by = {prompt.id for prompt in prompts_of(choosing, from_the_end=True)} if choosing else set()
    trained_on = prompts_of(mix) if mix else ()
    for name, prompts in (("--mix", trained_on), ("--copied", copied_prompts(recipe.mix, recipe.copied))):
        both = sum(prompt.id in chosen_by for prompt in prompts)
        if both:
            raise InputError(f"--choosing holds {both} prompts that {name} has too: ask for fewer")


def keep_compiled(folder: Path) -> None:
    """Let jax keep what it compiles in a folder, for the next start."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def variants(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Every run's changes to the recipe, by its name; the recipe itself, "full", comes first.

    Raises:
        InputError: an ingredient or a setting that is not there.
    """
    found: dict[str, dict[str, Any]] = {"full": {}}
    for ingredient in LEFT_OUT if recipe.without == ("all",) else recipe.without:
        if ingredient not in LEFT_OUT:
            raise InputError(f"--without is {ingredient!r}: choose all or {', '.join(LEFT_OUT)}")
        found[f"without {ingredient}"] = LEFT_OUT[ingredient](recipe)
    for text in recipe.vary:
        found[text] = _changes(text)
    return found


def _changes(text: str) -> dict[str, Any]:
    """`FIELD=VALUE,...` as values of the fields' types; a part without a name belongs to the value before it."""
    parts: list[str] = []
    for part in text.split(","):
        if part.partition("=")[0] in VARIED:
            parts.append(part)
        elif parts:
            parts[-1] += f",{part}"
        else:
            raise InputError(f"--vary is {text!r}: begin with one of {', '.join(VARIED)} and an =")
    types = {field.name: field.type for field in fields(Recipe)}
    changes = {}
    for name, _, value in (part.partition("=") for part in parts):
        kind = types[name]
        assert isinstance(kind, type)
        try:
            changes[name] = kind(value)
        except ValueError as error:
            raise InputError(f"--vary {name}={value}: {error}") from error
    layers = changes.get("capture_layers", "")
    if not all(layer.isdigit() for layer in layers.split(",") if layers):
        raise InputError(f"--vary capture_layers={layers!r}: layers are numbers")
    return changes


def _without(mix: str, name: str) -> str:
    """A mix but for what a set gives."""
    return ",".join(part for part in mix.split(",") if _set_of(part) != name)


def _set_of(part: str) -> str:
    return part.partition("=")[0].partition("@")[0].partition("/")[0]


def count_of(mix: str, name: str) -> int:
    """How many prompts of a set a mix asks for."""
    return sum(count for source, count in parts_of(mix) if _set_of(source) == name) if mix else 0


def parts_of(mix: str) -> list[tuple[str, int]]:
    """The sources of a mix of prompts and how many of each.

    Raises:
        InputError: a mix that is none.
    """
    parts = []
    for part in mix.split(","):
        source, _, count = part.partition("=")
        if not count.isdigit():
            raise InputError(f"{part!r} in a mix of prompts: SET[/FORM][@CHARACTERS]=COUNT is needed")
        parts.append((source, int(count)))
    return parts


def num_prompts(mix: str) -> int:
    """How many prompts a mix asks for; none where it is empty, as `--copied` may be.

    Raises:
        InputError: a mix that is none.
    """
    return sum(count for _, count in parts_of(mix)) if mix else 0


def prompts_of(mix: str, *, of_self: Sequence[Prompt] = (), from_the_end: bool = False) -> Iterator[Prompt]:
    """The prompts of a mix, source by source; what an earlier source took, a later one leaves.

    Args:
        mix: sources and counts.
        of_self: the prompts that the target made up for it.
        from_the_end: the last of each source, not the first.

    Raises:
        InputError: HumanEval's prompts; a source with too few prompts.
    """
    taken: set[str] = set()
    for source, count in parts_of(mix):
        asked, _, least = source.partition("@")
        name, _, form = asked.partition("/")
        if name == HELD_OUT:
            raise InputError(f"{mix!r}: the prompts of {HELD_OUT} are held out")
        if not (least or "0").isdigit():
            raise InputError(f"{source!r} in a mix of prompts: {least!r} is no number of characters")
        found = [
            prompt
            for prompt in (of_self if name == SELF else prompts_in(name))
            if (not form or prompt.id.endswith(f"/{form}"))
            and characters_of(prompt) >= int(least or 0)
            and prompt.id not in taken
        ]
        if len(found) < count:
            raise InputError(f"{count} prompts of {source} are asked for: it has {len(found)}")
        part = found[len(found) - count :] if from_the_end else found[:count]
        taken.update(prompt.id for prompt in part)
        yield from part


def copied_prompts(mix: str, copied: str) -> list[Prompt]:
    """The prompts whose texts are copied: none of the mix's."""
    if not copied:
        return []
    left = _without(mix, SELF)
    return list(prompts_of(f"{left},{copied}" if left else copied))[num_prompts(left) :]


def self_prompts(base: Recipe, stages: Stages, target: Path) -> list[Prompt]:
    """The prompts that the target makes up for the recipe's mix, and after them those that drafters are chosen by.

    They are sampled in rounds, until there are enough.

    Raises:
        InputError: the target makes up too few.
    """
    trained_on, choosing = count_of(base.mix, SELF), count_of(base.choosing, SELF)
    count = trained_on + choosing
    if not count:
        return []
    size, found = max(1, round(OPENINGS_PER_ROUND * count)), []
    for number in range(MOST_ROUNDS):
        begun = base.out / f"openings-{number}.jsonl"
        write_once(begun, openings(target, first=number * size, count=size))
        out = base.out / f"sampled-{number}.jsonl"
        stages.run(
            f"sampled-{number}", "responses", "--target", target, "--prompts", begun, "--out", out,
            "--max-new-tokens", base.opening_tokens, "--batch-size", base.response_batch,
            "--temperature", base.opening_temperature, "--top-k", base.opening_top_k,
            "--stop-tokens", FENCE, "--dtype", base.target_dtype, made=out,
        )  # fmt: skip
        found += read_jsonl(out, what="the sampled texts")
        prompts = made_up(found, target)
        mine = prompts[:trained_on]
        openings_of_mine = {opening_of(prompt) for prompt in mine}  # which are not chosen by
        apart = [prompt for prompt in prompts[trained_on:] if opening_of(prompt) not in openings_of_mine]
        if len(mine) == trained_on and len(apart) >= choosing:
            return mine + apart[:choosing]
    raise InputError(f"{count} prompts of {SELF} are asked for: the target made up {len(made_up(found, target))}")


def copied_rows(prompts: Sequence[Prompt], target: Path, *, max_new_tokens: int) -> list[dict[str, Any]]:
    """Rows of a responses file in which a prompt's code, or what its function does, is asked for again and given."""
    tokenizer, rows = load_tokenizer(target), []
    for index, prompt in enumerate(prompts):
        assert prompt.messages is not None  # built-in prompts are one question each
        question = prompt.messages[0]["content"]
        code = question.partition("```python\n")[2].rpartition("```")[0]
        text = code or question.partition("\n")[2]
        body = f"```python\n{text.strip(chr(10))}\n```"
        asked = Prompt(
            id=f"copied/{prompt.id}",
            messages=({"role": "user", "content": COPY_WORDINGS[index % len(COPY_WORDINGS)] + body},),
            set="copied",
        )
        rows.append(
            {
                "id": asked.id,
                "set": asked.set,
                "prompt_ids": tokenizer.encode_prompt(asked),
                "response_ids": tokenizer.encode(body)[:max_new_tokens],
            }
        )
    return rows


def characters_of(prompt: Prompt) -> int:
    """Characters of all its messages."""
    return sum(len(message["content"]) for message in prompt.messages or ())


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines, all or none: a file that is there is taken as made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prompt_file(path: Path, mix: str, *, of_self: Sequence[Prompt], from_the_end: bool = False) -> Path:
    """Write a mix of prompts unless it is there."""
    rows = [
        {"id": prompt.id, "messages": list(prompt.messages or ()), "set": prompt.set}
        for prompt in prompts_of(mix, of_self=of_self, from_the_end=from_the_end)
    ]
    write_once(path, rows)
    return path


def write_once(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines unless they are there.

    Raises:
        InputError: others are there, of other settings: what is chosen by could be among what is trained on.
    """
    if not path.exists():
        write_lines(path, rows)
    elif read_jsonl(path, what="the prompts") != list(rows):
        raise InputError(f"{path} is of other settings: choose another --out, or keep the settings")


def _tag(text: str) -> str:
    """A setting as part of a file's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in text)


def import_target(recipe: Recipe, stages: Stages) -> Path:
    """The target folder."""
    if recipe.target is not None:
        return recipe.target
    out = recipe.out / "target"
    stages.run("target", "target", "import", "--smollm2", "--out", out, made=out)
    return out


def responses(recipe: Recipe, stages: Stages, target: Path, prompts: str | Path, name: str) -> Path:
    """The target's greedy responses to a prompt file or a built-in set."""
    is_held_out = prompts == HELD_OUT
    tokens = recipe.held_out_tokens if is_held_out else recipe.max_new_tokens
    out = recipe.out / f"responses-{name}.jsonl"
    stages.run(
        f"responses-{name}", "responses", "--target", target, "--prompts", prompts, "--out", out,
        "--max-new-tokens", tokens, "--batch-size", recipe.response_batch,
        *(("--limit", recipe.held_out) if is_held_out else ("--dtype", recipe.target_dtype)), made=out,
    )  # fmt: skip
    return out


def training_responses(
    base: Recipe, recipe: Recipe, stages: Stages, target: Path, of_self: Sequence[Prompt]
) -> tuple[str, Path]:
    """A name and the texts of a run: what the target answers, and what it is shown copying."""
    name, out = generated_responses(base, recipe, stages, target, of_self)
    if not recipe.copied:
        return name, out
    name = f"{name}-copied-{_tag(recipe.copied)}"
    both = recipe.out / f"responses-{name}.jsonl"
    if not both.exists():
        # the base's mix is what is left aside, so that runs with other mixes copy the same texts
        copied = copied_rows(copied_prompts(base.mix, recipe.copied), target, max_new_tokens=recipe.max_new_tokens)
        write_json(record_of(both), read_json(record_of(out), what="the responses' record") | {"copied": recipe.copied})
        write_lines(both, [*read_jsonl(out, what="the responses"), *copied])
    return name, both


def record_of(path: Path) -> Path:
    """The record beside a responses file."""
    return path.with_name(path.name + ".record.json")


def generated_responses(
    base: Recipe, recipe: Recipe, stages: Stages, target: Path, of_self: Sequence[Prompt]
) -> tuple[str, Path]:
    """A name and responses to a run's prompts: a part of the recipe's own where they are among them."""
    name = f"train-{_tag(recipe.mix)}-{recipe.max_new_tokens}"
    prompts = prompt_file(recipe.out / f"prompts-{_tag(recipe.mix)}.jsonl", recipe.mix, of_self=of_self)
    if recipe.mix == base.mix or recipe.max_new_tokens != base.max_new_tokens:
        return name, responses(recipe, stages, target, prompts, name)
    _, whole = generated_responses(base, base, stages, target, of_self)
    ids = {row["id"] for row in read_jsonl(prompts, what="the prompts")}
    rows = [row for row in read_jsonl(whole, what="the responses") if row["id"] in ids]
    if len(rows) < len(ids):
        return name, responses(recipe, stages, target, prompts, name)
    out = recipe.out / f"responses-{name}.jsonl"
    if not out.exists():
        write_json(record_of(out), read_json(record_of(whole), what="the responses' record"))
        write_lines(out, rows)
    return name, out


def cache(recipe: Recipe, stages: Stages, target: Path, source: Path, name: str, *, dtype: str, top_k: int = 0) -> Path:
    """The cache of responses, by the target in a dtype."""
    name = f"{name}-{_tag(recipe.capture_layers or 'default')}" + (f"-top-{top_k}" if top_k else "")
    out = recipe.out / f"cache-{name}"
    stages.run(
        f"cache-{name}", "cache", "build", "--target", target, "--responses", source, "--out", out,
        *(("--capture-layers", recipe.capture_layers) if recipe.capture_layers else ()), "--top-k", top_k,
        "--tokens-per-batch", recipe.tokens_per_batch, "--dtype", dtype,
    )  # fmt: skip
    return out


def train(recipe: Recipe, stages: Stages, target: Path, name: str, *, on: Path, choosing: Path) -> dict[str, Any]:
    """One run; what `train` says of it."""
    out = recipe.out / f"run-{_tag(name)}"
    settings = {
        "steps": recipe.steps,
        "block_size": recipe.block_size,
        "num_layers": recipe.num_layers,
        "sequences_per_step": recipe.sequences_per_step,
        "anchors_per_sequence": recipe.anchors_per_sequence,
        "length_buckets": recipe.length_buckets,
        "init": recipe.init,
        "loss": recipe.loss,
        **({} if recipe.loss == "d-pace" else {"decay_gamma": recipe.decay_gamma}),
        **({"sampled_vocab": recipe.sampled_vocab} if recipe.sampled_vocab else {}),
        "optimizer": recipe.optimizer,
        "schedule": recipe.schedule,
        "learning_rate": recipe.learning_rate,
        "warmup_ratio": recipe.warmup_ratio,
        "adam_b2": recipe.adam_b2,
        "weight_decay": recipe.weight_decay,
        "dtype": recipe.dtype,
        "seed": recipe.seed,
    }
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", value)]
    every = max(1, recipe.steps // EVALUATIONS)
    return stages.run(
        f"train-{_tag(name)}", "train", "--target", target, "--cache", on, "--eval-cache", choosing, "--out", out,
        *flags, "--checkpoint-every", every, "--keep", 1, resumes=out,
    )  # fmt: skip


def measure(base: Recipe, recipe: Recipe, name: str, stages: Stages) -> dict[str, Any]:
    """One run from its prompts to its numbers on held-out prompts."""
    target = import_target(recipe, stages)
    of_self = self_prompts(base, stages, target)
    source, trained_on = training_responses(base, recipe, stages, target, of_self[: count_of(base.mix, SELF)])
    choosing = prompt_file(base.out / "prompts-choosing.jsonl", base.choosing, of_self=of_self, from_the_end=True)
    answers = {
        name: responses(base, stages, target, of, name) for name, of in (("choosing", choosing), ("held-out", HELD_OUT))
    }
    on = cache(recipe, stages, target, trained_on, source, dtype=base.target_dtype, top_k=recipe.top_k)
    chosen_by = cache(recipe, stages, target, answers["choosing"], "choosing", dtype=base.target_dtype)
    held_out = cache(recipe, stages, target, answers["held-out"], "held-out", dtype="float32")
    trained = train(recipe, stages, target, name, on=on, choosing=chosen_by)
    drafter, full = Path(trained["best"]["drafter"]), base.out / "run-full" / "best"
    is_comparable = name != "full" and recipe.capture_layers == base.capture_layers
    compared = ("--compare-drafters", full) if is_comparable else ()
    checked = stages.run(
        f"check-{_tag(name)}", "check", "--target", target, "--cache", held_out, "--drafter", drafter, *compared
    )
    checked.pop("checks")
    found = {"train": trained, "curve": curve(Path(trained["run"])), "check": checked}
    if name == "full" and recipe.decode_prompts:
        found["decode"] = stages.run(
            "decode-full", "decode", "--target", target, "--drafter", served(recipe, stages, drafter, cache=on),
            "--prompts", HELD_OUT, "--compare", "--limit", recipe.decode_prompts,
            "--block-size", min(recipe.decode_block_size, recipe.block_size),
            "--max-new-tokens", recipe.held_out_tokens, allowed=(0, 1),
        )  # fmt: skip
    return found


def served(recipe: Recipe, stages: Stages, drafter: Path, *, cache: Path) -> Path:
    """The drafter with its draft vocabulary."""
    if not recipe.draft_vocab:
        return drafter
    out = recipe.out / "served"
    stages.run(
        "export-full", "export", "--drafter", drafter, "--out", out, "--dtype", "float32",
        "--draft-vocab", recipe.draft_vocab, "--cache", cache, made=out,
    )  # fmt: skip
    return out


def curve(run: Path) -> list[dict[str, Any]]:
    """A run's measured steps and about twenty others."""
    rows = read_jsonl(run / "metrics.jsonl", what="the run's curve")
    every = max(1, len(rows) // 20)
    return [row for row in rows if row.get("eval") or row["step"] % every == 0]


def table(results: dict[str, Any]) -> str:
    """Every run in Markdown: what it has in place of the recipe's settings, and its held-out numbers."""
    lines = [
        "| run | settings | held-out tau | full minus it | accept_len | token_acc | best step | train, s | budget, h |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in results.items():
        settings = ", ".join(f"{key} {value or 'default'}" for key, value in run["changes"].items()) or "-"
        if "failed" in run:
            numbers = ["failed", "", "", "", "", ""]
        else:
            check, trained = run["check"], run["train"]
            numbers = [
                f"{check['replay']['tau_micro']:.3f} {_interval(check['replay']['tau_ci95'])}",
                _difference(check),
                f"{check['accept_len_mean']:.3f} {_interval(check['accept_len_ci95'])}",
                f"{check['token_acc_mean']:.3f}",
                str(trained["best"]["step"]),
                f"{trained['seconds']:.0f}",
            ]
        hours = f"{sum(run['budget_s'].values()) / 3600:.2f}"
        lines.append(f"| {' | '.join([name, settings, *numbers, hours])} |")
    decoded = results["full"].get("decode")
    if decoded:
        interval = _interval(decoded["speedup_ci95"]) if decoded["speedup_ci95"] else ""
        lines += [
            "",
            f"decode, {decoded['num_prompts']} prompts, blocks of {decoded['block_size']}: "
            f"tau {decoded['tau_micro']:.3f}, "
            f"{decoded['tokens_per_s']:.1f} tokens/s, plain {decoded['plain_tokens_per_s']:.1f}: "
            f"{decoded['speedup']:.2f} {interval} times as fast; tokens equal: {decoded['tokens_equal']}",
        ]
    return "\n".join(lines)


def _interval(ends: Sequence[float], sign: str = "") -> str:
    low, high = ends
    return f"[{low:{sign}.3f}, {high:{sign}.3f}]"


def _difference(check: dict[str, Any]) -> str:
    """The full recipe's tau minus a run's, on the same prompts."""
    if not check["comparison"] or check["comparison"][0]["tau"] is None:
        return "-"
    tau = check["comparison"][0]["tau"]
    return f"{tau['difference']:+.3f} {_interval(tau['ci95'], '+')}"


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Recipe)))
    except InputError as error:
        sys.stderr.write(f"smollm2: {error}\n")
        sys.exit(2)
