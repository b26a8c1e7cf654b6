"""A report such as the demo gives, with its real images; the numbers are drawn from a seed."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import deploy.local.demo_data as demo_data
from services.gateway.report.model import (
    Chance,
    Cover,
    ErrorSlice,
    Family,
    Heatmap,
    Outcome,
    Parameters,
    Picture,
    PredictedSlice,
    Repair,
    ReportData,
    SlicePicks,
    TagScore,
)
from shared.schema import MAIN_OBJECT, Task

LEVELS = ("very low", "low", "high", "very high")
MEASURED = (
    "brightness",
    "contrast",
    "sharpness",
    "object size",
    "aspect",
    "vertical position",
    "symmetry",
    "texture",
)
ACCURACY = {
    "T-shirt/top": 0.772,
    "Trouser": 0.946,
    "Pullover": 0.704,
    "Dress": 0.839,
    "Coat": 0.714,
    "Sandal": 0.889,
    "Shirt": 0.497,
    "Sneaker": 0.905,
    "Bag": 0.936,
    "Ankle boot": 0.933,
}
MISTAKES = {"Shirt": ("T-shirt/top", "Pullover", "Coat"), "Coat": ("Pullover", "Shirt"), "Pullover": ("Coat", "Shirt")}
OVERALL = 0.8134


def sample(slices: int = 60, seed: int = 3) -> ReportData:
    rng = np.random.default_rng(seed)
    images = pq.read_table(Path(demo_data.__file__).with_name("fashion_mnist.parquet"), columns=["label", "image"])
    by_label: dict[str, list[bytes]] = {}
    for label, image in zip(images["label"].to_pylist(), images["image"].to_pylist(), strict=True):
        by_label.setdefault(label, []).append(image)

    error_slices = []
    means = np.sort(rng.beta(5, 6, slices) * 0.6)
    for rank, mean in enumerate(means, 1):
        label = str(rng.choice(list(MISTAKES), p=[0.6, 0.2, 0.2]))
        chosen = rng.permutation(len(MEASURED))[: int(rng.integers(1, 3))]
        count = int(rng.integers(10, 16) if rng.random() < 0.6 else rng.integers(16, 180))
        hits = round(float(mean) * count)
        pictures = tuple(
            Picture(
                by_label[label][int(rng.integers(len(by_label[label])))], f"{label} → {rng.choice(MISTAKES[label])}"
            )
            for _ in range(min(count - hits, int(rng.integers(4, 9))))
        )
        error_slices.append(
            ErrorSlice(
                rank=rank,
                pairs=((MAIN_OBJECT, label), *((MEASURED[i], LEVELS[int(rng.integers(4))]) for i in sorted(chosen))),
                count=count,
                mean=hits / count,
                interval=_wilson(hits, count),
                drop=OVERALL - hits / count,
                error_share=(count - hits) / (5000 * (1 - OVERALL)),
                q=min(1.0, float(2e4 * np.exp(-count * (OVERALL - hits / count) ** 2 * 4))),
                blame=tuple((OVERALL - hits / count) * rng.dirichlet([3.0] + [1.0] * len(chosen))),
                told_by=0,
                pictures=pictures,
            )
        )
    error_slices = [
        replace(s, rank=i, told_by=i - 1 if i % 7 == 0 else i)
        for i, s in enumerate(sorted(error_slices, key=lambda s: s.mean), 1)
    ]
    error_slices.sort(key=lambda s: s.q)  # the surest first, as on a page
    tag_scores = [
        TagScore(name, tag, 1250 + int(rng.integers(-30, 30)), OVERALL + spread * offset)
        for name in MEASURED
        for spread in [float(rng.uniform(0.01, 0.09))]
        for tag, offset in zip(LEVELS, rng.permutation([-1.4, -0.3, 0.5, 1.1]), strict=True)
    ] + [TagScore(MAIN_OBJECT, tag, int(rng.integers(460, 540)), mean) for tag, mean in ACCURACY.items()]
    heat_mean = np.clip(np.array(list(ACCURACY.values()))[:, None] + rng.normal(0, 0.11, (10, 4)), 0, 1)
    heat_count = rng.geometric(1 / 125, (10, 4)) - 1
    heat_count[1, 3], heat_count[2, 0] = 0, 6
    return ReportData(
        title="fashion-mnist · logistic regression v1",
        dataset="fashion-mnist",
        model="logistic-v1",
        task=Task.CLASSIFICATION,
        made_at=datetime(2026, 2, 3, 14, 5, tzinfo=UTC),
        split="validation",
        instance_count=5000,
        overall_mean=OVERALL,
        parameters=Parameters(max_depth=3, min_count=10, margin=0.2, seed=0),
        slice_count=15093,
        error_slices=tuple(error_slices),
        error_slice_total=924,
        tested_count=15093,
        significant_count=640,
        by_chance=Chance(mean=12.2, low=4.95, high=19.6),
        cover=_cover(error_slices),
        tag_scores=tuple(tag_scores),
        heatmaps=(
            Heatmap(
                MAIN_OBJECT,
                tuple(ACCURACY),
                "symmetry",
                LEVELS,
                tuple(
                    tuple(float(m) if c else None for m, c in zip(row, counts, strict=True))
                    for row, counts in zip(heat_mean, heat_count, strict=True)
                ),
                tuple(tuple(int(c) for c in row) for row in heat_count),
            ),
        ),
        predicted_slices=tuple(
            PredictedSlice(
                rank=i + 1,
                pairs=(*s.pairs[:-1], (s.pairs[-1][0], LEVELS[(LEVELS.index(s.pairs[-1][1]) + 1) % 4])),
                score=0.42 - 0.02 * i,
                origin=f"error slice {s.rank} fails at {100 * s.mean:.1f}%, and the tags are near (0.{85 - i})",
                replaced=s.pairs[-1],
            )
            for i, s in enumerate(error_slices[:8])
        ),
        predicted_slice_total=112,
        repair=Repair(
            budget=500,
            picked=500,
            pool_count=6000,
            unmatched_slices=3,
            by_slice=tuple(SlicePicks(s.rank, s.pairs, s.mean, int(rng.integers(2, 40))) for s in error_slices[:12]),
            by_slice_total=31,
            outcomes=(
                Outcome("original", 0, 0.8110, 0.6980),
                Outcome("random", 500, 0.8154, 0.7044),
                Outcome("hibug2", 500, 0.8157, 0.7070),
            ),
            test_count=4000,
            failing_test_count=2189,
        ),
        provenance={
            "dataset": "sha256:3d1c9a7be0f24c51",
            "schema": "9a41f0c7d2be6613",
            "scores": "sha256:77e20b6c11d94e0f",
            "version": "0.1.0",
        },
    )


def _cover(error_slices: list[ErrorSlice]) -> Cover:
    chosen = sorted(error_slices, key=lambda s: -s.error_share)[:12]
    families = tuple(
        Family(told_by=s, member_count=1 + (5 * i) % 8, error_share=1 - 0.78 ** (i + 1), instance_share=0.035 * (i + 1))
        for i, s in enumerate(chosen)
    )
    return Cover(families, family_total=689, needed=((0.5, 3), (0.9, 40)), error_share=0.931)


def _wilson(hits: int, count: int) -> tuple[float, float]:
    z = 1.96
    middle = (hits + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * (hits * (count - hits) / count + z * z / 4) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
