"""The golden numbers: what the official code computes, number by number.

The folder is WANFLOW_GOLDEN or tests/golden; its README.md describes the format. File names,
shapes, settings and tolerances all come from the manifests, so that another folder of the same
format, with other seeds, sizes and cases, runs the same tests.
"""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch
from helpers.compiled import compiled
from helpers.golden import (
    DIT,
    FOLDER,
    KINDS,
    MANIFESTS,
    PIPELINE,
    SIZES,
    SOLVERS,
    T5,
    VAE,
    Json,
    case_tensors,
    check_full_size,
    close,
    expert,
    filled,
    schedule_of,
    stored,
    tensors,
)
from helpers.golden_dit import (
    batches,
    built,
    check_batch,
    check_intermediates,
    check_sample,
    samples,
)
from torch import Tensor

from wanflow.config import TRAIN_STEPS, DiTConfig, TextConfig, VAEConfig, from_mapping
from wanflow.models.dit import WanDiT
from wanflow.models.umt5 import UMT5Encoder, position_buckets
from wanflow.models.vae import WanVAE
from wanflow.presets import T2V_A14B
from wanflow.sampling.guidance import guide
from wanflow.sampling.schedule import Step
from wanflow.sampling.solvers import SolverState, advance, order
from wanflow.sampling.timeline import expert_at, expert_per_step


def test_folder_holds_manifests() -> None:
    assert MANIFESTS, (
        f"{FOLDER.resolve()} holds no manifest of any kind ({', '.join(KINDS)}); set WANFLOW_GOLDEN"
        " to a folder that does"
    )
    if not os.environ.get("WANFLOW_GOLDEN"):
        assert set(MANIFESTS) == set(KINDS)  # our own folder has all of them; another need not


# --- the transformer ---


@cache
def dit(model: str) -> WanDiT:
    return built(DIT["models"][model])


DIT_SAMPLES = samples(DIT)


@pytest.mark.parametrize(("model", "case", "sample"), DIT_SAMPLES)
def test_dit(model: str, case: Json, sample: int) -> None:
    check_sample(dit(model), DIT["models"][model], case, sample)


@pytest.mark.parametrize(("model", "case"), batches(DIT))
def test_dit_batch(model: str, case: Json) -> None:
    check_batch(dit(model), DIT["models"][model], case)


@pytest.mark.slow
@pytest.mark.parametrize("model", DIT["models"])
def test_dit_compiled(model: str) -> None:
    with compiled(dit(model)) as compiler:
        for one, case, sample in (param.values for param in DIT_SAMPLES):
            if one == model:
                test_dit(model, case, sample)
    assert compiler.graphs >= 2


@pytest.mark.parametrize(
    ("model", "case", "sample"), samples(DIT, lambda case: "intermediates" in case)
)
def test_dit_intermediates(model: str, case: Json, sample: int) -> None:
    check_intermediates(dit(model), DIT["models"][model], case, sample)


# --- the autoencoder ---


@cache
def vae() -> WanVAE:
    settings = VAE["config"] | {"latent_mean": VAE["latent_mean"], "latent_std": VAE["latent_std"]}
    return filled(WanVAE(from_mapping(VAEConfig, settings, "vae.json")), VAE["weights_file"], VAE)


VAE_CASES = [pytest.param(case, id=case["name"]) for case in VAE["cases"]]
GROUPS = [pytest.param(groups, id=f"groups{groups}") for groups in (1, 2, 3, 100)]


def vae_tensors(case: Json, way: str) -> dict[str, Tensor]:
    return case_tensors(VAE["cases_file"], {"name": f"{case['name']}.{way}", **case[way]})


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("case", VAE_CASES)
def test_vae_encode(case: Json, groups: int) -> None:
    found = vae_tensors(case, "encode")
    close(
        vae().encode(found["video"], groups),
        found["latent"],
        VAE["tolerance"]["encode"],
        f"latent of {case['name']}",
    )


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("case", VAE_CASES)
def test_vae_decode(case: Json, groups: int) -> None:
    found = vae_tensors(case, "decode")
    close(
        vae().decode(found["latent"], groups),
        found["video_unclamped"],
        VAE["tolerance"]["decode"],
        f"video of {case['name']}",
    )


@pytest.mark.parametrize("case", VAE_CASES)
def test_vae_decode_streamed(case: Json) -> None:
    """Frame by frame, each part compared as it comes."""
    found = vae_tensors(case, "decode")
    start = 0
    for part in vae().decode_frames(found["latent"]):
        assert part.shape[2] == (vae().config.temporal_stride if start else 1)
        expected = found["video_unclamped"][:, :, start : start + part.shape[2]]
        close(part, expected, VAE["tolerance"]["decode"], f"frames {start}.. of {case['name']}")
        start += part.shape[2]
    assert start == case["frames"]


# --- the text encoder ---


@cache
def t5() -> UMT5Encoder:
    return filled(
        UMT5Encoder(from_mapping(TextConfig, T5["config"], "t5.json")), T5["weights_file"], T5
    )


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in T5["cases"]])
def test_t5(case: Json) -> None:
    found = case_tensors(T5["cases_file"], case)
    assert found["mask"].sum(1).tolist() == case["valid_tokens"]
    close(
        t5()(found["ids"], found["mask"]),
        found["output"],
        T5["tolerance"],
        f"output of {case['name']}",
    )


@pytest.mark.parametrize(
    "keys", [pytest.param(T5["buckets"]["keys"], id="buckets")] if "buckets" in T5 else []
)
def test_t5_buckets(keys: list[str]) -> None:
    relative, bucket = (tensors(T5["cases_file"])[key] for key in keys)
    config = t5().config
    assert torch.equal(position_buckets(relative, config.num_buckets, config.max_dist), bucket)


# --- schedules and solvers ---

RUNS = [pytest.param(run, id=run["name"]) for run in SOLVERS["runs"]]


def golden_velocity(x: Tensor, step: Step) -> Tensor:
    """The manifest's field: factor and wave in float64, rounded; tanh, product and sum in
    float32.
    """
    p = SOLVERS["velocity"]["parameters"]
    tau = step.timestep / SOLVERS["num_train_timesteps"]
    places = torch.arange(x.numel(), dtype=torch.float64).view(x.shape)
    wave = p["c"] * getattr(torch, p["kind"])(p["w"] * tau + p["p"] * places)
    factor = torch.tensor(p["a0"] + p["a1"] * tau, dtype=torch.float64).float()
    return factor * torch.tanh(torch.tensor(p["g"]).float() * x) + wave.float()


@pytest.mark.parametrize("run", RUNS)
def test_schedule(run: Json) -> None:
    assert SOLVERS["num_train_timesteps"] == TRAIN_STEPS
    found = case_tensors(SOLVERS["file"], run)
    schedule = schedule_of(run)
    assert list(schedule.timesteps) == run["timesteps"] == found["timesteps"].tolist()
    close(torch.tensor(schedule.sigmas), found["sigmas"], SOLVERS["tolerance"]["sigmas"], "sigmas")


@pytest.mark.parametrize("run", RUNS)
def test_schedule_experts(run: Json) -> None:
    schedule, checked = schedule_of(run), 0
    for key, expected in run.items():
        if "boundary_" not in key:
            continue
        boundary = float(key.rpartition("boundary_")[2])
        chosen = expert_per_step(schedule, T2V_A14B.experts_at(boundary))
        assert expected == (
            chosen.count("high") if key.startswith("high_steps") else list(chosen)
        ), key
        checked += 1
    assert checked


@pytest.mark.parametrize("run", RUNS)
def test_solver_orders(run: Json) -> None:
    schedule = schedule_of(run)
    orders = [order(schedule, index) for index in range(len(schedule))]
    assert orders == run.get("predictor_order", run.get("order"))
    if "corrector_order" in run:  # the corrector redoes the step before, at that step's order
        assert [0, *orders[:-1]] == run["corrector_order"]


@pytest.mark.parametrize("run", RUNS)
def test_solver_samples(run: Json) -> None:
    """x after every step, from our own x before it."""
    expected = case_tensors(SOLVERS["file"], run)["x"]
    schedule = schedule_of(run)
    start = SOLVERS["start"]
    state = SolverState(0, stored(SOLVERS["file"], start["key"], start).reshape(expected[0].shape))
    assert torch.equal(state.x, expected[0])
    for index in range(len(schedule)):
        state = advance(schedule, state, golden_velocity)
        close(state.x, expected[index + 1], SOLVERS["tolerance"]["x"], f"x after step {index}")
    assert state.index == len(schedule) == len(expected) - 1


@pytest.mark.parametrize(
    ("boundary", "timestep", "expert"),
    [
        pytest.param(float(key.partition("_")[2]), timestep, expert, id=f"{key}-{timestep}")
        for key, rule in SOLVERS["expert_rule"].items()
        if key.startswith("boundary_")
        for timestep, expert in rule
    ],
)
def test_expert_rule(boundary: float, timestep: int, expert: str) -> None:
    assert expert_at(timestep, T2V_A14B.experts_at(boundary)) == expert


# --- the whole loop ---


@pytest.mark.slow
def test_pipeline_compiled() -> None:
    with compiled(expert("high"), expert("low")) as compiler:
        for run in PIPELINE["runs"]:
            test_pipeline(run)
    assert compiler.graphs == 2


@pytest.mark.parametrize("run", [pytest.param(run, id=run["name"]) for run in PIPELINE["runs"]])
def test_pipeline(run: Json) -> None:
    """Both experts with guidance: velocity and latent of every step, then the video."""
    file, tolerance = PIPELINE["cases_file"], PIPELINE["tolerance"]
    found = case_tensors(file, run)
    context, context_null = (
        stored(file, key, PIPELINE["context"][key])[None] for key in ("context", "context_null")
    )
    schedule, experts = schedule_of(run), T2V_A14B.experts_at(PIPELINE["boundary"])
    assert list(schedule.timesteps) == run["timesteps"] == found["timesteps"].tolist()
    close(torch.tensor(schedule.sigmas), found["sigmas"], tolerance["sigmas"], "sigmas")
    assert list(expert_per_step(schedule, experts)) == run["expert"]
    assert [PIPELINE["guide_scale"][name] for name in run["expert"]] == run["guidance"]
    velocities: list[Tensor] = []

    def velocity(x: Tensor, step: Step) -> Tensor:
        name = expert_at(step.timestep, experts)
        at = torch.tensor([step.timestep])
        conditional, unconditional = (expert(name)(x, at, text) for text in (context, context_null))
        velocities.append(guide(conditional, unconditional, PIPELINE["guide_scale"][name]))
        return velocities[-1]

    state = SolverState(0, found["noise"][None])
    assert torch.equal(state.x[0], found["latents"][0])
    for index in range(len(schedule)):
        state = advance(schedule, state, velocity)
        close(
            velocities[-1][0],
            found["velocity"][index],
            tolerance["latents"],
            f"velocity of step {index}",
        )
        close(
            state.x[0],
            found["latents"][index + 1],
            tolerance["latents"],
            f"latent after step {index}",
        )
    close(state.x[0], found["final_latent"], tolerance["latents"], "final latent")
    video = vae().decode(state.x).clamp(-1, 1)
    assert video.shape[2:] == (PIPELINE["frames"], PIPELINE["height"], PIPELINE["width"])
    close(video[0], found["video"], tolerance["video"], "video")


# --- full size, on meta ---

BUILDERS = {
    "dit": (WanDiT, DiTConfig),
    "t5 encoder": (UMT5Encoder, TextConfig),
    "wan2.1 vae": (WanVAE, VAEConfig),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=name)
        for name, entry in SIZES["modules"].items()
        if entry["module"] in BUILDERS
    ],
)
def test_sizes(name: str) -> None:
    entry = SIZES["modules"][name]
    check_full_size(entry, *BUILDERS[entry["module"]])
