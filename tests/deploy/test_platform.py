"""All containers on one network do what the demo does, and lose nothing when one is told to end or killed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from deploy.images.build import ROOT
from hibug2.v1 import run_pb2
from tests.deploy.conftest import WORKERS, Platform
from tests.deploy.engine import of
from tests.deploy.runs import demo, error_slices, finished, in_tagging, run_again

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def said(platform: Platform) -> str:
    started = time.monotonic()
    text = demo(platform)
    print(f"\nthe demo through the gateway: {time.monotonic() - started:.0f} s", end="")
    return text


def test_the_demo_finds_and_repairs(platform: Platform, said: str) -> None:
    assert "error slices" in said
    outcome = dict(re.findall(r"(training images|\+ picks by slice).*?(0\.\d{4})", said))
    assert float(outcome["+ picks by slice"]) > float(outcome["training images"])
    with platform.client() as client:
        (run,) = client.runs()
        tagging = next(step for step in run.steps if step.kind == run_pb2.STEP_KIND_TAGGING)
        seconds = tagging.elapsed.ToMilliseconds() / 1000
        print(f"\ntagging: {tagging.job.total_count} items in {seconds:.1f} s by two workers of one core", end="")
        assert len(error_slices(client, run)) > 0


def test_the_call_of_helm_test(platform: Platform) -> None:
    call = ROOT / "charts" / "hibug2" / "files" / "call.py"
    answer = platform.engine(
        *("run", "--rm", "--read-only", "--tmpfs=/tmp", f"--network={platform.mark}"),
        *(f"--volume={call}:/etc/hibug2/test/call.py:ro", "--env=HIBUG2_ADDRESS=gateway:50051"),
        *("--entrypoint=/opt/venv/bin/python", of("gateway"), "/etc/hibug2/test/call.py"),
    )
    assert "the platform answers" in answer


def terminated(platform: Platform, component: str) -> None:
    """SIGTERM; it must end by itself, in its time."""
    grace = 180 if component in WORKERS else 60
    status, seconds = platform.engine.stop(platform.container(component), grace)
    print(f"\n{component} ended {seconds:.1f} s after SIGTERM", end="")
    assert status == 0, platform.engine.logs(platform.container(component))
    assert seconds < grace / 2


def killed(platform: Platform, component: str) -> None:
    platform.engine("kill", "--signal=KILL", platform.container(component))


ENDINGS = [(component, how) for component in (WORKERS[0], "tagging", "gateway") for how in (terminated, killed)]


# Redis is not ours to drain; killed, it comes back from its append-only file.
@pytest.mark.parametrize(("component", "how"), [*ENDINGS, ("redis", killed)])
def test_nothing_is_lost(platform: Platform, said: str, component: str, how: Callable[[Platform, str], None]) -> None:
    with platform.client() as client:
        whole = client.runs("fashion")[0]
        before = in_tagging(client, run := run_again(platform, client, f"{component}-{how.__name__}"))
    how(platform, component)
    platform.restart(component)
    last = finished(platform, run)
    print(f"\n{component} {how.__name__} after {before} items: the run succeeded", end="")
    with platform.client() as client:
        assert error_slices(client, last) == error_slices(client, whole)
