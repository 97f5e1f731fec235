"""Nothing is lost with any drafter: a few prompts of the tiny target, and slowly of the real one."""

import json

import jax
import pytest

import lossless
from dflash_jax.core import InputError
from dflash_jax.drafter import init_drafter, save_drafter
from support import tiny, tiny_chain


def run(capsys, target, drafter, out, **options):
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]
    code = lossless.main(["--target", str(target), "--drafter", str(drafter), "--out", str(out), *flags])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_every_way_gives_the_tokens_of_plain_decoding(tmp_path, capsys):
    (tmp_path / "drafter").mkdir()
    save_drafter(tiny.half_memorised(), tmp_path / "drafter")
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS[:5])
    options = {"prompts": prompts, "max_new_tokens": 23, "batch_size": 3}
    place = tiny.tiny_target(), tmp_path / "drafter", tmp_path / "out" / "rows.jsonl"
    with tiny_chain.quick_compiles():
        code, result = run(capsys, *place, **options)
    assert code == 0
    assert (result["tokens_equal"], result["num_prompts"]) == (True, 5)
    ways = result["ways"]
    assert all(way["num_equal"] == 5 and way["differences"] == [] for way in ways.values())
    assert (ways["oracle"]["tau_whole"], ways["wrong"]["tau_micro"]) == (5, 1)
    assert 1 < ways["trained"]["tau_micro"] < ways["oracle"]["tau_micro"] <= 5
    # it goes on where it was killed, in the middle of a line; and nothing is decoded that is there
    rows = place[2].read_bytes()
    place[2].write_bytes(rows + b'{"id": "p')
    code, again = run(capsys, *place, **options)
    assert (code, again["ways"]) == (0, ways)
    assert place[2].read_bytes() == rows
    # a text that is not plain decoding's is a loss
    place[2].write_bytes(rows.replace(b'{"equal": true', b'{"equal": false', 1))
    code, result = run(capsys, *place, **options)
    assert (code, result["tokens_equal"]) == (1, False)
    with pytest.raises(InputError, match="begun with other settings"):
        run(capsys, *place, **options | {"max_new_tokens": 9})


@pytest.mark.slow
def test_nothing_is_lost_on_the_real_target(smollm2, tmp_path, capsys):
    from dflash_jax.drafter import DrafterConfig
    from dflash_jax.targets import read_target_config

    target = read_target_config(smollm2)
    config = DrafterConfig(
        hidden_size=target.hidden_size, intermediate_size=256, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64,
        attention_bias=False, rms_norm_eps=1e-5, rope_theta=10000.0, max_positions=8192, block_size=8, mask_token_id=3,
        capture_layers=(1, 27), num_target_layers=target.num_layers, vocab_size=target.vocab_size,
    )  # fmt: skip
    (tmp_path / "drafter").mkdir()
    save_drafter(init_drafter(config, key=jax.random.key(1)), tmp_path / "drafter")
    options = {"limit": 3, "max_new_tokens": 18, "batch_size": 3}
    code, result = run(capsys, smollm2, tmp_path / "drafter", tmp_path / "rows.jsonl", **options)
    assert (code, result["tokens_equal"]) == (0, True)
    assert (result["ways"]["oracle"]["tau_whole"], result["ways"]["wrong"]["tau_micro"]) == (8, 1)
