"""Feature caches and drafters of others: imported to ours, and ours exported.

It promises: layer ids are converted by one rule and checked against the target; what is stored equals the source, bit
for bit; a cache, a drafter or an export appears whole or not at all; nothing pickled is opened. It imports `accept`,
`cache`, `drafter`, `targets`, `text` and `core`.
"""

from dflash_jax.interchange.commands import export_cache, import_cache
from dflash_jax.interchange.config import CacheExportConfig, CacheImportConfig, DrafterExportConfig, DrafterImportConfig
from dflash_jax.interchange.drafters import export_drafter, import_drafter
from dflash_jax.interchange.speculators import from_speculators_layer, to_speculators_layer
from dflash_jax.interchange.windows import WindowText, window_arrays

__all__ = [
    "CacheExportConfig",
    "CacheImportConfig",
    "DrafterExportConfig",
    "DrafterImportConfig",
    "WindowText",
    "export_cache",
    "export_drafter",
    "from_speculators_layer",
    "import_cache",
    "import_drafter",
    "to_speculators_layer",
    "window_arrays",
]
