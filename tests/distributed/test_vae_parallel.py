"""A latent decoded in strips, one a process, gives the frames of one process.

Numbers are proven three ways: with threads that play the processes, exactly and for any number of
them; with processes that speak gloo, started once for all that is looked at; and with one that
imagines the others, for shapes, bytes and memory at full size.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from helpers.expected_bytes import decode_bytes
from helpers.processes import CPU, Processes
from safetensors.torch import load_file
from torch import Tensor, nn

from wanflow.checkpoint.structure import vae_of
from wanflow.config import VAE22Config, VAEConfig, from_mapping
from wanflow.models.vae import WanVAE, growth, receptive_margin
from wanflow.models.vae22 import WanVAE22
from wanflow.parallel import ranks, vae_parallel
from wanflow.parallel.groups import Group, Layout, ParallelContext, make_groups, simulated_groups
from wanflow.parallel.vae_parallel import NARROWEST, Frames, Strips, connected, decode_frames
from wanflow.pipeline import to_uint8
from wanflow.plan.trace import fake, materialise
from wanflow.presets import T2V_A14B, TI2V_5B

GOLDEN = Path(os.environ.get("WANFLOW_GOLDEN") or Path(__file__).parents[1] / "golden")
PUBLISHED = VAEConfig(
    dim=8, latent_mean=(0.1,) * 16, latent_std=(1.5,) * 16
)  # its layers, with fewer channels
OTHER = VAEConfig(8, 4, (1, 2, 2), 1, (True, False), latent_mean=(0.1,) * 4, latent_std=(1.5,) * 4)
WAN22 = VAE22Config(dim=4, dec_dim=8, z_dim=16, latent_mean=(0.1,) * 16, latent_std=(1.5,) * 16)
QUICK, SLOW = (2,), (3, 8)  # threads play others
# Strips change the shapes of convolutions and so the order of their sums (7.0e-6 seen at most, for
# values up to 1.7).
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}


@dataclass(frozen=True)
class Case:
    """A decode of a random latent of so many frames, rows and columns; without a config, of the
    golden weights.
    """

    shape: tuple[int, int, int]
    config: VAEConfig | None = PUBLISHED
    dtype: torch.dtype = torch.float32


CASES = {
    "golden": Case((3, 4, 6), None),
    "golden, portrait": Case((1, 11, 5), None),
    "golden, 5 frames": Case((5, 4, 9), None),
    "wide": Case((2, 5, 17)),
    "tall": Case((2, 13, 4)),
    "square, 5 frames": Case((5, 8, 8)),
    "one strip": Case((2, 3, 3)),
    "one pixel": Case((1, 1, 1)),
    "other layers": Case((4, 7, 18), OTHER),
    "Wan2.2, wide": Case((3, 3, 9), WAN22),
    "Wan2.2, tall": Case((2, 8, 3), WAN22),
    "bfloat16": Case((2, 6, 16), dtype=torch.bfloat16),
}
EXACT = [name for name, case in CASES.items() if case.dtype == torch.float32]


@cache
def made(config: VAEConfig | None, dtype: torch.dtype = torch.float32) -> WanVAE:
    if config is None:
        manifest = json.loads((GOLDEN / "vae.json").read_text(encoding="utf-8"))
        statistics = {key: manifest[key] for key in ("latent_mean", "latent_std")}
        vae = WanVAE(from_mapping(VAEConfig, manifest["config"] | statistics, "vae.json"))
        vae.load_state_dict(load_file(GOLDEN / manifest["weights_file"]))
        return vae.requires_grad_(False).to(dtype)
    vae = WanVAE22(config) if isinstance(config, VAE22Config) else WanVAE(config)
    vae, generator = vae.requires_grad_(False), torch.Generator().manual_seed(0)
    for name, parameter in vae.named_parameters():
        # So that activations stay near one, and every pixel is told by all in reach.
        if "gamma" not in name:
            parameter.normal_(
                std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1, generator=generator
            )
    return vae.to(dtype)


def latent_of(case: Case) -> Tensor:
    return torch.randn(
        1, made(case.config).config.z_dim, *case.shape, generator=torch.Generator().manual_seed(1)
    )


@cache
def alone(name: str) -> Tensor:
    """A case decoded whole, on one process."""
    case = CASES[name]
    return made(case.config, case.dtype).decode(latent_of(case))


@dataclass
class Found:
    """What came out on one process: its strip in numbers, the frames, what it was told, and what it
    sent.
    """

    part: Tensor | None
    frames: list[Frames]
    told: list[tuple[int, int]]
    sent: dict[str, int]


def decoded(
    ctx: ParallelContext,
    vae: WanVAE,
    latent: Tensor,
    on_part: Callable[[int, int], None] | None = None,
) -> Found:
    parts: list[Tensor] = []
    told: list[tuple[int, int]] = []

    def convert(part: Tensor) -> Frames:
        parts.append(part)
        return to_uint8(part)

    def note(done: int, count: int) -> None:
        told.append((done, count))
        if on_part is not None:
            on_part(done, count)

    ctx.stats.reset()
    frames = list(decode_frames(vae, latent, ctx, convert, note))
    traffic = {key: value for key, value in ctx.stats.sent.items() if value}
    return Found(torch.cat(parts, dim=2) if parts else None, frames, told, traffic)


def together(found: Sequence[Found], cut: Strips) -> Tensor:
    """The video [1, 3, T, H, W] of all strips."""
    assert [one.part is not None for one in found] == [
        rank < len(cut.sizes) for rank in range(len(found))
    ]
    return torch.cat([one.part for one in found if one.part is not None], dim=cut.axis + 1)


# threads that play the processes


class Arriving:
    def __init__(self, queue: Queue[Tensor], values: Tensor) -> None:
        self.queue, self.values = queue, values

    def wait(self) -> None:
        got = self.queue.get(timeout=120)
        assert got.shape == self.values.shape and got.dtype == self.values.dtype
        self.values.copy_(got)


class Threads(Group):
    """The place of one thread among those that play a run."""

    def __init__(self, ctx: ParallelContext, queues: dict[tuple[int, int], Queue[Tensor]]) -> None:
        super().__init__(ctx.stats, rank=ctx.info.rank, size=ctx.layout.size)
        self.queues = queues

    def exchange(
        self,
        what: str,
        leaving: Sequence[tuple[int, Tensor]],
        arriving: Sequence[tuple[int, Tensor]],
    ) -> list[Any]:
        self.stats.add(what, sum(values.nbytes for _, values in leaving))
        for peer, values in leaving:
            assert values.is_contiguous() and peer != self.rank
            self.queues[self.rank, peer].put(values.clone())
        assert all(values.is_contiguous() for _, values in arriving)
        return [Arriving(self.queues[peer, self.rank], values) for peer, values in arriving]


def played(size: int, vae: WanVAE, latent: Tensor) -> list[Found]:
    """What each of so many processes finds, in order."""
    queues: dict[tuple[int, int], Queue[Tensor]] = {
        (a, b): Queue() for a in range(size) for b in range(size)
    }
    found: dict[int, Found] = {}

    def work(rank: int) -> None:
        ctx = simulated_groups(Layout(ulysses=size), rank)
        ctx.world = Threads(ctx, queues)
        found[rank] = decoded(ctx, vae, latent)

    threads = [Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert all(queue.empty() for queue in queues.values())
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize(
    ("size", "shape", "config"),
    [
        *itertools.product(
            (2, 3, 5, 8), ((2, 5, 17), (3, 16, 3), (1, 3, 9), (1, 9, 9)), (PUBLISHED,)
        ),
        *itertools.product((2, 3), ((3, 2, 7), (2, 7, 3)), (WAN22,)),
    ],
)
def test_exact(size: int, shape: tuple[int, int, int], config: VAEConfig) -> None:
    """In float64 nothing hides in rounding, not even what the outermost pixel of a halo tells."""
    case, cut = Case(shape, config, torch.float64), Strips(*shape[1:], size)
    vae, latent = made(config, torch.float64), latent_of(case)
    before, expected = latent.clone(), vae.decode(latent)
    found = played(size, vae, latent)
    assert expected.std() > 0.1
    assert (together(found, cut) - expected).abs().max() < 1e-12
    assert np.array_equal(np.concatenate(found[0].frames), to_uint8(together(found, cut)))
    assert torch.equal(latent, before)


@pytest.mark.parametrize("number", range(19))
def test_a_smaller_halo_shows(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every layer's halo is needed to its last pixel."""
    vae, latent = made(PUBLISHED, torch.float64), latent_of(Case((2, 3, 9)))
    reaching = [layer for layer in vae.decoder.layers() if receptive_margin(layer)]
    assert len(reaching) == 19
    monkeypatch.setattr(
        vae_parallel,
        "receptive_margin",
        lambda layer: receptive_margin(layer) - (layer is reaching[number]),
    )
    assert (
        together(played(3, vae, latent), Strips(3, 9, 3)) - vae.decode(latent)
    ).abs().max() > 1e-6


def test_attention_needs_all_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_parallel.Attention, "forward", lambda self, x: self.block(x, {}))
    vae, latent = made(PUBLISHED, torch.float64), latent_of(Case((1, 3, 9)))
    assert (
        together(played(3, vae, latent), Strips(3, 9, 3)) - vae.decode(latent)
    ).abs().max() > 1e-6


# processes


def gone_through(info: ranks.DistInfo) -> dict[str, dict[str, Any]]:
    """Every case, on one of several processes."""
    size = info.world_size
    ctx, found = (
        make_groups(
            Layout(cfg=2, ulysses=size // 2) if size % 2 == 0 else Layout(ring=size), info, 60
        ),
        {},
    )

    def agree(done: int, _: int) -> None:
        # As in a run that any process may be told to stop: all must say how far they are equally
        # often.
        assert ctx.from_rank0(done) == done

    for name, case in CASES.items():
        one = decoded(ctx, made(case.config, case.dtype), latent_of(case), agree)
        found[name] = vars(one) | {"frames": [torch.from_numpy(frames) for frames in one.frames]}
    return found


Worked = Callable[[int], list[dict[str, Found]]]


@pytest.fixture
def worked(processes: Processes) -> Worked:
    """What each of so many processes found."""

    def results(size: int) -> list[dict[str, Found]]:
        files = processes(gone_through, size)
        return [
            {
                name: Found(**one | {"frames": [frames.numpy() for frames in one["frames"]]})
                for name, one in file.items()
            }
            for file in files
        ]

    return results


SIZES = [
    *(pytest.param(size, marks=pytest.mark.distributed) for size in QUICK),
    *(
        pytest.param(size, marks=[pytest.mark.distributed, pytest.mark.slow, pytest.mark.crowded])
        for size in SLOW
    ),
]


@pytest.mark.parametrize("size", SIZES)
def test_strips_give_what_one_process_gives(size: int, worked: Worked) -> None:
    found = worked(size)
    for name in EXACT:
        video = together([one[name] for one in found], Strips(*CASES[name].shape[1:], size))
        torch.testing.assert_close(
            video, alone(name), **ROUNDING, msg=lambda text, name=name: f"{name}: {text}"
        )
        apart = np.abs(np.concatenate(found[0][name].frames).astype(int) - to_uint8(alone(name)))
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-3, name
    assert sum(float(alone(name).std()) > 0.1 for name in EXACT) == len(EXACT)


@pytest.mark.parametrize("size", SIZES)
def test_process_0_has_the_frames_in_order(size: int, worked: Worked) -> None:
    for rank, found in enumerate(worked(size)):
        for name, case in CASES.items():
            config, steps = made(case.config).config, case.shape[0]
            assert found[name].told == [(done, steps) for done in range(1, steps + 1)]
            if rank:
                assert not found[name].frames
                continue
            image = (*(side * config.spatial_stride for side in case.shape[1:]), 3)
            counts = [1, *[config.temporal_stride] * (steps - 1)]
            assert [frames.shape for frames in found[name].frames] == [
                (count, *image) for count in counts
            ]
            assert all(frames.dtype == np.uint8 for frames in found[name].frames)


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_differs_by_its_rounding(size: int, worked: Worked) -> None:
    case = CASES["bfloat16"]
    exact = made(case.config).decode(latent_of(case))
    video = together([one["bfloat16"] for one in worked(size)], Strips(*case.shape[1:], size))
    errors = [
        float((one.float() - exact).norm() / exact.norm()) for one in (video, alone("bfloat16"))
    ]
    assert errors[1] > 1e-3 and errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_sent_is_what_is_said(size: int, worked: Worked) -> None:
    for rank, found in enumerate(worked(size)):
        for name, case in CASES.items():
            expected = decode_bytes(
                made(case.config, case.dtype), case.shape[0], Strips(*case.shape[1:], size), rank
            )
            told = {"first": 8 * (size - 1) * case.shape[0]} if rank == 0 else {}
            assert found[name].sent == expected | told, (rank, name)


# one process


@pytest.mark.parametrize("name", EXACT)
def test_one_process_is_a_plain_decode(name: str) -> None:
    case = CASES[name]
    vae, latent, ctx = (
        made(case.config),
        latent_of(case),
        make_groups(Layout(), ranks.DistInfo(0, 1, CPU)),
    )
    found = decoded(ctx, vae, latent)
    assert found.part is not None and torch.equal(found.part, alone(name)) and not found.sent
    assert all(
        np.array_equal(a, to_uint8(b))
        for a, b in zip(found.frames, vae.decode_frames(latent), strict=True)
    )
    layers = vae.decoder.layers()
    assert connected(layers, Strips(9, 9, 1), ctx.world) == layers


@pytest.mark.parametrize("name", ["one strip", "one pixel"])
def test_one_strip_is_a_plain_decode(name: str) -> None:
    """However many processes there are."""
    found = [
        decoded(simulated_groups(Layout(ulysses=4), rank), made(PUBLISHED), latent_of(CASES[name]))
        for rank in range(4)
    ]
    assert torch.equal(together(found, Strips(*CASES[name].shape[1:], 4)), alone(name))
    assert not any(one.sent for one in found)


def test_strips_cover_a_frame() -> None:
    for size in range(1, 12):
        for height, width in ((1, 1), (1, 5), (5, 1), (7, 7), (90, 160), (160, 90), (60, 104)):
            cut, longer = Strips(height, width, size), max(height, width)
            assert sum(cut.sizes) == longer and max(cut.sizes) - min(cut.sizes) <= 1
            assert cut.sizes == [longer] or min(cut.sizes) >= NARROWEST
            assert len(cut.sizes) == min(size, max(1, longer // NARROWEST))
            assert cut.axis == (-3 if height > width else -2) and cut.across == min(height, width)
            ends = [
                (cut.around(rank)[0], longer - cut.around(rank)[1])
                for rank in range(len(cut.sizes))
            ]
            assert (
                ends[0][0] == 0
                and ends[-1][1] == longer
                and all(a[1] == b[0] for a, b in pairwise(ends))
            )
            assert [cut.neighbours(rank) for rank in (0, len(cut.sizes) - 1)] == (
                [[1], [len(cut.sizes) - 2]] if len(cut.sizes) > 1 else [[], []]
            )
    assert Strips(90, 160, 8).sizes == [20] * 8 and Strips(90, 160, 3).sizes == [53, 53, 54]
    assert Strips(4, 6, 8).sizes == [2, 2, 2]


@pytest.mark.parametrize("config", [PUBLISHED, OTHER, T2V_A14B.vae, TI2V_5B.vae])
def test_no_layer_sees_beyond_the_nearest_strip(config: VAEConfig) -> None:
    layers = vae_of(config).decoder.layers()
    scale, reaches = 1, []
    for layer in layers:
        reaches.append(receptive_margin(layer) / scale)
        scale *= growth(layer)
    assert max(reaches) == NARROWEST and scale == config.spatial_stride


def test_activations_stay_channels_last() -> None:
    vae, wrong = made(PUBLISHED), []

    def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if receptive_margin(layer) and not args[0].is_contiguous(
            memory_format=torch.channels_last_3d
        ):
            wrong.append(type(layer).__name__)

    handles = [layer.register_forward_pre_hook(look) for layer in vae.decoder.layers()]
    for shape in ((2, 4, 9), (2, 9, 4)):
        decoded(simulated_groups(Layout(ulysses=3), 1), vae, latent_of(Case(shape)))
    for handle in handles:
        handle.remove()
    assert not wrong


@pytest.mark.parametrize("rank", [0, 2])
def test_convert_and_on_part_can_end_it(rank: int) -> None:
    class Enough(Exception):
        pass

    def refuse(*_: Any) -> Frames:
        raise Enough

    ctx, latent = simulated_groups(Layout(ulysses=3), rank), latent_of(CASES["wide"])
    for ways in ((refuse,), (to_uint8, refuse)):
        with pytest.raises(Enough):
            list(decode_frames(made(PUBLISHED), latent, ctx, *ways))


@pytest.mark.parametrize(
    "shape", [(16, 1, 8, 8), (2, 16, 1, 8, 8), (1, 15, 1, 8, 8), (1, 16, 0, 8, 8)]
)
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="latent is"):
        next(
            decode_frames(
                made(PUBLISHED), torch.zeros(shape), simulated_groups(Layout(ulysses=2)), to_uint8
            )
        )


# full size, without memory


def traced(size: int, rank: int, latent: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes at the peak beside the weights, and FLOPs, of the published VAE; what it sends is
    compared on the way.
    """
    with torch.device("meta"):
        vae = WanVAE(T2V_A14B.vae)
    with fake() as trace:
        weights, x, ctx = (
            materialise(vae),
            torch.empty(1, 16, *latent),
            simulated_groups(Layout(ulysses=size), rank),
        )
        trace.mark()
        for frames in decode_frames(
            vae, x, ctx, lambda part: np.empty((part.shape[2], *part.shape[3:], 3), dtype=np.uint8)
        ):
            assert frames.shape[1:] == (latent[1] * 8, latent[2] * 8, 3)
    assert {key: value for key, value in ctx.stats.sent.items() if value} == decode_bytes(
        vae, latent[0], Strips(*latent[1:], size), rank
    )
    return trace.peak - weights, trace.work.total()


@pytest.mark.slow
def test_memory_and_work_are_shared() -> None:
    """At 1280*720 all the halos cost a process in the middle 6 % at most, of memory and of work."""
    peak, work = traced(1, 0, (3, 90, 160))
    assert 11.5e9 < peak < 12.5e9
    for size, rank, latent in (
        (2, 0, (3, 90, 160)),
        (4, 2, (3, 90, 160)),
        (8, 4, (3, 90, 160)),
        (8, 7, (3, 160, 90)),
    ):
        own, done = traced(size, rank, latent)
        assert own < 1.06 * peak / size and done < 1.06 * work / size, (size, rank)


def test_a_14b_decode_on_eight_sends_what_is_known() -> None:
    """By hand: 81 frames at 1280*720. Keys and values are 2 * 384 numbers of a latent pixel; a
    column is 90 latent pixels high.
    """
    with torch.device("meta"):
        vae = WanVAE(T2V_A14B.vae)
    found = decode_bytes(vae, 21, Strips(90, 160, 8), 3)
    assert found["kv"] == 7 * 20 * 90 * 2 * 384 * 21 * 4
    assert found["frames"] == 81 * 720 * 160 * 3
    levels = [
        (90, 21, 16 + 2 * 2 * 384 + 3 * 2 * 384 + 384),
        (180, 41, 2 * 192 + 2 * 2 * 384 + 384),
        (360, 81, 3 * 2 * 192 + 192),
        (720, 81, 3 * 2 * 96 + 96),
    ]
    assert found["halo"] == 2 * 4 * sum(high * frames * numbers for high, frames, numbers in levels)
    assert (
        decode_bytes(vae, 21, Strips(90, 160, 1)) == decode_bytes(vae, 1, Strips(2, 6, 8), 3) == {}
    )
