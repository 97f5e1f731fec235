"""One self-contained HTML page from record files, and the check as a table for terminal and Markdown.

It promises that the page works offline and runs no markup or script out of a record, that it reads record files only,
and that an unknown or broken record is one `InputError`. It may import `core` only; the command line and the demo
import it.
"""

from dflash_jax.report.config import ReportConfig
from dflash_jax.report.page import write_report
from dflash_jax.report.tables import markdown_table, render_table

__all__ = ["ReportConfig", "markdown_table", "render_table", "write_report"]
