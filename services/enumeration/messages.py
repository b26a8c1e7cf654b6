"""Slices, comparisons and verdicts as messages of the contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

from hibug2.v1 import slice_pb2 as pb
from hibug2.v1 import types_pb2
from services.enumeration.gate import Verdict
from services.enumeration.read import Vocabulary
from services.enumeration.side_by_side import Comparison, Difference, Shared
from services.enumeration.statistics import Confirmation

MAX_VIOLATIONS = 1000  # the summary counts all of them
_CHANGES = {
    "": pb.VERSION_CHANGE_UNSPECIFIED,
    "fixed": pb.VERSION_CHANGE_FIXED,
    "regressed": pb.VERSION_CHANGE_REGRESSED,
    "new": pb.VERSION_CHANGE_NEW,
    "kept": pb.VERSION_CHANGE_KEPT,
}


def slice_proto(row: dict[str, Any]) -> pb.Slice:
    """A row of `StoredSlices.arrow` as a message."""
    out = pb.Slice(rank=row.get("rank", 0), instance_count=row["count"])
    out.tags.extend(types_pb2.AttributeTag(attribute=p["attribute"], tag=p["tag"]) for p in row["tags"])
    out.doubtful.extend(row["doubtful"])
    if "mean" in row:
        out.score.CopyFrom(
            pb.SliceScore(
                scored_count=row["scored_count"],
                mean=row["mean"],
                drop=row["drop"],
                parent_drop=row["parent_drop"],
                error_share=row["error_share"],
                interval_low=row["interval_low"],
                interval_high=row["interval_high"],
                p_value=row["p_value"],
                q_value=row["q_value"],
                family_rank=row["family"],
            )
        )
        for pair in row["blame"]:
            tag = types_pb2.AttributeTag(attribute=pair["attribute"], tag=pair["tag"])
            out.score.blame.add(tag=tag, drop=pair["drop"])
    return out


def confirmation_proto(shared: Shared, found: Confirmation, rows: range, doubtful: Set[str]) -> list[pb.ConfirmedSlice]:
    """The confirmed slices at `rows`; `doubtful` are attributes that are not to be relied on, here as below."""
    words = shared.words
    out = []
    for i in rows:
        message = pb.ConfirmedSlice(
            tags=_pairs(found.items[i].tolist(), words),
            found_count=int(found.found_scored[i]),
            found_mean=float(found.found_mean[i]),
            held_count=int(found.held_scored[i]),
        )
        message.doubtful.extend(_doubted(message.tags, doubtful))
        if found.held_scored[i]:
            message.held_mean = float(found.held_mean[i])
            message.p_value, message.q_value = float(found.p[i]), float(found.q[i])
        out.append(message)
    return out


def comparison_proto(found: Comparison, rankings: Sequence[str], doubtful: Set[str]) -> pb.CompareModelsResponse:
    """The answer of CompareModels; `rankings` in the order in which they were compared."""
    out = pb.CompareModelsResponse(average_overlap=found.overlap.average)
    for i, first in enumerate(rankings):
        for j, second in enumerate(rankings[:i]):
            out.overlaps.add(first=second, second=first, share=found.overlap.share[j, i])
    words = found.shared.words
    out.worse.extend(_difference(d, words, doubtful) for d in found.worse)
    for change, count in found.change_counts.items():
        out.changes.add(change=_CHANGES[change], slice_count=count)
    out.versions.extend(_difference(d, words, doubtful) for d in found.versions)
    return out


def _difference(d: Difference, words: Vocabulary, doubtful: Set[str]) -> pb.SliceDifference:
    out = pb.SliceDifference(
        tags=_pairs(d.items, words),
        instance_count=d.count,
        paired_count=d.paired,
        first_mean=d.first_mean,
        second_mean=d.second_mean,
        difference=d.second_mean - d.first_mean,
        change=_CHANGES[d.change],
    )
    out.doubtful.extend(_doubted(out.tags, doubtful))
    if d.p is not None:
        out.p_value = d.p
    if d.q is not None:
        out.q_value = d.q
    return out


def verdict_proto(shared: Shared, verdict: Verdict, doubtful: Set[str]) -> pb.CheckGateResponse:
    """The answer of CheckGate."""
    out = pb.CheckGateResponse(
        passed=verdict.passed,
        summary=verdict.reason,
        compared_slice_count=verdict.compared,
        judged_slice_count=verdict.judged,
    )
    words = shared.words
    for r in verdict.regressions[:MAX_VIOLATIONS]:
        tags = _pairs(r.items, words)
        out.violations.add(
            tags=tags,
            baseline_mean=r.baseline_mean,
            candidate_mean=r.candidate_mean,
            max_drop=r.limit,
            paired_count=r.scored,
            q_value=r.q,
            reason=r.reason,
            doubtful=_doubted(tags, doubtful),
        )
    return out


def _doubted(tags: Iterable[types_pb2.AttributeTag], doubtful: Set[str]) -> list[str]:
    return [tag.attribute for tag in tags if tag.attribute in doubtful]


def _pairs(items: Iterable[int], words: Vocabulary) -> list[types_pb2.AttributeTag]:
    return [
        types_pb2.AttributeTag(attribute=words.attributes[i].as_py(), tag=words.tags[i].as_py())
        for i in items
        if i >= 0
    ]
