"""Settings of the prediction service."""

from __future__ import annotations

from pydantic import Field

from shared.config import ClipSettings, LLMEnvironment, ServiceSettings


class Settings(ServiceSettings, LLMEnvironment, ClipSettings):
    """The text tower of the CLIP model embeds tags; without one the embedded encoder does."""

    neighbours: int = Field(3, ge=1, description="tags that each tag of an error slice is replaced by")
    max_origins: int = Field(5000, ge=1, description="error slices, the worst first, that are varied")
    target_count: int = Field(2, ge=1, description="confusable classes of each that a language model is asked about")
    question_count: int = Field(100, ge=1, description="most questions of one prediction to a language model")
