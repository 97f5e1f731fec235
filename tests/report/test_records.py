"""Inputs are recognised by their keys, and a broken one is one line that names the file and the key."""

import json
import re

import pytest

from dflash_jax.core import InputError
from dflash_jax.report import ReportConfig, write_report
from dflash_jax.report.records import read_records


def test_kinds_are_told_apart_by_keys_in_any_order(build, tmp_path):
    details = build.write_jsonl(tmp_path / "b.jsonl", [build.detail(0), build.detail(1)])
    decode = build.write_json(tmp_path / "c.json", build.decode())
    check = build.write_json(tmp_path / "d.json", build.check())
    records = read_records([details, build.write_run(tmp_path / "run", count=3), decode, check])
    assert [sample.id for sample in records.samples] == ["HumanEval/0", "HumanEval/1"]
    assert [run.label for run in records.runs] == ["run"]
    assert list(records.runs[0].records) == ["run-50", "run-100"]  # by step, not by name
    assert records.decodes[0].speedup == 1.212
    assert records.checks[0].label == "run/run-600"
    assert records.checks[0].extra == {"cache": "demo/cache-heldout", "drafter": "demo/run/run-600"}


def test_offsets_are_ordered_as_numbers_and_null_groups_are_absent(build, tmp_path):
    document = build.check(unseen=None)
    by_offset = {key: document["by_ctx_pos_start"][key] for key in ("65536", "131072", "0")} | {"4096": None}
    path = build.write_json(tmp_path / "check.json", document | {"by_ctx_pos_start": by_offset})
    check = read_records([path]).checks[0]
    assert list(check.by_offset) == [0, 65536, 131072]
    assert check.unseen is None
    assert check.seen is None
    assert check.group == "All prompts"


def test_a_group_without_anchors_is_absent(build, tmp_path):
    path = build.write_json(tmp_path / "check.json", build.check(seen={"num_anchors": 0, "accept_len_mean": None}))
    assert read_records([path]).checks[0].seen is None


def test_untrained_is_compared_on_the_same_group(build, tmp_path):
    untrained = build.bucket(0.5, anchors=9, prompts=3) | {"unseen": build.bucket(0.02, anchors=4, prompts=1)}
    held_out = build.write_json(tmp_path / "a.json", build.check(untrained=untrained))
    everything = build.write_json(tmp_path / "b.json", build.check(untrained=untrained, unseen=None))
    first, second = read_records([held_out, everything]).checks
    assert first.untrained is not None
    assert second.untrained is not None
    assert (first.untrained.num_anchors, second.untrained.num_anchors) == (4, 9)


def test_two_checks_of_one_drafter_have_two_names(build, tmp_path):
    paths = [build.write_json(tmp_path / name, build.check()) for name in ("a.json", "b.json")]
    assert [check.label for check in read_records(paths).checks] == [
        "run/run-600 on cache-heldout",
        "run/run-600 on cache-heldout (b.json)",
    ]
    build.write_json(paths[1], build.check(cache="demo/cache-train"))
    assert [check.label for check in read_records(paths).checks] == [
        "run/run-600 on cache-heldout",
        "run/run-600 on cache-train",
    ]


def test_a_step_logged_twice_after_a_resume_counts_once(build, tmp_path):
    run = build.write_run(tmp_path / "run", count=2)
    rows = [
        {"step": step, "loss": loss, "accuracy": 0.1} for step, loss in ((10, 9.0), (20, 8.0), (10, 7.0), (20, 6.0))
    ]
    build.write_jsonl(run / "metrics.jsonl", rows)
    assert [(step.step, step.loss) for step in read_records([run]).runs[0].steps] == [(10, 7.0), (20, 6.0)]


def test_a_record_beside_a_file_is_read_with_it(build, tmp_path):
    details = build.write_jsonl(tmp_path / "details.jsonl", [build.detail(0, pieces=["a"], accepted=[], tau=None)])
    build.write_json(tmp_path / "details.jsonl.record.json", {"argv": ["dflash-jax", "decode"]})
    records = read_records([details])
    assert records.sidecars == {"details.jsonl": {"argv": ["dflash-jax", "decode"]}}
    assert records.samples[0].tau is None


def _without(document, key):
    return {name: value for name, value in document.items() if name != key}


CHECK_FAULTS = {
    "'block_size' is missing": lambda check: _without(check, "block_size"),
    "'accept_len_mean' is 'much', a finite number": lambda check: check | {"accept_len_mean": "much"},
    "'accept_len_mean' is nan, a finite number": lambda check: check | {"accept_len_mean": float("nan")},
    "'accept_len_mean' is True, a finite number": lambda check: check | {"accept_len_mean": True},
    "'accept_len_ci95' is [0.5, 0.4], an interval": lambda check: check | {"accept_len_ci95": [0.5, 0.4]},
    "'survival' is [0.5, None], a list": lambda check: check | {"survival": [0.5, None]},
    "by_ctx_pos_start: 'zero' is no position offset": lambda check: check | {"by_ctx_pos_start": {"zero": {}}},
    "by_ctx_pos_start: 0: the key 'num_anchors' is missing": lambda check: check | {"by_ctx_pos_start": {"0": {}}},
    "'by_ctx_pos_start' is [], an object": lambda check: check | {"by_ctx_pos_start": []},
    "'num_anchors' is -1, an integer of at least 0": lambda check: check | {"num_anchors": -1},
    "num_anchors is 0": lambda check: check | {"num_anchors": 0},
}


@pytest.mark.parametrize("message", CHECK_FAULTS)
def test_a_broken_check_is_one_line_with_file_and_key(build, tmp_path, message):
    path = build.write_json(tmp_path / "check.json", CHECK_FAULTS[message](build.check()))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_records([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


DETAIL_FAULTS = {
    "row 2: 'accepted' is [0], a list": {"pieces": ["a"], "accepted": [0]},
    "row 2: 'accepted' is 3, a list": {"pieces": ["a"], "accepted": 3},
    "row 2: 'pieces' is [], a list": {"pieces": []},
    "row 2: 'pieces' is [1], a list": {"pieces": [1]},
    "row 2: 'prompt' is None, a string": {"prompt": None},
    "row 2: 'tokens_equal' is 'yes', true or false": {"tokens_equal": "yes"},
    "row 2: 6 pieces do not fit 1 token of prefill and accepted lengths that sum to 4": {
        "pieces": list("abcdef"),
        "accepted": [2, 2],
    },
    "row 2: 'tau' is 'high', a finite number": {"tau": "high"},
    "row 2: 3 pieces do not fit 1 token of prefill and accepted lengths that sum to 4": {
        "pieces": list("abc"),
        "accepted": [2, 2],
    },
}


@pytest.mark.parametrize("message", DETAIL_FAULTS)
def test_broken_details_name_the_row(build, tmp_path, message):
    path = build.write_jsonl(tmp_path / "details.jsonl", [build.detail(0), build.detail(1, **DETAIL_FAULTS[message])])
    with pytest.raises(InputError, match=re.escape(message)):
        read_records([path])


def test_broken_decode_and_run(build, tmp_path):
    path = build.write_json(tmp_path / "decode.json", build.decode(speedup="fast"))
    with pytest.raises(InputError, match=r"decode\.json: 'speedup' is 'fast', a finite number"):
        read_records([path])
    run = build.write_run(tmp_path / "run", count=2)
    build.write_jsonl(run / "metrics.jsonl", [{"step": 1, "loss": "low", "accuracy": 0.5}])
    with pytest.raises(InputError, match=r"metrics\.jsonl row 1: 'loss' is 'low', a number"):
        read_records([run])
    build.write_jsonl(run / "metrics.jsonl", build.metrics(2))
    build.write_json(run / "config.json", [])
    with pytest.raises(InputError, match=r"config\.json is \[\], a JSON object is needed"):
        read_records([run])


def test_what_is_no_record_says_what_would_be(build, tmp_path):
    faults = {
        "none.json": (None, "does not exist"),
        "other.json": ('{"a": 1, "b": 2}', r"is no record that a report knows \(its keys are a, b\)"),
        "list.json": ("[1]", r"is no record that a report knows \(it is no object\)"),
        "cut.json": (json.dumps(build.check())[:200], "is not JSON"),
        "bytes.jsonl": (b"\xff\xfe\x00", "is not UTF-8 in line 1"),
        "rows.jsonl": ('{"a": 1}\n', r"is no record that a report knows \(its rows' keys are a\)"),
        "cut.jsonl": (json.dumps(build.detail(0)) + '\n{"id', "line 2 is not JSON"),
        "metrics.jsonl": ('{"step": 1, "loss": 2.0}\n', "is a run's curve: give the run folder"),
    }
    for name, (content, message) in faults.items():
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=message):
            read_records([tmp_path / name])
    with pytest.raises(InputError, match="is not a run folder"):
        read_records([tmp_path])


def test_config_wants_inputs_and_a_file_to_write(tmp_path):
    page = tmp_path / "page.html"
    with pytest.raises(InputError, match="--inputs is empty"):
        ReportConfig(inputs=(), out=page)
    with pytest.raises(InputError, match="is a folder"):
        ReportConfig(inputs=(page,), out=tmp_path)
    with pytest.raises(InputError, match="is also an input"):
        ReportConfig(inputs=(page,), out=tmp_path / "x" / ".." / "page.html")


def test_a_broken_input_leaves_the_old_page_alone(build, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    good = build.write_json(tmp_path / "check.json", build.check())
    with pytest.raises(InputError):
        write_report(ReportConfig(inputs=(good, tmp_path / "absent.json"), out=page))
    assert page.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.json", "page.html"]
