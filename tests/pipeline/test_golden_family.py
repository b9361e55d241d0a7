"""What the official code computes for TI2V-5B and I2V-A14B, number by number.

The folder is WANFLOW_GOLDEN_FAMILY or tests/golden-family; its README.md describes the format. File
names, shapes, settings and tolerances come from the manifests, so that another folder of the same
format, with other seeds, sizes and cases, runs the same tests. More of the autoencoder (what its
layers give out, and its mistakes) is in tests/unit/test_golden_family_vae.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.compiled import compiled
from helpers.golden import Json, case_tensors, check_full_size, close
from helpers.golden_dit import (
    batches,
    check_batch,
    check_intermediates,
    check_sample,
    latent_of,
    samples,
)
from helpers.golden_family import (
    DITS,
    FOLDER,
    GIVEN,
    KINDS,
    LOOPS,
    MANIFESTS,
    SIZES,
    Walk,
    check_pictures,
    check_schedule,
    check_steps,
    check_video,
    dit,
    parts,
    request_of,
    spec_of,
    stored_of,
    vae,
    walk,
    walk_on,
    written,
)
from helpers.tiny import T5_FILE, TOKENIZER, VAE_FILES
from PIL import Image

import wanflow
from wanflow.conditioning import FirstFrame, prepared
from wanflow.config import TRAIN_STEPS, DiTConfig, VAE22Config
from wanflow.geometry import geometry_of, parse_size, picture_size
from wanflow.models.dit import WanDiT, time_features
from wanflow.models.vae22 import WanVAE22
from wanflow.pictures import open_picture
from wanflow.pipeline import begin
from wanflow.presets import FAMILY, ModelSpec
from wanflow.request import Request
from wanflow.sampling.schedule import Step


def test_folder_holds_manifests() -> None:
    assert MANIFESTS, (
        f"{FOLDER} holds no manifest of any kind ({', '.join(KINDS)}); set WANFLOW_GOLDEN_FAMILY to"
        " a folder that does"
    )
    if not GIVEN:
        assert set(MANIFESTS) == set(KINDS)  # our own folder has all of them; another need not


# --- the transformers ---


def of_both(find: Any, *args: Any) -> list[Any]:
    return [
        pytest.param(kind, *param.values, id=f"{kind}-{param.id}")
        for kind, manifests in DITS.items()
        for param in find(manifests, *args)
    ]


@pytest.mark.parametrize(("kind", "model", "case", "sample"), of_both(samples))
def test_dit(kind: str, model: str, case: Json, sample: int) -> None:
    check_sample(dit(kind, model), DITS[kind]["models"][model], case, sample)


@pytest.mark.parametrize(("kind", "model", "case"), of_both(batches))
def test_dit_batch(kind: str, model: str, case: Json) -> None:
    check_batch(dit(kind, model), DITS[kind]["models"][model], case)


@pytest.mark.parametrize(
    ("kind", "model", "case", "sample"), of_both(samples, lambda case: "intermediates" in case)
)
def test_dit_intermediates(kind: str, model: str, case: Json, sample: int) -> None:
    check_intermediates(dit(kind, model), DITS[kind]["models"][model], case, sample)


@pytest.mark.parametrize(
    ("kind", "model", "case", "sample"),
    of_both(samples, lambda case: case["timesteps"] == "first_frame"),
)
def test_dit_with_two_times(kind: str, model: str, case: Json, sample: int) -> None:
    """As the pipeline tells the time: that of the first frame's tokens, and that of the others."""
    network, manifest = dit(kind, model), DITS[kind]["models"][model]
    found = case_tensors(manifest["cases_file"], case)
    latent, grid = latent_of(found, sample)[None], tuple(case["grids_after_patching"][sample])
    last = float(found["t"][sample, -1])  # padding has the sample's time
    conditioning = FirstFrame(tuple(latent.shape[1:]), latent[:, :, :1])
    times, runs = conditioning.times(Step(0, last, 0.0)), conditioning.runs(grid)
    told = torch.cat([times[row].expand(count) for row, count in runs])
    assert torch.equal(told, found["t"][sample, : math.prod(grid)].float())
    features = time_features(times[None], network.config.freq_dim)
    velocity = network(latent, features, found[f"context.{sample}"][None], runs=runs)
    close(velocity[0], found[f"output.{sample}"], manifest["tolerance"], case["name"])


# --- the autoencoder ---

VAE22 = MANIFESTS.get("vae22", {"cases": []})


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in VAE22["cases"]])
def test_vae22(case: Json) -> None:
    """Whole, and as pictures and frames pass it: group by group."""
    own, tolerance = vae("ti2v"), VAE22["tolerance"]
    found = {
        way: case_tensors(VAE22["cases_file"], {"name": f"{case['name']}.{way}", **case[way]})
        for way in ("encode", "decode")
    }
    video, latent = found["encode"]["video"], found["encode"]["latent"]
    parts = [video[:, :, :1], *video[:, :, 1:].split(own.config.temporal_stride, 2)]
    for encoded in (own.encode(video), own.encode_parts(part for part in parts if part.numel())):
        close(encoded, latent, tolerance["encode"], f"latent of {case['name']}")
    latent, tolerance = found["decode"]["latent"], tolerance["decode"]
    for decoded in (own.decode(latent), torch.cat(list(own.decode_frames(latent)), 2)):
        close(decoded, found["decode"]["video_unclamped"], tolerance, f"video of {case['name']}")
        close(decoded.clamp(-1, 1), found["decode"]["video"], tolerance, "clamped")


# --- the loops, through the pipeline of users ---


RUNS = [
    pytest.param(kind, run, id=f"{kind}-{run['name']}")
    for kind, manifest in LOOPS.items()
    for run in manifest["runs"]
]
PICTURED = [param for param in RUNS if "image_width" in param.values[1]]


@cache
def walked(kind: str, name: str) -> Walk:
    return walk(kind, next(run for run in LOOPS[kind]["runs"] if run["name"] == name))


@pytest.mark.parametrize(("kind", "run"), RUNS)
def test_schedule(kind: str, run: Json) -> None:
    check_schedule(kind, run)


@pytest.mark.parametrize(("kind", "run"), RUNS)
def test_noise_and_shape(kind: str, run: Json) -> None:
    begun = begin(parts(kind).engine(False), request_of(kind, run))
    assert torch.equal(begun.state.x[0], stored_of(kind, run)["noise"])
    assert list(begun.state.x.shape[1:]) == run["latent_shape"]
    assert begun.request.size == (run["width"], run["height"])
    tokens = geometry_of(spec_of(kind)).tokens(begun.request.size, run["frames"])
    assert tokens == run.get("tokens", tokens)


def has_a_size(kind: str, run: Json) -> bool:
    """Whether the area is one of a size that a user may write."""
    return run["max_area"] % geometry_of(spec_of(kind)).size_multiple ** 2 == 0


@pytest.mark.parametrize(
    ("kind", "run"), [param for param in PICTURED if has_a_size(*param.values)]
)
def test_the_area_and_the_picture_give_the_size(kind: str, run: Json) -> None:
    spec, asked = spec_of(kind), request_of(kind, run)
    step = geometry_of(spec).size_multiple
    area = Request("any", image=asked.image, size=(step, run["max_area"] // step), seed=0)
    assert area.complete(spec).size == (run["width"], run["height"])


@pytest.mark.parametrize(("kind", "run"), PICTURED)
def test_picture(kind: str, run: Json) -> None:
    check_pictures(kind, run, walked(kind, run["name"]))


@pytest.mark.parametrize(("kind", "run"), RUNS)
def test_steps(kind: str, run: Json) -> None:
    check_steps(kind, run, walked(kind, run["name"]))


@pytest.mark.parametrize(("kind", "run"), RUNS)
def test_steps_of_both_prompts_in_one_batch(kind: str, run: Json) -> None:
    check_steps(kind, run, walk(kind, run, together=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOOPS)
def test_steps_compiled(kind: str) -> None:
    """By inductor: a time for each token makes other graphs than one time."""
    with compiled(*parts(kind).models.values()) as compiler:
        for one, run in (param.values for param in PICTURED):
            if one == kind:
                check_steps(kind, run, walk(kind, run))
    assert compiler.graphs >= 2


@pytest.mark.parametrize(("kind", "run"), RUNS)
def test_video(kind: str, run: Json) -> None:
    check_video(kind, run, walked(kind, run["name"]))


@pytest.mark.parametrize("kind", LOOPS)
def test_a_folder_of_the_official_layout(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models written as users have them, opened by `wanflow.load`; the text states stay."""
    pipe = wanflow.load(written(kind, tmp_path / "model"), device="cpu")
    own, texts = pipe.engine.spec, parts(kind).texts
    shapes = replace(spec_of(kind), name=own.name, text=own.text)
    assert (own.dit, own.vae, own.conditioning) == (shapes.dit, shapes.vae, shapes.conditioning)
    monkeypatch.setattr(pipe.parts, "text", lambda prompts: texts[: len(prompts)])
    for run in LOOPS[kind]["runs"]:
        found = walk_on(pipe.engine, kind, run)
        check_pictures(kind, run, found)
        check_steps(kind, run, found)
        check_video(kind, run, found, pipe.engine)


# --- sizes of pictures ---

RULES = [
    pytest.param(kind, rule, id=f"{kind}-{'x'.join(map(str, rule['image']))}-{rule['max_area']}")
    for kind, manifest in LOOPS.items()
    for rule in manifest["size_rule"]
]


@pytest.mark.parametrize(("kind", "rule"), RULES)
def test_size_rule(kind: str, rule: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    """The video's size, and how the picture is resized and cropped to it."""
    spec = spec_of(kind)
    geometry = geometry_of(spec)
    assert list(geometry.stride) == LOOPS[kind]["vae_stride"]
    size = picture_size(spec, tuple(rule["image"]), rule["max_area"])
    assert list(size) == rule["size"]
    if "resized" not in rule:
        return
    resized: list[Image.Image] = []
    resize = Image.Image.resize

    def noted(self: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        resized.append(resize(self, *args, **kwargs))
        return resized[-1]

    monkeypatch.setattr(Image.Image, "resize", noted)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (*rule["image"][::-1], 3), generator=generator, dtype=torch.uint8)
    picture = prepared(spec, Request("any", image=open_picture(pixels.numpy())), size)["first"]
    assert [list(each.size) for each in resized] == [rule["resized"]]
    (left, top), (width, height) = rule["crop"], size
    cropped = np.array(resized[0])[top : top + height, left : left + width]
    expected = torch.from_numpy(cropped).permute(2, 0, 1).float() / 255
    close(picture, (expected - 0.5) / 0.5, LOOPS[kind]["tolerance"]["image_preprocessed"], "crop")


# --- full size ---

BUILDERS: dict[str, Any] = {"dit": (WanDiT, DiTConfig), "vae 2.2": (WanVAE22, VAE22Config)}


@pytest.mark.parametrize("name", SIZES["modules"])
def test_sizes(name: str) -> None:
    """Names, shapes, dtypes, order and bytes of a full-size module, built on meta."""
    entry = SIZES["modules"][name]
    check_full_size(entry, *BUILDERS[entry["module"]])


def preset_of(task: str) -> ModelSpec:
    return next(spec for spec in FAMILY if spec.task == task)


def official_numbers(spec: ModelSpec) -> dict[str, Any]:
    """What a preset says, under the names of the official configurations."""
    geometry, dit = geometry_of(spec), spec.dit
    same = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "window_size", "qk_norm")
    scales = (spec.cfg_low, spec.cfg_high)
    numbers: dict[str, Any] = {name: getattr(dit, name) for name in same}
    numbers |= {
        "cross_attn_norm": dit.cross_attn_norm,
        "eps": dit.eps,
        "patch_size": dit.patch_size,
        "text_len": dit.text_len,
        "num_train_timesteps": TRAIN_STEPS,
        "sample_fps": spec.fps,
        "sample_neg_prompt": spec.negative_prompt,
        "frame_num": spec.frame_num,
        "vae_stride": geometry.stride,
        "sample_shift": spec.sample_shift,
        "sample_steps": spec.sample_steps,
        "sample_guide_scale": scales if len(spec.experts) > 1 else spec.cfg_high,
        "boundary": spec.boundary,
    }
    for expert in spec.experts:
        numbers[f"{expert.name}_noise_checkpoint"] = expert.folder
    return numbers


# Names of official files, with which `test_a_folder_of_the_official_layout` opens, and what
# `Runtime` decides.
ELSEWHERE = {
    "t5_checkpoint": T5_FILE,
    "t5_tokenizer": TOKENIZER,
    "t5_model": "umt5_xxl",
    "t5_dtype": "bfloat16",
    "param_dtype": "bfloat16",
}


@pytest.mark.parametrize("task", [task for task in SIZES["configs"] if task != "shared"])
def test_official_configurations(task: str) -> None:
    official, spec = SIZES["configs"][task], preset_of(task)
    numbers = official_numbers(spec) | ELSEWHERE | {"vae_checkpoint": VAE_FILES[type(spec.vae)]}
    listed = {key: list(v) if isinstance(v, tuple) else v for key, v in numbers.items()}
    assert {key: listed[key] for key in official} == official


@pytest.mark.parametrize("task", SIZES.get("supported_sizes", {}))
def test_official_sizes(task: str) -> None:
    """Every official size is taken, its area is the official one, and the default is among them."""
    spec, names = preset_of(task), SIZES["supported_sizes"][task]
    geometry = geometry_of(spec)
    sizes = [parse_size(name, geometry) for name in names]
    for name, size in zip(names, sizes, strict=True):
        assert list(size) == SIZES["size_configs_width_height"][name]
        assert math.prod(size) == SIZES["max_area_configs"][name]
    assert spec.size in sizes
