"""The report as one HTML string that loads nothing from anywhere.

The page is bounded whatever comes in: rows and pictures past the limits below are left out, and the page says how
many. All text is escaped by the template; a content security policy lets only the page's own script run and only
embedded images show.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import jinja2
from markupsafe import Markup

from services.gateway.report.model import SIGNIFICANT, ErrorSlice, Picture, ReportData, TagScore
from shared.errors import invalid
from shared.schema import Task

MAX_SLICES = 200
MAX_FAMILIES = 12
MAX_PICTURES = 6  # of one slice
MAX_PICTURE_BYTES = 6_000_000  # of the page, before base64
MAX_ATTRIBUTES = 24
MAX_TAGS = 20  # of one attribute
MAX_PREDICTED = 40
MAX_PICK_ROWS = 20

_HERE = Path(__file__).parent
_SCORE = {Task.CLASSIFICATION: "accuracy", Task.DETECTION: "IoU", Task.POSE: "OKS"}


@dataclass(frozen=True)
class _TagGroup:
    """The tags of one attribute, in the schema's order."""

    attribute: str
    tags: tuple[TagScore, ...]
    left_out: int


def render(data: ReportData) -> str:
    """The page. Raises InvalidInput when a picture is no PNG, JPEG or WebP file."""
    percent = data.task is Task.CLASSIFICATION
    slices = data.error_slices[:MAX_SLICES]
    predicted = sorted(data.predicted_slices, key=lambda s: s.rank)[:MAX_PREDICTED]
    picks = data.repair.by_slice[:MAX_PICK_ROWS] if data.repair else ()
    families = data.cover.families[:MAX_FAMILIES]
    pictures = _pictures([*(f.told_by for f in families), *slices])
    family_pictures, slice_pictures = pictures[: len(families)], pictures[len(families) :]
    groups = _tag_groups(data.tag_scores)
    script = (_HERE / "page.js").read_text("utf-8")
    return _template().render(
        data=data,
        slices=list(zip(slices, slice_pictures, strict=True)),
        families=list(zip(families, family_pictures, strict=True)),
        slices_left_out=max(data.error_slice_total, len(data.error_slices)) - len(slices),
        pictures_left_out=sum(bool(s.pictures) and not shown for s, shown in zip(slices, slice_pictures, strict=True)),
        families_left_out=max(data.cover.family_total - len(families), 0) if families else 0,
        significant=SIGNIFICANT,
        belief_axis=(0.0, max(1.0, data.error_slice_total, data.by_chance.high if data.by_chance else 0.0)),
        about=_about,
        q_value=_q_value,
        groups=groups[:MAX_ATTRIBUTES],
        groups_left_out=max(0, len(groups) - MAX_ATTRIBUTES),
        tag_axis=_axis([t.mean for g in groups for t in g.tags] + [data.overall_mean]),
        predicted=predicted,
        predicted_left_out=max(data.predicted_slice_total, len(data.predicted_slices)) - len(predicted),
        picks=picks,
        picks_left_out=max(data.repair.by_slice_total - len(picks), 0) if data.repair else 0,
        score_name=_SCORE[data.task],
        noun="images" if percent else "objects",
        score=_percent if percent else _plain,
        change=_points if percent else _signed,
        short_change=_whole_points if percent else _hundredths,
        margin=f"{100 * data.parameters.margin:g} points" if percent else f"{data.parameters.margin:g}",
        position=_position,
        data_uri=_data_uri,
        style=Markup((_HERE / "page.css").read_text("utf-8")),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704 - our own file
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def _pictures(slices: Sequence[ErrorSlice]) -> list[tuple[Picture, ...]]:
    """The pictures that each slice shows: the first few, until the page's budget of bytes is spent."""
    left = MAX_PICTURE_BYTES
    shown: list[tuple[Picture, ...]] = []
    for found in slices:
        strip = found.pictures[:MAX_PICTURES]
        size = sum(len(p.data) for p in strip)
        if size > left:
            strip = ()
        else:
            left -= size
        shown.append(strip)
    return shown


def _tag_groups(scores: Sequence[TagScore]) -> list[_TagGroup]:
    """Tags by attribute, the attribute whose means differ most first; of a long tag set the worst tags."""
    groups: list[_TagGroup] = []
    by_attribute = sorted(scores, key=lambda t: t.attribute)  # stable: tags keep their order
    for attribute, members in groupby(by_attribute, key=lambda t: t.attribute):
        tags = tuple(members)
        worst = set(sorted(range(len(tags)), key=lambda i: tags[i].mean)[:MAX_TAGS])
        kept = tuple(t for i, t in enumerate(tags) if i in worst)
        groups.append(_TagGroup(attribute, kept, len(tags) - len(kept)))
    return sorted(groups, key=lambda g: min(t.mean for t in g.tags) - max(t.mean for t in g.tags))


def _axis(means: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis that holds `means`, at tenths, which are never the same."""
    low = max(0, min(9, int(min(means) * 10)))
    high = min(10, int(max(means) * 10) + 1)
    return low / 10, high / 10


def _position(value: float, axis: tuple[float, float] = (0.0, 1.0)) -> float:
    """Where `value` lies on `axis`, as a percentage of its length."""
    low, high = axis
    return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 2)


def _percent(score: float) -> str:
    return f"{100 * score:.1f}%"


def _plain(score: float) -> str:
    return f"{score:.3f}"


def _about(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}".removesuffix(".0")


def _q_value(q: float | None) -> str:
    """Rounded up, so that no q-value reads as if it held when it does not."""
    if q is None:
        return "not tested"
    return "≤ 0.001" if q <= 0.001 else f"{math.ceil(round(1000 * q, 6)) / 1000:.3f}"


def _points(change: float) -> str:
    return f"{100 * change:+.1f} pts".replace("-", "−")


def _whole_points(change: float) -> str:
    return f"{100 * change:+.0f}".replace("-", "−")


def _hundredths(change: float) -> str:
    return f"{change:+.2f}".replace("-", "−")


def _signed(change: float) -> str:
    return f"{change:+.3f}".replace("-", "−")


def _data_uri(picture: Picture) -> str:
    data = picture.data
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "png"
    elif data.startswith(b"\xff\xd8\xff"):
        kind = "jpeg"
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "webp"
    else:
        raise invalid("pictures", f"'{picture.caption}' is no PNG, JPEG or WebP file; give the bytes of one")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
