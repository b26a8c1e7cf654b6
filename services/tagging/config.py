"""Settings of the tagging service and its workers."""

from __future__ import annotations

from pydantic import Field

from shared.config import ClipSettings, ImageSettings, LLMEnvironment, ServiceSettings


class Settings(ServiceSettings, ImageSettings, LLMEnvironment, ClipSettings):
    item_rows: int = Field(64, ge=1, le=1000, description="instances of a work item when all attributes are measured")
    llm_item_rows: int = Field(8, ge=1, le=1000, description="instances of a work item when some are asked of an LLM")
    clip_device: str = Field("cpu", description="where CLIP runs, in torch's words: cpu, cuda, cuda:1")
    min_kappa: float = Field(
        0.6, ge=-1, le=1, description="agreement beyond chance below which a check of tags calls an attribute doubtful"
    )
    lease_s: float = Field(60.0, gt=0, description="silence after which a worker's items go to another")
    max_deliveries: int = Field(5, ge=1, description="deliveries after which an item counts as dead")
    patience_s: float = Field(
        300.0, ge=0, description="seconds that a worker waits for a storage or model that is away"
    )
    interactive_rows: int = Field(1000, ge=0, description="a tagging of at most so many instances is interactive")
    team_items: int = Field(0, ge=0, description="work items of a team in the queue; 0: twice what workers can hold")
    max_backlog: int = Field(200_000, ge=1, description="work items that may wait before a new tagging is refused")
    flush_rows: int = Field(4096, ge=1, description="instances whose results are kept in Redis before they are stored")
    flush_s: float = Field(30.0, gt=0, description="seconds that results are kept in Redis before they are stored")
