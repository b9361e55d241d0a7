"""Run the stages of a training one after another, each claimed while it runs and resumable."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from wanflow.config import DiTConfig, RequestError
from wanflow.convert.configs import as_json, official
from wanflow.convert.taken import refuse_folder
from wanflow.models.dit import WanDiT
from wanflow.outputs import Claims
from wanflow.presets import Expert, ModelSpec
from wanflow.screen import Screen
from wanflow.train import experts
from wanflow.train.loop import Train, fit
from wanflow.train.saving import is_whole, read_state, write_tensors
from wanflow.train.stopping import Stop

DROPOUT = 0.1  # share of captions replaced by the empty prompt, for guidance
SHIFT = 3.0  # crowds the training sigmas upwards, as sampling does

Stage = Callable[[Path, float, Screen, Stop], None]


def run(
    stages: Mapping[str, Stage],
    work: Path,
    out: Path,
    scale: float,
    only: str | None,
    screen: Screen,
    overwrite: bool,
    stop: Stop | None,
) -> None:
    """Run all stages, or one; `nano.train` says what the arguments are."""
    if only is not None and only not in stages:
        raise RequestError(f"there is no stage {only} here; the stages are {', '.join(stages)}")
    stop, chosen = stop or Stop(), tuple(stages) if only is None else (only,)
    if "export" in chosen:
        refuse_folder(out, overwrite)
    work.mkdir(parents=True, exist_ok=True)
    screen.say(f"the state of the training is in {work}")
    torch.manual_seed(0)
    for stage in chosen:
        stop.here()
        with Claims() as claims:
            claims.take(work / stage)
            screen.say(f"{stage}: begins")
            stages[stage](work, scale, screen, stop)


def needs(file: Path, stage: str, flags: str = "--nano") -> Path:
    """Return a file that an earlier stage wrote; RequestError where it did not."""
    if not file.exists() or (file.suffix == ".safetensors" and not is_whole(file)):
        raise RequestError(
            f"{file} is missing or damaged: run stage {stage} first (wanflow train {flags} --stage"
            f" {stage})"
        )
    return file


def train_expert(
    model: WanDiT,
    spec: ModelSpec,
    which: Expert,
    settings: Train,
    work: Path,
    screen: Screen,
    stop: Stop,
    flags: str = "--nano",
    name: str | None = None,
    weigh: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Train an expert on its own range of sigma, on the clips of the stage `cache`.

    Args:
        model: the expert, to be changed.
        spec: its model.
        which: the expert.
        settings: how to train.
        work: the folder of every stage's state.
        screen: shows progress.
        stop: asks for the end.
        flags: of the command, for messages.
        name: of the stage, if it is not the expert's.
        weigh: turns the further channels of the input into the weights of the squared errors.
    """
    name = name or which
    cache = experts.Cache(**load_file(needs(work / "cache.safetensors", "cache", flags)))
    low, high = experts.sigma_range(spec, which)
    if settings.steps > 500 and shutil.which("g++"):
        for block in model.blocks:
            block.compile(dynamic=False)  # a fifth faster, after a minute

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        latents, texts, noise, given = experts.batch(cache, settings.batch, DROPOUT, generator)
        sigma = experts.sigmas(settings.batch, low, high, SHIFT, generator)
        weight = None if weigh is None or given is None else weigh(given)
        return experts.flow_loss(model, latents, texts, sigma, noise, given, weight)

    fit(model, loss, settings, work / f"{name}.pt", screen, stop=stop)
    stop.here()
    write_tensors(work / f"{name}.safetensors", model.state_dict())


def export_expert(work: Path, stage: str, shape: DiTConfig, folder: Path) -> None:
    """Write an expert in bfloat16, with its config; one in training with its averaged weights."""
    trained = work / f"{stage}.safetensors"
    if trained.exists():
        state = load_file(trained)
    else:
        state = read_state(needs(work / f"{stage}.pt", stage), "cpu")["average"]
    folder.mkdir(parents=True)
    file = folder / "diffusion_pytorch_model.safetensors"
    write_tensors(file, {name: value.bfloat16() for name, value in state.items()})
    (folder / "config.json").write_bytes(as_json(dict(sorted(official(shape).items()))))
