"""Settings: environment variables `HIBUG2_…`, read once, frozen."""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated, Self, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class ServiceSettings(BaseSettings):
    """What every service is told."""

    model_config = SettingsConfigDict(env_prefix="HIBUG2_", frozen=True, extra="ignore")

    listen: str = Field("0.0.0.0:50051", description="host:port of the gRPC server; port 0 takes a free one")
    metrics_port: int = Field(9090, ge=0, le=65535, description="port of /metrics; 0 turns it off")
    reflection: bool = Field(False, description="serve gRPC reflection")
    drain_s: float = Field(20.0, ge=0, description="seconds that running calls get after SIGTERM")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")
    store_url: str = Field("file:///var/lib/hibug2", description="where artifacts live, any fsspec URL")
    redis_url: str = Field("redis://localhost:6379/0", description="queues and progress")


class ImageSettings(BaseSettings):
    """What a service that opens images is told beside."""

    model_config = SettingsConfigDict(env_prefix="HIBUG2_", frozen=True, extra="ignore")

    image_prefixes: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="URI prefixes, comma separated, that images may be read from; none by default"
    )

    @field_validator("image_prefixes", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value


class LLMEnvironment(BaseSettings):
    """How to reach a language model: any OpenAI-compatible endpoint; none when the base URL is empty."""

    model_config = SettingsConfigDict(env_prefix="HIBUG2_", frozen=True, extra="ignore")

    llm_base_url: str = Field("", description="for instance https://api.openai.com/v1; empty: measured attributes only")
    llm_api_key: SecretStr = Field(SecretStr(""), description="sent as bearer token")
    llm_model: str = Field("", description="the name of the model at that endpoint")
    llm_timeout_s: float = Field(120.0, gt=0)
    llm_max_concurrency: int = Field(16, ge=1, description="calls in flight of one process")
    prompts_dir: str = Field("", description="prompt files; empty: those that come with the code")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.llm_base_url and not self.llm_model:
            raise ValueError("HIBUG2_LLM_BASE_URL is set, so HIBUG2_LLM_MODEL must name a model")
        return self


Settings = TypeVar("Settings", bound=BaseSettings)


def load(settings: type[Settings], arguments: list[str]) -> Settings:
    """The settings from the environment; with `--print-config` they are printed (secrets masked) and the process ends.

    A wrong value ends the process with status 2 and a line for each variable that is wrong.
    """
    try:
        loaded = settings()
    except ValidationError as error:
        for problem in error.errors():
            variable = "_".join(str(part) for part in problem["loc"]).upper()
            print(f"HIBUG2_{variable}: {problem['msg']}" if variable else problem["msg"], file=sys.stderr)
        sys.exit(2)
    if "--print-config" in arguments:
        shown = json.dumps(loaded.model_dump(mode="json"), indent=2)
        print(re.sub(r"(://[^/@\s\"]*:)[^/@\s\"]+@", r"\1**********@", shown))  # passwords in URLs
        sys.exit(0)
    return loaded
