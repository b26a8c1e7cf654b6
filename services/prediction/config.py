"""Settings of the prediction service."""

from __future__ import annotations

from pydantic import Field

from shared.config import LLMEnvironment, ServiceSettings


class Settings(ServiceSettings, LLMEnvironment):
    clip_model: str = Field("", description="open_clip model whose text tower embeds tags; empty: the embedded encoder")
    clip_weights: str = Field("", description="its weights: a path, or a tag that open_clip knows")
    neighbours: int = Field(3, ge=1, description="tags that each tag of an error slice is replaced by")
    max_origins: int = Field(5000, ge=1, description="error slices, the worst first, that are varied")
    target_count: int = Field(2, ge=1, description="confusable classes of each that a language model is asked about")
    question_count: int = Field(100, ge=1, description="most questions of one prediction to a language model")
