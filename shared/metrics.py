"""Prometheus metrics that every service has; a service's own live beside the code that they measure."""

from __future__ import annotations

import resource
from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram, start_http_server

# A method is one that the contract names, so that no caller can make new ones.
RPCS = Counter("hibug2_rpc_handled_total", "Calls that ended", ["method", "code"])
RPC_SECONDS = Histogram(
    "hibug2_rpc_seconds",
    "Time to serve a call",
    ["method", "code"],
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60, 600),
)
RPCS_IN_FLIGHT = Gauge("hibug2_rpc_in_flight", "Calls that are being served", ["method"])
CERTIFICATE_EXPIRY = Gauge(
    "hibug2_tls_certificate_expiry_seconds",
    "Seconds until the first of the certificates in a file that is shown to others ends",
    ["file"],
)
STORE_WRITE_FAILURES = Counter("hibug2_store_write_failures_total", "Writes that the artifact store did not take")
PEAK_MEMORY = Gauge("hibug2_peak_memory_bytes", "The most memory that the process had at a time")
PEAK_MEMORY.set_function(lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
TAGGED = Counter("hibug2_tagging_instances_total", "Instances whose tags were stored")
DEAD = Counter("hibug2_tagging_dead_total", "Instances that could not be tagged, and work items that were given up")
SLICES = Counter("hibug2_enumeration_slices_total", "Slices that enumerations found")
JOBS = Counter("hibug2_jobs_total", "Jobs that ended", ["service", "state"])
JOB_SECONDS = Histogram(
    "hibug2_job_seconds",
    "Time of a job from start to end",
    ["service"],
    buckets=(0.1, 1, 5, 20, 60, 300, 1800, 7200),
)
JOB_STEP_SECONDS = Histogram(
    "hibug2_job_step_seconds",
    "Time that a job was at a step",
    ["service", "step"],
    buckets=(0.1, 1, 5, 20, 60, 300, 1800, 7200),
)
LLM_CALLS = Counter(
    "hibug2_llm_calls_total",
    "Calls of language models: ok, invalid, refused, truncated, rate_limited, error, timeout, or cached",
    ["outcome"],
)
LLM_TOKENS = Counter("hibug2_llm_tokens_total", "Tokens as the endpoint counts them", ["team", "direction"])
LLM_SPEND = Counter(
    "hibug2_llm_spend_total", "What calls cost, and may have cost where no answer came", ["team", "currency"]
)
# Of accounts that are in use, and of a bounded number of them: see Ledger.capped.
LLM_BUDGET = Gauge(
    "hibug2_llm_budget_spent_ratio",
    "What an account has spent and reserved, over its cap, of the accounts that are in use",
    ["team", "account"],
)
LLM_CACHE = Counter("hibug2_llm_cache_total", "Looks for a kept answer", ["result"])
LLM_WAIT_SECONDS = Histogram(
    "hibug2_llm_wait_seconds",
    "Time for which a call had to wait: for requests or tokens a minute, in the queue, in a pause, for the budget",
    ["bucket"],
    buckets=(0.1, 1, 5, 20, 60, 300, 1800),
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
