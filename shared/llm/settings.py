"""How to reach a model, and how much to ask of it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from shared.llm.tokens import Detail


class LLMSettings(BaseModel):
    """How to reach a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = Field(pattern=r"^https?://[^/\s]+")
    api_key: SecretStr = SecretStr("")
    model: str = Field(min_length=1)
    timeout_s: float = Field(120.0, gt=0)  # of one attempt; max_attempts times as much bounds a call with its retries
    max_concurrency: int = Field(16, ge=1)
    max_attempts: int = Field(5, ge=1)
    requests_per_minute: int = Field(0, ge=0)  # of all processes together; 0 for no limit
    tokens_per_minute: int = Field(0, ge=0)
    image_detail: Detail = "auto"
    cache_ttl_s: float = Field(86_400.0, ge=0)
