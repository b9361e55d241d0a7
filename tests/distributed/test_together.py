"""Whole runs on several processes: what one process makes, with every other feature, stopped and
resumed on another number of them.

Real processes speak gloo; for each number of them one set does all that is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.common import PROMPT
from helpers.features import FEATURES, KINDS, ROUNDING, feature, latent, made, packed, picture
from helpers.golden import PIPELINE, case_tensors, close, expert, schedule_of, stored
from helpers.processes import Processes, played
from torch import Tensor

from wanflow.api import Pipeline
from wanflow.assemble import assemble, layout_of
from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.config import DiTConfig, RequestError, from_mapping
from wanflow.loaders.velocity import make_velocity
from wanflow.opening import resolve
from wanflow.parallel import ranks
from wanflow.parallel.cfg import split_guidance
from wanflow.parallel.groups import Layout, layouts, make_groups
from wanflow.parallel.sequence import connect, sharded
from wanflow.pipeline import Cancelled
from wanflow.presets import T2V_A14B
from wanflow.request import CompleteRequest, Request
from wanflow.runtime import Runtime
from wanflow.sampling.solvers import SolverState, advance
from wanflow.transforms.attention_kernels import BACKENDS

# Of 6, test_distributed tries every layout; a whole run has nothing that is of 6 alone.
QUICK, SLOW = (2,), (3, 4, 8)
CROWD = (pytest.mark.slow, pytest.mark.crowded)
SIZES = [*QUICK, *(pytest.param(size, marks=CROWD) for size in SLOW)]
FEW = 4  # on which the family runs, too: on more, it is the same layouts nested once more
WANTED = Request(PROMPT, frame_num=5, sample_steps=3, seed=3)
SHARED: dict[str, Any] = {"dit_fsdp": True}
FAMILY = ("i2v, both pictures", "ti2v, picture")
pytestmark = pytest.mark.distributed


def fields(layout: Layout) -> dict[str, Any]:
    return {
        "cfg_parallel": layout.cfg == 2,
        "ring_size": layout.ring,
        "ulysses_size": layout.ulysses,
    }


@cache
def checkpoint(model: str) -> Checkpoint:
    return resolve("nano" if model == "nano" else packed("nano", model))


def opened(info: ranks.DistInfo, layout: Layout, model: str = "nano", **runtime: Any) -> Pipeline:
    return assemble(
        checkpoint(model), Runtime(device="cpu", **fields(layout), **runtime), None, info
    )


# every layout


def on_layouts(info: ranks.DistInfo) -> dict[str, Any]:
    """nano's latent and frames, and golden's latents, on every layout; and the latent with the
    weights shared out.
    """
    return {str(layout): on_layout(info, layout) for layout in layouts(info.world_size)}


def on_layout(info: ranks.DistInfo, layout: Layout) -> dict[str, Any]:
    pipe = opened(info, layout)
    run = pipe.resume(pipe.begin(WANTED))
    video = pipe.finish(run)
    drawn = pipe.begin(replace(WANTED, seed=-1)).request.seed
    with pytest.raises(Cancelled) as cancelled:  # what the first says holds for all
        pipe.resume(pipe.begin(WANTED), lambda told: told.step < 2 if info.rank == 0 else None)
    shared = opened(info, layout, **SHARED)
    found = {
        "latent": run.state.x,
        "frames": torch.from_numpy(video.frames),
        "seed": drawn,
        "half": cancelled.value.run.state.tensors(),
    }
    found |= {"shared out": shared.resume(shared.begin(WANTED)).state.x, "shares": shares(shared)}
    if info.world_size <= FEW:
        found["family"] = {kind: of_family(kind, info, layout) for kind in FAMILY}
    for case in PIPELINE["runs"] if info.world_size == 2 else PIPELINE["runs"][:1]:
        found[case["name"]] = golden(info, layout, case)
    return found


def of_family(kind: str, info: ranks.DistInfo | None = None, layout: Layout | None = None) -> Any:
    """The latent and the frames of a small model of the family, and the latent with shared weights.

    Only the first process has the pictures: what it encodes must reach the others.
    """
    name, pictures = KINDS[kind]
    asked = replace(WANTED, **{which: picture(which) for which in pictures})
    found = []
    # Weights are shared out in every layout alike: see nano's.
    for shared in ({}, SHARED) if layout and layout.ulysses > 1 else ({},):
        runtime = Runtime(device="cpu", **(fields(layout) if layout else {}), **shared)
        pipe = assemble(resolve(made(name) / name), runtime, None, info)
        run = pipe.begin(asked)
        if info and info.rank:
            blank = {key: torch.zeros_like(value) for key, value in run.pictures.items()}
            run = replace(run, pictures=blank)
        found.append(pipe.resume(run))
    return {
        "latent": found[0].state.x,
        "shared out": found[-1].state.x,
        "frames": torch.from_numpy(pipe.finish(found[-1]).frames),
    }


def shares(pipe: Pipeline) -> list[tuple[int, int]]:
    """Of an expert's parameters: numbers that this process keeps, and in all, of those that are
    shared out.
    """
    model: Any = pipe.parts.expert("low")
    held = [
        (p.to_local().numel(), p.numel()) for p in model.parameters() if hasattr(p, "device_mesh")
    ]
    return [tuple(map(sum, zip(*held, strict=True)))]  # type: ignore[list-item]


class GoldenParts:
    """Golden's experts and texts, as a pipeline asks for them."""

    def __init__(self, ctx: Any) -> None:
        config = from_mapping(DiTConfig, PIPELINE["config"], "pipeline.json")
        self.spec = replace(T2V_A14B, dit=config)
        self.ctx = ctx

    def text(self, prompts: list[str]) -> Tensor:
        states = torch.zeros(len(prompts), self.spec.dit.text_len, self.spec.dit.text_dim)
        for row, key in zip(states, prompts, strict=True):
            context = stored(PIPELINE["cases_file"], key, PIPELINE["context"][key])
            row[: len(context)] = context
        return states

    def expert(self, which: str, strengths: tuple[float, ...] = ()) -> Any:
        model = expert(which)
        connect(model, self.ctx, BACKENDS["sdpa"].attend, BACKENDS["sdpa"].with_lse)
        return model

    def prepare(self, which: str, strengths: tuple[float, ...] = ()) -> None: ...


def golden(info: ranks.DistInfo, layout: Layout, case: dict[str, Any]) -> list[Tensor]:
    """The latent after each step of one of golden's runs."""
    ctx = make_groups(layout, info, 60)
    request = CompleteRequest(
        "context",
        "context_null",
        (PIPELINE["width"], PIPELINE["height"]),
        PIPELINE["frames"],
        case["solver"],
        case["steps"],
        case["shift"],
        PIPELINE["guide_scale"]["high"],
        PIPELINE["guide_scale"]["low"],
        PIPELINE["boundary"],
        16,
        0,
    )
    schedule = schedule_of(case)
    state, latents = SolverState(0, case_tensors(PIPELINE["cases_file"], case)["noise"][None]), []
    velocity = make_velocity(
        GoldenParts(ctx), request, trunk=sharded(ctx), guidance=split_guidance(ctx)
    )
    while state.index < len(schedule):
        state = advance(schedule, state, velocity)
        latents.append(state.x[0])
    return latents


@cache
def alone() -> dict[str, Tensor]:
    """What one process makes."""
    pipe = assemble(resolve("nano"), Runtime(device="cpu"))
    run = pipe.resume(pipe.begin(WANTED))
    return {"latent": run.state.x, "frames": torch.from_numpy(pipe.finish(run).frames)}


family_alone = cache(of_family)
Found = Callable[[int], Sequence[dict[str, Any]]]


@pytest.fixture
def found(processes: Processes) -> Found:
    return lambda size: processes(on_layouts, size)


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_run_gives_the_latent_of_one_process(size: int, found: Found) -> None:
    """Through the switch of experts; the same bits in every process."""
    first, *others = found(size)
    assert list(first) == [str(layout) for layout in layouts(size)]
    for layout, values in first.items():
        torch.testing.assert_close(
            values["latent"],
            alone()["latent"],
            atol=1e-4,
            rtol=1e-5,
            msg=lambda text, where=layout: f"{where}: {text}",
        )
        assert all(torch.equal(values["latent"], other[layout]["latent"]) for other in others), (
            layout
        )


@pytest.mark.parametrize("size", SIZES)
def test_the_first_process_has_the_video(size: int, found: Found) -> None:
    first, *others = found(size)
    expected = alone()["frames"].int()
    for layout, values in first.items():
        apart = (values["frames"].int() - expected).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3, layout
        assert all(len(other[layout]["frames"]) == 0 for other in others)


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("size", SIZES[:-1])
def test_the_family_makes_of_pictures_what_one_process_makes(
    size: int, kind: str, found: Found
) -> None:
    expected = family_alone(kind)
    for rank, values in enumerate(found(size)):
        for layout, value in ((where, each["family"][kind]) for where, each in values.items()):
            torch.testing.assert_close(
                value["latent"],
                expected["latent"],
                atol=1e-4,
                rtol=1e-5,
                msg=lambda text, where=layout: f"{where}: {text}",
            )
            assert torch.equal(value["latent"], found(size)[0][layout]["family"][kind]["latent"])
            assert torch.equal(value["shared out"], value["latent"]), layout
            if rank == 0:
                assert (value["frames"].int() - expected["frames"].int()).abs().max() <= 1
            else:
                assert len(value["frames"]) == 0


@pytest.mark.parametrize("size", SIZES)
def test_golden_runs_on_every_layout(size: int, found: Found) -> None:
    compared = 0
    for layout, values in found(size)[0].items():
        for case in PIPELINE["runs"]:
            wanted = case_tensors(PIPELINE["cases_file"], case)["latents"]
            for index, x in enumerate(values.get(case["name"], ())):
                close(
                    x,
                    wanted[index + 1],
                    PIPELINE["tolerance"]["latents"],
                    f"{layout}, {case['name']}, step {index}",
                )
                compared += 1
    assert compared >= len(layouts(size)) * PIPELINE["runs"][0]["steps"]


@pytest.mark.parametrize("size", SIZES)
def test_weights_that_are_shared_out_change_no_bit(size: int, found: Found) -> None:
    for rank, values in enumerate(found(size)):
        for layout, value in values.items():
            assert torch.equal(value["shared out"], value["latent"]), (rank, layout)
            ((own, whole),) = value["shares"]
            assert own < 1.3 * whole / size, "each process keeps its share"


@pytest.mark.parametrize("size", SIZES)
def test_one_process_goes_on_where_several_were_stopped(size: int, found: Found) -> None:
    pipe = assemble(resolve("nano"), Runtime(device="cpu"))
    begun = pipe.begin(WANTED)
    for layout, values in found(size)[size - 1].items():
        run = replace(begun, state=SolverState.from_tensors(2, values["half"]))
        latent = pipe.resume(run).state.x
        torch.testing.assert_close(
            latent,
            alone()["latent"],
            atol=1e-4,
            rtol=1e-5,
            msg=lambda text, where=layout: f"{where}: {text}",
        )


@pytest.mark.parametrize("size", SIZES)
def test_all_draw_the_first_one_s_seed(size: int, found: Found) -> None:
    for layout in found(size)[0]:
        assert len({values[layout]["seed"] for values in found(size)}) == 1


# every feature

# Where a feature cannot be had on several processes, or with shared-out weights, it is refused in
# these words.
REFUSED = {"tiles": "decode in strips"}
REFUSED_SHARED = {
    "blocks streamed from disk": "not both",
    "blocks streamed from RAM": "not both",
    "the next expert read ahead": "dit_fsdp and prefetch",
}
WAYS = {
    "cfg": (Layout(cfg=2), {}),
    "ring": (Layout(ring=2), {}),
    "ulysses, shared out": (Layout(ulysses=2), SHARED),
}
# A ring is another attention and nothing else: it goes with what attention sees of a feature.
OF_ATTENTION = (
    "two passes",
    "one batch",
    "bfloat16",
    "another size",
    "one frame",
    "another attention",
    "tokens in chunks",
    "blocks streamed from disk",
    "quantised",
)
PAIRS = [
    (way, name)
    for way in WAYS
    for name in FEATURES
    if name != "compiled" and (way != "ring" or name in OF_ATTENTION)  # test_compile_together
]

# With the family: what its channels, times and single network might break.
FAMILY_PAIRS = [
    (kind, way, name)
    for kind in FAMILY
    for way in WAYS
    for name in ("stop and resume", "fused LoRAs", "tokens in chunks", "quantised", "one batch")
]


def with_features(info: ranks.DistInfo) -> dict[str, Any]:
    """Each way with each feature: the latent, or the words of the refusal."""
    return {f"{way} + {name}": with_feature(info, *WAYS[way], name) for way, name in PAIRS}


def with_family_features(info: ranks.DistInfo) -> dict[str, Any]:
    return {
        f"{kind}, {way} + {name}": with_feature(info, *WAYS[way], name, kind)
        for kind, way, name in FAMILY_PAIRS
    }


def with_feature(
    info: ranks.DistInfo, layout: Layout, runtime: dict[str, Any], name: str, kind: str = "nano"
) -> Any:
    (model, pictures), (more, request, _) = KINDS[kind], feature(kind, name)
    request = {"frame_num": 5, "sample_steps": 3, "seed": 3, **request}
    request |= {which: picture(which) for which in pictures}
    stop, form = request.pop("stop", None), request.pop("model", "nano")
    request["lora"] = tuple(str(made(model) / lora) for lora in request.get("lora", ()))
    try:
        if model == "nano":
            pipe = opened(info, layout, form, **runtime, **more)
        else:
            asked = Runtime(device="cpu", **fields(layout), **runtime, **more)
            pipe = assemble(resolve(made(model) / model), asked, None, info)
        run = pipe.begin(Request(PROMPT, **request))
        if stop is not None:
            with pytest.raises(Cancelled) as cancelled:
                pipe.resume(run, lambda told: told.step < stop if info.rank == 0 else None)
            run = cancelled.value.run
            assert run.state.index == stop
        return pipe.resume(run).state.x
    except RequestError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "name"), PAIRS, ids=[f"{way} + {name}" for way, name in PAIRS])
def test_with_every_feature(way: str, name: str, processes: Processes) -> None:
    results = [values[f"{way} + {name}"] for values in processes(with_features, 2)]
    words = REFUSED.get(name) or (REFUSED_SHARED.get(name) if WAYS[way][1] else None)
    if words:
        assert all(words in result for result in results)
        return
    check_feature("nano", name, results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way", "name"), FAMILY_PAIRS, ids=[f"{a}, {b} + {c}" for a, b, c in FAMILY_PAIRS]
)
def test_the_family_with_features(kind: str, way: str, name: str, processes: Processes) -> None:
    found = processes(with_family_features, 2)
    check_feature(kind, name, [values[f"{kind}, {way} + {name}"] for values in found])


def check_feature(kind: str, name: str, results: list[Tensor]) -> None:
    runtime, request, limit = feature(kind, name)
    assert torch.equal(*results)
    one = latent(runtime, {key: value for key, value in request.items() if key != "stop"}, kind)
    # Two processes make what one makes with the same feature, to rounding, which is larger where
    # values are rounded to 8 bits or bfloat16.
    assert (results[0] - one).abs().mean() <= max(ROUNDING, limit / 4) * one.abs().mean()


# refusals


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({"ulysses_size": 3}, r"ulysses 3 = 3 needs 3 ranks"),
        ({"ulysses_size": 2, "vae_tile": 64}, "vae_tile 64: .*strips"),
        (
            {"ulysses_size": 2, "dit_fsdp": True, "resident_blocks": 2},
            "dit_fsdp and resident_blocks 2",
        ),
        ({"ulysses_size": 2, "dit_fsdp": True, "prefetch": True}, "dit_fsdp and prefetch"),
    ],
)
def test_what_cannot_go_together_is_refused_before_anything_is_read(
    runtime: dict[str, Any], words: str
) -> None:
    with played(0, 2) as info, pytest.raises(RequestError, match=words):
        assemble(resolve("nano"), Runtime(device="cpu", **runtime), None, info)


def test_a_share_of_one_is_refused() -> None:
    with pytest.raises(
        RequestError, match="dit_fsdp shards the weights over several processes, and there is one"
    ):
        assemble(resolve("nano"), Runtime(device="cpu", dit_fsdp=True))
    assert layout_of(Runtime()) == Layout()
