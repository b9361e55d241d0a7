"""The plan of I2V-A14B and TI2V-5B: what their pictures, their one network and their VAEs take."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plans import of
from helpers.tiny import FAMILY as TINY
from helpers.tiny import tiny_family
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from wanflow.assemble import at_most
from wanflow.checkpoint.checkpoint import published
from wanflow.checkpoint.structure import vae_of
from wanflow.cli import main
from wanflow.conditioning import clip_parts
from wanflow.config import RequestError
from wanflow.geometry import geometry_of
from wanflow.opening import load
from wanflow.plan import decoding
from wanflow.plan.estimate import estimate
from wanflow.plan.gpus import Machine, described
from wanflow.plan.needed import A14B, TI2V_5B, enough_for_full_size, named, needed
from wanflow.plan.phases import Phase, need
from wanflow.plan.plan import Plan, _layout_reasons, with_layout
from wanflow.plan.report import answer, document, page
from wanflow.plan.solve import solve
from wanflow.plan.start import needs_gpu, refuse_without_gpu
from wanflow.plan.traces import Traces
from wanflow.presets import FAMILY, I2V_A14B, T2V_A14B, ModelSpec
from wanflow.presets import TI2V_5B as TI2V
from wanflow.request import CompleteRequest, PictureRecord
from wanflow.runtime import Runtime

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"size": "832*480", "frame_num": 17}


def asked(spec: ModelSpec, **options: Any) -> CompleteRequest:
    """A request with a picture."""
    request = of(spec, **options)
    return replace(request, image=PictureRecord("0" * 64, *request.size))


def traced(spec: ModelSpec, request: CompleteRequest) -> Traces:
    return Traces(published(spec), request, torch.bfloat16, CPU)


@cache
def plan_of(
    spec: ModelSpec,
    machine: Machine,
    request: CompleteRequest,
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Plan:
    return solve(published(spec), request, runtime, machine)


def phases(spec: ModelSpec, request: CompleteRequest, runtime: Runtime) -> dict[str, Phase]:
    return {phase.name: phase for phase in need(traced(spec, request), runtime, "gpu").phases}


HELD = Runtime(
    keep_experts=True,
    resident_blocks=40,
    chunk_tokens=0,
    t5_cpu=False,
    prefetch=False,
    vae_tile=0,
    cfg_batch=False,
    stream_from="ram",
)
SMALL: dict[str, Any] = {"size": "64*64", "frame_num": 9}


def test_pictures_are_encoded_before_the_prompt_and_their_vae_may_stay() -> None:
    spec = TINY["i2v"]
    held = replace(HELD, resident_blocks=spec.dit.num_layers)
    kept = phases(spec, of(spec, **SMALL), held)
    names = ["VAE encoder", "text encoder", "high-noise expert", "low-noise expert", "VAE"]
    assert list(kept) == names, "also without a picture: the model makes nothing without one"
    freed = phases(spec, of(spec, **SMALL), replace(held, keep_experts=False))
    vae = freed["VAE"].weights
    assert vae == freed["VAE encoder"].weights == 4 * published(spec).parameters("vae")
    high = "high-noise expert"
    assert kept[high].weights - freed[high].weights == vae
    assert kept["VAE"].weights == 2 * freed[high].weights + vae
    text = replace(spec, conditioning="text", dit=replace(spec.dit, in_dim=16))
    assert list(phases(text, of(text, **SMALL), held)) == names[1:]
    one = TINY["ti2v"]
    for request, first in ((of(one, **SMALL), "text encoder"), (asked(one, **SMALL), names[0])):
        assert next(iter(phases(one, request, held))) == first


def test_picture_channels_stay_through_a_step() -> None:
    """20 channels in float32 beside the latent, and the 36 that they make together."""
    ours, theirs = (
        traced(spec, of(spec, **QUICK)).step("high", 2, HELD, False)
        for spec in (I2V_A14B, T2V_A14B)
    )
    pixel = 4 * 5 * 60 * 104
    assert 20 * pixel <= ours.activations - theirs.activations <= (20 + 36) * pixel


@pytest.mark.parametrize("frames", [1, 5, 9, 33])
def test_the_work_of_an_encode_is_what_encoding_takes(frames: int) -> None:
    """Also of the groups that are not traced, but for a 1x1x1 convolution at the end."""
    for spec in TINY.values():
        request = asked(spec, size="64*64", frame_num=frames)
        vae = vae_of(spec.vae).to_empty(device="cpu").requires_grad_(False)
        pictures = {"first": torch.zeros(3, 64, 64)}
        with torch.no_grad(), FlopCounterMode(display=False) as theirs:
            vae.encode_parts(clip_parts(spec, request, pictures))
        flops = decoding.clip(spec, request).work.flops
        # The counter does not know the attention of a CPU, which is one operation.
        ours = sum(count for (kind, _), count in flops.items() if kind != "attention")
        assert ours == pytest.approx(theirs.get_total_flops(), rel=2e-3 if frames > 9 else 1e-12)


@pytest.mark.parametrize("spec", FAMILY, ids=lambda spec: str(spec.task))
def test_each_model_is_refused_by_its_own_needs(spec: ModelSpec) -> None:
    assert needs_gpu(published(spec))
    with pytest.raises(RequestError) as refusal:
        refuse_without_gpu(published(spec), described("none", ram=64))
    has, here, do = str(refusal.value).splitlines()
    one = needed(spec.name)
    assert has.startswith(f"{spec.name} needs a GPU with {one.gpu} GB, {one.ram} GB of RAM and")
    assert f"any GPU with {one.least[0]} GB" in do and "no GPU" in here
    assert one is (A14B if spec is not TI2V else TI2V_5B)
    assert published(spec).disk_bytes < one.disk * 1e9
    assert enough_for_full_size(described(f"{one.gpu}gb", ram=one.ram), spec.name)
    assert not enough_for_full_size(described(f"{one.least[0]}gb", ram=64), spec.name)


@pytest.mark.parametrize(
    ("folder", "spec"),
    [
        ("Wan2.2-TI2V-5B", TI2V),
        ("TI2V_5B_weights", TI2V),
        ("Wan2.2-I2V-A14B", I2V_A14B),
        ("T2V_A14B_weights", T2V_A14B),
        ("weights", T2V_A14B),
    ],
)
def test_a_folder_that_is_not_there_is_taken_by_its_name(folder: str, spec: ModelSpec) -> None:
    assert named(folder) == spec.name


def test_work_of_ti2v_is_the_published_reckoning() -> None:
    """516.3 TFLOP a pass, by an independent count from the shapes; 51.6 PFLOP for 50 steps.

    A public reckoning says 516.9: it makes the text's keys and values anew in each pass.
    """
    n, d, f, layers, text = 27_280, 3072, 14_336, 30, 512
    linear, own = 2 * n * layers * (6 * d * d + 2 * d * f), 4 * n * n * d * layers
    cross, keys = 4 * n * text * d * layers, 4 * text * d * d * layers
    step = traced(TI2V, asked(TI2V)).step("dit", 2, HELD, False).work
    assert step.total() / 2 == pytest.approx(linear + own + cross, rel=1e-3)
    assert (linear + own + cross + keys) / 1e12 == pytest.approx(516.9, abs=0.05)


def test_one_network_is_planned_as_one() -> None:
    """There is no second expert to read, to keep or to name."""
    plan = plan_of(TI2V, described("rtx4090"), asked(TI2V, frame_num=17))
    assert plan.need is not None and plan.fits
    names = [phase.name for phase in plan.need.phases]
    assert names == ["VAE encoder", "text encoder", "transformer", "VAE"]
    assert plan.runtime.resident_blocks == 30 and not plan.runtime.prefetch
    page_of = "\n".join(page(plan, estimate(plan)))
    assert "expert" not in page_of and "the complete transformer is in memory" in page_of
    found = document(plan, estimate(plan), answer(plan, estimate(plan), "x"))
    assert found["experts"] == {"dit": 50, "boundary": 0.0}
    assert found["model"]["parameters"]["dit"] == 4_999_787_712
    assert estimate(plan).denoising == pytest.approx(50 * estimate(plan).stages[2].step)
    # The transformer stays beside the VAE where full frames have room too.
    kept = plan_of(TI2V, described("a100-80gb"), asked(TI2V, frame_num=17))
    assert kept.runtime.keep_experts and kept.need is not None
    assert kept.need.phases[-1].weights - kept.need.phases[0].weights == pytest.approx(
        2 * 4_999_787_712, rel=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize("spec", FAMILY, ids=lambda spec: str(spec.task))
def test_the_least_that_a_model_is_said_to_run_with_suffices(spec: ModelSpec) -> None:
    gpu, ram = needed(spec.name).least
    request = of(spec) if spec.conditioning == "text" else asked(spec)
    plan = plan_of(spec, described(f"{gpu}gb", ram=ram), request)
    assert plan.fits, plan.short
    whose = "of an expert's 40" if len(spec.expert_names) == 2 else "of the 30"
    assert any(f"{whose} blocks stay resident" in reason for reason in plan.reasons)
    smaller = plan_of(spec, described(f"{gpu // 2}gb", ram=ram), request)
    assert not smaller.fits


def test_heads_that_ranks_cannot_share_evenly_are_said() -> None:
    five = with_layout(published(TI2V), of(TI2V), Runtime(cfg_parallel=False), 5, 8)[1]
    assert five.ulysses == 5
    reasons = "\n".join(_layout_reasons(published(TI2V), of(TI2V), five))
    assert "24 heads on 5 are up to 5 each: attention takes 4% longer" in reasons
    four = with_layout(published(TI2V), of(TI2V), Runtime(), 4, 8)[1]
    assert four.cfg == 2 and "heads on" not in "\n".join(
        _layout_reasons(published(TI2V), of(TI2V), four)
    )


@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_a_tiny_run_takes_no_more_than_its_bound(kind: str) -> None:
    """The bound alone decides whether it is planned."""
    spec = TINY[kind]
    request = asked(spec, size="512*512", frame_num=5)
    plan = plan_of(spec, described("none"), request, Runtime(device="cpu"))
    assert plan.need is not None
    taken = max(phase.weights + phase.activations + phase.frames for phase in plan.need.phases)
    assert taken <= at_most(published(spec), Runtime(device="cpu"), request)


def test_the_vae_makes_room_for_the_next_video(tmp_path: Path) -> None:
    """A model that keeps nothing frees it before a transformer is read."""
    folder = tiny_family(tmp_path / "model", "ti2v")
    pipe = load(str(folder), device="cpu", keep_experts=False)
    picture = np.full((32, 64, 3), 200, dtype=np.uint8)
    pipe.generate("a red circle", image=picture, seed=1)
    assert pipe.parts._vae is not None, "the decode's"
    held: list[bool] = []
    pipe.generate(
        "moves left",
        image=picture,
        seed=1,
        on_step=lambda progress: held.append(pipe.parts._vae is not None),
    )
    assert held == [False] * len(held) and held
    pipe.parts.close()


@pytest.mark.slow
def test_the_command_names_task_and_picture(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--gpu", "rtx4090", "--frame_num", "5", "--sample_steps", "2", "--json"]
    for task, words, weights in (
        ("i2v-A14B", "--image harbour.jpg", "I2V_A14B"),
        ("ti2v-5B", "--prompt", "TI2V_5B"),
    ):
        assert main(["plan", "--task", task, *quick]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["command"].startswith(f"wanflow generate --task {task} --ckpt_dir {weights}")
        assert words in found["command"]
        assert found["model"]["name"].lower() == f"wan2.2-{task.lower()}"


@pytest.mark.slow
def test_a_picture_gives_the_size_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the model's own rule."""
    file = tmp_path / "photo.png"
    Image.new("RGB", (1024, 1024)).save(file)
    for task, size in (("i2v-A14B", [960, 960]), ("ti2v-5B", [960, 928])):
        argv = ["plan", "--task", task, "--image", str(file), "--gpu", "h200", "--json"]
        assert main([*argv, "--frame_num", "5", "--sample_steps", "2"]) == 0
        assert json.loads(capsys.readouterr().out)["request"]["size"] == size


# the pages


def table(page: str, head: str) -> list[list[str]]:
    """The cells of the first table after these words, without its head."""
    lines = (ROOT / page).read_text(encoding="utf-8").partition(head)[2].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


def numbers(cell: str) -> list[float]:
    return [float(one.replace(",", "")) for one in re.findall(r"\d[\d,]*\.?\d*", cell)]


def test_the_page_of_models_is_the_codes() -> None:
    rows = {cells[0]: cells[1:] for cells in table("docs/explain/models.md", "The models that")}
    for spec, *cells in zip(FAMILY, *rows.values(), strict=True):
        said = dict(zip(rows, map(numbers, cells), strict=True))
        checkpoint, geometry = published(spec), geometry_of(spec)
        parameters = checkpoint.parameters(spec.expert_names[0])
        latent = geometry.latent_shape(spec.size, spec.frame_num)
        exact = {
            "billions of parameters of each": parameters / 1e9,
            "billions of parameters of the VAE": checkpoint.parameters("vae") / 1e9,
            "GB of one transformer in bf16": parameters * 2 / 1e9,
            "GB of one transformer in fp8": parameters / 1e9,
            "GB of the official files": checkpoint.disk_bytes / 1e9,
        }
        for row, value in exact.items():
            assert said[row] == [pytest.approx(value, abs=0.051)], (spec.name, row)
        assert said["video"] == [*spec.size, spec.frame_num]
        assert said["frames a second"] == [spec.fps] and said["latent"] == [*latent]
        assert said["sizes"] == [geometry.size_multiple]
        assert said["tokens"] == [geometry.tokens(spec.size, spec.frame_num)]
        assert said["steps with guidance"] == [spec.sample_steps]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3), ids=[spec.task for spec in FAMILY])
def test_work_times_and_memory_of_the_page_of_models_are_the_plans(number: int) -> None:
    spec = FAMILY[number]
    request = of(spec) if spec is T2V_A14B else asked(spec)
    rows = {cells[0]: cells[1:] for cells in table("docs/explain/models.md", "The models that")}
    for card, *cells in table("docs/explain/models.md", "Time of a video in minutes"):
        plan = plan_of(spec, described(card.removesuffix(" 80 GB"), ram=64), request)
        assert plan.fits and plan.need is not None
        minutes, memory = float(cells[number]), float(cells[3 + number])
        assert estimate(plan).seconds / 60 == pytest.approx(minutes, abs=0.06), card
        assert plan.need.device.device / 2**30 == pytest.approx(memory, abs=0.051), card
        work = {phase.name: phase.work.total() * phase.steps for phase in plan.need.phases}
    step = next(phase for phase in plan.need.phases if phase.expert)
    assert numbers(rows["TFLOP of a pass"][number]) == [round(step.work.total() / 2e12)]
    assert numbers(rows["PFLOP of a video"][number]) == [round(sum(work.values()) / 1e15, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "row"),
    [
        (spec, row)
        for spec, head in ((TI2V, "TI2V-5B with a picture, 1280"), (I2V_A14B, "I2V-A14B, 1280"))
        for row in table("docs/explain/performance.md", f"\n{head}")
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value.task,
)
def test_the_page_of_performance_is_the_plans(spec: ModelSpec, row: list[str]) -> None:
    card, ram = row[0].split(", ")
    plan = plan_of(spec, described(card, ram=int(ram)), asked(spec))
    assert plan.fits and plan.need is not None
    layers = spec.dit.num_layers
    resident = layers if row[1].startswith("all") else numbers(row[1])[0]
    assert plan.runtime.resident_blocks == resident
    assert ("tiles of 512" in row[1]) == (plan.runtime.vae_tile == 512)
    assert ("kept" in row[1]) == plan.runtime.keep_experts
    assert f"{plan.need.device.device / 2**30:.1f}" == row[2]
    assert f"{plan.need.ram.ram / 2**30:.1f}" == row[3]
    if row[4]:
        assert estimate(plan).seconds / 60 == pytest.approx(float(row[4]), abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "count", "frames", "row"), [(I2V_A14B, 4, 81, "4 x H100"), (TI2V, 2, 81, "2 x H100")]
)
def test_published_times_are_beside_the_plans(
    spec: ModelSpec, count: int, frames: int, row: str
) -> None:
    rows = table("docs/explain/performance.md", "Published, exact, weights loaded")
    cells = next(cells for cells in rows if cells[0] == row)
    machine = described("h100-80gb", count, ram=64)
    plan = solve(
        published(spec), asked(spec, frame_num=frames), Runtime(), machine, processes=count
    )
    found = estimate(plan)
    seconds = found.seconds - sum(stage.loading for stage in found.stages)
    assert seconds == pytest.approx(float(cells[-1]), abs=0.6)
    # As far from the fastest as T2V-A14B is, and not ahead of it.
    assert 1.0 < seconds / float(cells[2]) < 1.25


@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_a_run_is_measured_beside_its_plan(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """I2V-A14B gets a grey picture, and its encode is a stage of its own."""
    folder = tiny_family(tmp_path / "model", kind)
    assert main(["bench", "--ckpt_dir", str(folder), "--device", "cpu", "--json"]) == 0
    stages = {one["name"]: one for one in json.loads(capsys.readouterr().out)["stages"]}
    assert ("VAE encoder" in stages) == (kind == "i2v")
    step = "transformer: a step" if kind == "ti2v" else "low-noise expert: a step"
    assert stages[step]["planned"] > 0 and stages[step]["flops"] > 0
    assert stages[f"{step.partition(':')[0]}: first step beyond"]["seconds"] >= 0
