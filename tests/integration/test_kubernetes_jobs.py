"""Big enumerations in Kubernetes Jobs, against an emulated API; the pods' process is the real one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import kmock
import kubernetes_validate
import pytest
from kubernetes import client as kubernetes
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from hibug2.v1 import enumeration_pb2 as pb
from hibug2.v1 import enumeration_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.enumeration import kubernetes_jobs, run_job
from services.enumeration.config import Settings
from services.enumeration.kubernetes_jobs import Cluster
from services.enumeration.order import Order
from services.enumeration.server import start_server
from shared.errors import InvalidInput
from shared.names import Name
from shared.rpc.channel import connect
from shared.store.artifacts import Artifacts
from shared.store.store import Store
from tests.integration.waiting import eventually
from tests.unit.shared.world import TAGGING, World

ROOT = Path(__file__).resolve().parents[2]
JOBS, PODS = "batch/v1/jobs", "v1/pods"
TOKEN = {"name": "kube-api-access-x", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True}
# As the API shows a pod of the chart's enumeration service.
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "enumeration-7d9-x",
        "namespace": "vision",
        "labels": {
            "app.kubernetes.io/name": "hibug2",
            "app.kubernetes.io/instance": "release",
            "app.kubernetes.io/component": "enumeration",
            "pod-template-hash": "7d9",
        },
    },
    "spec": {
        "serviceAccountName": "hibug2-enumeration",
        "nodeName": "node-1",
        "restartPolicy": "Always",
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001},
        "tolerations": [{"key": "big", "operator": "Exists"}],
        "containers": [
            {"name": "sidecar", "image": "proxy:1"},
            {
                "name": "enumeration",
                "image": "registry/hibug2-enumeration:0.1.0",
                "imagePullPolicy": "IfNotPresent",
                "envFrom": [{"configMapRef": {"name": "hibug2-enumeration"}}],
                "env": [
                    {"name": "HIBUG2_REDIS_URL", "valueFrom": {"secretKeyRef": {"name": "redis", "key": "url"}}},
                    {"name": "HIBUG2_JOBS_ENABLED", "value": "true"},
                ],
                "ports": [{"name": "grpc", "containerPort": 50051}, {"name": "metrics", "containerPort": 9090}],
                "livenessProbe": {"grpc": {"port": 50051}},
                "resources": {"limits": {"cpu": "4", "memory": "4Gi"}},
                "securityContext": {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False},
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, TOKEN],
            },
        ],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "other", "emptyDir": {}},
            {"name": "kube-api-access-x", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}},
        ],
    },
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(kubernetes_jobs, "LOOK_S", 0.05)


@pytest.fixture
async def api():
    async with kmock.KubernetesEmulator() as emulated, kmock.Server(emulated):
        for resource in (JOBS, PODS):
            emulated.resources[resource] = {"namespaced": True}
        emulated.objects[PODS, "vision", POD["metadata"]["name"]] = POD
        yield emulated


class Service:
    """The enumeration service with the emulated cluster, and what a test asks of it."""

    def __init__(self, api, folder: Path, redis_url: str, exits: AsyncExitStack) -> None:
        self.api, self.redis_url, self._exits = api, redis_url, exits
        self.store = folder.as_uri()
        self.artifacts = Artifacts(Store(self.store), "default")

    async def start(self, **more) -> rpc.EnumerationServiceStub:
        settings = Settings(
            listen="127.0.0.1:0",
            metrics_port=0,
            drain_s=0.1,
            store_url=self.store,
            redis_url=self.redis_url,
            jobs_enabled=True,
            jobs_service_account="hibug2-job",
            **{"jobs_min_slices": 1, **more},
        )
        reached = kubernetes.ApiClient(kubernetes.Configuration(host=str(self.api.url).rstrip("/")))
        reached.configuration.retries = False
        self.running = await start_server(settings, Cluster(reached, settings, POD["metadata"]["name"], "vision"))
        self._exits.push_async_callback(self.running.stop)
        channel = await self._exits.enter_async_context(connect(self.running.address))
        self.stub = rpc.EnumerationServiceStub(channel)
        return self.stub

    async def create(self, min_count: int = 5, **more) -> str:
        answer = await self.stub.CreateEnumeration(
            pb.CreateEnumerationRequest(
                parent="datasets/pets", tagging=str(TAGGING), min_count=min_count, max_depth=2, **more
            )
        )
        return answer.job.name

    async def job(self, name: str) -> types_pb2.Job:
        return (await self.stub.GetEnumeration(pb.GetEnumerationRequest(name=name))).job

    async def ended(self, name: str) -> types_pb2.Job:
        async for answer in self.stub.WatchEnumeration(pb.WatchEnumerationRequest(name=name)):
            last = answer.job
        return last

    # What the cluster does

    def jobs(self) -> list[dict]:
        return [
            found.last.raw for key, found in self.api.objects.items() if key[0].plural == "jobs" and not found.deleted
        ]

    async def made(self) -> dict:
        """The Job, once there is one."""
        return (await eventually(self.jobs))[0]

    def tell(self, job: dict, kind: str, reason: str = "", message: str = "") -> None:
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        self.api.objects[JOBS, "vision", job["metadata"]["name"]].patch({"status": {"conditions": [condition]}})

    def pod(self, job: dict, **status) -> None:
        name = f"{job['metadata']['name']}-abc"
        self.api.objects[PODS, "vision", name] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "vision", "labels": {"job-name": job["metadata"]["name"]}},
            "spec": {"containers": [{"name": "job"}]},
            "status": status,
        }

    async def run(self, job: dict, **variables: str) -> int:
        """Run the process of the Job's pod."""
        container = job["spec"]["template"]["spec"]["containers"][0]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HIBUG2_")},
            "HIBUG2_STORE_URL": self.store,
            "HIBUG2_REDIS_URL": self.redis_url,
            "HIBUG2_METRICS_PORT": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")]),
            **{e["name"]: e["value"] for e in container["env"] if "value" in e},
            **variables,
        }
        process = await asyncio.create_subprocess_exec(
            *container["command"], *container["args"], env=environment, cwd=ROOT
        )
        return await asyncio.wait_for(process.wait(), 60)


def failed(exit_code: int, reason: str = "Error", message: str = "") -> dict:
    ending = {"exitCode": exit_code, "reason": reason, "message": message}
    return {"phase": "Failed", "containerStatuses": [{"name": "job", "state": {"terminated": ending}}]}


@pytest.fixture
async def service(api, tmp_path, redis_url):
    World(tmp_path / "store")
    async with AsyncExitStack() as exits:
        yield Service(api, tmp_path / "store", redis_url, exits)


async def test_a_big_enumeration_is_made_by_the_pod_of_a_job_as_the_service_itself_would(service):
    await service.start()
    name = await service.create()
    job = await service.made()
    assert await service.run(job) == 0
    service.tell(job, "Complete")
    ended = await service.ended(name)
    assert ended.state == types_pb2.JOB_STATE_SUCCEEDED, ended.problem
    by_pod = service.artifacts.read_part(_name(name), "slices")
    await service.running.stop()
    Store(service.store).delete(service.artifacts.path(_name(name)))
    await service.start(jobs_min_slices=1_000_000)
    assert (await service.ended(await service.create())).state == types_pb2.JOB_STATE_SUCCEEDED
    assert service.artifacts.read_part(_name(name), "slices").equals(by_pod)
    assert len(service.jobs()) == 1


def _name(text: str) -> Name:
    _, dataset, collection, id_ = text.split("/")
    return Name(dataset, collection, id_)


async def test_a_job_is_made_of_the_services_pod_and_a_cluster_would_take_it(service):
    await service.start()
    name = await service.create()
    job = await service.made()
    for version in ("1.30", "1.33"):
        kubernetes_validate.validate(job, version, strict=True)
    pod = job["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["image"] == "registry/hibug2-enumeration:0.1.0"
    assert container["command"] == [sys.executable, "-m", "services.enumeration.run_job"]
    assert Order.parse(container["args"]) == Order("default", name, str(TAGGING), "validation", 5, 2)
    own = POD["spec"]["containers"][1]
    for field in ("envFrom", "resources", "securityContext"):
        assert container[field] == own[field]
    env = {e["name"]: e for e in container["env"]}
    assert env["HIBUG2_REDIS_URL"] == own["env"][0]  # a reference: the Job holds no secret
    assert env["HIBUG2_JOBS_ENABLED"]["value"] == "false"
    # nothing of what leads to the API, and nothing by which a Service or a Deployment would take the pod as its own
    assert [mount["name"] for mount in container["volumeMounts"]] == ["tmp"]
    assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["tmp"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["serviceAccountName"] == "hibug2-job"
    assert "livenessProbe" not in container
    assert "nodeName" not in pod["spec"]
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == "enumeration-job"
    assert "pod-template-hash" not in pod["metadata"]["labels"]
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    (listed,) = [request for request in service.api["get"] if request.url.path.endswith("/jobs")][:1]
    assert listed.params["labelSelector"] == f"hibug2/enumeration={job['metadata']['labels']['hibug2/enumeration']}"


async def test_a_small_enumeration_is_done_in_the_service(service):
    await service.start(jobs_min_slices=1_000_000)
    assert (await service.ended(await service.create())).state == types_pb2.JOB_STATE_SUCCEEDED
    assert len(service.api) == 0


async def test_what_would_be_too_large_is_refused_without_a_job(service):
    await service.start(max_slices=3)
    ended = await service.ended(await service.create())
    assert ended.problem.reason == "TOO_LARGE"
    assert len(service.api) == 0


async def test_progress_is_what_the_pod_says_and_waiting_is_explained(service, redis):
    await service.start()
    name = await service.create()
    job = await service.made()
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no cpu"}
    service.pod(job, phase="Pending", conditions=[unschedulable])

    async def says(text: str) -> bool:
        return text in (await service.job(name)).message

    await eventually(lambda: says("Unschedulable: no cpu"))
    pulling = {"name": "job", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    service.pod(job, phase="Pending", containerStatuses=[pulling])
    await eventually(lambda: says("ImagePullBackOff no such image"))
    service.pod(job, phase="Running")
    order = Order.parse(job["spec"]["template"]["spec"]["containers"][0]["args"])
    await run_job.tell(redis, order, 30, 120)

    async def is_so_far() -> bool:
        found = await service.job(name)
        return (found.step, found.done_count, found.total_count) == ("enumerating", 30, 120)

    await eventually(is_so_far)


PROBLEM = {"code": 5, "reason": "NOT_FOUND", "message": "the store holds no tags"}


EVICTED = {"phase": "Failed", "reason": "Evicted", "message": "disk pressure"}


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (failed(run_job.REFUSED, message=json.dumps(PROBLEM)), grpc.StatusCode.NOT_FOUND, "the store holds no tags"),
        (failed(137, "OOMKilled"), grpc.StatusCode.INTERNAL, "OOMKilled); it needs more memory"),
        (failed(1, message="{no json"), grpc.StatusCode.INTERNAL, "ended with 1 (Error)"),
        (EVICTED, grpc.StatusCode.INTERNAL, "Evicted, disk pressure"),
        (None, grpc.StatusCode.INTERNAL, "BackoffLimitExceeded: too often"),
    ],
)
async def test_a_failure_is_told_with_its_reason(service, status, code, said):
    await service.start()
    name = await service.create()
    job = await service.made()
    if status is not None:
        service.pod(job, **status)
    service.tell(job, "Failed", "BackoffLimitExceeded", "too often")
    ended = await service.ended(name)
    assert ended.state == types_pb2.JOB_STATE_FAILED
    assert ended.problem.code == code.value[0]
    assert said in ended.problem.message
    # another try makes another Job, while that which failed stays to be looked at
    await service.create()
    await eventually(lambda: len(service.jobs()) == 2)


async def test_a_cancel_deletes_the_job(service):
    await service.start()
    name = await service.create()
    await service.made()
    answer = await service.stub.CancelEnumeration(pb.CancelEnumerationRequest(name=name))
    assert answer.job.state == types_pb2.JOB_STATE_CANCELLED
    assert service.jobs() == []
    (deleted,) = service.api["delete"]
    assert deleted.params["propagationPolicy"] == "Background"  # its pods go with it


async def test_a_service_that_is_stopped_leaves_the_job_and_the_next_one_goes_on_with_it(service, redis, tmp_path):
    await service.start()
    name = await service.create()
    job = await service.made()
    await service.running.stop()
    assert service.jobs() == [job]
    await service.start()
    assert await service.create() == name
    order = Order.parse(job["spec"]["template"]["spec"]["containers"][0]["args"])
    assert await carried_out(order, tmp_path, redis, asyncio.Event()) == (0, {})
    service.tell(job, "Complete")
    assert (await service.ended(name)).state == types_pb2.JOB_STATE_SUCCEEDED
    assert len(service.api["post"]) == 1


async def test_a_job_that_somebody_deleted_may_be_tried_again(service):
    await service.start()
    name = await service.create()
    job = await service.made()
    service.api.objects[JOBS, "vision", job["metadata"]["name"]].delete()
    ended = await service.ended(name)
    assert ended.problem.reason == "UNAVAILABLE"
    assert "was deleted" in ended.problem.message


async def test_a_job_that_ended_well_without_a_result_is_a_failure(service):
    await service.start()
    name = await service.create()
    service.tell(await service.made(), "Complete")
    assert "HIBUG2_STORE_URL" in (await service.ended(name)).problem.message


async def test_a_pod_that_does_not_begin_in_time_is_given_up_with_its_reason(service):
    await service.start(jobs_start_s=0.3)
    name = await service.create()
    job = await service.made()
    waiting = {"name": "job", "state": {"waiting": {"reason": "InvalidImageName", "message": "oh"}}}
    service.pod(job, phase="Pending", containerStatuses=[waiting])
    ended = await service.ended(name)
    assert ended.state == types_pb2.JOB_STATE_FAILED
    assert "within 0.3 s" in ended.problem.message
    assert "InvalidImageName" in ended.problem.message
    assert service.jobs() == []


async def test_what_the_api_refuses_is_told(service):
    body = {"kind": "Status", "message": "jobs.batch is forbidden", "code": 403}
    service.api["post /apis/batch/v1/namespaces/vision/jobs"] << 403 << body
    await service.start()
    ended = await service.ended(await service.create())
    assert ended.problem.reason == "PRECONDITION"
    assert "refuses to create a Job in 'vision': jobs.batch is forbidden; check the role" in ended.problem.message


async def test_an_api_that_is_away_for_a_moment_is_waited_for(service):
    await service.start()
    name = await service.create()
    job = await service.made()
    path = f"get /apis/batch/v1/namespaces/vision/jobs/{job['metadata']['name']}"
    away = service.api[path] << 503
    looks = len(service.api[path])
    await eventually(lambda: len(service.api[path]) > looks + 2)
    assert (await service.job(name)).state == types_pb2.JOB_STATE_RUNNING
    del away
    await service.stub.CancelEnumeration(pb.CancelEnumerationRequest(name=name))


def test_jobs_need_a_pod_to_be_made_from(monkeypatch):
    assert kubernetes_jobs.connect(Settings()) is None
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(InvalidInput, match="HIBUG2_JOBS_ENABLED"):
        kubernetes_jobs.connect(Settings(jobs_enabled=True))


# The process of the pod


@pytest.fixture
def order(tmp_path) -> Order:
    World(tmp_path / "store")
    return Order("default", "datasets/pets/enumerations/x", str(TAGGING), "validation", 5, 2)


async def carried_out(order: Order, tmp_path: Path, redis, stop: asyncio.Event, **more) -> tuple[int, dict]:
    said = tmp_path / "termination-log"
    said.touch()
    settings = Settings(store_url=(tmp_path / "store").as_uri(), **more)
    code = await run_job.enumerate_order(settings, order, stop, redis, said)
    return code, json.loads(said.read_text() or "{}")


async def test_an_order_that_cannot_be_done_is_refused_with_what_is_wrong(order, tmp_path, redis):
    code, said = await carried_out(order, tmp_path, redis, asyncio.Event(), max_slices=3)
    assert code == run_job.REFUSED
    assert said["reason"] == "TOO_LARGE"
    assert len(json.dumps(said)) < 4096


async def test_an_order_that_is_done_already_is_not_done_again(order, tmp_path, redis):
    assert await carried_out(order, tmp_path, redis, asyncio.Event()) == (0, {})
    (slices,) = (tmp_path / "store").rglob("enumerations/x/slices*")
    before = slices.stat().st_mtime_ns
    assert await carried_out(order, tmp_path, redis, asyncio.Event()) == (0, {})
    assert slices.stat().st_mtime_ns == before


async def test_a_pod_that_is_told_to_stop_stops(order, tmp_path, redis, monkeypatch):
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def for_ever(*given) -> None:
        cancelled = given[-1]
        loop.call_soon_threadsafe(begun.set)
        while not cancelled():
            pass
        raise run_job.Cancelled("stopped")

    monkeypatch.setattr(run_job.slices, "enumerate_artifact", for_ever)
    stop = asyncio.Event()
    task = asyncio.create_task(carried_out(order, tmp_path, redis, stop))
    await begun.wait()
    stop.set()
    assert await asyncio.wait_for(task, 5) == (run_job.STOPPED, {})


async def test_redis_that_is_away_stops_no_pod(order, tmp_path):
    away = Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0))
    assert await carried_out(order, tmp_path, away, asyncio.Event()) == (0, {})
    await away.aclose()


async def test_a_store_that_is_away_may_be_tried_again(order, tmp_path, redis, monkeypatch):
    def fail(*_) -> None:
        raise run_job.Unavailable("the store cannot write")

    monkeypatch.setattr(run_job.slices, "enumerate_artifact", fail)
    code, said = await carried_out(order, tmp_path, redis, asyncio.Event())
    assert (code, said["reason"]) == (run_job.AWAY, "UNAVAILABLE")


async def test_very_much_to_say_is_cut_to_what_kubernetes_keeps(order, tmp_path, redis, monkeypatch):
    def fail(*_) -> None:
        raise run_job.HiBug2Error("ö" * 10_000, {"k": "v" * 9000})

    monkeypatch.setattr(run_job.slices, "enumerate_artifact", fail)
    code, said = await carried_out(order, tmp_path, redis, asyncio.Event())
    assert code == run_job.REFUSED
    assert said["message"].startswith("öö")
    assert len((tmp_path / "termination-log").read_bytes()) <= 4096


@pytest.mark.parametrize("arguments", [[], ["--team=a"], ["--min-count=x"]])
def test_an_order_that_is_none_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        Order.parse(arguments)
    assert ended.value.code == 2
