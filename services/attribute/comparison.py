"""Attributes by comparison: two images of one class side by side, and what sets them apart (paper 3.2.1, A.8)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.attribute.difficulty import proposed
from services.attribute.interview import Interview
from services.attribute.normalise import COMPARISON, Gathering
from services.attribute.sample import Sample
from shared.llm import together
from shared.prompting import Prompt

Pairs = npt.NDArray[np.int64]


def choose_pairs(
    labels: Sequence[str],
    values: npt.NDArray[np.float64],
    scores: npt.NDArray[np.float64],
    count: int,
    seed: int,
) -> Pairs:
    """At most `count` pairs (P, 2) int64 of instances of the same class, chosen to contrast; no instance is in two.

    `labels` (n,) are the classes, `values` (n, m) float64 what was measured and `scores` (n,) float64 how well the
    model did, NaN where unknown. A pair is an instance on which the model does worse than on its class on average,
    with one on which it does better, in a seeded order. Where a class has no such two (left), the pairs are far apart
    in what was measured: a seeded instance with the one farthest from it. Classes take turns, so pairs are spread over
    them; a class with a single instance has none.
    """
    rng = np.random.default_rng(seed)
    apart = _standardised(values)
    of = np.asarray(labels, dtype=str)
    queues = []
    for label in rng.permutation(np.unique(of)):
        members = rng.permutation(np.flatnonzero(of == label))
        queues.append(_class_pairs(members, apart, scores, count))
    turns = [
        pair for turn in range(max(map(len, queues), default=0)) for queue in queues for pair in queue[turn : turn + 1]
    ]
    return np.array(turns[:count], dtype=np.int64).reshape(-1, 2)


def _class_pairs(
    members: npt.NDArray[np.int64], apart: npt.NDArray[np.float64], scores: npt.NDArray[np.float64], count: int
) -> list[tuple[int, int]]:
    known = members[np.isfinite(scores[members])]
    mean = scores[known].mean() if known.size else 0.0
    worse, better = known[scores[known] < mean], known[scores[known] > mean]
    pairs = [(int(a), int(b)) for a, b in zip(worse, better, strict=False)][:count]
    used = {i for pair in pairs for i in pair}
    left = np.array([i for i in members if i not in used], dtype=np.int64)
    while len(pairs) < count and left.size > 1:
        distance = ((apart[left] - apart[left[0]]) ** 2).sum(axis=1)
        far = 1 + int(distance[1:].argmax())
        pairs.append((int(left[0]), int(left[far])))
        left = np.delete(left, [0, far])
    return pairs


def _standardised(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each column with mean 0 and deviation 1; what is unknown or the same for all counts as 0."""
    known = np.where(np.isfinite(values), values, np.nan)
    out = np.zeros(values.shape)
    for j, column in enumerate(known.T):
        there = np.isfinite(column)
        if there.any():
            scale = np.abs(column[there]).max() or 1.0  # huge values would overflow when squared
            centred = column / scale - (column[there] / scale).mean()
            deviation = centred[there].std()
            if deviation > 0:
                out[there, j] = centred[there] / deviation
    return out


async def compare(
    interview: Interview,
    prompt: Prompt,
    sample: Sample,
    pairs: Pairs,
    gathering: Gathering,
    known: Sequence[str],
    patience: int,
) -> int:
    """Show `pairs` and add what differs to `gathering`; how many pairs were shown.

    Pairs are shown `patience` at a time, with the list as it then stands (`known` are those that need no model), so
    that only new attributes come back. After `patience` pairs in a row without any, the rest is left out. A pair whose
    answer is of no use counts as one that brings nothing.
    """

    async def ask(first: int, second: int) -> object:
        images = await sample.shown(first, second)
        if images is None:
            interview.expect(-1)
            return None
        inputs = {"main_object": sample.labels[first], "known": [*known, *gathering.names], "pictured": ""}
        return await interview.try_ask(prompt, inputs, images=images)

    interview.begin("comparing images")
    shown, barren = 0, 0
    while shown < len(pairs) and barren < patience:
        wave = pairs[shown : shown + patience]
        for answer in await together([ask(int(a), int(b)) for a, b in wave]):
            new = gathering.add(proposed(answer), COMPARISON) if answer is not None else 0
            barren = 0 if new else barren + 1
        shown += len(wave)
    interview.expect(shown - len(pairs))
    return shown
