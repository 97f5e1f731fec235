"""What the `report` command is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dflash_jax.core import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Make one self-contained HTML page, or Markdown, from record files."""

    inputs: tuple[Path, ...]
    """Check JSON, agree JSON, parity JSON, decode JSON, decode details JSONL, run folders: any mix and number, told
    apart by their keys."""
    out: Path | None = None
    """The file to write; an older one is replaced. Markdown is printed where it is not given."""
    format: Literal["html", "md"] = "html"
    """A page, or Markdown in the form of the baseline report, ready to paste."""
    title: str | None = None
    """The heading; default: named after the first record."""

    def __post_init__(self) -> None:
        """Check that there is something to read and a file to write."""
        if not self.inputs:
            raise InputError(
                "--inputs is empty: give a check JSON, an agree JSON, a parity JSON, a decode JSON, a decode details"
                " JSONL or a run folder"
            )
        if self.out is None:
            if self.format == "html":
                raise InputError("--out is needed: the HTML page to write (or --format md to print Markdown)")
            return
        if self.out.is_dir():
            raise InputError(
                f"--out {self.out} is a folder: give the name of the page, such as {self.out / 'report.html'}"
            )
        if self.out.resolve() in {path.resolve() for path in self.inputs}:
            raise InputError(f"--out {self.out} is also an input: choose another name for the page")
