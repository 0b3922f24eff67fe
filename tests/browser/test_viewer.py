"""The token viewer in a browser: what it shows of a store, by pointer, touch and keys."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from logitcask.engine.exchange.positions import positions
from logitcask.engine.report.page import page
from logitcask.engine.report.viewer import data as viewer_module
from logitcask.engine.report.viewer.data import viewer_data
from logitcask.engine.report.viewer.sources import Source
from logitcask.engine.report.viewer.texts import TokenTexts
from logitcask.engine.store import Store
from tests.browser.hostile import STRINGS
from tests.browser.reports import report, with_panels
from tests.engine.cached import Unit, make_graded_unit, make_store, make_unit

pytestmark = pytest.mark.needs("chromium")

TABLE = report().sections[1].panels[1:]
WORDS = [f"w{i}" for i in range(40)]


class Texts(TokenTexts):
    """Texts of a list in place of a tokenizer's."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__(digest="d")
        self.texts = texts

    def of(self, ids: Sequence[int]) -> list[tuple[str | None, str]]:
        return [
            ("", each.removeprefix("bytes ")) if each.startswith("bytes ") else (each, "")
            for each in (self.texts[i] for i in ids)
        ]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes a page with the viewer of a store; ids have these texts."""

    def make(*stores: Store, texts: Sequence[str] = WORDS, **options: object) -> str:
        monkeypatch.setattr(viewer_module, "token_texts", lambda *_: Texts(texts))
        sources = [
            Source(name=f"run {i}", store=s, snapshot=s.head()) for i, s in enumerate(stores)
        ]
        return page(replace(with_panels(*TABLE), viewer=viewer_data(sources, **options)))

    return make


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    units = [make_graded_unit(0), versioned(make_unit(0, lengths=[5, 5, 5, 5, 5, 5]), 3)]
    return make_store(tmp_path_factory.mktemp("store") / "s", units)


def versioned(unit: Unit, version: int) -> Unit:
    """Return later responses to the prompts of `make_unit`; the first token of each is the same."""
    versions = np.full(len(unit.rollouts.finish), version)
    rollouts = replace(unit.rollouts, version_start=versions, version_end=versions)
    return replace(unit, rollouts=replace(rollouts, reward=np.ones(len(versions), np.float32)))


def ready(opened):
    opened.wait_for_selector(".viewer[data-ready]")
    opened.set_default_timeout(5000)
    return opened


def of(store: Store, sequence: int) -> list[dict]:
    return [
        r for r in positions(store, rollouts="main", teacher="big") if r["sequence"] == sequence
    ]


def shown_lists(opened) -> list[dict[str, str]]:
    """Return text -> probability of each list of the details."""
    return opened.locator(".top").evaluate_all(
        """tables => tables.map(table => {
            const rows = [...table.querySelectorAll("tr:not(.rest)")];
            const text = row => row.querySelector(".entry-text").textContent;
            return Object.fromEntries(rows.map(row => [text(row), row.cells[1].textContent]));
        })"""
    )


def current(opened) -> tuple[str, str]:
    """Return the text of the chosen token, and the sentence about its place."""
    return tuple(opened.locator(".viewer-detail h3 > *").all_inner_texts())


def test_a_token_shows_the_numbers_and_lists_of_the_store(open_page, made, store, shoot) -> None:
    opened = ready(open_page(made(store) + "\n"))
    first = opened.locator(".responses > li").first
    number = int(first.get_attribute("title").split("response ")[1])
    rows = of(store, number)
    tokens = opened.locator(".tokens [role=option]")
    assert tokens.all_text_contents() == [f"w{row['token']}" for row in rows]
    worst = max(range(len(rows)), key=lambda i: rows[i]["reverse_kl"] or 0.0)
    tokens.nth(worst).click()
    row = rows[worst]
    shoot(opened, "viewer-light")
    assert current(opened) == (
        f"w{row['token']}",
        f" position {worst} of 0 to {len(rows) - 1}, id {row['token']}.",
    )
    values = opened.locator(".numbers-of-token").inner_text().split("\n")
    at = values.index("KL(p ‖ q)")
    assert values[at + 1] == f"{row['reverse_kl']:.3f} nats"
    p, q = shown_lists(opened)
    student = dict(zip(row["student_topk_ids"], row["student_topk_logprobs"], strict=True))
    student[row["token"]] = row["student_logprob"]
    assert student.keys() == {int(text[1:]) for text in p}
    for each, lp in student.items():
        assert float(p[f"w{each}"].removesuffix(" %")) == pytest.approx(
            100 * math.exp(lp), rel=5e-3
        )
    teacher = dict(zip(row["teacher_ids"], row["teacher_logprobs"], strict=True))
    assert len(q) > len(p)
    assert list(q)[:3] == [f"w{each}" for each in row["teacher_ids"][:3]]
    for text, value in q.items():
        lp = teacher.get(int(text[1:]), row["teacher_logprob"])
        expected = 100 * math.exp(lp)
        # Three digits at least, or thousandths of a percent.
        assert float(value.removesuffix(" %")) == pytest.approx(expected, rel=5e-3, abs=6e-3)
    tail = opened.locator(".top").first.locator(".rest td.number").last.inner_text()
    assert float(tail.removesuffix(" %")) == pytest.approx(
        100 * math.exp(row["student_log_tail"]), abs=0.02
    )
    pointer_and_keys(opened)


def pointer_and_keys(opened) -> None:
    """Choose tokens by the pointer, by arrows, by the keys of bad tokens and of responses."""
    tokens, box = opened.locator(".tokens [role=option]"), opened.locator(".tokens")
    tokens.nth(2).hover()
    assert current(opened)[1].startswith(" position 2 ")
    assert tokens.nth(2).inner_text() in opened.locator(".tip").inner_text()
    opened.mouse.move(2, 2)
    assert opened.locator(".tip").is_hidden()
    box.focus()
    last = tokens.count() - 1
    keys = [("Home", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("End", last), ("Home", 0)]
    for key, place in keys:
        opened.keyboard.press(key)
        assert current(opened)[1].startswith(f" position {place} ")
    active = box.get_attribute("aria-activedescendant")
    assert opened.locator(f"#{active}").inner_text() == tokens.nth(0).inner_text()
    assert tokens.nth(0).inner_text() in opened.locator("[role=status]").inner_text()
    bad = [i for i, each in enumerate(tokens.all()) if "bad" in each.get_attribute("class").split()]
    assert len(bad) > 1
    tokens.nth(0).dispatch_event("click")
    for place in [each for each in bad if each > 0]:
        opened.keyboard.press("n")
        assert current(opened)[1].startswith(f" position {place} ")
    title = opened.locator(".viewer-head h3").inner_text()
    opened.keyboard.press("j")
    assert opened.locator(".viewer-head h3").inner_text() != title
    opened.keyboard.press("k")
    assert opened.locator(".viewer-head h3").inner_text() == title
    opened.keyboard.press("?")
    assert opened.locator("dialog.keys").is_visible()
    opened.keyboard.press("Escape")
    assert opened.locator("dialog.keys").is_hidden()
    expect(opened).to_have_url(re.compile("#seq="))


def test_filters_and_orders_of_the_list(open_page, made, store) -> None:
    opened = ready(open_page(made(store)))
    items, count = opened.locator(".responses > li"), opened.locator(".viewer-side > .note")
    assert count.inner_text() == "11 of 11 responses"
    worst = [float(text.split("worst ")[1].split(" nats")[0]) for text in items.all_inner_texts()]
    assert worst == sorted(worst, reverse=True)
    opened.get_by_label("Order").select_option("shortest")
    lengths = [int(text.split(" tokens")[0].split(" ")[-1]) for text in items.all_inner_texts()]
    assert lengths == sorted(lengths)
    opened.locator(".filters summary").click()
    opened.get_by_label("Version of the student").select_option("3")
    assert count.inner_text() == "6 of 11 responses"
    opened.get_by_label("Version of the student").select_option("all")
    opened.get_by_label("Correctness").select_option("incorrect")
    texts = items.all_inner_texts()
    assert texts
    assert all("reward 0" in text for text in texts)
    opened.get_by_label("Correctness").select_option("all")
    row = of(store, 0)[0]
    opened.get_by_label("Search prompts and responses").fill(
        f"w{row['token']}w{of(store, 0)[1]['token']}"
    )
    assert [each.get_attribute("title")[-10:] for each in items.all()] == ["response 0"]
    opened.get_by_label("Search prompts and responses").fill("")
    new_data_keeps_the_choices(opened)


def new_data_keeps_the_choices(opened) -> None:
    """Start the viewer again in its place, as the live page does."""
    opened.get_by_label("Colour tokens by").select_option("entropy_gap")
    opened.get_by_label("Order").select_option("number")
    opened.locator(".responses > li").nth(3).click()
    opened.locator(".tokens [role=option]").nth(1).click()
    title, place = opened.locator(".viewer-head h3").inner_text(), current(opened)
    again = (
        """async () => { await startViewer(document.querySelector(".viewer"), report.viewer); }"""
    )
    opened.evaluate(again)
    assert opened.evaluate("document.activeElement.className") == "tokens short"
    assert opened.locator(".viewer-head h3").inner_text() == title
    assert current(opened) == place
    assert opened.get_by_label("Colour tokens by").input_value() == "entropy_gap"
    assert opened.get_by_label("Order").input_value() == "number"


def test_two_versions_side_by_side_are_aligned_until_they_part(
    open_page, made, store, shoot
) -> None:
    opened = ready(open_page(made(store)))
    opened.evaluate("location.hash = '#seq=0&pos=0'")
    expect(opened.locator(".viewer-head h3")).to_have_text(re.compile("response 0$"))
    choice = opened.get_by_label("Side by side with")
    other = choice.locator("option", has_text="version 3").first
    choice.select_option(other.get_attribute("value"))
    panes = [pane.locator("[role=option]") for pane in opened.locator(".pane").all()]
    ids = [pane.all_text_contents() for pane in panes]
    common = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    panes[0].nth(common).click()
    shoot(opened, "viewer-side-by-side")
    assert opened.locator(".top").count() == 4
    assert panes[1].nth(common).get_attribute("aria-selected") == "true"
    if common + 1 < len(ids[0]):
        panes[0].nth(common + 1).click()
        assert opened.locator(".top").count() == 2
        assert f"part at token {common}" in opened.locator(".viewer-detail").inner_text()


def test_hostile_tokens_stay_text(open_page, made, tmp_path) -> None:
    assert len(STRINGS) >= 30
    count = len(STRINGS)
    unit = make_unit(0, prompts=1, n=1, lengths=[count], vocab=count, student_k=4)
    tokens = replace(unit.rollouts, tokens=np.arange(count, dtype=np.uint32))
    student = replace(
        tokens.student, lp=unit.log_p[np.arange(count), np.arange(count)].astype(np.float32)
    )
    unit = replace(
        unit,
        rollouts=replace(
            tokens, student=student, prompts=(replace(tokens.prompts[0], id=STRINGS[2]),)
        ),
        scores=replace(
            unit.scores, lp=unit.log_q[np.arange(count), np.arange(count)].astype(np.float32)
        ),
    )
    opened = ready(open_page(made(make_store(tmp_path / "s", [unit]), texts=STRINGS)))
    spans = opened.locator(".tokens [role=option]")
    shown = spans.all_text_contents()
    expected = opened.evaluate("texts => texts.map(visible)", STRINGS)
    assert shown == expected
    hidden = "".join(chr(c) for c in (0, 8, 0x202E, 0x2028, 0x200B, 0xD800, 0xFEFF))
    assert opened.evaluate("visible", "a\0\x08\u202e\u2028\u200b\ufeff\u0301") == (
        "a␀␈⟨U+202E⟩⟨U+2028⟩⟨U+200B⟩⟨U+FEFF⟩\u0301"
    )
    assert not [text for text in shown if any(each in text for each in hidden)]
    assert STRINGS[2] in opened.locator(".viewer-head h3").inner_text()
    box = opened.locator(".tokens")
    box.focus()
    for _ in STRINGS:
        opened.keyboard.press("ArrowRight")
    made_of = "document.querySelectorAll('#tokens :is(script, img, svg, iframe)').length"
    assert opened.evaluate(made_of) == 0
    assert opened.evaluate("window.pwned") is None


def test_rollouts_without_scores_and_parts_of_characters(open_page, made, store, tmp_path) -> None:
    unit = make_unit(0, prompts=1, n=1, lengths=[3])
    rollouts = replace(unit.rollouts, tokens=np.arange(3, dtype=np.uint32), student=None)
    bare = make_store(tmp_path / "s", [replace(unit, rollouts=rollouts)], scored=0)
    opened = ready(open_page(made(bare, texts=["a", "bytes F0 9F", "bytes 98 80", *WORDS])))
    tokens = opened.locator(".tokens [role=option]")
    assert tokens.all_text_contents() == ["a", "⟨F0 9F⟩", "⟨98 80⟩"]
    tokens.nth(2).click()
    assert current(opened)[1].endswith("A part of the bytes of 😀.")
    assert "no scores yet" in opened.locator(".viewer-legend").inner_text()
    assert "No teacher scored this response." in opened.locator(".viewer-detail").inner_text()
    # The lists of a teacher that has no rows of the responses before.
    listed = make_store(tmp_path / "listed", [make_unit(0, lengths=[3] * 6)], scored=0)
    sources = [Source(name="run", store=each, snapshot=each.head()) for each in (listed, store)]
    found = opened.evaluate(QS, viewer_data(sources))
    assert len(found) == 11
    for number, entries in found:
        row = of(store, number)[0]
        teacher = dict(zip(row["teacher_ids"], row["teacher_logprobs"], strict=True))
        teacher[row["token"]] = row["teacher_logprob"]
        assert len(entries) > 4
        for each, q in entries:
            assert q == pytest.approx(math.exp(teacher[each]), rel=5e-3)


QS = """async viewer => {
    const model = await unpackViewer(viewer);
    const entries = each => model.lists(each, 0, 0).entries.filter(found => found.q !== null);
    return model.sequences.filter(each => each.source === 1)
        .map(each => [each.number, entries(each).map(found => [found.token.id, found.q])]);
}"""


def test_themes_and_narrow_windows_can_be_read_by_all(open_page, made, store, shoot) -> None:
    opened = ready(open_page(made(store)))
    opened.locator(".filters summary").click()
    opened.locator(".tokens [role=option]").nth(1).click()
    for theme, measure in (("light", "reverse_kl"), ("dark", "advantage")):
        opened.emulate_media(color_scheme=theme)
        opened.get_by_label("Colour tokens by").select_option(measure)
        shoot(opened, f"viewer-{theme}")
        found = Axe().run(opened, context="#tokens").response["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert not serious, json.dumps(serious, indent=1)[:3000]
    opened.locator(".filters summary").click()
    opened.set_viewport_size({"width": 360, "height": 740})
    opened.locator(".tokens [role=option]").nth(1).click()
    shoot(opened, "viewer-narrow")
    assert opened.evaluate("document.documentElement.scrollWidth") == 360
    assert opened.locator(".viewer-detail").bounding_box()["y"] < 740


def test_ten_thousand_tokens_scroll_smoothly(open_page, made, tmp_path) -> None:
    unit = make_unit(0, prompts=1, n=1, lengths=[10_000])
    opened = ready(open_page(made(make_store(tmp_path / "s", [unit]))))
    assert opened.locator(".tokens [role=option]").count() == 10_000
    frames = opened.evaluate(SCROLL)
    print(f"median frame {np.median(frames['times']):.1f} ms of {len(frames['times'])}")
    assert frames["long"] == []
    assert frames["end"] > 1000


SCROLL = """async () => {
    const box = document.querySelector(".pane-body"), long = [], times = [];
    const keep = list => long.push(...list.getEntries().map(e => e.duration).filter(d => d > 200));
    new PerformanceObserver(keep).observe({ entryTypes: ["longtask"] });
    let last = performance.now();
    const frame = () => new Promise(done => requestAnimationFrame(done));
    for (let i = 0; i < 60; i++) {
        box.scrollTop += 400;
        await frame();
        times.push(performance.now() - last);
        last = performance.now();
    }
    await new Promise(done => setTimeout(done, 50));
    return { long, times, end: box.scrollTop };
}"""
