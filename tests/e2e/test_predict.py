"""Predicted slices by every method, verified on the test split, by the client and the command over real sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_llm import ScriptedLLM

# Cuts in the quarters of these images.
EDGES = {
    "brightness": [0.256, 0.3, 0.41],
    "sharpness": [1.1, 1.26, 1.58],
    "noise": [0.0024, 0.0082, 0.015],
    "object_extent": [0.33, 0.47, 0.58],
    "object_texture": [0.133, 0.18, 0.26],
}
METHODS = ["tag_substitution", "instruction", "prior"]


def few_of(images: Path, counts: dict[str, int]) -> set[str]:
    """Write foreseen.csv and foreseen-v1.csv: the first images of some splits; returns their ids."""
    header, *lines = (images / "manifest.csv").read_text().splitlines()
    left = dict(counts)
    kept = []
    for line in lines:
        split = line.replace('"', "").rpartition(",")[2]
        if left.get(split, 0):
            left[split] -= 1
            kept.append(line)
    (images / "foreseen.csv").write_text("\n".join([header, *kept]) + "\n")
    ids = {line.split(",")[0] for line in kept}
    first, *said = (images / "v1.csv").read_text().splitlines()
    (images / "foreseen-v1.csv").write_text("\n".join([first, *(s for s in said if s.split(",")[0] in ids)]) + "\n")
    return ids


def test_what_is_foreseen_is_verified(start_platform: Callable[..., Any], images: Path) -> None:
    assert len(few_of(images, {"validation": 150, "test": 120})) == 270
    with ScriptedLLM() as llm:
        settings = {"llm_base_url": llm.base_url, "llm_model": "scripted"}
        with start_platform(images, settings=settings) as platform, platform.client() as client:
            client.create_dataset("foreseen", images / "foreseen.csv")
            client.add_scores("foreseen", "v1", images / "foreseen-v1.csv")
            classes = list(client.dataset("foreseen").main_objects)
            attributes = [{"name": "main object", "tags": classes, "tagger": "given"}]
            for measure, edges in EDGES.items():
                told = {"tagger": "measured", "measure": {"name": measure, "edges": edges}}
                tags = ["very low", "low", "high", "very high"]
                attributes.append({"name": measure.replace("_", " "), "category": "global", "tags": tags, **told})
            run = client.run("foreseen", "v1", depth=2, schema={"attributes": attributes})
            assert llm.calls == []
            enumerated = {
                frozenset((pair["attribute"], pair["tag"]) for pair in row["tags"])
                for row in client.slices(run.enumeration).to_pylist()
            }
            for method in METHODS:
                rows = client.predicted(run, method).to_pylist()
                assert rows, method
                tags = [frozenset((pair["attribute"], pair["tag"]) for pair in row["tags"]) for row in rows]
                assert len(set(tags)) == len(tags)
                assert not set(tags) & enumerated
            asked = len(llm.calls)
            found = client.verify_predictions(run, METHODS, min_count=2)
            assert len(llm.calls) == asked  # what is there is not asked for again
            assert found.scored_count == 120
            assert found.methods.column("method").to_pylist() == METHODS
            drops = found.methods.to_pylist()
            assert all(row["base_count"] > 0 for row in drops if row["verified_count"])
            # What a slice is said to do is what its instances do.
            slices = [row for row in found.slices.to_pylist() if row["scored_count"]]
            assert all(row["drop"] == pytest.approx(found.overall_mean - row["mean"]) for row in slices)
            document = json.loads(predict(platform, "--method", "prior").stdout)
            assert document["verification"]["overall_mean"] == found.overall_mean
            assert document["verification"]["methods"][0]["method"] == "prior"
            refused = predict(platform, "--method", "prior", "--split", "validation")
            assert refused.returncode == 2
            assert "made from" in refused.stderr


def predict(platform: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "hibug2", "--json", "predict", "latest", "--verify", *arguments]
    environment = {**os.environ, "HIBUG2_ADDRESS": platform.address}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
