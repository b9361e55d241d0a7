"""Make videos from Python: lists, seeds, advice as warnings, bars, one run at a time."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from threading import RLock
from typing import TYPE_CHECKING, Any, NoReturn, overload

from wanflow import api
from wanflow.config import RequestError
from wanflow.pipeline import Cancelled, Engine, Frames, OnPart, OnStep, Progress, Run
from wanflow.request import PICTURES, VIDEOS, CompleteRequest, Request, with_settings
from wanflow.settings import check
from wanflow.untrusted import shown
from wanflow.video import Video
from wanflow.wording import without_flags

if TYPE_CHECKING:
    from typing import Unpack

    from wanflow.options import RequestOptions
    from wanflow.screen import Screen

# What other programs call our fields.
ELSEWHERE = {
    "num_frames": "frame_num",
    "num_inference_steps": "sample_steps",
    "guidance_scale": "cfg_high and cfg_low",
    "guidance_scale_2": "cfg_low",
    "height": "size",
    "width": "size",
    "generator": "seed",
    "num_videos_per_prompt": "a list of seeds",
    "callback_on_step_end": "on_step",
    "torch_dtype": "dtype",
}


class RequestWarning(UserWarning):
    """A request or a model that is accepted and known to give poor videos."""


class Pipeline(api.Pipeline):
    """A loaded model; made by `wanflow.load`.

    A second thread waits until the run of the first has ended.

    parts: what the engine's callables read from, for tools that look inside; may be None.
    """

    def __init__(
        self,
        engine: Engine,
        parts: Any = None,
        advise: Callable[[CompleteRequest], Iterable[str]] | None = None,
        display: Display | None = None,
    ) -> None:
        super().__init__(engine, parts)
        self._advise, self._display = advise, display or Display(False)
        self._turn = Turn()

    def __repr__(self) -> str:
        return f"<Pipeline: {self.spec.name} on {self.engine.device}>"

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise RequestError("a pipeline is not copied or pickled; call wanflow.load once more")

    @overload
    def generate(
        self,
        prompt: str | Request,
        on_step: OnStep | None = None,
        progress: bool | None = None,
        *,
        seed: int | None = None,
        **request: Unpack[RequestOptions],
    ) -> Video: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[Request] | tuple[str | Request, ...],
        on_step: OnStep | None = None,
        progress: bool | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        **request: Unpack[RequestOptions],
    ) -> list[Video]: ...

    @overload
    def generate(
        self,
        prompt: str | Request,
        on_step: OnStep | None = None,
        progress: bool | None = None,
        *,
        seed: Sequence[int],
        **request: Unpack[RequestOptions],
    ) -> list[Video]: ...

    def generate(
        self,
        prompt: Any,
        on_step: OnStep | None = None,
        progress: bool | None = None,
        **request: Any,
    ) -> Any:
        """Make a video, or a list of videos where `prompt` or `seed` is a list.

        Two lists are of equal length and go in pairs; one alone is combined with the other value.

        Args:
            prompt: what the video shows, or a `wanflow.Request`, or a list of either.
            on_step: called after each step with a `Progress`; returning False cancels.
            progress: show a bar on a terminal or in a notebook; None: as `wanflow.load` was asked.
            **request: fields of `wanflow.Request` (negative_prompt, size, frame_num, sample_steps,
                sample_shift, sample_solver, cfg_high, cfg_low, boundary, fps, seed, lora, ...), and
                `preset`, the name of a step preset.

        Raises:
            RequestError: for invalid values.
            Cancelled: when `on_step` returned False; it carries the run, which `resume` continues,
                and the videos of a list that were finished.
            OutputError: when the result is NaN or constant.
        """
        _refuse_no_function(on_step)
        requests, many = requests_of(prompt, request)
        with without_flags(), self._turn():
            notes = [note for one in requests for note in self._notes(one)]
            for note in dict.fromkeys(notes):
                warnings.warn(note, RequestWarning, stacklevel=2)
            if self.parts is not None and len(requests) > 1:
                self.parts.remember(prompts_of(one.complete(self.spec) for one in requests))
            videos: list[Video] = []
            for one in requests:
                try:
                    videos.append(self._make(one, on_step, progress))
                except Cancelled as stop:
                    stop.videos = videos
                    raise
        return videos if many else videos[0]

    def begin(self, request: Request) -> Run:
        """Complete a request and draw its noise: a run at step 0. Reads no weights."""
        _refuse_other("begin", request, Request)
        return super().begin(with_pictures(request))

    def resume(self, run: Run, on_step: OnStep | None = None) -> Run:
        """Denoise a run from its state to its end; see `wanflow.pipeline.denoise`.

        Several processes continue the first one's state, and its `on_step` decides for all.
        """
        _refuse_other("resume", run, Run)
        _refuse_no_function(on_step)
        with self._turn():
            return super().resume(run, on_step and self._turn.watched(on_step))

    def frames(self, run: Run, on_part: OnPart | None = None) -> Iterator[Frames]:
        """Decode a finished run as it goes; see `wanflow.pipeline.decode`.

        Of several processes the first one gets the frames; each must go through to the end.
        """
        _refuse_other("frames", run, Run)
        chunks = super().frames(run, on_part)
        while True:
            with self._turn():  # not while the caller uses a chunk
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def finish(self, run: Run, on_part: OnPart | None = None) -> Video:
        """Decode a finished run. Of several processes the first one gets a video with frames."""
        _refuse_other("finish", run, Run)
        video = super().finish(run, on_part)
        return Video(video.frames, video.fps, video.recipe)

    def _notes(self, request: Request) -> Iterable[str]:
        """Check a request before the first of all is made; return what to know about it."""
        complete = request.complete(self.spec)
        return self._advise(complete) if self._advise is not None else ()

    def _make(self, request: Request, on_step: OnStep | None, progress: bool | None) -> Video:
        run = self.begin(request)
        with self._display.showing(run, progress) as (watch, on_part):
            run = self.resume(run, _both(on_step, watch))
            return self.finish(run, on_part)


class Turn:
    """Lets one thread at a time use a pipeline, in the process that loaded it."""

    def __init__(self) -> None:
        self._lock, self._process, self._watching = RLock(), os.getpid(), False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Wait for this thread's turn, and keep it while the block lasts."""
        if os.getpid() != self._process:
            raise RequestError(
                "this pipeline was loaded before a fork, and its process owns it; call wanflow.load"
                " in the child"
            )
        with self._lock:
            if self._watching:
                raise RequestError(
                    "on_step was called within a run of this pipeline; return from it before the"
                    " next one"
                )
            yield

    def watched(self, on_step: OnStep) -> OnStep:
        """Return a callback during which this thread may begin no other run."""

        def watch(progress: Progress) -> bool | None:
            self._watching = True
            try:
                return on_step(progress)
            finally:
                self._watching = False

        return watch


class Display:
    """Shows bars on a terminal or in a notebook, and nothing elsewhere.

    wanted: whether a run that does not say so is shown.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._screen: Screen | None = None

    def report(self, what: str, done: int, total: int) -> None:
        """Show how far the weights of a part are read, during a run that is shown."""
        if self._screen is not None:
            self._screen.loading(what, done, total)

    @contextmanager
    def showing(
        self, run: Run, progress: bool | None
    ) -> Iterator[tuple[OnStep | None, OnPart | None]]:
        """Yield callbacks that show a run's steps and decoded parts; None where nothing shows."""
        if not (self.wanted if progress is None else progress) or not _seen():
            yield None, None
            return
        from wanflow.screen import Screen

        self._screen = screen = Screen()
        try:
            with screen.denoising(run) as watch:
                yield watch, screen.decoded
        finally:
            self._screen = None
            screen.close()


def _seen() -> bool:
    """Return whether a person sees standard error."""
    if "ipykernel" in sys.modules:
        return True
    return sys.stderr is not None and sys.stderr.isatty()


def _both(on_step: OnStep | None, watch: OnStep | None) -> OnStep | None:
    """Return a callback that calls two; the first decides."""
    if on_step is None or watch is None:
        return on_step or watch

    def both(progress: Progress) -> bool | None:
        watch(progress)
        return on_step(progress)

    return both


def requests_of(prompt: Any, options: dict[str, Any]) -> tuple[list[Request], bool]:
    """Return the requests of a call of `generate`, and whether it asks for a list.

    Raises:
        RequestError: for unknown or invalid values, and lists of unequal lengths.
    """
    known = [field.name for field in fields(Request) if field.name != "prompt"]
    refuse_unknown("generate", options, ["prompt", *known, "preset", "on_step", "progress"])
    options = {**options, **opened(options)}
    preset, seed = options.pop("preset", None), options.pop("seed", None)
    prompts, seeds = _items("prompt", prompt), _items("seed", seed)
    count = max(len(prompts or ()), len(seeds or ()), 1)
    prompts, seeds = prompts or [prompt] * count, seeds or [seed] * count
    if len(prompts) != len(seeds):
        raise RequestError(
            f"{len(prompts)} prompts and {len(seeds)} seeds: lists of equal length go in pairs"
        )
    requests = []
    for text, number in zip(prompts, seeds, strict=True):
        asked = text if isinstance(text, Request) else Request(text)
        if number is not None:
            asked = replace(asked, seed=number)
        asked = with_pictures(replace(asked, **options))
        requests.append(asked if preset is None else with_settings(asked, preset))
        check(Request, requests[-1])
    return requests, isinstance(prompt, list | tuple) or _is_list(seed)


def opened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pictures among the fields of a request, opened; see `wanflow.pictures`."""
    given = {name: values.get(name) for name in PICTURES}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return {}
    from wanflow.pictures import open_picture

    return {name: open_picture(value, name) for name, value in given.items()}


def with_pictures(request: Request) -> Request:
    """Return a request with its pictures opened."""
    pictures = opened(vars(request))
    return replace(request, **pictures) if pictures else request


def _is_list(value: Any) -> bool:
    """Return whether a value is a list, a range, or numpy's list."""
    return isinstance(value, list | tuple | range) or getattr(value, "ndim", 0) == 1


def _items(name: str, value: Any) -> list[Any] | None:
    """Return the items of a list; None for a single value."""
    if not _is_list(value):
        return None
    if not 0 < len(value) <= VIDEOS:
        raise RequestError(f"{name} is a list of {len(value):,}; expected 1 to {VIDEOS:,} items")
    return list(value)


def prompts_of(requests: Iterable[CompleteRequest]) -> list[str]:
    """Return the texts that requests have, each once."""
    pairs = ((one.prompt, one.negative_prompt) for one in requests)
    return list(dict.fromkeys(text for pair in pairs for text in pair))


def refuse_unknown(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise RequestError for a keyword that a call does not know, with the nearest that it does."""
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, 1)
        hint = ELSEWHERE.get(name) or (near[0] if near else "")
        also = f"did you mean {hint}?" if hint else f"it knows {', '.join(sorted(known))}"
        raise RequestError(f"{what} does not know {shown(name)[1:-1]}; {also}")


def _refuse_other(call: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise RequestError(f"{call} takes a wanflow.{kind.__name__} (got {shown(value)})")


def _refuse_no_function(on_step: object) -> None:
    if on_step is not None and not callable(on_step):
        raise RequestError(f"on_step must be a function (got {shown(on_step)})")
