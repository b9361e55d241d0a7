"""wanflow: run Wan2.2 (T2V-A14B, I2V-A14B, TI2V-5B), or its miniatures, from Python.

    import wanflow
    pipe = wanflow.load("nano")
    video = pipe.generate("a red circle moves left on a blue background", seed=7)
    video.save("out.mp4")

Importing the package imports nothing heavy: each name below is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanflow import presets
    from wanflow.config import RequestError
    from wanflow.front import Pipeline, RequestWarning
    from wanflow.opening import load
    from wanflow.pipeline import Cancelled, Progress, Run
    from wanflow.preview import Previewer
    from wanflow.request import Request
    from wanflow.runtime import Runtime
    from wanflow.sanity import OutputError
    from wanflow.video import Video

_HOME = {
    "load": "opening",
    "Request": "request",
    "RequestError": "config",
    "RequestWarning": "front",
    "Runtime": "runtime",
    "Cancelled": "pipeline",
    "OutputError": "sanity",
    "Pipeline": "front",
    "Previewer": "preview",
    "Progress": "pipeline",
    "Run": "pipeline",
    "Video": "video",  # api's, with `save`
}

__all__ = [
    "Cancelled",
    "OutputError",
    "Pipeline",
    "Previewer",
    "Progress",
    "Request",
    "RequestError",
    "RequestWarning",
    "Run",
    "Runtime",
    "Video",
    "load",
    "presets",
]


__version__ = "0.4.0"  # the one home of the version; CHANGELOG.md has its heading


def __getattr__(name: str) -> Any:
    if name == "presets":
        return import_module("wanflow.presets")
    if name in _HOME:
        return getattr(import_module(f"wanflow.{_HOME[name]}"), name)
    raise AttributeError(f"module 'wanflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
