"""Settings of the prediction service."""

from __future__ import annotations

from pydantic import Field

from shared.config import ServiceSettings


class Settings(ServiceSettings):
    clip_model: str = Field("", description="open_clip model whose text tower embeds tags; empty: the embedded encoder")
    clip_pretrained: str = Field("", description="its weights: a tag that open_clip knows, or a path")
    neighbours: int = Field(3, ge=1, description="tags that each tag of an error slice is replaced by")
    max_origins: int = Field(5000, ge=1, description="error slices, the worst first, that are varied")
