"""The reference numbers of TI2V-5B and I2V-A14B, and their loops through the pipeline of users.

WANFLOW_GOLDEN_FAMILY names another folder of the same format.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.golden import Json, case_tensors, close, filled, read_manifests, schedule_of, stored
from helpers.golden_dit import built
from helpers.golden_parts import GoldenParts
from helpers.tiny import SMALL, TEXT, randomised, write_official
from wanflow.checkpoint.structure import module_of
from wanflow.conditioning import TextToVideo
from wanflow.config import TRAIN_STEPS, DiTConfig, VAE22Config, VAEConfig, from_mapping
from wanflow.geometry import picture_size
from wanflow.models.dit import WanDiT
from wanflow.models.vae import WanVAE
from wanflow.pictures import open_picture
from wanflow.pipeline import Engine, Progress, Run, begin, decode, denoise, to_uint8
from wanflow.presets import I2V_A14B, TI2V_5B, ModelSpec
from wanflow.request import Picture, Request
from wanflow.sampling.schedule import Step
from wanflow.sampling.solvers import SolverState, Velocity

GIVEN = os.environ.get("WANFLOW_GOLDEN_FAMILY")
FOLDER = Path(GIVEN or Path(__file__).parents[1] / "golden-family").resolve()
KINDS = ("vae22", "dit_ti2v", "dit_i2v", "ti2v", "i2v", "sizes_family")


def _located(value: Any) -> Any:
    """A manifest with whole paths in place of its file names."""
    if isinstance(value, list):
        return [_located(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: str(FOLDER / item) if key.endswith("_file") else _located(item)
        for key, item in value.items()
    }


MANIFESTS = {kind: _located(one) for kind, one in read_manifests(FOLDER, KINDS).items()}
DITS: dict[str, Json] = {kind: MANIFESTS[kind] for kind in KINDS[1:3] if kind in MANIFESTS}
LOOPS: dict[str, Json] = {kind: MANIFESTS[kind] for kind in KINDS[3:5] if kind in MANIFESTS}
SIZES: Json = MANIFESTS.get("sizes_family", {"modules": {}, "configs": {}})


@cache
def dit(kind: str, model: str) -> WanDiT:
    return built(DITS[kind]["models"][model])


def texts(manifest: Json) -> list[Tensor]:
    """The stored text states: of the prompt, and of the negative one."""
    return [
        stored(manifest["cases_file"], key, manifest["context"][key])
        for key in ("context", "context_null")
    ]


def vae_of(kind: str) -> WanVAE:
    """The autoencoder of a loop; that of TI2V-5B has a manifest of its own."""
    manifest = MANIFESTS["vae22"] if kind == "ti2v" else LOOPS[kind]["vae"]
    settings = manifest["config"] | {key: manifest[key] for key in ("latent_mean", "latent_std")}
    file = manifest["weights_file"]
    if kind == "ti2v":
        from wanflow.models.vae22 import WanVAE22

        return filled(WanVAE22(from_mapping(VAE22Config, settings, file)), file, manifest)
    return filled(WanVAE(from_mapping(VAEConfig, settings, file)), file, manifest)


def spec_of(kind: str) -> ModelSpec:
    """The model of a loop: the published one with the shapes of its manifest."""
    published = {"ti2v": TI2V_5B, "i2v": I2V_A14B}[kind]
    manifest = LOOPS[kind]
    dit = from_mapping(DiTConfig, manifest["config"], kind)
    return replace(published, dit=dit, vae=vae(kind).config)


@cache
def vae(kind: str) -> WanVAE:
    return vae_of(kind)


@cache
def parts(kind: str) -> GoldenParts:
    manifest, spec = LOOPS[kind], spec_of(kind)
    prefixes = {name: "" if len(spec.experts) == 1 else f"{name}_" for name in spec.expert_names}
    models = {
        name: built({**manifest, "weights_file": manifest[f"{prefix}weights_file"]})
        for name, prefix in prefixes.items()
    }
    return GoldenParts(spec, models, vae(kind), texts(manifest))


def written(kind: str, folder: Path) -> Path:
    """A loop's models as the official folder of a model; its text encoder says nothing."""
    spec, own = spec_of(kind), parts(kind)
    spec = replace(spec, text=replace(TEXT, dim=spec.dit.text_dim))
    encoder = randomised(module_of(spec.text), 0)
    states = {name: model.state_dict() for name, model in own.models.items()}
    states |= {"t5": encoder.state_dict(), "vae": own.vae.state_dict()}
    # A default size so small that `wanflow.load` needs no plan for it.
    return write_official(folder, spec, states, {"name": f"golden-{kind}", "defaults": SMALL})


def request_of(kind: str, run: Json) -> Request:
    """What a user would ask for to get a run."""
    manifest, scale = LOOPS[kind], run["guide_scale"]
    scales = scale if isinstance(scale, dict) else dict.fromkeys(("high", "low"), scale)
    picture, size = picture_of(kind, run), (run["width"], run["height"])
    if picture is not None:
        sides = picture.width, picture.height
        size = picture_size(spec_of(kind), sides, run["max_area"])
    return Request(
        "golden",
        "none",
        image=picture,
        size=size,
        exact_size=True,  # an area need not be a product of sides that a user may write
        frame_num=run["frames"],
        sample_solver=run["solver"],
        sample_steps=run["steps"],
        sample_shift=run["shift"],
        cfg_high=scales["high"],
        cfg_low=scales["low"],
        boundary=manifest.get("boundary"),
        seed=run["noise_seed"],
    )


def picture_of(kind: str, run: Json) -> Picture | None:
    pixels = case_tensors(LOOPS[kind]["cases_file"], run).get("image")
    return None if pixels is None else open_picture(pixels.numpy())


@dataclass
class Walk:
    """A run of the pipeline, with all that is compared."""

    begun: Run
    conditioning: TextToVideo
    inputs: list[Tensor] = field(default_factory=list)  # what the solver asks about
    velocities: list[Tensor] = field(default_factory=list)
    steps: list[Progress] = field(default_factory=list)
    done: Run | None = None


def walk(kind: str, run: Json, together: bool = False) -> Walk:
    """Run a loop from its stored noise, through `wanflow.pipeline`."""
    return walk_on(parts(kind).engine(together), kind, run)


def walk_on(engine: Engine, kind: str, run: Json) -> Walk:
    """Run a loop from its stored noise on an engine."""
    noise = stored_of(kind, run)["noise"]
    begun = replace(begin(engine, request_of(kind, run)), state=SolverState(0, noise.unsqueeze(0)))
    with torch.no_grad():
        found = Walk(begun, engine.condition(begun))

    def velocity(run: Run, conditioning: TextToVideo) -> Velocity:
        asked = engine.velocity(run, conditioning)

        def noted(x: Tensor, step: Step) -> Tensor:
            found.inputs.append(x)
            found.velocities.append(asked(x, step))
            return found.velocities[-1]

        return noted

    found.done = denoise(replace(engine, velocity=velocity), begun, found.steps.append)
    return found


def stored_of(kind: str, run: Json) -> dict[str, Tensor]:
    return case_tensors(LOOPS[kind]["cases_file"], run)


def check_schedule(kind: str, run: Json) -> None:
    found, schedule, manifest = stored_of(kind, run), schedule_of(run), LOOPS[kind]
    assert manifest["num_train_timesteps"] == TRAIN_STEPS
    assert list(schedule.timesteps) == run["timesteps"] == found["timesteps"].tolist()
    sigmas = torch.tensor(schedule.sigmas)
    close(sigmas, found["sigmas"], manifest["tolerance"]["sigmas"], "sigmas")


def check_pictures(kind: str, run: Json, walk: Walk) -> None:
    """The picture at the video's size, and what the model sees of it."""
    found, tolerance = stored_of(kind, run), LOOPS[kind]["tolerance"]
    for key in {"image_preprocessed", "image_resized"} & found.keys():
        picture = walk.begun.pictures["first"].view_as(found[key])
        close(picture, found[key], tolerance[key], key)
    if "image_latent" in found:
        first: Tensor = walk.conditioning.first  # type: ignore[attr-defined]
        close(first[0], found["image_latent"], tolerance["image_latent"], "image latent")
    if "y" in found:
        y: Tensor = walk.conditioning.y  # type: ignore[attr-defined]
        close(y[0], found["y"], tolerance["y"], "y")
        given = len(found["y"]) - spec_of(kind).dit.out_dim
        assert torch.equal(y[0, :given], found["y"][:given])  # the mask


def check_steps(kind: str, run: Json, walk: Walk) -> None:
    """The model's input and the guided velocity at every step, and the final latent."""
    found, tolerance = stored_of(kind, run), LOOPS[kind]["tolerance"]["latents"]
    assert [told.timestep for told in walk.steps] == run["timesteps"]
    assert len(walk.inputs) == len(walk.velocities) == run["steps"] == len(found["latents"]) - 1
    if "expert" in run:
        assert [told.expert for told in walk.steps] == run["expert"]
        timed = [walk.begun.request.guidance(told.expert, told.step) for told in walk.steps]
        assert timed == run["guidance"]
    assert walk.done is not None
    for index in range(run["steps"]):
        close(walk.inputs[index][0], found["latents"][index], tolerance, f"input of step {index}")
        close(walk.velocities[index][0], found["velocity"][index], tolerance, f"velocity {index}")
        after = walk.steps[index].latents[0]
        close(after, found["latents"][index + 1], tolerance, f"latent after step {index}")
    close(walk.done.state.x[0], found["final_latent"], tolerance, "final latent")


def check_video(kind: str, run: Json, walk: Walk, engine: Engine | None = None) -> None:
    """Values by the VAE, and the bytes that the pipeline makes of them."""
    engine = engine or parts(kind).engine(False)
    found, tolerance = stored_of(kind, run), LOOPS[kind]["tolerance"]["video"]
    assert walk.done is not None
    assert found["video"].shape[1:] == (run["frames"], run["height"], run["width"])
    video = vae(kind).decode(walk.done.state.x).clamp(-1, 1)[0]
    close(video, found["video"], tolerance, "video")
    frames = np.concatenate(list(decode(engine, walk.done)))
    slack = tolerance["atol"] + tolerance["rtol"] * found["video"].abs()
    assert (frames >= to_uint8(found["video"] - slack)).all()
    assert (frames <= to_uint8(found["video"] + slack)).all()
