"""Settings of the attribute service."""

from __future__ import annotations

from pydantic import Field

from shared.config import ImageSettings, LLMEnvironment, ServiceSettings
from shared.schema import MAX_ATTRIBUTES


class Settings(ServiceSettings, ImageSettings, LLMEnvironment):
    sample_count: int = Field(1000, ge=1, description="images looked at for the thresholds of measured attributes")
    max_attributes: int = Field(MAX_ATTRIBUTES, ge=1, le=MAX_ATTRIBUTES)
    max_tags: int = Field(15, ge=2, le=1000, description="most tags that a language model may give an attribute")
