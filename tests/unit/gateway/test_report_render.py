import base64
import hashlib
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.report import render as page
from services.gateway.report.model import SIGNIFICANT, Chance, Cover, Picture, ReportData, TagScore
from services.gateway.report.render import _q_value, render
from shared.errors import InvalidInput
from shared.schema import Task
from tests.unit.gateway.report_sample import sample

VOID = {"meta", "img", "input", "col", "br", "link", "hr"}


class Page(HTMLParser):
    """Reads a page and fails where an element is not closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[dict[str, str]] = []
        self.items: list[str] = []  # the text of each list item
        self.places: list[str] = []  # the text of each row of the families
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._open: list[str] = []
        self._families = False
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        assert len(found) == len(attributes), f"<{tag}> says an attribute twice"
        self.elements.append((tag, found))
        if tag == "tr" and "data-rank" in found:
            self.rows.append(found)
        if tag == "li":
            self.items.append("")
        if tag == "table":
            self._families = "families" in found.get("class", "")
        if tag == "tr" and self._families:
            self.places.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            (self.scripts if self._open[-1] == "script" else self.styles).append(data)
            return
        if "li" in self._open:
            self.items[-1] += data
        if "tr" in self._open and self._families:
            self.places[-1] += data
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.elements if "id" in a]


@pytest.fixture(scope="module")
def data() -> ReportData:
    return sample()


@pytest.fixture(scope="module")
def html(data: ReportData) -> str:
    return render(data)


def test_it_is_well_formed_and_its_links_lead_somewhere(html: str) -> None:
    read = Page(html)
    ids = read.ids()
    assert len(set(ids)) == len(ids)
    for tag, attributes in read.elements:
        if tag == "a":
            assert attributes["href"].removeprefix("#") in ids
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
        if tag == "img":
            assert attributes["alt"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")


def test_it_loads_nothing_and_runs_only_its_own_script(html: str) -> None:
    read = Page(html)
    for tag, attributes in read.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not any(name.startswith("on") or name in ("srcset", "action", "background") for name in attributes)
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/")
        if "href" in attributes:
            assert attributes["href"].startswith("#")
        assert "url(" not in attributes.get("style", "")
    css = "".join(read.styles)
    assert "url(" not in css
    assert "@import" not in css
    policy = next(a["content"] for _, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256("".join(read.scripts).encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_error_slices_stand_in_the_order_they_come_in(data: ReportData, html: str) -> None:
    assert [int(row["data-rank"]) for row in Page(html).rows] == [s.rank for s in data.error_slices]
    turned = Page(render(replace(data, error_slices=data.error_slices[::-1]))).rows
    assert [int(row["data-rank"]) for row in turned] == [s.rank for s in data.error_slices[::-1]]
    assert [int(row["data-place"]) for row in turned] == list(range(1, len(turned) + 1))


def test_it_shows_the_numbers(data: ReportData, html: str) -> None:
    words = Page(html).words
    worst = data.error_slices[0]
    for shown in (
        "81.3%",
        "5,000 images",
        f"{100 * worst.mean:.1f}%",
        f"−{100 * worst.drop:.1f} pts",
        f"95% interval {100 * worst.interval[0]:.1f}% to {100 * worst.interval[1]:.1f}%",
        f"{100 * worst.error_share:.1f}%",
        worst.pictures[0].caption,
        "924 slices lie more than 20 points below the whole; "
        "shuffled scores name about 12 (95%: 4 to 20); 640 hold at q ≤ 0.05.",
        "These 12 slices hold 95% of all errors in 42% of the images. ",
        "3 slices hold 50%; 40 slices hold 90%; all 689 families together hold 93%.",
        "677 more families are left out",
        "864 more error slices are left out",
        "104 more predicted slices are left out",
        "19 more slices with picks are left out",
        "500 of 6,000 pool images were picked (budget 500)",
        "+0.9 pts",
        "sha256:3d1c9a7be0f24c51",
        "2026-02-03 14:05 UTC",
    ):
        assert shown in words


def test_scores_other_than_accuracy_are_not_percentages(data: ReportData) -> None:
    words = Page(render(replace(data, task=Task.DETECTION))).words
    assert "IoU is 0.813 over 5,000 objects" in words
    assert "below the whole" in words
    assert "pts" not in words


@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
    st.text(st.characters(exclude_categories=["Cs", "Cc"])),
)
def test_text_comes_out_as_it_went_in(attribute: str, tag: str) -> None:
    data = BASE
    hostile = replace(data.error_slices[0], pairs=((attribute, tag),), pictures=())
    data = replace(data, error_slices=(hostile,), cover=NO_COVER, predicted_slices=(), repair=None)
    assert Page(render(data)).items == [f"{attribute} {tag}"]
    two = replace(hostile, pairs=((attribute, tag), ("size", "small")), drop=0.4, blame=(0.28, 0.12))
    assert Page(render(replace(data, error_slices=(two,)))).items == [f"{attribute} {tag} −28", "size small −12"]


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "</style></script><img src=x onerror=alert(1)>",
        '" onmouseover="alert(1)" x=\'',
        "{{ 7 * 7 }}{% raw %}",
        "--><!--",
        "javascript:alert(1)",
    ],
)
def test_hostile_text_is_text_wherever_it_stands(data: ReportData, hostile: str) -> None:
    def spoil(value: object) -> object:
        if isinstance(value, str):
            return hostile
        if isinstance(value, tuple):
            return tuple(spoil(v) for v in value)
        if isinstance(value, dict):
            return {hostile: hostile}
        if hasattr(value, "__dataclass_fields__"):
            return replace(value, **{k: spoil(v) for k, v in vars(value).items() if k != "task"})  # type: ignore[type-var]
        return value

    spoiled = Page(render(spoil(data)))  # type: ignore[arg-type]
    names = {name for _, attributes in spoiled.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert len(spoiled.scripts) == 1
    assert all(a["src"].startswith("data:image/") for tag, a in spoiled.elements if tag == "img")
    # Attributes merge under one name, so the tag tables differ; everything else keeps its number of elements.
    clean = Page(render(data))
    for tag in ("script", "style", "img", "figure", "section", "nav", "a", "li", "meta"):
        assert sum(t == tag for t, _ in spoiled.elements) == sum(t == tag for t, _ in clean.elements)
    assert hostile in "".join(spoiled.text)


def test_the_page_is_bounded_and_says_what_it_leaves_out() -> None:
    data = sample(slices=260)
    png = data.error_slices[0].pictures[0].data
    heavy = (Picture(png + bytes(10_000), "a → b"),) * 30
    many = replace(
        data,
        error_slices=tuple(replace(s, pictures=heavy) for s in data.error_slices),
        cover=replace(
            data.cover,
            families=tuple(replace(f, told_by=replace(f.told_by, pictures=heavy)) for f in data.cover.families) * 20,
        ),
        error_slice_total=1_000_000,
        tag_scores=tuple(TagScore(f"a{i}", f"t{j}", 10, j / 100) for i in range(72) for j in range(100)),
        predicted_slices=data.predicted_slices * 50,
    )
    html = render(many)
    read = Page(html)
    images = sum(tag == "img" for tag, _ in read.elements)
    assert len(read.rows) == page.MAX_SLICES
    assert len(read.places) == 1 + page.MAX_FAMILIES
    assert 0 < images * len(heavy[0].data) <= page.MAX_PICTURE_BYTES
    assert len(html) < 4 / 3 * page.MAX_PICTURE_BYTES + 2_000_000
    strips = images // page.MAX_PICTURES - page.MAX_FAMILIES
    assert f"Images of {page.MAX_SLICES - strips} slices are left out" in read.words
    assert f"{1_000_000 - page.MAX_SLICES:,} more error slices are left out" in read.words
    assert f"{72 - page.MAX_ATTRIBUTES} more attributes are left out" in read.words
    assert "80 better tags left out" in read.words
    assert f"{400 - page.MAX_PREDICTED} more predicted slices are left out" in read.words


def test_a_run_that_found_nothing_says_so(data: ReportData) -> None:
    empty = replace(
        data,
        error_slices=(),
        error_slice_total=0,
        significant_count=0,
        cover=NO_COVER,
        tag_scores=(),
        heatmaps=(),
        predicted_slices=(),
        predicted_slice_total=0,
        repair=None,
    )
    read = Page(render(empty))
    assert "no slice lies more than 20 points below it" in read.words
    assert "left out" not in read.words
    assert {"families", "tags", "together", "predicted", "repair"}.isdisjoint(read.ids())


def test_families_stand_in_the_order_of_the_cover(data: ReportData, html: str) -> None:
    places = Page(html).places[1:]
    assert len(places) == len(data.cover.families)
    before = 0.0
    for place, (text, family) in enumerate(zip(places, data.cover.families, strict=True), 1):
        words = " ".join(text.split())
        assert words.startswith(f"{place} ")
        assert f"rank {family.told_by.rank}" in words
        copies = family.member_count - 1
        assert ("near-cop" in words) == (copies > 0)
        assert f"stands for {copies} near-cop{'y' if copies == 1 else 'ies'}" in words or not copies
        assert f"{100 * family.error_share:.0f}% +{100 * (family.error_share - before):.1f}%" in words
        assert words.endswith(f"in {100 * family.instance_share:.0f}% of the images")
        before = family.error_share


def test_what_may_be_luck_is_marked(data: ReportData) -> None:
    by_q = {0.0004: "≤ 0.001", 0.0312: "0.032", SIGNIFICANT: "0.050", 0.0501: "0.051", 1.0: "1.000", None: "not tested"}
    slices = tuple(replace(s, q=q, pictures=()) for s, q in zip(data.error_slices, by_q, strict=False))
    read = Page(render(replace(data, error_slices=slices, cover=NO_COVER)))
    assert [row.get("class", "") for row in read.rows] == ["", "", "", "luck", "luck", "luck"]
    assert all(shown in read.words for shown in by_q.values())
    assert read.words.count("may be luck") == 1 + 3  # the legend says it too
    assert [float(row["data-q"]) for row in read.rows] == sorted(float(row["data-q"]) for row in read.rows)


@given(st.floats(0, 1))
def test_a_q_value_never_reads_as_lower_than_it_is(q: float) -> None:
    shown = float(_q_value(q).removeprefix("≤ "))
    assert q <= shown + 1e-9
    assert (shown <= SIGNIFICANT) == (q <= SIGNIFICANT) or math.isclose(q, SIGNIFICANT)


@pytest.mark.parametrize(
    ("by_chance", "significant", "said"),
    [
        (None, 640, "below the whole; 640 hold at"),
        (Chance(0.0, 0.0, 0.0), 1, "below the whole; shuffled scores name none; 1 holds at"),
        (Chance(0.45, 0.0, 2.5), 640, "shuffled scores name about 0.5 (95%: 0 to 3); 640 hold at"),
        (Chance(7513.2, 7207.9, 7888.1), 0, "about 7,513 (95%: 7,207 to 7,889); none holds at"),
    ],
)
def test_the_head_says_what_chance_would_name(
    data: ReportData, by_chance: Chance | None, significant: int, said: str
) -> None:
    html = render(replace(data, by_chance=by_chance, significant_count=significant))
    assert said in Page(html).words
    test_bars_stay_on_their_track(html)


def test_a_surest_slice_that_may_be_luck_is_called_so(data: ReportData) -> None:
    surest = replace(data.error_slices[0], q=0.2)
    assert "in the surest error slice, which may be luck." in Page(render(replace(data, error_slices=(surest,)))).words


def test_a_selection_without_outcomes_says_what_to_do(data: ReportData) -> None:
    assert data.repair
    read = Page(render(replace(data, repair=replace(data.repair, outcomes=()))))
    assert "Train on the picks" in read.words


def test_bars_stay_on_their_track(html: str) -> None:
    for left, width in re.findall(r"left:(-?[\d.]+)%;width:(-?[\d.]+)%", html):
        assert float(left) >= 0
        assert float(width) >= 0
        assert float(left) + float(width) <= 100.02


def test_a_picture_that_is_none_is_refused(data: ReportData) -> None:
    wrong = replace(data.error_slices[0], pictures=(Picture(b"<svg onload=alert(1)>", "Shirt → Coat"),))
    with pytest.raises(InvalidInput, match="Shirt → Coat"):
        render(replace(data, error_slices=(wrong,)))


NO_COVER = Cover((), 0, (), 0.0)
BASE = sample(slices=1)
