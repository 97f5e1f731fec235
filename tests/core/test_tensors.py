"""safetensors files are checked before they are believed."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dflash_jax.core import InputError, check_names_and_shapes, load_tensors, read_header, save_tensors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    transposed = np.arange(6, dtype=np.int32).reshape(2, 3).T
    save_tensors(path, {"w": transposed, "h": np.array([1.5, -2.0, 3e38], dtype=ml_dtypes.bfloat16)})
    return path


def test_round_trip_keeps_bits_dtypes_and_order_of_axes(saved: Path):
    loaded = load_tensors(saved, what="the drafter")
    assert loaded["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert loaded["h"].dtype == ml_dtypes.bfloat16
    # bfloat16 is the upper half of float32: 1.5 = 0x3FC0, -2 = 0xC000, 3e38 rounds to 0x7F62.
    assert loaded["h"].view(np.uint16).tolist() == [0x3FC0, 0xC000, 0x7F62]


def test_header_is_read_without_tensors(saved: Path):
    header = read_header(saved, what="the drafter")
    assert {name: entry["shape"] for name, entry in header.items()} == {"w": [3, 2], "h": [3]}
    assert header["h"]["dtype"] == "BF16"


@pytest.mark.parametrize("kept", [0, 5, 20, -1])
def test_truncated_file_is_named_with_its_size(saved: Path, kept: int):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:kept])
    size = len(whole[:kept])
    with pytest.raises(InputError, match=rf"the drafter is (not|truncated).*model\.safetensors.*{size} bytes"):
        load_tensors(saved, what="the drafter")


def test_file_with_bytes_too_many_is_refused(saved: Path):
    size = saved.stat().st_size
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(InputError, match=rf"has {size + 1} bytes, its header needs {size}"):
        load_tensors(saved, what="the drafter")


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"the drafter is missing: .*gone"):
        load_tensors(tmp_path / "gone", what="the drafter")
    path = tmp_path / "model.safetensors"
    path.write_bytes((3).to_bytes(8, "little") + b"abc")
    with pytest.raises(InputError, match="not a safetensors file: .*: its header is not JSON"):
        load_tensors(path, what="the drafter")


@pytest.mark.parametrize("header", [[1], {"w": 3}, {"w": {"dtype": "F32"}}, {"w": {"data_offsets": [0, "x"]}}])
def test_header_of_another_form_is_refused(tmp_path: Path, header: object):
    path = tmp_path / "model.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="the drafter is not a safetensors file: .*: its header"):
        load_tensors(path, what="the drafter")


def test_all_mismatches_are_listed_at_once():
    found = {"a": (2, 3), "b": (4,), "extra": (1,)}
    wanted = {"a": (3, 2), "b": (4,), "lost": (5, 5)}
    message = (
        "the drafter: 3 tensor(s) do not fit its config: missing lost [5, 5]; unexpected extra [1]; "
        "a is [2, 3], [3, 2] is needed"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_names_and_shapes(found, wanted, what="the drafter")
    check_names_and_shapes(found, dict(found), what="the drafter")
