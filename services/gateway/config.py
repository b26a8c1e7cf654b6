"""Settings of the gateway."""

from __future__ import annotations

from pydantic import Field

from shared.config import ImageSettings, ServiceSettings


class Settings(ServiceSettings, ImageSettings):
    http_port: int = Field(8080, ge=0, le=65535, description="HTTP/JSON and the web pages; 0 turns them off")
    http_host: str = Field("0.0.0.0", description="address the HTTP port is bound to")  # noqa: S104
    attribute_address: str = "dns:///localhost:50052"
    tagging_address: str = "dns:///localhost:50053"
    enumeration_address: str = "dns:///localhost:50054"
    prediction_address: str = "dns:///localhost:50055"
    repair_address: str = "dns:///localhost:50056"
    max_upload_bytes: int = Field(1 << 30, ge=1, description="most bytes of instances or scores in one call")
    max_instances: int = Field(10_000_000, ge=1, description="most instances of a dataset")
    image_check_threads: int = Field(8, ge=1, description="images opened at a time when a dataset is created")
