"""Every kind of page, opened and clicked through in a real browser: nothing fails, nothing is fetched.

The records are those that the commands wrote on the tiny target (tests/support/tiny_records.py).
"""

import json
import re
from pathlib import Path

import pytest

from dflash_jax.report import ReportConfig, write_report
from dflash_jax.report.records import read_records
from support import browser as browsing

pytestmark = [pytest.mark.slow, browsing.needs_chromium]

RECORDS = Path(__file__).parent / "records"
KINDS = {
    "check": ("check.json",),
    "seen": ("check-seen.json",),
    "comparison": ("comparison.json",),
    "parity-holds": ("parity-holds.json",),
    "parity-broken": ("parity-broken.json",),
    "many": ("check.json", "check-seen.json", "comparison.json", "parity-holds.json"),
    "run": ("run",),
    "decode": ("decode.json", "decoded.jsonl"),
    "bfloat16": ("../smollm2/decode-bfloat16.json",),
    "mix": ("parity-broken.json", "check.json", "check-seen.json", "decode.json", "decoded.jsonl", "run"),
}
PHONE = {"width": 390, "height": 844}
DARK, LIGHT = "rgb(15, 19, 24)", "rgb(246, 247, 249)"
INK = {DARK: "rgb(230, 233, 237)", LIGHT: "rgb(27, 31, 36)"}
GROUND = "getComputedStyle(document.body).backgroundColor"
TICK = "getComputedStyle(document.querySelector('.plot[data-drawn] .xtick text')).fill"
READ = "navigator.clipboard.readText()"


@pytest.fixture(scope="module")
def browser():
    with browsing.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for kind, names in KINDS.items():
        inputs = tuple(RECORDS / name for name in names)
        write_report(ReportConfig(inputs=inputs, out=folder / f"{kind}.html"))
        write_report(ReportConfig(inputs=inputs, out=folder / f"{kind}.md", format="md"))
    return folder


def _sound(visit):
    """Neither a complaint nor a request has come up."""
    assert visit.complaints == []
    assert visit.foreign_requests() == []


def _all_drawn(page):
    """Every figure that can be seen holds a drawing."""
    page.wait_for_function(
        "[...document.querySelectorAll('.plot')].every(p => !p.offsetWidth || p.querySelector('.main-svg'))"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_button_tab_and_toggle_works(browser, pages, kind):
    with browsing.visit(browser, pages / f"{kind}.html") as visit:
        page = visit.page
        _all_drawn(page)
        for tab in page.get_by_role("tab").all():
            tab.click()
            assert tab.get_attribute("aria-selected") == "true"
            assert page.locator(f"#{tab.get_attribute('aria-controls')}").is_visible()
            # Of each list one panel is open.
            lists, panels = page.get_by_role("tablist").count(), page.locator("[role=tabpanel]:visible").count()
            assert lists == panels
            _all_drawn(page)
        assert page.locator(".plot[data-drawn]").count() == page.locator(".plot").count()
        for summary in page.locator("details > summary").all():
            if summary.is_visible():
                before = summary.evaluate("s => s.parentElement.open")
                summary.click()
                assert summary.evaluate("s => s.parentElement.open") is not before
        for button in page.locator("button.copy:visible").all():
            wanted = button.get_attribute("data-markdown")
            button.click()
            page.wait_for_function(f"async text => (await {READ}) === text", arg=wanted)
        for link in page.get_by_role("navigation").get_by_role("link").all():
            link.click()
            target = page.locator(str(link.get_attribute("href")))
            assert target.evaluate("s => s.getBoundingClientRect().top < innerHeight")
        _sound(visit)


@pytest.mark.parametrize("kind", ["comparison", "mix"])
def test_the_whole_report_is_copied_as_the_command_prints_it(browser, pages, kind):
    with browsing.visit(browser, pages / f"{kind}.html") as visit:
        visit.page.get_by_role("button", name="Copy the whole report").click()
        wanted = (pages / f"{kind}.md").read_text(encoding="utf-8")
        visit.page.wait_for_function(f"async text => (await {READ}) === text", arg=wanted)
        visit.page.get_by_role("status").filter(has_text="Copied").wait_for(state="attached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch(browser, pages, scheme):
    system, other = (DARK, LIGHT) if scheme == "dark" else (LIGHT, DARK)
    with browsing.visit(browser, pages / "mix.html", color_scheme=scheme) as visit:
        page = visit.page
        _all_drawn(page)
        for name, ground in (("Auto", system), ("Light", LIGHT), ("Dark", DARK), ("Auto", system)):
            page.get_by_role("button", name=name, exact=True).click()
            pressed = page.locator(".themes [aria-pressed=true]")
            assert pressed.inner_text() == name
            assert page.evaluate(GROUND) == ground
            page.wait_for_function(f"ink => {TICK} === ink", arg=INK[ground])
        page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
        page.wait_for_function(f"ink => {TICK} === ink", arg=INK[other])
        _sound(visit)


@pytest.mark.parametrize("kind", ["comparison", "seen", "many", "mix"])
def test_a_phone_shows_it_without_scrolling_aside(browser, pages, kind):
    with browsing.visit(browser, pages / f"{kind}.html", viewport=PHONE, has_touch=True) as visit:
        _all_drawn(visit.page)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        for name in ("Light", "Dark"):
            box = visit.page.get_by_role("button", name=name, exact=True).bounding_box()
            assert box is not None
            assert box["height"] >= 32
        _sound(visit)


def test_a_hover_shows_the_records_value_and_interval(browser, pages):
    check = read_records([RECORDS / "check.json"]).checks[0]
    unseen = check.unseen
    assert unseen is not None
    assert unseen.accept_len_ci95 is not None
    with browsing.visit(browser, pages / "check.html") as visit:
        page = visit.page
        _all_drawn(page)
        page.locator("#figure-groups").scroll_into_view_if_needed()
        box = page.locator("#figure-groups .point path").first.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
        hover = page.locator("#figure-groups .hoverlayer .hovertext").first
        hover.wait_for()
        text = " ".join((hover.text_content() or "").split())
        low, high = unseen.accept_len_ci95.low, unseen.accept_len_ci95.high
        assert f"{unseen.accept_len_mean:.3f} (95 % {low:.3f} to {high:.3f})" in text
        assert f"{unseen.num_anchors:,} anchors of {unseen.num_prompts} prompts" in text
        _sound(visit)


def test_a_hover_shows_held_out_tau_at_the_best_step(browser, pages):
    best = read_records([RECORDS / "run"]).runs[0].best
    assert best is not None
    assert best.tau_ci95 is not None
    with browsing.visit(browser, pages / "run.html") as visit:
        page = visit.page
        _all_drawn(page)
        page.locator("#figure-held-out").scroll_into_view_if_needed()
        star = page.locator("#figure-held-out .scatterlayer .trace").nth(1).locator(".point").bounding_box()
        assert star is not None
        page.mouse.move(star["x"] + star["width"] / 2, star["y"] + star["height"] / 2, steps=4)
        hover = page.locator("#figure-held-out .hoverlayer .hovertext").first
        hover.wait_for()
        text = " ".join((hover.text_content() or "").split())
        low, high = best.tau_ci95.low, best.tau_ci95.high
        assert f"step {best.step}: tau {best.tau_micro:.3f} (95 % {low:.3f} to {high:.3f})" in text
        assert f"{best.num_prompts} prompts" in text
        _sound(visit)


def test_tabs_and_buttons_work_from_the_keyboard(browser, pages):
    with browsing.visit(browser, pages / "check.html") as visit:
        page = visit.page
        # From the top of the page, every button can be reached: of a list of tabs the chosen one.
        reached = []
        for _ in range(page.locator("button, a, summary, [tabindex]").count()):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.outerHTML.slice(0, 200)"))
        for button in page.locator("button:visible:not([tabindex='-1'])").all():
            assert button.evaluate("button => button.outerHTML.slice(0, 200)") in reached
        tabs = page.get_by_role("tab")
        tabs.first.focus()
        last = tabs.count() - 1
        for key, place in (("ArrowRight", 1), ("End", last), ("ArrowRight", 0), ("ArrowLeft", last), ("Home", 0)):
            page.keyboard.press(key)
            assert tabs.nth(place).get_attribute("aria-selected") == "true"
            assert tabs.nth(place).evaluate("tab => tab === document.activeElement")
        _sound(visit)


def test_a_figure_is_saved_as_a_picture(browser, pages, tmp_path):
    with browsing.visit(browser, pages / "parity-broken.html", accept_downloads=True) as visit:
        _all_drawn(visit.page)
        with visit.page.expect_download() as download:
            visit.page.get_by_role("button", name="Save the figure as PNG: Drift").click()
        download.value.save_as(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        assert download.value.suggested_filename == "Drift-of-the-numerics.png"
        _sound(visit)


def test_paper_shows_what_tabs_hide(browser, pages):
    with browsing.visit(browser, pages / "check.html", color_scheme="dark") as visit:
        page = visit.page
        _all_drawn(page)
        hidden = page.locator("[role=tabpanel].closed")
        assert not hidden.first.is_visible()
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert hidden.first.is_visible()
        _all_drawn(page)
        assert page.locator(".plot[data-drawn]").count() == page.locator(".plot").count()
        page.wait_for_function(f"ink => {TICK} === ink", arg=INK[LIGHT])  # black on white, whatever the screen is
        assert not page.get_by_role("button", name="Copy the whole report").is_visible()
        assert len(page.pdf()) > 20_000
        page.emulate_media(media="screen")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert not hidden.first.is_visible()
        _sound(visit)


def test_the_warning_of_seen_prompts_is_seen_first(browser, pages):
    for viewport in ({"width": 1280, "height": 800}, PHONE):
        with browsing.visit(browser, pages / "seen.html", viewport=viewport) as visit:
            alarm = visit.page.get_by_role("alert")
            assert "Only prompts the drafter was trained on were measured" in (alarm.text_content() or "")
            box = alarm.bounding_box()
            assert box is not None
            assert box["y"] + box["height"] < viewport["height"]  # without scrolling
            assert box["width"] > 0.85 * viewport["width"]
            above = visit.page.evaluate("document.querySelector('.alarm').getBoundingClientRect().top")
            assert above < visit.page.evaluate("document.querySelector('#verdict').getBoundingClientRect().top")
    with browsing.visit(browser, pages / "check.html") as visit:
        assert visit.page.get_by_role("alert").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ten_records_of_seen_prompts_have_one_box_that_names_them(browser, tmp_path, scheme):
    document = json.loads((RECORDS / "check-seen.json").read_text(encoding="utf-8"))
    paths = [tmp_path / f"{place}.json" for place in range(10)]
    for place, path in enumerate(paths):
        path.write_text(json.dumps(document | {"drafter": f"runs/run-{place}"}), encoding="utf-8")
    write_report(ReportConfig(inputs=(*paths, RECORDS / "check.json"), out=tmp_path / "page.html"))
    for viewport in ({"width": 1280, "height": 800}, PHONE):
        with browsing.visit(browser, tmp_path / "page.html", viewport=viewport, color_scheme=scheme) as visit:
            page = visit.page
            _all_drawn(page)
            alarm = page.get_by_role("alert")  # the locator is strict: a second box would fail
            assert "in 10 of 11 checks" in (alarm.text_content() or "")
            named = alarm.get_by_role("listitem").all_inner_texts()
            assert named == [f"check of {'ABCDEFGHIJ'[place]}) runs/run-{place} (10 prompts)" for place in range(10)]
            box = alarm.bounding_box()
            assert box is not None
            assert box["y"] < 0.3 * viewport["height"]
            assert box["width"] > 0.85 * viewport["width"]
            # on a screen all of it is seen without scrolling, on a phone its headline and what it means
            seen = box if viewport is not PHONE else alarm.locator("p").bounding_box()
            assert seen is not None
            assert seen["y"] + seen["height"] < viewport["height"]
            assert page.locator(".flag:visible").count() == 10
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
            _sound(visit)


def test_the_clipboards_old_way_works_where_the_new_one_is_refused(browser, pages):
    with browsing.visit(browser, pages / "run.html") as visit:
        page = visit.page
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('refused')); }")
        button = page.locator(".table button.copy").first
        wanted = button.get_attribute("data-markdown")
        button.click()
        page.wait_for_function(f"async text => (await {READ}) === text", arg=wanted)
        _sound(visit)


def test_without_scripts_every_number_is_still_there(browser, pages):
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto((pages / "check.html").as_uri())
    # The parser of a browser that is only told to run nothing still leaves <noscript> closed: its text is looked for.
    assert "The figures need JavaScript" in page.content()
    assert page.locator("table:visible").count() == page.locator("table").count() >= 4
    assert page.locator("button:visible").count() == 0
    context.close()


EVIL = "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
EVIL += " `a` [b](javascript:c) | d"


def test_records_run_no_script_and_ask_for_nothing(browser, build, tmp_path):
    check = build.write_json(
        tmp_path / "check.json", build.check(drafter=EVIL, cache=EVIL, warnings=[EVIL], note={EVIL: EVIL})
    )
    details = build.write_jsonl(
        tmp_path / "d.jsonl", [build.detail(0, id=EVIL, prompt=EVIL, pieces=[EVIL, EVIL], accepted=[1])]
    )
    run = build.write_run(tmp_path / "<img src=x onerror=alert(1)>", count=2)
    parity = build.write_json(tmp_path / "parity.json", build.parity(drafter=EVIL, cause=EVIL, notes=[EVIL]))
    write_report(ReportConfig(inputs=(check, parity, details, run), out=tmp_path / "page.html", title=EVIL))
    with browsing.visit(browser, tmp_path / "page.html") as visit:
        _all_drawn(visit.page)
        for tab in visit.page.get_by_role("tab").all():
            tab.click()
            _all_drawn(visit.page)
        assert visit.page.title() == re.sub(r"\s+", " ", EVIL)
        assert visit.page.locator("img").count() == 0
        assert visit.page.locator("a:not([href^='#'])").count() == 0
        _sound(visit)
