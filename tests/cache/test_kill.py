"""A build killed with SIGKILL at random instants and started again writes the bytes of one that was left alone."""

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from dflash_jax.cache import CacheBuildConfig, open_cache, plan, verify_cache
from dflash_jax.cache.ledger import Share
from dflash_jax.cache.manifest import read_manifest, write_manifest
from dflash_jax.cache.plan import ShardPlan
from dflash_jax.core import InputError, sha256_file
from support import toy_cache


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, toy_cache.__file__, *map(str, arguments)], capture_output=True, text=True, **options
    )


@pytest.mark.slow
def test_killed_25_times_gives_the_same_bytes(tmp_path):
    rows = toy_cache.toy_rows(90, responses=3)
    for name in ("whole", "killed"):
        toy_cache.write_inputs(tmp_path / name, rows)
    toy_cache.build_toy(tmp_path / "whole")
    wanted = toy_cache.shard_bytes(tmp_path / "whole" / "cache")
    done = run(tmp_path / "killed", 25, 13)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert len(seen["killed"]) == 25
    # the kills fell on many states of the folder, and did not keep builds from their end
    assert len({len([n for n in names if n.startswith("shard-")]) for names in seen["killed"]}) >= 5, seen["killed"]
    assert seen["finished"]
    toy_cache.build_toy(tmp_path / "killed")
    digests = {path.name: sha256_file(path) for path in (tmp_path / "killed" / "cache").glob("*.safetensors")}
    assert all(finished == digests for finished in seen["finished"])
    assert toy_cache.shard_bytes(tmp_path / "killed" / "cache") == wanted
    assert verify_cache(tmp_path / "killed" / "cache")["problems"] == []
    assert {path.name for path in (tmp_path / "killed" / "cache").iterdir()} == {*wanted, "manifest.json"}


class KilledError(Exception):
    pass


def killed_after(batches):
    """A capture that dies at its n-th batch, as a build does whose device is taken away."""
    left = [batches]

    def capture(tokens, lengths, position_offset):
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        return toy_cache.toy_capture(tokens, lengths, position_offset)

    return capture


@pytest.mark.parametrize("batches", [0, 1, 7])
def test_interrupted_build_is_incomplete_then_resumes_and_keeps_shards(tmp_path, batches):
    rows = toy_cache.toy_rows(20)
    for name in ("whole", "part"):
        toy_cache.write_inputs(tmp_path / name, rows)
    toy_cache.build_toy(tmp_path / "whole")
    with pytest.raises(KilledError):
        toy_cache.build_toy(tmp_path / "part", capture=killed_after(batches))
    cache = tmp_path / "part" / "cache"
    have = len(toy_cache.shard_bytes(cache))
    with pytest.raises(
        InputError, match=rf"is not complete \({have} of \d+ shards\): run the same `cache build` again"
    ):
        open_cache(cache)
    strays = [cache / ".shard-00009.safetensors.abc.partial", cache / ".manifest.json.x.partial"]
    for stray in strays:
        stray.write_bytes(b"half")
    progress = []
    done = toy_cache.build_toy(tmp_path / "part", progress=progress.append)
    assert done["shards_kept"] == have
    assert (have > 0) == (batches == 7)
    assert not any(stray.exists() for stray in strays)
    assert toy_cache.shard_bytes(cache) == toy_cache.shard_bytes(tmp_path / "whole" / "cache")
    assert progress[-1].tokens_done == progress[-1].tokens_total == done["num_tokens"]
    assert (progress[0].tokens_kept > 0) == (have > 0)


def test_damaged_shard_is_found_and_built_again(tmp_path):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(20))
    toy_cache.build_toy(tmp_path)
    wanted = toy_cache.shard_bytes(tmp_path / "cache")
    victim = tmp_path / "cache" / "shard-00001.safetensors"
    victim.write_bytes(b"\0" + victim.read_bytes()[1:])
    done = toy_cache.build_toy(tmp_path)
    assert (done["shards_damaged"], done["shards_kept"]) == (1, len(wanted) - 1)
    assert toy_cache.shard_bytes(tmp_path / "cache") == wanted
    assert verify_cache(tmp_path / "cache")["ok"]


def test_finished_build_does_nothing_again(tmp_path):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(5))
    toy_cache.build_toy(tmp_path)
    before = (tmp_path / "cache" / "manifest.json").read_bytes()
    toy_cache.build_toy(tmp_path, capture=killed_after(0))
    assert (tmp_path / "cache" / "manifest.json").read_bytes() == before


def build_shares(folder, count, **options):
    """Build in `count` processes at the same time, each its share."""
    code = "import sys; from pathlib import Path; from support import toy_cache as t; " + (
        "t.build_toy(Path(sys.argv[1]), process_index=int(sys.argv[2]), process_count=int(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    running = [subprocess.Popen([*command, str(i), str(count)], env=environment(), **options) for i in range(count)]
    return [process.wait() for process in running]


def environment():
    path = os.pathsep.join([str(Path(toy_cache.__file__).parents[1]), *sys.path])
    return {**os.environ, "PYTHONPATH": path}


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(tmp_path):
    rows = toy_cache.toy_rows(40)
    for name in ("one", "two"):
        toy_cache.write_inputs(tmp_path / name, rows)
    toy_cache.build_toy(tmp_path / "one")
    assert build_shares(tmp_path / "two", 2) == [0, 0]
    wanted = toy_cache.shard_bytes(tmp_path / "one" / "cache")
    assert toy_cache.shard_bytes(tmp_path / "two" / "cache") == wanted
    assert verify_cache(tmp_path / "two" / "cache")["problems"] == []
    manifest = json.loads((tmp_path / "two" / "cache" / "manifest.json").read_text())
    assert manifest["complete"]
    assert len(manifest["records"]) == 2
    assert {path.name for path in (tmp_path / "two" / "cache").iterdir()} == {*wanted, "manifest.json"}


def test_shares_interrupted_anywhere_and_finished_by_another_number_of_processes(tmp_path):
    rows = toy_cache.toy_rows(40)
    for name in ("whole", "part"):
        toy_cache.write_inputs(tmp_path / name, rows)
    toy_cache.build_toy(tmp_path / "whole")
    shares = [{"process_index": index, "process_count": 3} for index in range(3)]
    with pytest.raises(KilledError):
        toy_cache.build_toy(tmp_path / "part", capture=killed_after(4), **shares[1])
    cache = tmp_path / "part" / "cache"
    stray = cache / ".shard-00000.safetensors.abc.partial"  # another process's: it may be at work
    stray.write_bytes(b"half")
    done = toy_cache.build_toy(tmp_path / "part", **shares[1])
    assert done["shards_kept"] > 0
    assert stray.exists()
    assert not done["complete"]
    have = len(toy_cache.shard_bytes(cache))
    done = toy_cache.build_toy(tmp_path / "part")
    assert (done["complete"], done["shards_kept"]) == (True, have)
    assert not stray.exists()
    assert toy_cache.shard_bytes(cache) == toy_cache.shard_bytes(tmp_path / "whole" / "cache")
    assert {path.name for path in cache.iterdir()} == {*toy_cache.shard_bytes(cache), "manifest.json"}


def test_shares_are_the_shards_once():
    shards = tuple(ShardPlan(file=f"{i}", steps=(), sequences=1, tokens=1) for i in range(5))
    for count in (1, 2, 3, 7):
        shares = [Share(index=index, count=count).of(shards) for index in range(count)]
        assert [shard for share in shares for shard in share] == list(shards)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("holder", "message"),
    [
        ({"process_index": 1, "process_count": 2}, "another `cache build` with --process-index 1 is writing .*: wait"),
        ({}, "another `cache build` is writing .*: wait for it"),
    ],
)
def test_second_builder_of_a_share_is_refused(tmp_path, holder, message):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(5))
    share = {"process_index": 1, "process_count": 2}

    def capture(*given):
        if not refused:
            with pytest.raises(InputError, match=message) as error:
                toy_cache.build_toy(tmp_path, **share)
            refused.append(error)
        return toy_cache.toy_capture(*given)

    refused = []
    toy_cache.build_toy(tmp_path, capture=capture, **holder)
    assert refused


def test_second_builder_is_refused(tmp_path):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(5))
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another `cache build` is writing .*cache: wait for it"):
            toy_cache.build_toy(tmp_path)
    toy_cache.build_toy(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_shard": 700}, "tokens_per_shard was 600, now 700"),
        ({"tokens_per_batch": 512}, "tokens_per_batch was 256, now 512"),
        ({"capture_layers": (3, 1)}, r"capture_layers was \[1, 3\], now \[3, 1\]"),
        ({"position_offsets": (0,)}, r"position_offsets was \[0, 1000\], now \[0\]"),
        ({"features": "float32"}, "features was 'bfloat16', now 'float32'"),
        ({"share_prompts": False}, "share_prompts was True, now False"),
        ({"rope": "float32"}, "rope was 'exact', now 'float32'"),
        ({"top_k": 4}, "top_k was 0, now 4"),
        ({"dtype": "bfloat16"}, "dtype was 'float32', now 'bfloat16'"),
        ({"mesh": "data=2"}, "mesh was 'data=1', now 'data=2'"),
        ({"fingerprint": toy_cache.FINGERPRINT | {"target_weights": "w2"}}, "target_weights was 'w1', now 'w2'"),
    ],
)
def test_changed_setting_is_named(tmp_path, changes, message):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(5))
    toy_cache.build_toy(tmp_path)
    with pytest.raises(InputError, match=f"was begun with other settings: .*{message}") as error:
        toy_cache.build_toy(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_every_setting_is_compared_or_free():
    """A setting that is added must be in one of the two tests here."""
    compared = {"tokens_per_shard", "tokens_per_batch", "capture_layers", "position_offsets", "features"}
    compared |= {"share_prompts", "rope", "dtype", "mesh", "top_k"}
    free = {"target", "responses", "out", "process_index", "process_count"}
    assert {field.name for field in fields(CacheBuildConfig)} == compared | free


def test_a_setting_that_the_first_run_did_not_know_had_its_default(tmp_path):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(5))
    toy_cache.build_toy(tmp_path)
    manifest = read_manifest(tmp_path / "cache")
    del manifest["config"]["dtype"]
    write_manifest(tmp_path / "cache", manifest)
    toy_cache.build_toy(tmp_path, capture=killed_after(0))
    with pytest.raises(InputError, match="dtype was 'float32', now 'bfloat16'"):
        toy_cache.build_toy(tmp_path, dtype="bfloat16")


def test_a_version_that_plans_otherwise_does_not_go_on(tmp_path, monkeypatch):
    """Its shards would hold some texts twice and others not at all."""
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(20))
    with pytest.raises(KilledError):
        toy_cache.build_toy(tmp_path, capture=killed_after(7))
    monkeypatch.setattr(plan, "LENGTH_MULTIPLE", 32)
    with pytest.raises(InputError, match=r"was begun by dflash-jax \d.*, which makes other batches .*: finish it with"):
        toy_cache.build_toy(tmp_path)


def test_the_plan_s_hash_tells_rows_shapes_and_shards_apart():
    rows = np.array([2, 0])
    step = plan.Step(rows=rows, padded_rows=2, padded_length=64, position_offset=0)
    more = plan.Extension(rows=np.array([1]), sources=np.array([0]), padded_length=64)
    steps = [
        (step,),
        (step, step),
        (replace(step, rows=rows[::-1]),),
        (replace(step, padded_rows=4),),
        (replace(step, padded_length=128),),
        (replace(step, position_offset=1),),
        (replace(step, extensions=(more,)),),
        (replace(step, extensions=(replace(more, sources=np.array([1])),)),),
        (replace(step, extensions=(replace(more, padded_length=128),)),),
    ]
    shard = lambda *steps: plan.ShardPlan(file="f", steps=steps, sequences=1, tokens=1)
    plans = [(shard(*one),) for one in steps] + [(shard(step), shard(step))]
    assert len({plan.plan_sha256(one) for one in plans}) == len(plans)


def test_changed_responses_are_named_and_moved_inputs_are_not(tmp_path):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(5))
    toy_cache.build_toy(tmp_path)
    moved = (tmp_path / "responses.jsonl").rename(tmp_path / "moved.jsonl")
    toy_cache.build_toy(tmp_path, responses=moved)
    toy_cache.write_responses(moved, toy_cache.toy_rows(6))
    with pytest.raises(InputError, match="responses_sha256 was"):
        toy_cache.build_toy(tmp_path, responses=moved)


def test_folder_with_other_things_is_refused(tmp_path):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(5))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds files and is not a cache \(thesis.tex\): choose another --out"):
        toy_cache.build_toy(tmp_path)


FULL_DISK = """
import resource, sys
from pathlib import Path
from support import toy_cache
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
toy_cache.build_toy(Path(sys.argv[1]))
"""


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB, or none where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root; the limit on file sizes is tested without")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_is_one_line_and_the_build_resumes_when_there_is_room(tmp_path, small_disk):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(60))
    toy_cache.build_toy(tmp_path)
    with pytest.raises(InputError, match="cannot write the cache .*No space left on device.*: see to it, then run"):
        toy_cache.build_toy(tmp_path, out=small_disk / "cache")
    finished = len(toy_cache.shard_bytes(small_disk / "cache"))
    assert finished
    assert list((small_disk / "cache").glob(".*.partial")) == []
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    done = toy_cache.build_toy(tmp_path, out=small_disk / "cache")
    assert done["shards_kept"] == finished
    assert toy_cache.shard_bytes(small_disk / "cache") == toy_cache.shard_bytes(tmp_path / "cache")


def test_read_only_folder_is_one_line(tmp_path, small_disk):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(5))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(InputError, match="cannot write the cache .*Read-only file system") as error:
        toy_cache.build_toy(tmp_path, out=small_disk / "cache")
    assert "\n" not in str(error.value)


def test_no_room_is_one_line_and_the_build_resumes(tmp_path):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(20))
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, env=environment()
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("dflash_jax.core.errors.InputError: cannot write the cache"), done.stderr
    assert "run the same `cache build` again" in last
    assert list((tmp_path / "cache").glob(".*.partial")) == []
    toy_cache.build_toy(tmp_path)
    assert verify_cache(tmp_path / "cache")["ok"]
