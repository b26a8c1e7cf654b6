"""HTTP/JSON and the pages say what gRPC says."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest


@pytest.fixture(scope="module")
def http(platform: Any) -> Iterator[httpx.Client]:
    headers = {"x-hibug2-team": "web"}
    with httpx.Client(base_url=f"http://127.0.0.1:{platform.stack.http_port}", headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def run(http: httpx.Client, images: Path) -> dict[str, Any]:
    with (images / "manifest.csv").open() as manifest:
        rows = [row for row in csv.DictReader(manifest) if row["split"] == "validation"][:300]
    with (images / "v1.csv").open() as file:
        said = {row["id"]: row["predicted"] for row in csv.DictReader(file)}
    instances = [
        {"instance_id": r["id"], "image_uri": (images / r["uri"]).as_uri(), "label": r["label"], "split": r["split"]}
        for r in rows
    ]
    made = http.post("/v1/datasets", json={"dataset_id": "web", "instances": instances})
    assert made.status_code == 201, made.text
    assert made.json()["instanceCount"] == "300"
    scores = [{"instance_id": r["id"], "predicted_label": said[r["id"]]} for r in rows]
    added = http.put("/v1/datasets/web/models/v1/scores", json={"scores": scores})
    assert added.json()["scoredCount"] == "300"
    body = {"dataset": "datasets/web", "model": "datasets/web/models/v1", "parameters": {"maxDepth": 2}}
    started = http.post("/v1/runs", json=body)
    assert started.status_code == 201, started.text
    name = started.json()["name"]
    page = http.get(f"/{name}")
    assert page.status_code == 200
    end = time.monotonic() + 60
    while True:
        found: dict[str, Any] = http.get(f"/v1/{name}").json()
        if found["job"]["state"] in ("JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED"):
            break
        assert time.monotonic() < end
        time.sleep(0.1)
    assert found["job"]["state"] == "JOB_STATE_SUCCEEDED", found
    return found


def test_slices_of_a_run(http: httpx.Client, run: dict[str, Any]) -> None:
    found = http.get(f"/v1/{run['name']}/slices", params={"page_size": 5}).json()
    assert 0 < len(found["slices"]) <= 5
    assert found["totalCount"] == run["summary"]["errorSliceCount"]
    assert found["slices"][0]["rank"] == "1"
    narrowed = http.get(f"/v1/{run['name']}/slices", params={"filter": 'tag = "Shirt" AND count >= 12'}).json()
    assert all({"attribute": "main object", "tag": "Shirt"} in s["tags"] for s in narrowed["slices"])


def test_pages_and_report(http: httpx.Client, run: dict[str, Any]) -> None:
    key = run["name"].partition("/")[2]
    assert key in http.get("/").text
    page = http.get(f"/runs/{key}").text
    assert "Open the report" in page
    assert "tagging" in page
    report = http.get(f"/runs/{key}/report")
    assert report.headers["content-type"].startswith("text/html")
    assert "main object" in report.text


def test_what_a_run_has_not_come_to_is_not_found(http: httpx.Client, run: dict[str, Any]) -> None:
    answer = http.get(f"/v1/{run['name']}/picks")
    assert answer.status_code == 404
    assert "selection" in answer.json()["error"]["message"]


def test_errors_name_the_field(http: httpx.Client, run: dict[str, Any]) -> None:
    body = {"dataset": "datasets/web", "model": "datasets/web/models/v1", "parameters": {"minCount": 0}}
    answer = http.post("/v1/runs", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["violations"][0]["field"] == "parameters.min_count"
    assert http.get("/v1/datasets/nowhere").status_code == 404
    again = http.post(
        "/v1/datasets",
        json={"dataset_id": "web", "instances": [{"instance_id": "a", "image_uri": "file:///nowhere/x.png"}]},
    )
    assert again.status_code == 409
    unknown = {**body, "parameters": {"colour": 1}}
    assert http.post("/v1/runs", json=unknown).status_code == 400


def test_openapi_and_health(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/datasets", "/v1/runs", "/v1/runs/{run}/slices"} <= set(paths)
    assert http.get("/healthz").json()["status"] == "serving"
    for page in ("/docs", "/redoc"):
        needed = re.findall(r'(?:src|href)="([^"]+)"', http.get(page).text)
        assert len(needed) >= 2
        for url in needed:  # all from here: there may be no internet
            assert url.startswith("/")
            assert http.get(url).status_code == 200


def test_another_team_sees_nothing(http: httpx.Client, run: dict[str, Any]) -> None:
    other = {"x-hibug2-team": "others"}
    assert http.get(f"/v1/{run['name']}", headers=other).status_code == 404
    assert http.get("/v1/datasets/web", headers=other).status_code == 404
