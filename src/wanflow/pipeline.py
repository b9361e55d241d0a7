"""Turn a prompt into frames: begin a run, denoise it, decode it. The only denoising loop is here.

A run is a value (`Run`): the recipe of its video, and the solver's state. It is saved after any
step, and continues in another process to the same bits; at its last step it holds the final latent.
What a run needs of weights and devices comes from an `Engine`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wanflow.conditioning import Pictures, TextToVideo, conditioning_of, prepared
from wanflow.config import RequestError
from wanflow.files import write_bytes
from wanflow.geometry import GEOMETRIES
from wanflow.models.vae import WanVAE
from wanflow.presets import Expert, ModelSpec
from wanflow.recipe import Recipe
from wanflow.request import CompleteRequest, Request
from wanflow.sampling.schedule import snr
from wanflow.sampling.solvers import SolverState, Velocity, advance, state_names
from wanflow.sampling.timeline import schedule_of, timeline
from wanflow.sanity import OutputError, check_latent, check_step, facts_of
from wanflow.untrusted import open_regular, parse_json, printable

logger = logging.getLogger("wanflow")

Frames = npt.NDArray[np.uint8]
HEADER_BYTES = 16 << 20  # of a saved run, which holds little but its recipe


class Cancelled(Exception):
    """The callback stopped the run; `run` continues it, and `videos` were made before it."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"cancelled after step {run.state.index}")
        self.run, self.videos = run, list[Any]()


@dataclass(frozen=True)
class Run:
    """Everything that continues a run: its recipe, the solver's state, and its pictures.

    id: distinguishes it from every other run, also from one of the same recipe.
    """

    recipe: Recipe
    state: SolverState
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    pictures: Pictures = field(default_factory=dict)

    def __repr__(self) -> str:
        asked, (width, height) = self.request, self.request.size
        done = f"step {self.state.index} of {asked.sample_steps}"
        frames = f"{asked.frame_num} frame{'s' * (asked.frame_num != 1)} of {width}*{height}"
        return f"<Run: {done}, {frames}, seed {asked.seed}>"

    @property
    def request(self) -> CompleteRequest:
        return self.recipe.request

    @property
    def finished(self) -> bool:
        return self.state.index >= self.request.sample_steps

    def save(self, path: str | Path) -> None:
        """Write a file for `load`; a crash leaves the previous one complete."""
        from safetensors.torch import save

        named = {**self.state.tensors(), **self.pictures}
        tensors = {name: value.detach().cpu().contiguous() for name, value in named.items()}
        stored = {"recipe": self.recipe.to_json(), "index": self.state.index, "id": self.id}
        stored["sha256"] = _sum(tensors)
        data = save(tensors, metadata={"wanflow": json.dumps(stored)})
        write_bytes(Path(path), data, overwrite=True)

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a run that `save` wrote.

        Raises:
            RequestError: when the file is missing, damaged, no saved run, or not what its recipe
                says.
        """
        from safetensors import safe_open

        recipe, index, identity, checksum = cls._stored(path)
        request = recipe.request
        shapes = [[1, *each.latent_shape(request.size, request.frame_num)] for each in GEOMETRIES]
        picture = [[3, *request.size[::-1]]]
        wanted = dict.fromkeys(state_names(request.sample_solver, index), shapes)
        wanted |= dict.fromkeys(_pictures_of(request), picture)
        tensors = {}
        with _naming(path), safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if found != set(wanted):
                raise RequestError(f"tensors {sorted(found)[:9]}; expected {sorted(wanted)}")
            for name, expected in wanted.items():
                part = file.get_slice(name)
                if part.get_dtype() != "F32" or part.get_shape() not in expected:
                    is_ = f"{part.get_dtype()} {part.get_shape()}"
                    raise RequestError(f"{name} is {is_}; expected F32 {expected[0]}")
                tensors[name] = file.get_tensor(name).clone()  # the file may change
                if not torch.isfinite(tensors[name]).all():
                    raise RequestError(f"{name} holds NaN or infinity")
            if checksum not in (None, _sum(tensors)):
                raise RequestError("its tensors are not those that were saved")
        pictures = {name: tensors.pop(name) for name in _pictures_of(request)}
        if len({value.shape for value in tensors.values()}) > 1:
            raise RequestError("its tensors are of several shapes")
        return cls(recipe, SolverState.from_tensors(index, tensors), identity, pictures)

    @staticmethod
    def header(path: str | Path) -> tuple[Recipe, int, str]:
        """Return the recipe, the steps done and the id of a saved run; reads no tensors."""
        return Run._stored(path)[:3]

    @staticmethod
    def _stored(path: str | Path) -> tuple[Recipe, int, str, Any]:
        """Return what `header` does, and the checksum of the tensors."""
        from safetensors import safe_open

        if not Path(path).exists():
            raise RequestError(f"there is no saved run at {printable(path)}")
        with open_regular(Path(path)) as raw:
            length = int.from_bytes(raw.read(8), "little")
        with _naming(path):
            if length > HEADER_BYTES:
                raise RequestError(f"its header has {length:,} bytes")
            with safe_open(path, framework="pt") as file:
                stored = dict(parse_json((file.metadata() or {})["wanflow"], path))
            recipe, index = Recipe.from_json(stored["recipe"], path), stored["index"]
            steps = recipe.request.sample_steps
            if type(index) is not int or not 0 <= index <= steps:
                raise RequestError(f"it says step {printable(index)} of {steps}")
            # Runs of earlier versions had no id and no checksum.
            text = json.dumps(stored["recipe"], sort_keys=True).encode()
            identity = stored.get("id", hashlib.sha256(text).hexdigest()[:16])
            if not re.fullmatch("[0-9a-f]{16}", identity):
                raise RequestError(f"its id is {printable(identity)}")
            return recipe, index, identity, stored.get("sha256")


def _sum(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].numpy().data)
    return found.hexdigest()


def _pictures_of(request: CompleteRequest) -> list[str]:
    named = {"first": request.image, "last": request.last_image}
    return [name for name, picture in named.items() if picture is not None]


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turn whatever reading a damaged run raises into a RequestError that names the file."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise RequestError(
            f"{printable(path)} is not a saved wanflow run, or it is damaged: {printable(error)}"
        ) from None


@dataclass(frozen=True)
class Progress:
    """A finished step, as `on_step` gets it."""

    step: int  # steps done, 1-based
    steps: int
    timestep: float
    sigma: float
    snr: float
    expert: Expert
    latents: Tensor = field(repr=False)  # [1, z, t, h, w] float32
    run: Run


OnStep = Callable[[Progress], bool | None]  # returning False cancels
OnPart = Callable[[int, int], None]  # parts decoded, parts in total


@dataclass(frozen=True)
class Engine:
    """Everything that a run needs from outside the core, as callables; `assemble` makes them.

    spec: the model. device: where its states are.
    record: completes a request, and returns the recipe that a video of it will carry.
    check: raises RequestError for a run that cannot continue with this engine.
    share: moves a state to the device, the same one in every process of the run.
    condition: what is denoised in a run; encodes its pictures.
    velocity: what the solver asks, from the state of a run on.
    decode: a final latent as frames; calls `OnPart` with (done, total).
    agree: makes one answer of the answers of all processes of the run.
    used: a run with a recipe of what was really used, which may change while the engine works.
    """

    spec: ModelSpec
    device: torch.device
    record: Callable[[Request], Recipe]
    check: Callable[[Run], None]
    share: Callable[[SolverState], SolverState]
    condition: Callable[[Run], TextToVideo]
    velocity: Callable[[Run, TextToVideo], Velocity]
    decode: Callable[[Tensor, OnPart | None], Iterator[Frames]]
    agree: Callable[[bool], bool]
    used: Callable[[Run], Run] = lambda run: run


def begin(engine: Engine, request: Request) -> Run:
    """Complete a request and draw its noise: a run at step 0. Reads no weights."""
    recipe = engine.record(request)
    pictures = prepared(engine.spec, request, recipe.request.size)
    conditioning = conditioning_of(engine.spec, recipe.request)
    noise = conditioning.start(recipe.request.seed, recipe.noise_device)
    return Run(recipe, SolverState(0, noise.to(engine.device)), pictures=pictures)


@torch.no_grad()
def denoise(engine: Engine, run: Run, on_step: OnStep | None = None) -> Run:
    """Denoise a run from its state to its end.

    Raises:
        Cancelled: when `on_step` returned False; it carries the run.
        OutputError: for a latent that no further step can save.
    """
    if run.finished:
        return run
    schedule, steps = schedule_of(run.request), timeline(run.request, engine.spec)
    state = engine.share(run.state)
    engine.check(run)
    conditioning, facts = engine.condition(run), facts_of(run.recipe)
    if tuple(state.x.shape[1:]) != conditioning.shape:
        raise RequestError(
            f"this run's latent is {list(state.x.shape)}, and {engine.spec.name} makes"
            f" {[1, *conditioning.shape]} of its request: it is of another model"
        )
    velocity = engine.velocity(run, conditioning)
    state = replace(state, x=conditioning.held(state.x))
    while state.index < len(schedule):
        step = steps[state.index]
        state = advance(schedule, state, velocity)
        state = replace(state, x=conditioning.held(state.x))
        done = step.index + 1
        check_step(state.x, done, facts)
        run = engine.used(replace(run, state=state))
        where = done, len(schedule), step.timestep, step.sigma, snr(step.sigma), step.expert
        progress = Progress(*where, state.x, run)
        if engine.agree(on_step is not None and on_step(progress) is False):
            raise Cancelled(run)
    return run


@torch.no_grad()
def decode(engine: Engine, run: Run, on_part: OnPart | None = None) -> Iterator[Frames]:
    """Decode a finished run as it goes: uint8 [t, H, W, 3], the first frame alone.

    Args:
        engine: what decodes.
        run: a finished run.
        on_part: called with (done, total) after each part.

    Raises:
        RequestError: when the run is not finished.
        OutputError: when the latent or a frame is NaN or infinite.
    """
    if not run.finished:
        steps = f"{run.state.index} of {run.request.sample_steps}"
        raise RequestError(f"this run stands at step {steps}: finish it first (generate --resume)")
    for suspicion in check_latent(run.state.x, facts_of(run.recipe)):
        logger.warning(suspicion)
    yield from engine.decode(run.state.x.to(engine.device), on_part)


def to_frames(chunk: Tensor) -> Frames:
    """Convert [1, 3, n, H, W] in -1..1 to uint8 [n, H, W, 3]; OutputError for NaN or infinity."""
    if not torch.isfinite(chunk).all():
        raise OutputError("the VAE gave NaN or infinity: check its weights file")
    return to_uint8(chunk)


def to_uint8(video: Tensor) -> Frames:
    """Convert a video [3, T, H, W] or [1, 3, T, H, W] in -1..1 to uint8 [T, H, W, 3].

    Values are truncated, not rounded, as in the official code.
    """
    if video.ndim == 5 and video.shape[0] == 1:
        video = video[0]
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"a video of shape {list(video.shape)} is not [3, T, H, W]")
    frames = video.detach().float().clamp(-1, 1).add_(1).div_(2).mul_(255).byte()
    return np.asarray(frames.permute(1, 2, 3, 0).contiguous().cpu().numpy(), dtype=np.uint8)


def frame_by_frame(vae: WanVAE, latent: Tensor, on_part: OnPart | None) -> Iterator[Frames]:
    """Decode a latent one latent frame at a time: `Engine.decode` for a plain VAE."""
    for done, chunk in enumerate(vae.decode_frames(latent), 1):
        yield to_frames(chunk)
        if on_part is not None:
            on_part(done, latent.shape[2])
