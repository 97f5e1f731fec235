"""Files are whole or absent; what is read badly is named."""

import hashlib
import json
import stat
from pathlib import Path

import pytest

from dflash_jax.core import (
    InputError,
    atomic_file,
    read_json,
    read_jsonl,
    sha256_file,
    sha256_json,
    staged_folder,
    write_json,
)


def test_atomic_file_gives_all_or_nothing(tmp_path: Path):
    path = tmp_path / "new" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_atomic_file_keeps_the_old_content_when_the_writer_fails(tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half-way")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_staged_folder_appears_whole(tmp_path: Path):
    path = tmp_path / "out" / "folder"
    with staged_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("1")
        assert not path.exists()
    assert (path / "inner" / "a").read_text() == "1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert [file.name for file in path.parent.iterdir()] == ["folder"]


def test_staged_folder_leaves_nothing_when_the_writer_fails(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_staged_folder_takes_an_empty_folder_and_refuses_anything_else(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with staged_folder(tmp_path / "empty") as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "empty" / "a").exists()
    (tmp_path / "file").write_text("mine")
    for taken in ("empty", "file"):
        with pytest.raises(InputError, match=f"{taken} exists already: choose another --out or remove it"):
            staged_folder(tmp_path / taken).__enter__()
    assert (tmp_path / "file").read_text() == "mine"


def test_json_round_trip_and_refusals(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None], "a": "é"})
    assert read_json(path, what="it") == {"b": [1, 2.5, None], "a": "é"}
    assert path.read_bytes().endswith(b"\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path, what="it") == {"b": [1, 2.5, None], "a": "é"}
    with pytest.raises(InputError, match=r"the manifest is missing: .*gone\.json"):
        read_json(tmp_path / "gone.json", what="the manifest")
    path.write_text("{")
    with pytest.raises(InputError, match=r"the manifest is not JSON: .*a\.json: .*line 1"):
        read_json(path, what="the manifest")
    path.write_bytes(b'"\xff"')
    with pytest.raises(InputError, match="the manifest is not JSON"):
        read_json(path, what="the manifest")


def test_jsonl_skips_blank_lines_and_counts_them(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": 1}\n\n  \n{"id": 2}')
    assert read_jsonl(path, what="prompts") == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}\n\n{"id": x}\n', r"prompts: .*p\.jsonl line 3 is not JSON: Expecting value at column 8"),
        ('{"id": 1}\n[2]\n', r"prompts: .*p\.jsonl line 2 is a JSON list, an object is needed"),
        ("\n \n", r"prompts holds no rows: .*p\.jsonl"),
        ("", r"prompts holds no rows: .*p\.jsonl"),
    ],
)
def test_jsonl_names_what_is_wrong_and_the_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_jsonl(path, what="prompts")


def test_jsonl_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"prompts is missing: .*gone\.jsonl"):
        read_jsonl(tmp_path / "gone.jsonl", what="prompts")


def test_jsonl_that_is_not_text_is_named(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": "\xff"}\n')
    with pytest.raises(InputError, match=r"prompts: .*p\.jsonl is not UTF-8"):
        read_jsonl(path, what="prompts")


def test_jsonl_column_of_a_line_cut_short(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id":\n')
    with pytest.raises(InputError, match="line 1 is not JSON: Expecting value at column 7"):
        read_jsonl(path, what="prompts")


def test_hashes(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    # The well-known digest of "abc" (FIPS 180-2, appendix B.1).
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "a") == abc
    assert sha256_json({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()
    assert sha256_json({"a": [2], "b": 1}) == sha256_json(json.loads('{"b": 1, "a": [2]}'))
