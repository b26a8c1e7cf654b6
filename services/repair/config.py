"""Settings of the repair service."""

from __future__ import annotations

from pydantic import Field

from shared.config import ImageSettings, ServiceSettings


class Settings(ServiceSettings, ImageSettings):
    max_budget: int = Field(1_000_000, ge=1, description="most instances that one selection may pick")
