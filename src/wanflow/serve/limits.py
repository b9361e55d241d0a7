"""Declare what a server accepts, and how long it keeps results; flags are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wanflow.config import RequestError
from wanflow.geometry import parse_size
from wanflow.request import PROMPT
from wanflow.settings import adopt, check, setting

IN: dict[str, Any] = {"group": "limits", "metavar": "N"}
KEPT: dict[str, Any] = {"group": "storage"}


@dataclass(frozen=True)
class Limits:
    """The largest request that is accepted, and the retention of results."""

    max_prompt: int = setting(
        5000, range=(1, PROMPT), help="characters of a prompt, and of a negative one", **IN
    )
    max_size: str = setting(
        "1280*720",
        group="limits",
        metavar="WIDTH*HEIGHT",
        help="the largest area of a video; its sides may be others",
    )
    max_frames: int = setting(257, range=(1, 1 << 20), help="frames of a video", **IN)
    max_steps: int = setting(100, range=(1, 1000), help="denoising steps", **IN)
    max_queue: int = setting(100, range=(1, 1_000_000), help="jobs that wait", **IN)
    max_body_mb: float = setting(
        32, range=(0.01, 1024), group="limits", metavar="MB", help="bytes of a request's body"
    )
    max_picture_mp: float = setting(
        40, range=(0.01, 100), group="limits", metavar="MP", help="megapixels of a picture"
    )
    keep_days: float = setting(
        7, range=(0.001, 10_000), metavar="DAYS", help="age at which a finished job goes", **KEPT
    )
    keep_gb: float = setting(
        50, range=(0.001, 1e6), metavar="GB", help="videos that are kept; the oldest go", **KEPT
    )
    min_free_gb: float = setting(
        1, range=(0, 1e6), metavar="GB", help="free disk below which no job is accepted", **KEPT
    )

    def __post_init__(self) -> None:
        adopt(Limits, self)
        check(Limits, self)
        try:
            parse_size(self.max_size)
        except RequestError as error:
            raise RequestError(f"--max_size: {error}") from None

    @property
    def area(self) -> int:
        """Pixels of a frame, at most."""
        width, height = parse_size(self.max_size)
        return width * height

    @property
    def body(self) -> int:
        """Bytes of a body, at most."""
        return int(self.max_body_mb * 1e6)
