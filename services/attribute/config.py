"""Settings of the attribute service."""

from __future__ import annotations

from pydantic import Field

from shared.config import ImageSettings, LLMEnvironment, ServiceSettings
from shared.schema import MAX_ATTRIBUTES


class Settings(ServiceSettings, ImageSettings, LLMEnvironment):
    sample_count: int = Field(1000, ge=1, description="images looked at for the thresholds of measured attributes")
    pair_count: int = Field(30, ge=1, le=1000, description="pairs of images that a language model compares")
    patience: int = Field(5, ge=1, le=1000, description="pairs in a row without a new attribute that end comparing")
    confusion_count: int = Field(10, ge=1, le=1000, description="pairs of classes, taken for one another, asked about")
    image_count: int = Field(100, ge=1, le=10_000, description="images that a language model looks at for missing tags")
    max_attributes: int = Field(MAX_ATTRIBUTES, ge=1, le=MAX_ATTRIBUTES)
    max_tags: int = Field(15, ge=4, le=100, description="most tags that a language model may give an attribute")
