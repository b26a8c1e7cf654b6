"""Settings of the tagging service and its workers."""

from __future__ import annotations

from pydantic import Field

from shared.config import ImageSettings, LLMEnvironment, ServiceSettings


class Settings(ServiceSettings, ImageSettings, LLMEnvironment):
    item_rows: int = Field(64, ge=1, le=1000, description="instances of a work item when all attributes are measured")
    llm_item_rows: int = Field(8, ge=1, le=1000, description="instances of a work item when some are asked of an LLM")
    lease_s: float = Field(60.0, ge=1, description="silence after which a worker's items go to another")
    max_deliveries: int = Field(5, ge=1, description="deliveries after which an item counts as dead")
