"""Settings of the enumeration service."""

from __future__ import annotations

from pydantic import Field

from shared.config import ServiceSettings


class Settings(ServiceSettings):
    max_slices: int = Field(5_000_000, ge=1, description="a request for more slices is refused")
    max_table_bytes: int = Field(1 << 30, ge=1, description="most bytes of a table that is sent along")
    parallel_jobs: int = Field(2, ge=1, description="enumerations and rankings at work at a time; others wait")
    jobs_enabled: bool = Field(False, description="do big enumerations in Kubernetes Jobs; the service runs in a pod")
    jobs_min_slices: int = Field(1_000_000, ge=1, description="estimated slices from which an enumeration is big")
    jobs_namespace: str = Field("", description="where Jobs are made; empty: the pod's own namespace")
    jobs_image: str = Field("", description="the image of Jobs; empty: the pod's own")
    jobs_service_account: str = Field("", description="the account of Jobs' pods; empty: the pod's own")
    jobs_start_s: float = Field(600.0, gt=0, description="seconds in which a Job's pod must have begun")
