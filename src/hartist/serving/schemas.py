"""Requests and replies of the HTTP API: OpenAI's Images API, and fields of our own beside it"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_IMAGES = 10
SEED_LIMIT = 2**63 - 1

Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class ImageRequest(BaseModel):
    """`POST /v1/images/generations`. What OpenAI's clients send is understood; what this model has no use for is
    accepted and ignored (`quality`, `style`, `background`, `moderation`, `user`)."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="What the picture shows; a class number for class-conditional models.")
    model: str | None = Field(None, description="A name that `/v1/models` lists; the served model if left out.")
    n: int = Field(1, ge=1, le=MAX_IMAGES, strict=True, description="How many pictures; picture i has seed + i.")
    size: str | None = Field(None, max_length=32, description="`auto`, or the model's own size.")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="`b64_json` (default), or `url` of a picture that is kept for an hour at most."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        None, description="png by default; every kind says how it was made."
    )
    output_compression: int | None = Field(None, ge=0, le=100, strict=True, description="Quality of jpeg and webp.")
    stream: bool | None = Field(None, strict=True, description="Send server-sent events while the picture sharpens.")
    partial_images: int | None = Field(
        None, ge=0, le=100, strict=True, description="Previews in a stream; one a scale if left out."
    )
    quality: str | None = Field(None, max_length=32, description="Ignored.")
    style: str | None = Field(None, max_length=32, description="Ignored.")
    background: str | None = Field(None, max_length=32, description="Ignored.")
    moderation: str | None = Field(None, max_length=32, description="Ignored.")
    user: str | None = Field(None, max_length=256, description="Ignored.")

    seed: int | None = Field(
        None,
        ge=-SEED_LIMIT,
        le=SEED_LIMIT,
        strict=True,
        description="The same seed gives the same picture. Random if left out.",
    )
    negative_prompt: str | None = Field(None, description="What the picture should not show.")
    guidance: Finite | None = Field(None, ge=0, le=100, description="How strictly the prompt is followed.")
    top_k: int | None = Field(None, ge=0, le=1_000_000, strict=True, description="Codes to choose from; 0 for all.")
    top_p: Finite | None = Field(None, ge=0, le=1, description="0 for all codes.")
    temperature: Finite | None = Field(None, ge=0, le=100, description="0 is greedy.")
    residual: bool | None = Field(None, strict=True, description="Add residual tokens (the hybrid path).")
    diffusion_steps: int | None = Field(None, ge=1, le=1000, strict=True, description="Of the residual tokens.")

    fast: bool | None = Field(None, strict=True, description="Take shortcuts: sooner, a little less exact.")

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, values: Any) -> Any:
        """An error for each of a hundred thousand unknown fields would take a second, in which nobody is answered."""
        if isinstance(values, dict) and len(values) > 100:
            raise PydanticCustomError("too_many_fields", "there are more fields than any request has")
        return values


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    seed: int
    blocked: bool = False
    """The image filter has withheld the picture."""
    truncated_tokens: int = 0
    """At the end of the prompt, those that did not fit into the model's context."""


class ImageReply(BaseModel):
    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    size: str


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hartist"
    size: str
    scales: int
    """Grids from coarse to fine: a stream has one preview less than these at most."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorBody
