"""Where an engine puts positions, and that an exchange changes one link and no other."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dflash_jax.core import InputError
from dflash_jax.parity import ParityConfig
from dflash_jax.parity.chain import CACHE, Source, reference_links
from dflash_jax.parity.engine import Engine, check_positions


def config(tmp_path, **changes):
    source: dict[str, Any] = {} if "cache" in changes else {"prompts": "humaneval"}
    return ParityConfig(target=tmp_path, drafter=tmp_path, **source | changes)


def engine(tmp_path, offsets=(0, 4096), **changes):
    return Engine(config=config(tmp_path, **changes), offsets=offsets)


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({}, (4096, 4096)),
        ({"drafter_positions": "ignore-offset"}, (0, 0)),
        ({"drafter_positions": "block-ignores-offset"}, (4096, 0)),
        ({"drafter_positions": "context-ignores-offset"}, (0, 4096)),
        ({"block_shift": -2}, (4096, 4094)),
        ({"drafter_positions": "block-ignores-offset", "context_shift": 3, "block_shift": 1}, (4099, 1)),
    ],
)
def test_where_context_and_block_begin(tmp_path, changes, starts):
    assert config(tmp_path, **changes).starts(4096) == starts


def differing(a, b):
    return {field.name for field in dataclasses.fields(a) if getattr(a, field.name) != getattr(b, field.name)}


def test_each_swap_mends_its_link_and_each_spoil_spoils_it(tmp_path):
    under_test = engine(
        tmp_path, offsets=(16, 4096), rope="bfloat16", drafter_rope="float32", context_shift=1, block_shift=2
    )
    ours, sound = under_test.links(4096), reference_links(16)
    assert under_test.reference == sound
    assert ours.features == ours.labels == Source(kind="bfloat16", offset=4096)
    assert differing(ours, sound) == {"features", "labels", "context_start", "block_start", "drafter_rope"}
    swaps = under_test.swaps(4096)
    assert {name: differing(links, ours) for name, links in swaps.items()} == {
        "none": set(),
        "features": {"features"},
        "labels": {"labels"},
        "target": {"features", "labels"},
        "context_positions": {"context_start"},
        "block_positions": {"block_start"},
        "positions": {"context_start", "block_start"},
        "near_positions": {"context_start", "block_start"},
        "drafter": {"drafter_rope"},
        "all": {"features", "labels", "context_start", "block_start", "drafter_rope"},
    }
    assert (swaps["positions"].context_start, swaps["positions"].block_start) == (4096, 4096)
    assert (swaps["near_positions"].context_start, swaps["near_positions"].block_start) == (17, 18)
    assert swaps["all"] == sound
    spoils = under_test.spoils(4096)
    assert {name: differing(links, sound) for name, links in spoils.items()} == {
        "features": {"features"},
        "labels": {"labels"},
        "positions": {"context_start", "block_start"},
        "drafter": {"context_start", "block_start", "drafter_rope"},
    }
    # what tells angles: positions as large as the engine's, that fit each other
    assert spoils["drafter"].context_start == spoils["drafter"].block_start == 4097


def test_a_cache_is_where_features_and_labels_come_from(tmp_path):
    links = engine(tmp_path, cache=tmp_path).links(4096)
    assert links.features == links.labels == Source(kind=CACHE, offset=4096)


@pytest.mark.parametrize("near", [0, 512])
def test_probes_move_layers_or_block_and_stay_above_zero(tmp_path, near):
    probes = engine(tmp_path, offsets=(near, 4096)).probes((-1, 1))
    assert list(probes) == ["layers-1", "layers+1", "block-1", "block+1"]
    assert [probes[name].features.layer_shift for name in probes] == [-1, 1, 0, 0]
    assert [probes[name].block_start - probes[name].context_start for name in probes] == [0, 0, -1, 1]
    assert min(min(links.block_start, links.context_start) for links in probes.values()) >= 0
    assert list(engine(tmp_path).probes((1,))) == ["layers+1", "block-1", "block+1"]


def test_positions_that_do_not_exist(tmp_path):
    fine = engine(tmp_path, offsets=(0, 2**31 - 1 - 108), context_shift=1)
    check_positions(fine, longest=99, block_size=8)
    message = (
        r"^--position-offsets 2147483539 \+ the longest text's 100 tokens are more than 2147483647: lower the offset$"
    )
    with pytest.raises(InputError, match=message):
        check_positions(fine, longest=100, block_size=8)
    for shift in ("context_shift", "block_shift"):
        message = (
            r"^at offset 0 the engine's positions begin at -1: shift the other one of context and block up instead"
        )
        with pytest.raises(InputError, match=message):
            check_positions(engine(tmp_path, **{shift: -1}), longest=9, block_size=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": None}, "parity needs texts from one place: give one of --prompts, --responses and --cache"),
        ({"responses": Path("r")}, "parity needs texts from one place: give one of --prompts, --responses and --cache"),
        ({"position_offsets": ()}, "--position-offsets is '': name different positions from 0 to 2147483647"),
        ({"position_offsets": (0, 0)}, "--position-offsets is '0,0': name different positions from 0 to 2147483647"),
        ({"position_offsets": (-1,)}, "--position-offsets is '-1': name different positions from 0 to 2147483647"),
        ({"limit": 0}, "--limit is 0: a positive number is needed"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0: a positive number is needed"),
        ({"block_size": 1}, r"--block-size is 1: at least 2 are needed \(the anchor and one drafted token\)"),
        ({"margin": 0.0}, "--margin is 0.0: a number of accepted tokens above 0 is needed"),
        ({"margin": float("nan")}, "--margin is nan: a number of accepted tokens above 0 is needed"),
        ({"rope": "float16"}, "the rope setting is 'float16': choose exact, .*"),
        ({"drafter_rope": "table:0"}, "the rope setting is 'table:0': choose exact, .*"),
        (
            {"prompts": None, "cache": Path("c"), "rope": "float32"},
            "--rope describes an engine .*: leave it out with --cache",
        ),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        ParityConfig(**{"target": tmp_path, "drafter": tmp_path, "prompts": "humaneval"} | changes)
