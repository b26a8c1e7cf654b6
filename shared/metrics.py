"""Prometheus metrics that every service has; a service's own live beside the code that they measure."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter, Histogram, start_http_server

RPCS = Counter("hibug2_rpc_handled_total", "Calls that ended", ["method", "code"])
RPC_SECONDS = Histogram(
    "hibug2_rpc_seconds",
    "Time to serve a call",
    ["method"],
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60, 600),
)
JOBS = Counter("hibug2_jobs_total", "Jobs that ended", ["service", "state"])
JOB_SECONDS = Histogram(
    "hibug2_job_seconds",
    "Time of a job from start to end",
    ["service"],
    buckets=(0.1, 1, 5, 20, 60, 300, 1800, 7200),
)


def serve(port: int) -> Callable[[], None]:
    """Serve /metrics on `port` (0: not at all) and return the function that stops it."""
    if port == 0:
        return lambda: None
    server, thread = start_http_server(port)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
