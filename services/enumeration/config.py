"""Settings of the enumeration service."""

from __future__ import annotations

from pydantic import Field

from shared.config import ServiceSettings


class Settings(ServiceSettings):
    max_slices: int = Field(5_000_000, ge=1, description="a request for more slices is refused")
    max_table_bytes: int = Field(1 << 30, ge=1, description="most bytes of a table that is sent along")
    parallel_jobs: int = Field(2, ge=1, description="enumerations and rankings at work at a time; others wait")
