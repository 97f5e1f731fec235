"""The page as a file: complete, self-contained, and deaf to markup in the records."""

import base64
import gzip
import hashlib
import html.parser
import json
import re

import plotly.offline
import pytest

from dflash_jax.report import ReportConfig, write_report
from dflash_jax.report.artefacts import describe, elide
from dflash_jax.report.check_figures import offset_figures, survival_figure
from dflash_jax.report.figures import MAX_POINTS, thin
from dflash_jax.report.page import _with_code
from dflash_jax.report.records import read_records

EVIL = "</script><img src=x onerror=\"document.title='pwned'\"><b>&amp;\u2028'"


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.visible, self._in = [], [], "", None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag):
        del tag
        self._in = None

    def handle_data(self, data):
        if self._in == "script":
            self.scripts.append((self.tags[-1][1].get("type"), data))
        elif self._in != "style":
            self.visible += data

    @property
    def policy(self):
        [policy] = [a["content"] for _, a in self.tags if a.get("http-equiv") == "Content-Security-Policy"]
        return policy

    @property
    def drawn(self):
        """The page but for plotly's own code, packed, and ours."""
        return [text for kind, text in self.scripts if kind == "application/json"]

    @property
    def plotly(self):
        """The code of plotly as a browser unpacks it; None where the page has none."""
        packed = [text for kind, text in self.scripts if kind == "application/gzip"]
        return gzip.decompress(base64.b64decode(packed[0])).decode() if packed else None

    @property
    def plots(self):
        return [json.loads(text) for kind, text in self.scripts if kind == "application/json"]


def _write(tmp_path, *inputs, title=None):
    result = write_report(ReportConfig(inputs=inputs, out=tmp_path / "out" / "page.html", title=title))
    text = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert result["report"] == str(tmp_path / "out" / "page.html")
    assert result["bytes"] == len(text.encode())
    return result["sections"], Page(text)


def _all_inputs(build, folder):
    check = build.write_json(folder / "check.json", build.check(seen=build.bucket(1.3, anchors=900, prompts=9)))
    decode = build.write_json(folder / "decode.json", build.decode())
    details = build.write_jsonl(folder / "details.jsonl", [build.detail(number) for number in range(30)])
    return check, decode, details, build.write_run(folder / "run")


@pytest.fixture(scope="module")
def full(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    return _write(folder, *_all_inputs(build, folder))


def test_every_section_is_there_and_linked(full):
    sections, page = full
    assert sections == ["verdict", "check", "training", "decode", "samples", "run", "words"]
    ids = {attributes["id"] for tag, attributes in page.tags if tag == "section"}
    links = {attributes["href"].removeprefix("#") for tag, attributes in page.tags if tag == "a"}
    assert ids == links == set(sections)
    assert "24 of 30 prompts" in page.visible
    assert "dflash-jax train --out 'my run'" in page.visible


def test_nothing_is_fetched_and_only_our_scripts_may_run(full):
    _, page = full
    for tag, attributes in page.tags:
        addresses = [attributes[name] for name in ("src", "href", "data", "action", "poster") if name in attributes]
        assert all(address.startswith(("#", "data:")) for address in addresses), (tag, attributes)
    policy = page.policy
    [script] = [text for kind, text in page.scripts if kind is None]
    assert page.plotly == plotly.offline.get_plotlyjs()
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (page.plotly, script)]
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == set(digests)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


def test_figures_hold_the_records_numbers(full, build, tmp_path):
    _, page = full
    check = read_records([build.write_json(tmp_path / "check.json", build.check())]).checks[0]
    offsets, differences = offset_figures([check])
    assert [plot["layout"]["xaxis"]["title"]["text"] for plot in page.plots] == [
        "prompts",
        "prompts",
        "position_offset (ctx_pos_start)",
        "position_offset (ctx_pos_start)",
        "slot of the block",
        "step",
        "step",
        "tokens committed by one target pass",
    ]
    assert offsets.plot == page.plots[2]
    [points] = offsets.plot["data"]
    assert points["x"] == ["0", "4,096", "65,536", "131,072"]
    assert points["error_y"]["array"] == pytest.approx([0.04] * 4)
    assert points["error_y"]["arrayminus"] == pytest.approx([0.04] * 4)
    assert differences.plot["data"][0]["y"] == [-0.0001, 0.00095, -0.00055]
    buttons = [attributes["data-markdown"] for _, attributes in page.tags if "data-markdown" in attributes]
    assert "\n| 4096 | 164 | 15,744 | 0.550 [0.510, 0.590] | 0.161 | +0.000 [-0.001, +0.001] |" in "".join(buttons)
    survival = survival_figure([check])
    assert survival is not None
    assert [trace["name"] for trace in survival.plot["data"]] == [
        "held-out, all anchors",
        "held-out, chain",
        "untrained, all anchors",
        "untrained, chain",
    ]
    assert survival.plot["data"][0]["y"] == list(check.main.survival or ())
    # Colours are roles for the page's script: a colour fixed here would not follow the scheme.
    assert all("color" not in json.dumps(trace | {"meta": None}) for plot in page.plots for trace in plot["data"])


def test_markup_in_records_stays_text(full, build, tmp_path):
    check = build.write_json(tmp_path / "check.json", build.check(drafter=EVIL, cache=EVIL, note={EVIL: [EVIL]}))
    decode = build.write_json(tmp_path / "decode.json", build.decode(drafter=EVIL))
    row = build.detail(0, id=EVIL, prompt=EVIL, pieces=[EVIL, EVIL, "\n"], accepted=[2])
    details = build.write_jsonl(tmp_path / "details.jsonl", [row])
    run = build.write_run(tmp_path / "<img src=x onerror=alert(1)>", count=2)
    build.write_json(run / "config.json", {EVIL: EVIL, "nested": {"a": {"b": EVIL}}})
    _, page = _write(tmp_path, check, decode, details, run, title=EVIL)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in full[1].tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.visible.count(EVIL) >= 8  # title twice, labels, id, prompt, both pieces, config
    # Plotly reads a few tags in its labels, so names are escaped for it once more.
    assert all("<img" not in json.dumps(trace.get("name", "")) for plot in page.plots for trace in plot["data"])


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("check", ["verdict", "check", "run", "words"]),
        ("decode", ["verdict", "decode", "words"]),
        ("details", ["decode", "samples", "words"]),
        ("run", ["verdict", "training", "run", "words"]),
    ],
)
def test_absent_inputs_leave_their_sections_out(build, tmp_path, kind, wanted):
    inputs = dict(zip(("check", "decode", "details", "run"), _all_inputs(build, tmp_path), strict=True))
    assert _write(tmp_path, inputs[kind])[0] == wanted


def test_the_least_that_a_check_may_hold(build, tmp_path):
    least = {"accept_len_mean": 0.5, "token_acc_mean": 0.25, "num_anchors": 4, "block_size": 4, "by_ctx_pos_start": {}}
    sections, page = _write(tmp_path, build.write_json(tmp_path / "check.json", least))
    assert sections == ["verdict", "check", "words"]
    assert len(page.plots) == 1  # accept_len of all prompts, without an interval
    row = build.detail(0, pieces=["only"], accepted=[], tau=None)
    sections, page = _write(tmp_path, build.write_jsonl(tmp_path / "details.jsonl", [row]))
    assert sections == ["samples", "words"]
    assert [kind for kind, _ in page.scripts] == [None]  # no plotly where nothing is plotted
    assert page.policy.count("sha256-") == 1


def test_text_samples_mark_who_wrote_each_token(build, tmp_path):
    row = build.detail(0, pieces=["zero", "one", "two", "\n", "four"], accepted=[3, 1], tokens_equal=False, tau=2.0)
    _, page = _write(tmp_path, build.write_jsonl(tmp_path / "details.jsonl", [row]))
    spans = [attributes.get("class") for tag, attributes in page.tags if tag == "span" and attributes]
    start = spans.index("block even", spans.index("p") + 1)  # past the legend
    assert spans[start:] == ["block even", "p", "block odd", "d", "d", "t", "nl", "block even", "t"]
    assert "DIFFERS from plain decoding" in page.visible
    titles = [attributes["title"] for _, attributes in page.tags if "title" in attributes]
    assert titles[1] == "block 1: 3 tokens committed = 2 drafted + 1 target's own"


def test_a_diverged_run_is_drawn_with_a_gap(build, tmp_path):
    run = build.write_run(tmp_path / "run", count=4)
    rows = build.metrics(4)
    rows[1] |= {"loss": float("nan"), "grad_norm": float("inf")}
    build.write_jsonl(run / "metrics.jsonl", rows)
    _, page = _write(tmp_path, run)
    assert page.plots[0]["data"][0]["y"][1] is None
    assert "NaN" not in "".join(page.drawn)


def test_long_curves_and_lists_are_thinned_and_say_so():
    assert thin(3) == [0, 1, 2]
    places = thin(100_001)
    assert len(places) <= MAX_POINTS + 1
    assert (places[0], places[-1]) == (0, 100_000)
    assert elide({"hashes": list(range(4000))})["hashes"][-2:] == [11, "… 4,000 items in all"]
    record = {"argv": ["a", "b c"], "seed": None, "config": {"x": 1}, "hashes": list(range(99)), "text": "long\n" * 99}
    artefact = describe("t", record)
    assert artefact.facts == {"command line": "a 'b c'", "seed": "–"}
    assert list(artefact.documents) == ["config", "hashes", "text"]
    assert artefact.documents["text"].startswith("long\nlong")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("*holds* says little", "<em>holds</em> says little"),
        ("`a*b*c` and 2*x*3, **no**", "<code>a*b*c</code> and 2*x*3, **no**"),
        ("one ` mark, *<b>*", "one ` mark, *&lt;b&gt;*"),
    ],
)
def test_sentences_show_code_and_stress(text, shown):
    assert _with_code(text) == shown
