"""The feature cache: every token once, provably intact, built to the same bytes however often the build was killed.

It promises: a shard is verified before its first use; sequences are views of mapped files; a build's bytes depend on
the responses, the target and the settings alone. The format is in docs/cache-format.md. It imports `core` and
`targets`.
"""

from dflash_jax.cache.batch import HostBatch, stack_on_host, stack_sequences
from dflash_jax.cache.build import DEFAULT_CAPTURE_COUNT, BuildProgress, build_cache
from dflash_jax.cache.capture import build
from dflash_jax.cache.config import CacheBuildConfig
from dflash_jax.cache.cost import CacheCostConfig, cache_cost
from dflash_jax.cache.features import FeatureLayout, load_features
from dflash_jax.cache.forward import Capture
from dflash_jax.cache.manifest import check_fingerprint
from dflash_jax.cache.reader import Cache, Sequence, open_cache
from dflash_jax.cache.responses import Responses, hash_prompt, read_responses
from dflash_jax.cache.source import epoch_order, sequence_source
from dflash_jax.cache.verify import cache_info, verify_cache
from dflash_jax.cache.writer import NewCache, TextGroup, write_cache

__all__ = [
    "DEFAULT_CAPTURE_COUNT",
    "BuildProgress",
    "Cache",
    "CacheBuildConfig",
    "CacheCostConfig",
    "Capture",
    "FeatureLayout",
    "HostBatch",
    "NewCache",
    "Responses",
    "Sequence",
    "TextGroup",
    "build",
    "build_cache",
    "cache_cost",
    "cache_info",
    "check_fingerprint",
    "epoch_order",
    "hash_prompt",
    "load_features",
    "open_cache",
    "read_responses",
    "sequence_source",
    "stack_on_host",
    "stack_sequences",
    "verify_cache",
    "write_cache",
]
