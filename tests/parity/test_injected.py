"""Every fault, put in through a real setting of the engine, is found and told from the others."""

import json
import shutil
from dataclasses import dataclass, field

import pytest

from dflash_jax.cli.commands import COMMANDS
from dflash_jax.core import read_json, write_json
from support.parity_world import FAR, UNSEEN

# the world of these tests takes long to make, and each of them seconds
pytestmark = pytest.mark.slow

(HOLDS,) = (command.holds for command in COMMANDS if command.name == "parity")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An engine and what must be found."""

    settings: dict
    cause: str
    broken: tuple[int, ...]
    """Offsets at which it is broken; it holds at the others."""
    mended_by: tuple[str, ...]
    """Exchanges that bring acceptance back; no other one does."""
    says: str
    """A part of the sentence."""
    offsets: tuple[int, ...] = (0, 4096, FAR)


@dataclass(frozen=True, kw_only=True)
class CacheFault(Fault):
    """The same, by a cache."""

    build: dict = field(default_factory=dict)


FAULTS = {
    "bfloat16 angles of the target": Fault(
        settings={"rope": "bfloat16"},
        cause="bfloat16_angles",
        broken=(4096, FAR),
        mended_by=("target",),
        says="the target's rotary angles are rounded to bfloat16",
    ),
    "bfloat16 angles of a target on two devices": Fault(
        settings={"rope": "bfloat16", "mesh": "data=2"},
        cause="bfloat16_angles",
        broken=(4096, FAR),
        mended_by=("target",),
        says="the target's rotary angles are rounded to bfloat16",
    ),
    "float32 angles of the target": Fault(
        settings={"rope": "float32", "position_offsets": (0, FAR, 2**28)},
        offsets=(0, FAR, 2**28),
        cause="float32_angles",
        broken=(2**28,),
        mended_by=("target",),
        says="the target's rotary angles are float32 products",
    ),
    "a table of the target that ends between offsets": Fault(
        settings={"rope": "table:8192"},
        cause="table_end",
        broken=(FAR,),
        mended_by=("target",),
        says="the target's table of angles ends before offset 65,536",
    ),
    "a table of the target that ends within the texts": Fault(
        settings={"rope": f"table:{FAR + 12}"},
        cause="table_end",
        broken=(FAR,),
        mended_by=("target",),
        says="the target's table of angles ends before offset 65,536 or soon after",
    ),
    "bfloat16 angles of the drafter": Fault(
        settings={"drafter_rope": "bfloat16"},
        cause="bfloat16_angles",
        broken=(4096, FAR),
        mended_by=("drafter", "near_positions"),
        says="the drafter's rotary angles are rounded to bfloat16",
    ),
    "float32 angles of the drafter": Fault(
        settings={"drafter_rope": "float32", "position_offsets": (0, FAR, 2**28)},
        offsets=(0, FAR, 2**28),
        cause="float32_angles",
        broken=(2**28,),
        mended_by=("drafter", "near_positions"),
        says="the drafter's rotary angles are float32 products",
    ),
    "a table of the drafter that ends": Fault(
        settings={"drafter_rope": "table:8192"},
        cause="table_end",
        broken=(FAR,),
        mended_by=("drafter", "near_positions"),
        says="the drafter's table of angles ends before offset 65,536",
    ),
    "a drafter whose block ignores the offset": Fault(
        settings={"drafter_positions": "block-ignores-offset"},
        cause="drafter_ignores_offset",
        broken=(4096, FAR),
        mended_by=("block_positions", "positions", "near_positions"),
        says="the drafter's block slots ignore the offset while its context rows do not",
    ),
    "a drafter whose context ignores the offset": Fault(
        settings={"drafter_positions": "context-ignores-offset"},
        cause="drafter_ignores_offset",
        broken=(4096, FAR),
        mended_by=("context_positions", "positions", "near_positions"),
        says="the drafter's context rows ignore the offset while its block slots do not",
    ),
    "a block one position too far": Fault(
        settings={"block_shift": 1},
        cause="offset_off_by_one",
        broken=(0, 4096, FAR),
        mended_by=("block_positions", "positions"),
        says="block slots sit 1 position too far",
    ),
    "a context one position too far": Fault(
        settings={"context_shift": 1},
        cause="offset_off_by_one",
        broken=(0, 4096, FAR),
        mended_by=("context_positions", "positions"),
        says="block slots sit 1 position too near",
    ),
    "a cache of the layers above": CacheFault(
        settings={},
        build={"capture_layers": (2, 4)},
        cause="capture_layers_shifted",
        broken=(0, 4096, FAR),
        mended_by=("features", "target"),
        says="the captured layers are moved by +1: the features are those of layers 2, 4",
    ),
    "a cache of the layers below": CacheFault(
        settings={},
        build={"capture_layers": (0, 2)},
        cause="capture_layers_shifted",
        broken=(0, 4096, FAR),
        mended_by=("features", "target"),
        says="the captured layers are moved by -1: the features are those of layers 0, 2",
    ),
    "a cache with the layers in another order": CacheFault(
        settings={},
        build={"capture_layers": (3, 1)},
        cause="capture_layers_shifted",
        broken=(0, 4096, FAR),
        mended_by=("features", "target"),
        says="the captured layers are others: the features are those of layers 3, 1",
    ),
    "a cache of another target": CacheFault(
        settings={},
        build={"target": "other"},
        cause="other_target",
        broken=(0, 4096, FAR),
        mended_by=("target",),
        says="the features are not this target's",
    ),
    "a cache with bfloat16 angles, stored as bfloat16": CacheFault(
        settings={},
        build={"rope": "bfloat16", "features": "bfloat16"},
        cause="bfloat16_angles",
        broken=(4096, FAR),
        mended_by=("target",),
        says="the target's rotary angles are rounded to bfloat16",
    ),
    "a cache with a table that ends": CacheFault(
        settings={},
        build={"rope": "table:8192"},
        cause="table_end",
        broken=(FAR,),
        mended_by=("target",),
        says="the target's table of angles ends before offset 65,536",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_told_from_the_others(world, name):
    fault = FAULTS[name]
    settings = dict(fault.settings)
    if isinstance(fault, CacheFault):
        build = {key: world.other if value == "other" else value for key, value in fault.build.items()}
        settings["cache"] = world.cache(name.replace(" ", "-"), **build)
    found = world.parity(**settings)
    assert (found["verdict"], found["cause_id"]) == ("broken", fault.cause)
    assert fault.says in found["cause"]
    assert not HOLDS(found)
    rows = found["by_ctx_pos_start"]
    assert list(rows) == [str(offset) for offset in fault.offsets]
    assert tuple(int(o) for o, row in rows.items() if row["verdict"] == "broken") == fault.broken
    assert {row["verdict"] for row in rows.values()} <= {"holds", "broken"}
    assert found["reference"]["accept_len_mean"] > 1.5
    for row in (rows[str(offset)] for offset in fault.broken):
        assert row["accept_len_difference"] < -0.5
        sound = row["swaps"]["all"]
        assert sound == pytest.approx(found["reference"]["accept_len_mean"])
        assert row["swaps"]["none"] == pytest.approx(row["accept_len_mean"])
        back = {link for link, value in row["swaps"].items() if value > sound - 0.1}
        assert back == {*fault.mended_by, "all"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_two_faults_are_both_named(world):
    found = world.parity(rope="table:8192", block_shift=1)
    assert found["cause_id"] in ("table_end", "offset_off_by_one")
    assert "block slots sit 1 position too far" in found["cause"]
    assert "the target's table of angles ends" in found["cause"]


@pytest.mark.parametrize(
    ("settings", "noted"),
    [
        ({}, False),
        ({"mesh": "data=2"}, False),
        ({"drafter_positions": "ignore-offset"}, True),
        ({"context_shift": 1, "block_shift": 1}, True),
        # float32 is good enough for a while
        ({"rope": "float32", "drafter_rope": "float32"}, False),
    ],
)
def test_what_is_no_fault_holds(world, settings, noted):
    found = world.parity(**settings)
    assert (found["verdict"], found["cause_id"], found["cause"]) == ("holds", None, None)
    assert HOLDS(found)
    assert [row["num_anchors_differing"] for row in found["by_ctx_pos_start"].values()] == [0, 0, 0]
    assert all(row["swaps"] is None and row["spoils"] is None for row in found["by_ctx_pos_start"].values())
    assert bool(found["notes"]) is noted
    if noted:
        assert "an identity under RoPE and breaks nothing" in found["notes"][0]


def test_a_cache_whose_offsets_are_one_off_is_no_fault(world):
    """Its features are those of the right offset: a shift of everything is an identity."""
    found = world.parity(cache=world.cache("one-off", position_offsets=(1, 4097, FAR + 1), features="bfloat16"))
    assert (found["verdict"], found["cause_id"]) == ("holds", None)
    assert list(found["by_ctx_pos_start"]) == ["1", "4097", str(FAR + 1)]
    drift = [row["feature_drift"] for row in found["by_ctx_pos_start"].values()]
    assert 1e-4 < min(drift) <= max(drift) < 4e-3  # the rounding to bfloat16


def test_a_drafter_that_only_knows_its_training_prompts(world):
    found = world.parity(prompts=str(world.both))
    assert (found["verdict"], found["cause_id"]) == ("holds", "memorisation")
    assert HOLDS(found)
    assert "positions are not to blame" in found["cause"]
    assert (found["seen"]["num_prompts"], found["unseen"]["num_prompts"]) == (8, len(UNSEEN))
    assert found["seen"]["accept_len_mean"] > 4 * found["unseen"]["accept_len_mean"]


def test_memorisation_shows_without_a_single_seen_prompt(world):
    found = world.parity(prompts=str(world.unseen))
    assert (found["verdict"], found["cause_id"], found["seen"]) == ("holds", "memorisation", None)
    assert found["training"]["step"] == 100
    assert found["training"]["token_acc"] > 3 * found["unseen"]["token_acc_mean"]
    assert "training batches before step 100" in found["evidence"][0]["test"]
    # as bad at 0 as anywhere
    assert len({row["accept_len_mean"] for row in found["by_ctx_pos_start"].values()}) == 1
    assert any("hardly anything to lose" in line for line in found["warnings"])


def test_a_drafter_that_was_trained_on_other_layers_than_it_says(tmp_path, world):
    """By the commonest mistake: ids of layers' inputs, where outputs were meant."""
    drafter = tmp_path / "drafter"
    shutil.copytree(world.drafter, drafter)
    config = read_json(drafter / "config.json", what="config")
    config["dflash_config"]["target_layer_ids"] = [0, 2]
    write_json(drafter / "config.json", config)
    found = world.parity(drafter=drafter)
    # every offset is as the smallest, and yet target and drafter do not fit
    assert (found["verdict"], found["cause_id"]) == ("holds", "capture_layers_shifted")
    assert not HOLDS(found)
    assert "it was trained on those, its target_layer_ids 0, 2 are moved by -1" in found["cause"]
    assert found["probes"]["layers+1"] > found["reference"]["accept_len_mean"] + 1
