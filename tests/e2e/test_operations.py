"""What docs/operations.md says of backups and of the key to Redis, done as it says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from deploy.local import stack
from deploy.local.redis import embedded_redis
from hibug2 import Client
from hibug2.v1 import run_pb2, types_pb2
from tests.e2e.conftest import running

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()


def copied(store: Path, to: Path) -> None:
    """A copy as a sync makes it: what vanishes while it is copied is left out."""
    try:
        shutil.copytree(store, to, dirs_exist_ok=True)
    except shutil.Error as error:
        for _, _, why in error.args[0]:
            assert "No such file" in why


def test_a_copy_taken_in_mid_run_restores_all_that_was_done(
    start_platform: Callable[..., Any], images: Path, tmp_path: Path
) -> None:
    backup = tmp_path / "backup"
    with start_platform(images) as platform, platform.client() as client:
        store = platform.stack.folder / "store"
        client.create_dataset("bags", images / "manifest.csv")
        client.create_dataset("coats", images / "manifest.csv")
        client.add_scores("bags", "v1", images / "v1.csv")
        done = client.run("bags", "v1", budget=20)
        found = client.slices(done).to_pylist()
        client.add_scores("coats", "v2", images / "v2.csv")
        under_way = client.run("coats", "v2", wait=False, budget=20)
        copied(store, backup)

        # one dataset, while the platform works: its folder is lost, and copied back
        (folder,) = (store / "teams").glob("*/datasets/bags")
        shutil.rmtree(folder)
        copied(backup / folder.relative_to(store), folder)
        assert client.slices(done).to_pylist() == found
        *_, last = client.watch(under_way)
        assert last.job.state == types_pb2.JOB_STATE_SUCCEEDED

    # all of it, to services that stopped, with a Redis that knows nothing
    restored = tmp_path / "restored"
    copied(backup, restored / "store")
    with running(restored, images) as platform, platform.client() as client:
        assert {d.name for d in client.datasets()} == {"datasets/bags", "datasets/coats"}
        (before,) = client.runs("bags")
        assert before.job.state == types_pb2.JOB_STATE_SUCCEEDED
        assert client.slices(before).to_pylist() == found
        client.add_scores("bags", "v2", images / "v2.csv")
        again = client.run("bags", "v2", budget=20)
        kinds = {step.kind: step for step in again.steps}
        assert again.job.state == types_pb2.JOB_STATE_SUCCEEDED
        assert kinds[run_pb2.STEP_KIND_TAGGING].job.total_count == kinds[run_pb2.STEP_KIND_TAGGING].job.done_count
        for run in client.runs("coats"):  # it was found where it was, and goes on
            *_, last = client.watch(run)
            assert last.job.state == types_pb2.JOB_STATE_SUCCEEDED


def acl(word: str, **secrets: str) -> list[str]:
    """The arguments of a command of the page that begins like that, with passwords in their places."""
    (found,) = re.findall(rf"`(ACL SETUSER hibug2 {re.escape(word)}[^`]*)`", PAGE)
    for place, secret in secrets.items():
        found = found.replace(place, secret)
    return found.replace("…", secrets.get("rest", "")).split()


def test_the_key_to_redis_is_changed_as_the_page_says_and_the_user_it_names_may_do_all_that_is_done(
    monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path
) -> None:
    with embedded_redis() as url:
        admin = redis.Redis.from_url(url)
        admin.execute_command(*acl("on", rest="first-key"))
        key = {"now": "first-key"}

        @contextmanager
        def as_user() -> Iterator[str]:
            yield url.replace("redis://", f"redis://hibug2:{key['now']}@")

        def refused() -> bool:
            with pytest.raises(redis.AuthenticationError):
                redis.Redis.from_url(url.replace("redis://", "redis://hibug2:first-key@")).ping()
            return True

        monkeypatch.setattr(stack, "embedded_redis", as_user)
        with running(tmp_path, images) as platform, platform.client() as client:
            run_of(client, images, "v1")
            admin.execute_command(*acl(">new", new="second-key"))
            run_of(client, images, "v2")  # the old key is good still
        key["now"] = "second-key"  # all are restarted with the new one
        with running(tmp_path, images) as platform, platform.client() as client:
            admin.execute_command(*acl("<old", old="first-key"))
            assert refused()
            run_of(client, images, "v1", minimum=20)
            admin.execute_command("CLIENT", "KILL", "TYPE", "normal")  # all connect anew, with what they know
            run_of(client, images, "v2", minimum=20)


def run_of(client: Client, images: Path, model: str, minimum: int = 10) -> None:
    if not any(d.name == "datasets/bags" for d in client.datasets()):
        client.create_dataset("bags", images / "manifest.csv")
    client.add_scores("bags", model, images / f"{model}.csv")
    assert client.run("bags", model, min_count=minimum, budget=20).job.state == types_pb2.JOB_STATE_SUCCEEDED
