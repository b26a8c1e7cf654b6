"""Big enumerations as Kubernetes Jobs: made from the service's own pod, watched until they end, taken away again.

A Job's pod is the service's pod with another command: the same image, settings, secrets and volumes, so that it reads
and writes the same store. The kubernetes library is imported only where Jobs are switched on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from hibug2.v1 import types_pb2
from services.enumeration.config import Settings
from services.enumeration.order import Order
from services.enumeration.run_job import REFUSED
from shared import logs, traces
from shared.errors import HiBug2Error, Precondition, Unavailable, invalid
from shared.jobs import Progress
from shared.rpc import status

log = logs.get("enumeration.kubernetes")
Document = dict[str, Any]

LOOK_S = 1.0
_AWAY_S = 60.0  # for so long the API may not answer
# Answers are taken as the JSON that they are: the library's models refuse what a newer or older cluster says.
_CALL: Document = {"_request_timeout": 10.0, "_preload_content": False}
_KEEP_S = 3600  # that a Job which ended stays to be looked at
_TRIES = 2  # further pods after one that failed, as when its node died
_KILLED = 137  # by the kernel, mostly for its memory
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TOKEN_MOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a path
_LABEL, _CONTAINER = "hibug2/enumeration", "job"
# What of the service's pod its Jobs' pods have too.
_POD_FIELDS = (
    "affinity",
    "dnsConfig",
    "dnsPolicy",
    "imagePullSecrets",
    "nodeSelector",
    "priorityClassName",
    "runtimeClassName",
    "schedulerName",
    "securityContext",
    "serviceAccountName",
    "tolerations",
)
_CONTAINER_FIELDS = ("image", "imagePullPolicy", "env", "envFrom", "resources", "securityContext")


@dataclass(frozen=True)
class Seen:
    """A Job at a moment. state: "waiting" for its pod to begin, "running", "succeeded", "failed" or "gone".

    why: what keeps its pod waiting, or how it failed; problem: what the pod itself said.
    """

    state: str
    why: str = ""
    problem: HiBug2Error | None = None


class Cluster:
    """The Kubernetes API, as far as it is used here. Blocking: async code calls it in a thread.

    Raises Precondition for what the API refuses, and Unavailable while it does not answer.
    """

    def __init__(self, api: Any, settings: Settings, pod: str = "", namespace: str = "") -> None:
        """`api`: a kubernetes.client.ApiClient. `pod`: the service's own; its name and namespace are those of the
        pod that the process is in where they are empty.
        """
        from kubernetes import client

        self._api = api
        self._batch, self._core = client.BatchV1Api(api), client.CoreV1Api(api)
        self._settings = settings
        self._pod = pod or socket.gethostname()
        self._own_namespace = namespace or _NAMESPACE.read_text().strip()
        self._namespace = settings.jobs_namespace or self._own_namespace

    def begin(self, order: Order) -> str:
        """The name of the Job that does `order`: one that is at it already, else a new one."""
        key = _key(order)
        with self._asked("list Jobs"):
            found = self._batch.list_namespaced_job(self._namespace, label_selector=f"{_LABEL}={key}", **_CALL)
        for job in _document(found)["items"]:
            metadata = job["metadata"]
            at_it = metadata.get("labels", {}).get(_LABEL) == key and not metadata.get("deletionTimestamp")
            if at_it and not _ended(job):
                return str(metadata["name"])
        with self._asked(f"read the pod {self._pod}"):
            pod = self._core.read_namespaced_pod(self._pod, self._own_namespace, **_CALL)
        made: Any = job_of(_document(pod), order, self._settings)
        with self._asked("create a Job"):
            _document(self._batch.create_namespaced_job(self._namespace, made, **_CALL))
        return str(made["metadata"]["name"])

    def look(self, name: str) -> Seen:
        """How the Job `name` is doing."""
        from kubernetes.client.exceptions import ApiException

        with self._asked(f"read the Job {name}"):
            try:
                job = _document(self._batch.read_namespaced_job(name, self._namespace, **_CALL))
            except ApiException as error:
                if error.status == 404:
                    return Seen("gone")
                raise
        ended = _ended(job)
        if ended is not None and ended["type"] == "Complete":
            return Seen("succeeded")
        with self._asked("list pods"):
            found = self._core.list_namespaced_pod(self._namespace, label_selector=f"job-name={name}", **_CALL)
        pods = [
            pod
            for pod in sorted(_document(found)["items"], key=lambda p: p["metadata"].get("creationTimestamp") or "")
            if pod["metadata"].get("labels", {}).get("job-name") == name
        ]
        if ended is not None:
            return _failure(ended, pods)
        newest = pods[-1] if pods else None
        if newest is not None and newest.get("status", {}).get("phase") == "Running":
            return Seen("running")
        return Seen("waiting", _waits_for(newest))

    def delete(self, name: str) -> None:
        """Take the Job `name` and its pods away; nothing happens when it is not there."""
        from kubernetes.client.exceptions import ApiException

        with self._asked(f"delete the Job {name}"):
            try:
                _document(
                    self._batch.delete_namespaced_job(name, self._namespace, propagation_policy="Background", **_CALL)
                )
            except ApiException as error:
                if error.status != 404:
                    raise

    def close(self) -> None:
        self._api.close()

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            said = _said(error)
            if error.status in (0, 429) or error.status >= 500:
                raise Unavailable(f"the Kubernetes API cannot {what}: {said}") from error
            raise Precondition(
                f"the Kubernetes API refuses to {what} in '{self._namespace}': {said}; "
                "check the role of the service's account and the HIBUG2_JOBS_ settings"
            ) from error
        except HTTPError as error:
            raise Unavailable(f"the Kubernetes API does not answer: {error}") from error


def connect(settings: Settings) -> Cluster | None:
    """The cluster that this pod is in; None where Jobs are switched off. InvalidInput where there is none."""
    if not settings.jobs_enabled:
        return None
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise invalid("HIBUG2_JOBS_ENABLED", "Jobs need the extra `jobs`: hibug2-platform[jobs]") from error
    configuration = client.Configuration()
    try:
        config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
    except config.ConfigException as error:
        raise invalid(
            "HIBUG2_JOBS_ENABLED", f"this process is in no Kubernetes pod with an account: {error}"
        ) from error
    configuration.retries = False  # each look is a try of its own
    return Cluster(client.ApiClient(configuration), settings)


@dataclass(frozen=True)
class Outside:
    """What is known of a Job beside what Kubernetes says.

    told: how far its pod is (done, total); is_there: whether the store holds what it is to make.
    """

    told: Callable[[], Awaitable[tuple[int, int]]]
    is_there: Callable[[], Awaitable[bool]]


async def follow(cluster: Cluster, order: Order, progress: Progress, outside: Outside, start_s: float) -> None:
    """Have a Job do `order` and wait until it has.

    Raises what the pod said went wrong, HiBug2Error with the pod's reason where it said nothing, and Unavailable where
    another try may help. A Job is deleted when it is cancelled or does not begin within `start_s` seconds; when this
    process is stopped it stays, and whoever takes the work over finds it.
    """
    beginning = asyncio.ensure_future(asyncio.to_thread(cluster.begin, order))
    try:
        name = await asyncio.shield(beginning)
        log.info("job in the cluster", kubernetes_job=name)
        await _until_made(cluster, name, progress, outside, start_s)
    except asyncio.CancelledError:
        if progress.cancelled and not progress.taken_over:
            try:
                await asyncio.to_thread(cluster.delete, await beginning)
            except HiBug2Error as error:
                log.warning("job not deleted; it ends by itself", error=str(error))
        raise


async def _until_made(cluster: Cluster, name: str, progress: Progress, outside: Outside, start_s: float) -> None:
    waits_since = answered = time.monotonic()
    while True:
        try:
            seen = await asyncio.to_thread(cluster.look, name)
        except Unavailable as error:
            if time.monotonic() - answered > _AWAY_S:
                raise
            log.warning("waiting for the Kubernetes API", error=str(error))
            await asyncio.sleep(LOOK_S)
            continue
        answered = time.monotonic()
        if seen.state in ("succeeded", "failed", "gone"):
            if not await outside.is_there():
                raise _unmade(name, seen)
            return
        if seen.state == "running":
            waits_since = answered
            progress.step, progress.message = "enumerating", f"in the Kubernetes Job {name}"
            progress.update(*await outside.told())
        else:
            progress.step = "waiting for a pod"
            progress.message = f"the Kubernetes Job {name} waits: {seen.why}"
            if answered - waits_since > start_s:
                await asyncio.to_thread(cluster.delete, name)
                raise HiBug2Error(f"the Kubernetes Job {name} did not begin within {start_s:g} s: {seen.why}")
        await asyncio.sleep(LOOK_S)


def _unmade(name: str, seen: Seen) -> HiBug2Error:
    """What is wrong with a Job that has ended without a result."""
    if seen.state == "gone":
        return Unavailable(f"the Kubernetes Job {name} was deleted; create the enumeration again")
    if seen.state == "failed":
        return seen.problem or HiBug2Error(f"the Kubernetes Job {name} failed: {seen.why}")
    return HiBug2Error(
        f"the Kubernetes Job {name} ended well, but the store does not hold what it made; do its pods have the "
        "service's HIBUG2_STORE_URL?"
    )


def job_of(pod: Mapping[str, Any], order: Order, settings: Settings) -> Document:
    """The Job for `order`, made from the service's own `pod` as the API shows it."""
    spec, metadata = pod["spec"], pod["metadata"]
    own = next((c for c in spec["containers"] if c["name"] == "enumeration"), spec["containers"][0])
    mounts = [m for m in own.get("volumeMounts", []) if m["mountPath"] != _TOKEN_MOUNT]
    mounted = {mount["name"] for mount in mounts}
    env = {e["name"]: e for e in own.get("env", [])}
    for name, value in {"HIBUG2_JOBS_ENABLED": "false", "TRACEPARENT": traces.traceparent()}.items():
        env[name] = {"name": name, "value": value}
    container = {
        **{field: own[field] for field in _CONTAINER_FIELDS if field in own},
        "name": _CONTAINER,
        "command": [sys.executable, "-m", "services.enumeration.run_job"],
        "args": order.arguments(),
        "env": list(env.values()),
        "volumeMounts": mounts,
        "ports": [port for port in own.get("ports", []) if port.get("name") == "metrics"],
    }
    if settings.jobs_image:
        container["image"] = settings.jobs_image
    of_pod = {field: spec[field] for field in _POD_FIELDS if field in spec}
    if settings.jobs_service_account:
        of_pod["serviceAccountName"] = settings.jobs_service_account
    labels = _labels(metadata.get("labels", {}), order)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"hibug2-enumeration-{_key(order)}-{secrets.token_hex(3)}",
            "labels": labels,
            "annotations": {"hibug2/team": order.team, "hibug2/name": order.name},
        },
        "spec": {
            "backoffLimit": _TRIES,
            "ttlSecondsAfterFinished": _KEEP_S,
            # The first rule that fits counts: a pod that had to leave its node is no failure; what was refused, or
            # killed for its memory, would end the same way again.
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": _CONTAINER,
                            "operator": "In",
                            "values": [REFUSED, _KILLED],
                        },
                    },
                ]
            },
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    **of_pod,
                    "containers": [container],
                    "volumes": [v for v in spec.get("volumes", []) if v["name"] in mounted],
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "terminationGracePeriodSeconds": 30,
                },
            },
        },
    }


def _document(answer: Any) -> Document:
    """What was answered; reading it gives the connection back."""
    found: Document = json.loads(answer.data)
    return found


def _key(order: Order) -> str:
    return hashlib.sha256(f"{order.team}/{order.name}".encode()).hexdigest()[:12]


def _labels(of_pod: Mapping[str, str], order: Order) -> dict[str, str]:
    """Those of the service's pod under another component: no Service and no Deployment takes the pods for its own."""
    kept = {key: value for key, value in of_pod.items() if key.startswith("app.kubernetes.io/")}
    component = kept.get("app.kubernetes.io/component", "enumeration")
    return {**kept, "app.kubernetes.io/component": f"{component}-job", _LABEL: _key(order)}


def _ended(job: Mapping[str, Any]) -> Document | None:
    """The condition that says that the Job has ended."""
    conditions = job.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"), None)


def _failure(ended: Mapping[str, Any], pods: list[Document]) -> Seen:
    """What the last pod that failed said, or what Kubernetes says of it, or else of the Job."""
    for pod in reversed(pods):
        of_pod = pod.get("status", {})
        for container in of_pod.get("containerStatuses") or []:
            ending = container.get("state", {}).get("terminated")
            if not ending or ending.get("exitCode") == 0:
                continue
            if problem := _problem(ending.get("message", "")):
                return Seen("failed", str(problem), problem)
            reason = ending.get("reason") or "Error"
            why = f"the pod {pod['metadata']['name']} ended with {ending.get('exitCode')} ({reason})"
            if reason == "OOMKilled":
                why += "; it needs more memory: raise the limit, min_count, or lower max_depth"
            return Seen("failed", f"{why}; see its log")
        if of_pod.get("phase") == "Failed" and of_pod.get("reason"):
            return Seen("failed", f"the pod {pod['metadata']['name']}: {of_pod['reason']}, {of_pod.get('message', '')}")
    return Seen("failed", f"{ended.get('reason', 'Failed')}: {ended.get('message', '')}")


def _problem(said: str) -> HiBug2Error | None:
    try:
        return status.error_of_problem(json_format.Parse(said, types_pb2.Problem()))
    except json_format.ParseError:
        return None


def _waits_for(pod: Mapping[str, Any] | None) -> str:
    """Why a pod does not run yet."""
    if pod is None:
        return "there is no pod yet"
    of_pod = pod.get("status", {})
    for container in of_pod.get("containerStatuses") or []:
        if waiting := container.get("state", {}).get("waiting"):
            return f"{waiting.get('reason', 'waiting')} {waiting.get('message', '')}".strip()
    for condition in of_pod.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] != "True":
            return f"{condition.get('reason', 'Unschedulable')}: {condition.get('message', '')}"
    return f"its pod is {of_pod.get('phase', 'Pending')}"


def _said(error: Any) -> str:
    """What the API says, without the headers that the library prints."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"
