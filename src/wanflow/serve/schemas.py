"""Describe requests and answers for the OpenAPI document; nothing validates with these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from wanflow.serve.fields import FIELDS, NOTHING, WRAPPERS

State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """A job and its video: OpenAI's fields, then ours."""

    id: str
    object: Literal["video"]
    model: str
    status: State
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    size: str
    seconds: str
    quality: str
    remixed_from_video_id: None
    prompt: str
    error: JobError | None
    width: int
    height: int
    num_frames: int
    fps: float
    seed: int | None
    step: int
    steps: int
    stage: str
    expert: str
    queue_position: int | None
    eta_seconds: int | None
    attempts: int
    cancelling: bool
    user: str | None
    media_type: str | None
    file_name: str | None
    inference_time_s: float | None
    stage_durations: dict[str, float]
    peak_memory_mb: float | None


class VideoList(BaseModel):
    """A page of jobs."""

    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A job that is gone."""

    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """Every answer that is no success."""

    error: Problem


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"]
    data: list[Model]


def submission() -> dict[str, Any]:
    """Return the schema of a submission's body, made from its table of fields."""
    picture = {
        "anyOf": [
            {"type": "string", "description": "data:image/png;base64,..."},
            {
                "type": "object",
                "properties": {"image_url": {"type": "string"}},
                "required": ["image_url"],
            },
        ]
    }
    loras = {"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "array"}]}
    known: dict[str, Any] = {}
    for name, field in FIELDS.items():
        shapes: dict[str, dict[str, Any]] = {"picture": picture, "lora": loras}
        schema = shapes.get(field.kind) or field.schema()
        known[name] = {**schema, "description": field.help}
    known["seconds"] |= {"anyOf": [{"type": "string"}, {"type": "number"}]}
    for name in WRAPPERS:
        known[name] = {"type": "object", "description": "its fields count as fields of the body"}
    for name, values in NOTHING.items():
        words = "accepted where it asks for nothing"
        known[name] = {"enum": [None, *values], "description": words}
    return {"type": "object", "required": ["prompt"], "properties": known}


def form() -> dict[str, Any]:
    """Return the same of a form, where pictures are files."""
    schema = submission()
    files = {"type": "string", "format": "binary"}
    for name, field in FIELDS.items():
        if field.kind == "picture":
            schema["properties"][name] = {**files, "description": field.help}
    return schema
