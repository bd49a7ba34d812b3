"""Configuration of the endpoint: `RunConfig.serve`. A part of `spo.config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from spo.config.base import Positive, Slice

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServeConfig(Slice):
    """The OpenAI-compatible endpoint. The engine itself is configured by `engine`."""

    host: str = "127.0.0.1"
    """Address that the server listens on; anything but loopback needs `keys_file`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    model_name: str | None = None
    """Name that clients use; None takes the model's own. Steered models are NAME:VECTOR."""
    auth: Literal["keys", "none"] = "keys"
    """`none` lets everybody in and is refused anywhere but on loopback."""
    keys_file: Path | None = None
    """JSON of hashed keys, read again when it changes; see `spo.serving.keys`."""
    unsteered: bool = True
    """Whether keys with the scope `unsteered` may ask for the model without a vector."""
    state_dir: Path | None = None
    """Loaded vectors and their history; None: `serve/` in the run folder."""
    artifacts_dir: Path | None = None
    """Folder whose artifacts may be loaded over HTTP; None allows only those given at the start."""
    gateways: Positive = 1
    """Ingress replicas."""
    min_engines: Positive = 1
    max_engines: Positive = 1
    target_requests: Positive = 32
    """Requests per engine that autoscaling aims for."""
    max_in_flight: Positive = 128
    """Requests that one gateway works on; more are refused with 429."""
    max_per_key: Positive = 128
    """The same for a single key."""
    max_body_mib: Annotated[float, Field(gt=0)] = 24.0
    max_messages: Positive = 64
    max_images: Positive = 4
    max_image_mib: Annotated[float, Field(gt=0)] = 8.0
    max_pixels: Positive = 16_000_000
    """Pixels of one picture, read from its header before it is decoded."""
    image_hosts: tuple[str, ...] = ()
    """Hosts that pictures may be fetched from by https; empty switches it off."""
    image_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    max_tokens: Positive = 1024
    """Largest answer that a request may ask for."""
    default_max_tokens: Positive = 256
    max_dose: Annotated[float, Field(gt=0)] = 2.0
    """Largest dose relative to the hidden norm that a request may ask for."""
    slots: Annotated[int, Field(ge=8)] = 32
    """Vector versions that an engine holds at once, four for each name."""
    keep_versions: Annotated[int, Field(ge=2)] = 8
    """Versions of a name that are kept for rolling back."""
    deadline_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest answer, waiting included."""
    drain_s: Annotated[float, Field(gt=0)] = 150.0
    """How long a replica that stops may finish its answers; above `deadline_s`."""
    health_period_s: Annotated[float, Field(gt=0)] = 10.0
    health_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """An engine that makes no token for so long while it is asked for one is restarted."""
    sync_s: Annotated[float, Field(gt=0)] = 1.0
    """How often a gateway looks for vectors that another one loaded."""
    stream_interval_ms: Annotated[float, Field(ge=0)] = 20.0
    """Tokens that come closer together than this are sent as one piece."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM, e.g. {max_num_batched_tokens: 4096}; several cards:
    `engine.tensor_parallel_size`."""

    @model_validator(mode="after")
    def _limits_agree(self) -> ServeConfig:
        if self.drain_s <= self.deadline_s:
            raise ValueError("'drain_s' must be above 'deadline_s', or stopping cuts answers off")
        if self.max_engines < self.min_engines:
            raise ValueError("'max_engines' must be at least 'min_engines'")
        if self.default_max_tokens > self.max_tokens:
            raise ValueError("'default_max_tokens' must be at most 'max_tokens'")
        loopback = self.host in LOOPBACK
        if not loopback and (self.auth == "none" or self.keys_file is None):
            raise ValueError(
                f"listening on {self.host} needs 'auth: keys' and a 'keys_file' "
                "(python -m jobs.serve --add-key NAME)"
            )
        return self
