import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import (
    Ratio,
    Times,
    compiled_flops,
    matmul_work,
    paired_ratio,
    peak_memory_bytes,
    time_interleaved,
    write_result,
)


def times(*wall):
    return Times(wall_s=wall, cpu_s=tuple(2 * second for second in wall))


def test_contestants_take_turns_and_the_order_turns_round():
    seen = []
    done = time_interleaved({name: lambda name=name: seen.append(name) for name in "abc"}, rounds=3, warmups=1)
    assert "".join(seen) == "abcabccbaabc"
    assert {name: len(part.wall_s) for name, part in done.items()} == {"a": 3, "b": 3, "c": 3}


def test_each_name_gets_its_own_times():
    done = time_interleaved({"busy": lambda: sum(range(300_000)), "idle": lambda: None}, rounds=4)
    assert done["busy"].median() > 20 * done["idle"].median()
    assert done["busy"].median("cpu_s") > 20 * done["idle"].median("cpu_s")


def test_a_ratio_is_taken_within_rounds():
    ratio = paired_ratio(times(2, 6, 4), times(1, 2, 1))
    assert ratio.median == 3  # of 2, 3, 4; the medians' own ratio is 4
    assert ratio.ci95 == (2, 4)
    assert ratio.rounds == 3
    assert paired_ratio(times(2, 6, 4), times(1, 2, 1), clock="cpu_s").median == 3


def test_the_ceiling_is_products_and_xla_counts_the_same():
    run, flops = matmul_work(size=48, products=3)
    assert flops == 2 * 3 * 48**3
    np.testing.assert_array_equal(run(), run())
    assert 0.5 < float(jnp.std(run())) < 2, "neither vanishes nor overflows"

    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((48, 48))).compile()
    assert compiled_flops(compiled) == pytest.approx(2 * 48**3, rel=0.01)


def test_the_result_is_one_json_line(capsys):
    write_result({"rate": 1 / 3, "many": 123456789, "ratio": Ratio(median=2.0, ci95=(1.0, 3.0), rounds=5)})
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert json.loads(line) == {
        "rate": 0.33333,
        "many": 123456789,
        "ratio": {"median": 2.0, "ci95": [1.0, 3.0], "rounds": 5},
    }


def test_memory_is_this_process_peak():
    before = peak_memory_bytes()["host_bytes"]
    held = np.ones(30_000_000)
    after = peak_memory_bytes()["host_bytes"]
    assert before is not None
    assert after is not None
    assert after >= before
    assert after > held.nbytes
