"""Settings: environment variables `HIBUG2_…`, read once, frozen."""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated, Literal, Self, TypeVar

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
    redis_url: str = Field("redis://localhost:6379/0", description="queues and progress; with TLS rediss://user:…@…")
    tls_cert_file: str = Field("", description="PEM chain that the server shows, and calls to others; empty: no TLS")
    tls_key_file: str = Field("", description="PEM key of that certificate")
    tls_client_ca_file: str = Field("", description="PEM of who signs callers; set: a caller must show a certificate")
    tls_ca_file: str = Field("", description="PEM of who signs the services that are called; empty: called without TLS")
    health_port: int = Field(0, ge=0, le=65535, description="gRPC health without TLS, for probes; 0: on `listen` alone")
    otlp_endpoint: str = Field("", description="traces go to this OTLP collector (gRPC, host:port or URL); empty: none")

    @model_validator(mode="after")
    def _whole_identity(self) -> Self:
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ValueError("HIBUG2_TLS_CERT_FILE and HIBUG2_TLS_KEY_FILE go together; one of them is not set")
        if self.tls_client_ca_file and not self.tls_cert_file:
            raise ValueError("HIBUG2_TLS_CLIENT_CA_FILE is for a server with TLS; set HIBUG2_TLS_CERT_FILE as well")
        return self


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


class ClipSettings(BaseSettings):
    """Which CLIP model; none when its name is empty. Needs the extra `clip`."""

    model_config = SettingsConfigDict(env_prefix="HIBUG2_", frozen=True, extra="ignore")

    clip_model: str = Field("", description="a model of open_clip, for instance ViT-B-32; empty: none")
    clip_weights: str = Field("", description="its weights: the path of a file, or one of open_clip's tags")

    @model_validator(mode="after")
    def _with_weights(self) -> Self:
        if self.clip_model and not self.clip_weights:
            raise ValueError("HIBUG2_CLIP_MODEL is set, so HIBUG2_CLIP_WEIGHTS must name its weights")
        return self


class LLMEnvironment(BaseSettings):
    """How to reach a language model: any OpenAI-compatible endpoint; none when the base URL is empty."""

    model_config = SettingsConfigDict(env_prefix="HIBUG2_", frozen=True, extra="ignore")

    llm_base_url: str = Field("", description="for instance https://api.openai.com/v1; empty: measured attributes only")
    llm_api_key: SecretStr = Field(SecretStr(""), description="sent as bearer token")
    llm_model: str = Field("", description="the name of the model at that endpoint")
    llm_timeout_s: float = Field(120.0, gt=0)
    llm_max_concurrency: int = Field(16, ge=1, description="calls in flight of one process")
    llm_requests_per_minute: int = Field(0, ge=0, description="of all processes together; 0: no limit")
    llm_tokens_per_minute: int = Field(0, ge=0, description="input and output, of all processes; 0: no limit")
    llm_image_detail: Literal["auto", "low", "high"] = Field("auto", description="auto: what the prompt says")
    llm_prices: str = Field("", description="a price table in YAML; empty: the one that comes with the code")
    llm_cache_ttl_s: float = Field(86_400.0, ge=0, description="seconds that a team's answers are kept; 0: not at all")
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
