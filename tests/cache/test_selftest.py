"""The capture self-test finds what captures get wrong, each injected into a real forward."""

from collections import Counter
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.cache import CacheBuildConfig, build
from dflash_jax.cache.build import plan_build
from dflash_jax.cache.selftest import require, self_test, self_test_shapes
from dflash_jax.core import InputError
from dflash_jax.targets import load_target, prefill
from dflash_jax.text import load_tokenizer
from support import tiny, toy_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selftest")
    tiny.write_tiny_target(folder / "target", seed=2)
    draw = np.random.default_rng(0)
    ids = lambda count: draw.integers(4, len(tiny.TOKENS), count).tolist()
    toy_cache.write_responses(folder / "r.jsonl", [(ids(9), ids(40)), (ids(3), ids(30)), (ids(6), ids(20))])
    return folder


def config(folder, **changes):
    settings: dict[str, Any] = {"target": folder / "target", "responses": folder / "r.jsonl", "out": folder / "cache"}
    settings |= {"capture_layers": (1, 3), "position_offsets": (0, 70000)}
    return CacheBuildConfig(**settings | changes)


def findings(folder, forward=prefill, **changes):
    target = load_target(folder / "target", rope=changes.get("rope", "exact"))
    tokenizer = load_tokenizer(folder / "target")
    return self_test(plan_build(config(folder, **changes)), target, tokenizer=tokenizer, forward=forward)


def failed(found):
    return {name for name, finding in found.items() if not finding["holds"]}


def test_a_sound_capture_passes(folder):
    found = findings(folder)
    assert failed(found) == set()
    require(found)
    assert found["capture layers"]["found"] == "outputs of 1, 3 of 0 to 4 (Hugging Face's hidden_states 2, 4)"
    assert found["mask token"]["found"] == f"{tiny.MASK_ID} (<spare>) is in none of 3 texts"
    assert found["chat template"]["found"] == "present, written round 0 of 3 prompts"
    assert found["head"]["found"] == "of its own; next_ids are its largest logits"


def test_its_forwards_are_counted(folder):
    ran = Counter()

    def forward(target, tokens, **named):
        ran[tokens.shape] += 1
        return prefill(target, tokens, **named)

    findings(folder, forward=forward)
    # layers from their own features run as other targets, all of them together once
    assert self_test_shapes(plan_build(config(folder))) == ran + Counter({(4, 32): 1})


def normed(target, *given, **named):
    output = prefill(target, *given, **named)
    columns = jnp.split(output.features, len(named["capture_layers"]), axis=-1)
    return eqx.tree_at(lambda o: o.features, output, jnp.concatenate([target.norm(x) for x in columns], axis=-1))


def layer_off_by_one(target, *given, **named):
    layers = tuple(max(0, layer - 1) for layer in named["capture_layers"])
    return prefill(target, *given, **named | {"capture_layers": layers})


def sees_padding(target, tokens, *, lengths, **named):
    output = prefill(target, tokens, lengths=lengths, **named)
    leak = 0.1 * target.embed_tokens[tokens].mean(axis=1)[:, None]
    return eqx.tree_at(lambda o: o.features, output, output.features + jnp.tile(leak, len(named["capture_layers"])))


def mixes_rows(target, tokens, **named):
    output = prefill(target, tokens, **named)
    return eqx.tree_at(
        lambda o: o.features, output, output.features + 0.1 * output.features.mean(axis=0, keepdims=True)
    )


def forgets_the_offset_of_half(target, tokens, *, position_offset, **named):
    far = prefill(target, tokens, position_offset=position_offset, **named)
    return eqx.tree_at(
        lambda o: o.features, far, far.features * jnp.where(position_offset > 0, 1.1, 1.0)[:, None, None]
    )


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (normed, {"residual or normed"}),
        (layer_off_by_one, {"residual or normed"}),
        (sees_padding, {"residual or normed", "padding"}),
        (mixes_rows, {"residual or normed", "padding", "batch of many, of one"}),
        (forgets_the_offset_of_half, {"rope at the offsets"}),
    ],
)
def test_what_is_broken_is_named(folder, forward, names):
    found = findings(folder, forward)
    assert failed(found) == names
    with pytest.raises(InputError, match=f"self-test failed, nothing was written: .*{min(names)}: ") as error:
        require(found)
    assert "\n" not in str(error.value)


def test_bad_angles_are_told_but_not_refused_when_they_were_asked_for(folder):
    found = findings(folder, rope="bfloat16")
    assert failed(found) == set()
    assert found["rope at the offsets"]["found"].startswith("--rope bfloat16 was asked for: ")


def test_mask_token_in_a_text_stops_the_build_before_anything_is_written(folder, tmp_path):
    toy_cache.write_responses(tmp_path / "r.jsonl", [([5, 6], [7, tiny.MASK_ID])])
    reported = []
    with pytest.raises(InputError, match=r"mask token: 3 \(<spare>\) is a token of 'r0'"):
        build(
            config(folder, responses=tmp_path / "r.jsonl", out=tmp_path / "cache"),
            fingerprint={},
            report=reported.append,
        )
    assert failed(reported[0]) == {"mask token"}
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_conversations_are_seen_to_use_the_template(folder, tmp_path):
    tokenizer = load_tokenizer(folder / "target")
    rendered = tokenizer.encode("<s>user\nab</s>\n<s>assistant\n")
    toy_cache.write_responses(tmp_path / "r.jsonl", [(rendered, [7, 8]), ([9, 10, 11], [7])])
    plan = plan_build(config(folder, responses=tmp_path / "r.jsonl"))
    found = self_test(plan, load_target(folder / "target"), tokenizer=tokenizer)
    assert found["chat template"]["found"] == "present, written round 1 of 2 prompts"
