"""A record says what made an artefact, as plain JSON."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax

from dflash_jax import __version__
from dflash_jax.core import RECORD_NAME, make_record, read_json, write_record


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inner:
    rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Config:
    out: Path
    offsets: tuple[int, ...]
    inner: _Inner
    inputs: tuple[Path, ...]
    limit: int | None = None


def test_record_is_plain_json_and_comes_back(tmp_path: Path):
    config = _Config(out=Path("a/b"), offsets=(0, 4096), inner=_Inner(rate=0.5), inputs=(Path("c"),))
    record = make_record("cache build", config, seed=3, fingerprint={"layers": (1, 2)})
    write_record(tmp_path, record)
    back = read_json(tmp_path / RECORD_NAME, what="the record")
    assert back == json.loads(json.dumps(record))
    assert back["command"] == "cache build"
    plain = {"out": "a/b", "offsets": [0, 4096], "inner": {"rate": 0.5}, "inputs": ["c"], "limit": None}
    assert back["config"] == plain
    assert back["fingerprint"] == {"layers": [1, 2]}
    assert back["seed"] == 3
    assert back["argv"] == sys.argv
    assert back["versions"]["dflash-jax"] == __version__
    assert back["versions"]["jax"] == jax.__version__
    assert len(back["devices"]) == jax.device_count()
    assert back["created_utc"].endswith("+00:00")
