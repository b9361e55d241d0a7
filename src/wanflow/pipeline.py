"""A prompt becomes frames: encode, denoise, decode. The only denoising loop is here.

A run is a value (`Run`): the complete request, what made it, and the solver's state. It can be
saved after any step and continued in another process to the same bits; at its last step it holds
the final latent.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wanflow import media as files
from wanflow.config import RequestError
from wanflow.files import write_bytes
from wanflow.geometry import geometry_of
from wanflow.models.dit import TextStates, WanDiT
from wanflow.models.vae import WanVAE
from wanflow.parallel import cfg
from wanflow.parallel import vae_parallel as strips
from wanflow.parallel.groups import Layout, ParallelContext, simulated_groups
from wanflow.parallel.sequence import sharded
from wanflow.presets import Expert, ModelSpec
from wanflow.recipe import Recipe
from wanflow.request import CompleteRequest, Lora, Request, with_settings
from wanflow.runtime import batch_guidance
from wanflow.sampling.guidance import guide
from wanflow.sampling.schedule import Step, snr
from wanflow.sampling.solvers import SolverState, Velocity, advance
from wanflow.sampling.timeline import handover, schedule_of, timeline
from wanflow.sanity import Facts, OutputError, check_latent, check_step
from wanflow.transforms.block_streaming import Streaming
from wanflow.transforms.vae_tiling import decode_frames as decode_in_tiles

logger = logging.getLogger("wanflow")

Frames = npt.NDArray[np.uint8]


class Cancelled(Exception):
    """The callback asked to stop; `run` is where the run stands."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"cancelled after step {run.state.index}")
        self.run = run


@dataclass(frozen=True)
class Run:
    """Everything that continues a run: its recipe and the solver's state."""

    recipe: Recipe
    state: SolverState

    @property
    def request(self) -> CompleteRequest:
        return self.recipe.request

    @property
    def finished(self) -> bool:
        return self.state.index >= self.request.sample_steps

    def save(self, path: str | Path) -> None:
        """Write a file for `load`; a crash leaves the previous one complete."""
        from safetensors.torch import save

        meta = {"wanflow": json.dumps({"recipe": self.recipe.to_json(), "index": self.state.index})}
        data = save(
            {
                name: value.detach().cpu().contiguous()
                for name, value in self.state.tensors().items()
            },
            metadata=meta,
        )
        write_bytes(Path(path), data, overwrite=True)

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read what `save` wrote.

        Raises:
            RequestError: when the file is missing, damaged or something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                stored = json.loads((file.metadata() or {})["wanflow"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            recipe = Recipe.from_json(stored["recipe"], path)
            return cls(recipe, SolverState.from_tensors(int(stored["index"]), tensors))
        except FileNotFoundError:
            raise RequestError(f"there is no saved run at {path}") from None
        except (
            OSError,
            SafetensorError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise RequestError(
                f"{path} is not a saved wanflow run, or it is damaged: {error}"
            ) from None


@dataclass(frozen=True)
class Progress:
    """What `on_step` is told after each step."""

    step: int  # steps done, 1-based
    steps: int
    timestep: float
    sigma: float
    snr: float
    expert: Expert
    latents: Tensor  # [1, z, t, h, w] float32
    run: Run


OnStep = Callable[[Progress], bool | None]  # returning False cancels
OnPart = Callable[[int, int], None]  # parts decoded, and in all


@dataclass(frozen=True)
class Video:
    """A finished video: frames uint8 [T, H, W, 3], frames per second, and the recipe that made
    it.
    """

    frames: Frames
    fps: float
    recipe: dict[str, Any]

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write an mp4 (a PNG where there is one frame) with the recipe inside; returns the path.

        Writes nothing where there are no frames, as on other processes than the first.
        """
        if not len(self.frames):
            return Path(path)
        return save_frames(Path(path), iter([self.frames]), self.fps, self.recipe, overwrite)


def save_frames(
    path: Path,
    chunks: Iterator[Frames],
    fps: float,
    recipe: dict[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write frames as they come; the file appears under its name only when it is whole.

    Raises:
        OutputError: when all frames are one constant; nothing is left under `path`.
    """
    tags = files.recipe_tags(recipe, recipe["request"]["prompt"])
    first = next(chunks)
    if path.suffix.lower() == ".png":
        if any(len(chunk) for chunk in chunks) or len(first) != 1:
            raise RequestError(
                f"{path.name}: a PNG holds one frame; ask for frame_num 1 or name an .mp4"
            )
        refuse_constant(int(first.min()), int(first.max()))
        files.save_picture(path, first[0], tags, overwrite)
        return path
    low, high = int(first.min()), int(first.max())
    with files.VideoWriter(
        path, first.shape[2], first.shape[1], fps, tags, overwrite=overwrite
    ) as writer:
        writer.write(first)
        for chunk in chunks:
            writer.write(chunk)
            low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
        refuse_constant(low, high)
    return path


def refuse_constant(low: int, high: int) -> None:
    """Raise where every value of a video is the same."""
    if low == high:
        raise OutputError(
            f"the output is constant (every value is {low}): the weights are empty or damaged, or"
            " the model is not a Wan2.2 one"
        )


class Parts(Protocol):
    """Where the pipeline gets its models; `assemble` decides what stays in memory."""

    preset: ModelSpec
    device: torch.device

    def recipe(self, request: CompleteRequest, loras: tuple[Lora, ...]) -> Recipe:
        """What a video of these parts is made again from."""

    def text(self, prompts: list[str]) -> Tensor:
        """Text states [B, text_len, D], zero past each prompt's end."""

    def find_loras(self, wanted: tuple[Lora, ...]) -> tuple[Lora, ...]:
        """The LoRA files that are meant, with every strength settled."""

    def use_loras(self, loras: tuple[Lora, ...], recorded: dict[str, str] | None = None) -> None:
        """Take these as the LoRAs of what follows; `recorded`: fingerprints they must have."""

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> WanDiT | Streaming:
        """An expert with each of these LoRAs at its strength; with none where no strengths are
        given.
        """

    def prepare(self, which: Expert, strengths: tuple[float, ...] = ()) -> None:
        """That expert will be wanted later in the run."""

    def vae(self) -> WanVAE: ...


class Pipeline:
    """Prompt to video with the parts it is given; made by `wanflow.load`."""

    def __init__(
        self,
        parts: Parts,
        noise_device: str = "cpu",
        cfg_batch: bool | None = None,
        vae_tile: int = 0,
        team: ParallelContext | None = None,
    ) -> None:
        self.parts = parts
        self.team = team or simulated_groups(Layout())  # of one: this process
        self.vae_tile = vae_tile
        self.noise_device = noise_device
        self.cfg_batch = cfg_batch

    def generate(self, prompt: str, on_step: OnStep | None = None, **request: Any) -> Video:
        """Make a video.

        Args:
            prompt: what it should show.
            on_step: called after each step with a `Progress`; returning False cancels.
            request: fields of `wanflow.Request` (negative_prompt, size, frame_num, sample_steps,
                sample_shift, sample_solver, cfg_high, cfg_low, boundary, fps, seed, lora, ...), and
                `preset`, the name of a settings preset.

        Raises:
            RequestError: for values that cannot be.
            Cancelled: when `on_step` returned False; it carries the run, which `resume` continues.
            OutputError: when the result is NaN or constant.
        """
        settings = request.pop("preset", None)
        unknown = sorted(set(request) - set(Request.__dataclass_fields__))
        if unknown:
            known = ", ".join(sorted([*Request.__dataclass_fields__, "preset"]))
            raise RequestError(f"generate does not know {', '.join(unknown)}; it knows {known}")
        wanted = Request(prompt, **request)
        return self.finish(
            self.resume(
                self.begin(with_settings(wanted, settings) if settings else wanted), on_step
            )
        )

    def begin(self, request: Request) -> Run:
        """Complete the request and draw its noise: a run at step 0. Reads no weights."""
        loras = self.parts.find_loras(request.loras()) if request.lora else ()
        complete = replace(
            request, lora=tuple(str(lora) for lora in loras), lora_from=None
        ).complete(self.parts.preset)
        complete = replace(complete, seed=self.team.first(complete.seed))
        return Run(self.parts.recipe(complete, loras), SolverState(0, self.noise(complete)))

    def noise(self, request: CompleteRequest) -> Tensor:
        """[1, z, t, h, w] float32 on the parts' device, from the seed alone."""
        geometry = geometry_of(self.parts.preset)
        shape = geometry.latent_shape(request.size, request.frame_num)
        generator = torch.Generator(self.noise_device).manual_seed(request.seed)
        return (
            torch.randn(shape, generator=generator, device=self.noise_device)
            .unsqueeze(0)
            .to(self.parts.device)
        )

    @torch.no_grad()
    def resume(self, run: Run, on_step: OnStep | None = None) -> Run:
        """Denoise from where a run stands to its end. Raises `Cancelled` when `on_step` returns
        False.

        Several processes work on one state, the first one's; and what its `on_step` says holds for
        all.
        """
        if run.finished:
            return run
        request = run.request
        schedule, steps = schedule_of(request), timeline(request, self.parts.preset)
        state = replace(run.state, x=run.state.x.to(self.parts.device))
        tensors = {
            name: self.team.world.from_first("state", value.to(self.parts.device))
            for name, value in state.tensors().items()
        }
        state = SolverState.from_tensors(state.index, tensors)
        self.take_loras(run)
        facts = facts_of(run)
        velocity = self.velocity(request, state.index)
        while state.index < len(schedule):
            step = steps[state.index]
            state = advance(schedule, state, velocity)
            check_step(state.x, step.index + 1, facts)
            run = replace(run, state=state)
            told = Progress(
                step.index + 1,
                len(schedule),
                step.timestep,
                step.sigma,
                snr(step.sigma),
                step.expert,
                state.x,
                run,
            )
            if self.team.first(int(on_step is not None and on_step(told) is False)):
                raise Cancelled(run)
        return run

    def take_loras(self, run: Run) -> None:
        """Read a run's LoRAs, which must fit the model and be the files it was begun with;
        RequestError otherwise.
        """
        self.parts.use_loras(run.request.loras, run.recipe.loras)

    def velocity(self, request: CompleteRequest, start: int) -> Velocity:
        """The function a solver asks: picks the expert, its LoRAs and guidance, and prepares the
        text once for each.

        On several processes it gives all of them the whole velocity, and each computes its share.
        """
        team, trunk = self.team, sharded(self.team)
        steps = timeline(request, self.parts.preset)
        guided = any(step.guided for step in steps[start:])
        texts = self.parts.text(
            [request.prompt, request.negative_prompt] if guided else [request.prompt]
        )
        tokens = geometry_of(self.parts.preset).tokens(request.size, request.frame_num)
        prepared: dict[tuple[Expert, tuple[float, ...], bool], TextStates] = {}

        def velocity(x: Tensor, step: Step) -> Tensor:
            at = steps[step.index]
            which, strengths, scale = at.expert, at.strengths, at.guidance
            key = (which, strengths, at.guided)
            if key not in prepared:
                # before the next expert is loaded, and at most one expert's keys and values are
                # kept
                prepared.clear()
            model = self.parts.expert(which, strengths)
            after = handover(steps, step.index)
            if after is not None:
                self.parts.prepare(after.expert, after.strengths)
            if key not in prepared:
                prepared[key] = model.text_states(
                    cfg.local_branch(team, texts) if scale != 1 else texts[:1]
                )
            states = prepared[key]
            timestep = torch.tensor([step.timestep], device=x.device)
            if scale == 1:
                return cast(Tensor, model(x, timestep, states, trunk))
            if team.layout.cfg == 2:
                return guide(*cfg.gather_branches(team, model(x, timestep, states, trunk)), scale)
            if batch_guidance(self.cfg_batch, tokens):
                conditional, unconditional = model(
                    x.expand(2, -1, -1, -1, -1), timestep.expand(2), states, trunk
                ).split(1)
            else:
                conditional, unconditional = (
                    model(
                        x,
                        timestep,
                        tuple((k[row : row + 1], v[row : row + 1]) for k, v in states),
                        trunk,
                    )
                    for row in range(2)
                )
            return guide(conditional, unconditional, scale)

        return velocity

    def finish(self, run: Run) -> Video:
        """Decode a finished run. On several processes the first one has the frames, and the others
        a video of none.
        """
        width, height = run.request.size
        frames = np.concatenate([np.empty((0, height, width, 3), np.uint8), *self.frames(run)])
        if not len(frames):
            return Video(frames, run.request.fps, run.recipe.to_json())
        refuse_constant(int(frames.min()), int(frames.max()))
        return Video(frames, run.request.fps, run.recipe.to_json())

    @torch.no_grad()
    def frames(self, run: Run, on_part: OnPart | None = None) -> Iterator[Frames]:
        """Decode a finished run as it goes: uint8 [t, H, W, 3], one frame first, then four at a
        time.

        Of several processes, each of which must go through to the end, the first one is given the
        frames.

        Args:
            on_part: told (done, in all) after each part: a latent frame, or one of a tile, whose
                frames come with the last tile.

        Raises:
            RequestError: when the run is not finished.
            OutputError: when the latent or a frame is NaN or infinite.
        """
        if not run.finished:
            steps = f"{run.state.index} of {run.request.sample_steps}"
            raise RequestError(
                f"this run stands at step {steps}: finish it first (generate --resume)"
            )
        for suspicion in check_latent(run.state.x, facts_of(run)):
            logger.warning(suspicion)
        latent, vae = run.state.x.to(self.parts.device), self.parts.vae()
        if self.team.layout.size > 1:
            yield from strips.decode_frames(vae, latent, self.team, to_frames, on_part)
            return
        if self.vae_tile:
            yield from decode_in_tiles(vae, latent, self.vae_tile, to_frames, on_part)
            return
        for done, chunk in enumerate(vae.decode_frames(latent), 1):
            yield to_frames(chunk)
            if on_part is not None:
                on_part(done, latent.shape[2])


def facts_of(run: Run) -> Facts:
    """What a report on a broken output may name as its cause."""
    runtime, request = run.recipe.runtime, run.request
    named = {name: runtime[name] for name in ("dtype", "quantize", "attention") if name in runtime}
    return Facts(
        **named,
        loras=request.lora,
        guidance=max(request.cfg_high, request.cfg_low),
        steps=request.sample_steps,
    )


def to_frames(chunk: Tensor) -> Frames:
    """[1, 3, n, H, W] in -1..1 -> uint8 [n, H, W, 3]; OutputError where the VAE gave NaN or
    infinity.
    """
    if not torch.isfinite(chunk).all():
        raise OutputError("the VAE gave NaN or infinity: check its weights file")
    return files.to_uint8(chunk)
