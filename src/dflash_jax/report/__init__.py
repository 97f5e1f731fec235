"""Record files to one self-contained HTML page, or to Markdown in the form of the baseline report.

It promises that the page works offline and runs no markup or script out of a record, that it reads record files only,
that a number is never shown without the warning that belongs to it, and that an unknown or broken record is one
`InputError`. It may import `core` only; the command line and the demo import it.
"""

from dflash_jax.report.check_tables import markdown_table, render_table
from dflash_jax.report.config import ReportConfig
from dflash_jax.report.markdown import render_result
from dflash_jax.report.page import write_report

__all__ = ["ReportConfig", "markdown_table", "render_result", "render_table", "write_report"]
