"""Streamed blocks give a resident model's numbers, also after errors and abandoned passes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.memory import measurable, measured
from torch import Tensor

import wanflow
from wanflow.checkpoint.containers import SafetensorsFile
from wanflow.checkpoint.load import load_expert, load_text_encoder
from wanflow.checkpoint.structure import set_chunk
from wanflow.config import DiTConfig
from wanflow.loaders.parts import open_expert
from wanflow.loaders.placement import Placement
from wanflow.loaders.streamed import Prefetcher
from wanflow.loaders.text_encoder import StreamedEncoder
from wanflow.models.dit import WanDiT, run_blocks
from wanflow.opening import resolve
from wanflow.presets import NANO_FOLDER
from wanflow.runtime import Runtime
from wanflow.transforms import quant
from wanflow.transforms.block_streaming import (
    BlockBuffers,
    BufferLayout,
    Streaming,
    SyncExecutor,
    evenly_spaced_resident,
    load_to_host,
    matmul_leaves,
)
from wanflow.transforms.deltas import Difference, LowRank
from wanflow.transforms.host_memory import HostMemory
from wanflow.transforms.lora import Adapters
from wanflow.transforms.ways import ROUNDING

CPU = torch.device("cpu")
CONFIG = DiTConfig(
    dim=48, ffn_dim=96, num_heads=4, num_layers=5, text_dim=24, text_len=7, freq_dim=16
)


def full_model(seed: int = 0) -> WanDiT:
    torch.manual_seed(seed)
    model = WanDiT(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    return model


class File:
    """A file of blocks: copies them out of a model, and records which were read."""

    def __init__(self, model: WanDiT) -> None:
        self.blocks = [
            {name: getattr(leaf, key) for name, (leaf, key) in matmul_leaves(block).items()}
            for block in model.blocks
        ]
        self.read: list[int] = []
        self.fails_at: int | None = None
        self.finished = threading.Semaphore(0)  # one for each read that ended

    def fetch(self, index: int, views: Mapping[str, Tensor]) -> None:
        self.read.append(index)
        if index == self.fails_at:
            raise OSError("the disk is gone")
        for name, view in views.items():
            view.copy_(self.blocks[index][name])
        self.finished.release()


def streaming(
    model: WanDiT, resident: set[int], home: str, worker: SyncExecutor | None = None
) -> tuple[Streaming, File]:
    file = File(model)
    bare = copy.deepcopy(model)
    host_buffers = (
        load_to_host(bare, file.fetch, HostMemory(False), resident) if home == "ram" else None
    )
    return Streaming(bare, file.fetch, resident, CPU, host_buffers, worker), file


def inputs(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent, text = (
        torch.randn(batch, 16, 2, 6, 4, generator=generator),
        torch.randn(batch, 7, 24, generator=generator),
    )
    return latent, torch.full((batch,), 700.0), text


@pytest.mark.parametrize("home", ["ram", "disk"])
@pytest.mark.parametrize("resident", [set(), {2}, {0, 4}, {1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}])
@torch.no_grad()
def test_streamed_is_resident(home: str, resident: set[int]) -> None:
    model = full_model()
    streamed, file = streaming(model, resident, home)
    for _ in range(3):  # what is sent ahead belongs to the next pass
        assert torch.equal(streamed(*inputs()), model(*inputs()))
    assert torch.equal(streamed(*inputs(2)), model(*inputs(2)))
    states = streamed.text_states(inputs()[2])
    assert all(
        torch.equal(a, b)
        for one, two in zip(states, model.text_states(inputs()[2]), strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert torch.equal(streamed(*inputs()[:2], states), model(*inputs()))
    if home == "ram":  # the file was read once
        assert sorted(file.read) == [0, 1, 2, 3, 4]
    streamed.close()


@torch.no_grad()
def test_another_trunk_gets_the_blocks_one_by_one() -> None:
    """Another trunk sees blocks with their weights, and may stop in the middle of a pass."""
    model = full_model()
    streamed, _ = streaming(model, {1}, "disk")

    def first_two(blocks, head, tokens, conditioning):  # type: ignore[no-untyped-def]
        for block, text, _ in zip(blocks, conditioning.text, range(2), strict=False):
            tokens = block(tokens, conditioning, text)
        return head(tokens, conditioning)

    assert torch.equal(streamed(*inputs(), first_two), model(*inputs(), first_two))
    assert torch.equal(streamed(*inputs()), model(*inputs()))
    assert torch.equal(streamed(*inputs(), run_blocks), model(*inputs()))


@torch.no_grad()
def test_an_abandoned_pass_leaves_the_next_one_right() -> None:
    model = full_model()
    streamed, file = streaming(model, set(), "disk")

    def breaks(blocks, head, tokens, conditioning):  # type: ignore[no-untyped-def]
        for number, _ in enumerate(blocks):
            if number == 3:
                raise KeyboardInterrupt
        return tokens

    with pytest.raises(KeyboardInterrupt):
        streamed(*inputs(), breaks)
    assert torch.equal(streamed(*inputs()), model(*inputs()))
    file.fails_at = 2
    with pytest.raises(OSError, match="the disk is gone"):
        streamed(*inputs())
        streamed(*inputs())  # it may have been ahead when the disk went
    file.fails_at = None
    assert torch.equal(streamed(*inputs()), model(*inputs()))


@torch.no_grad()
def test_weights_that_wait_take_no_memory() -> None:
    model = full_model()
    streamed, _ = streaming(model, {0}, "disk", SyncExecutor())
    streamed(*inputs())
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in streamed.parameters()
    }
    block = BlockBuffers(next(iter(model.blocks))).layout.nbytes
    small = sum(
        p.nbytes
        for name, p in model.named_parameters()
        if not name.startswith("blocks.") or p.ndim != 2
    )
    assert sum(held.values()) < block + small + 5 * 10 * 8
    seen: list[int] = []

    def watch(blocks, head, tokens, conditioning):  # type: ignore[no-untyped-def]
        for block, text in zip(blocks, conditioning.text, strict=True):
            inside = sum(
                leaf.weight.untyped_storage().nbytes() > 8
                for b in streamed.model.blocks
                for leaf in (b.ffn[0],)
            )
            seen.append(inside)
            tokens = block(tokens, conditioning, text)
        return head(tokens, conditioning)

    streamed(*inputs(), watch)
    assert seen == [1, 2, 2, 2, 2]  # the resident one, and the one at work


@torch.no_grad()
def test_the_next_block_is_read_while_the_current_one_runs() -> None:
    """While a block is held here, the read of the next one ends: also across passes."""
    model = full_model()
    streamed, file = streaming(model, set(), "disk")

    def held(blocks, head, tokens, conditioning):  # type: ignore[no-untyped-def]
        for block, text in zip(blocks, conditioning.text, strict=True):
            assert file.finished.acquire(timeout=60)
            tokens = block(tokens, conditioning, text)
        return head(tokens, conditioning)

    text = streamed.text_states(inputs()[2])
    streamed(*inputs()[:2], text)
    for _ in range(5 + 5 + 1):  # the text, the pass, and the first block of the next pass
        assert file.finished.acquire(timeout=60)
    for _ in range(4):
        streamed(*inputs()[:2], text, held)


def test_streamed_blocks_are_evenly_spaced() -> None:
    for layers in (1, 5, 40):
        for resident in range(layers + 3):
            staying = evenly_spaced_resident(layers, resident)
            streamed = sorted(set(range(layers)) - staying)
            assert len(staying) == min(resident, layers)
            gaps = [b - a for a, b in pairwise(streamed)]
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_layout_gives_back_what_was_put_in() -> None:
    values = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "d": torch.tensor(2.0),
    }
    layout = BufferLayout.of(values)
    views = layout.views(HostMemory(False).buffer(layout.nbytes))
    for name, value in values.items():
        views[name].copy_(value)
    for name, value in values.items():
        assert views[name].dtype == value.dtype and views[name].shape == value.shape
        assert torch.equal(views[name].float(), value.float())
        assert views[name].data_ptr() % 64 == 0 or value.nbytes < 64


@pytest.mark.parametrize("home", ["ram", "disk"])
@torch.no_grad()
def test_loras_on_streamed_blocks(home: str) -> None:
    """On streamed weights, and on the small tensors that stay."""
    model = full_model()
    streamed, _ = streaming(model, {1}, home)
    generator = torch.Generator().manual_seed(3)
    changes = {
        f"blocks.{n}.{leaf}": LowRank(
            torch.randn(out, 2, generator=generator), torch.randn(2, side, generator=generator)
        )
        for n in range(5)
        for leaf, out, side in (
            ("ffn.0.weight", 96, 48),
            ("self_attn.q.weight", 48, 48),
            ("cross_attn.k.weight", 48, 48),
        )
    } | {
        "blocks.3.ffn.2.bias": Difference(torch.ones(48)),
        "blocks.0.modulation": Difference(torch.ones(1, 6, 48)),
    }
    plain = model(*inputs())
    both = [Adapters(model), Adapters(streamed.model)]
    for strength in (1.0, 0.3):
        for adapters in both:
            if "x" in adapters.names:
                adapters.set_strength("x", strength)
            else:
                adapters.attach("x", changes, strength)
        changed = model(*inputs())
        assert not torch.equal(changed, plain)
        assert torch.equal(streamed(*inputs()), changed)
    for adapters in both:
        adapters.remove("x")
    assert torch.equal(streamed(*inputs()), plain)
    assert torch.equal(model(*inputs()), plain)


@pytest.mark.parametrize("chunk", [1, 5, 11, 12, 13, 100])
@torch.no_grad()
def test_chunks_of_tokens(chunk: int) -> None:
    model, latent = full_model(), inputs(2)[0]
    timesteps = torch.arange(24.0).view(2, 12) * 40
    for timestep in (torch.full((2,), 700.0), timesteps):
        expected = model(latent, timestep, inputs(2)[2])
        set_chunk(model, chunk)
        torch.testing.assert_close(
            model(latent, timestep, inputs(2)[2]), expected, rtol=1e-5, atol=1e-5
        )
        set_chunk(model, 0)


# the parts of a pipeline


def test_a_prefetched_expert_equals_the_one_read_at_once() -> None:
    checkpoint = resolve("nano")
    for runtime in (
        Runtime(),
        Runtime(resident_blocks=2, stream_from="ram"),
        Runtime(quantize="nf4", quantize_layers="all"),
    ):
        where = Placement(torch.float32, CPU, runtime)
        ahead = Prefetcher(checkpoint, "low", where, None, ())
        expected = open_expert(checkpoint, "low", where)
        model = ahead.take()
        generator = torch.Generator().manual_seed(1)
        shape = checkpoint.spec.dit
        sample = (
            torch.randn(1, 16, 2, 8, 8, generator=generator),
            torch.tensor([300.0]),
            torch.randn(1, 9, shape.text_dim, generator=generator),
        )
        with torch.no_grad():
            assert torch.equal(model(*sample), expected(*sample))
        assert not any("wanflow-ahead" in thread.name for thread in threading.enumerate())


def test_a_prefetch_that_failed_raises_when_the_expert_is_needed(tmp_path: Path) -> None:
    from dataclasses import replace

    checkpoint = resolve("nano")
    low = checkpoint.source("low")
    assert isinstance(low.inner, SafetensorsFile)
    file = replace(low.inner.file, path=tmp_path / "gone.safetensors")
    lost = replace(low, inner=replace(low.inner, file=file))
    gone = replace(checkpoint, sources={**checkpoint.sources, "low": lost})
    ahead = Prefetcher(gone, "low", Placement(torch.float32, CPU, Runtime()), None, ())
    with pytest.raises(wanflow.RequestError, match="gone"):
        ahead.take()
    Prefetcher(checkpoint, "low", Placement(torch.float32, CPU, Runtime()), None, ()).drop()
    assert not any("wanflow-ahead" in thread.name for thread in threading.enumerate())


def test_a_text_encoder_streamed_block_by_block() -> None:
    checkpoint = resolve("nano")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, checkpoint.spec.text.vocab, (3, 16), generator=generator)
    mask = (torch.arange(16) < torch.tensor([[16], [3], [9]])).long()
    reports: list[tuple[int, int]] = []
    for dtype in (torch.float32, torch.bfloat16):
        encoder = load_text_encoder(checkpoint, dtype, "cpu")
        streamed = StreamedEncoder(
            checkpoint, dtype, CPU, lambda done, total: reports.append((done, total))
        )
        with torch.no_grad():
            expected = torch.zeros(3, 16, checkpoint.spec.text.dim, dtype=dtype)
            for row, length in enumerate(mask.sum(1).tolist()):
                expected[row, :length] = encoder(
                    ids[row : row + 1, :length], mask[row : row + 1, :length]
                )
            padded = encoder(ids, mask) * mask.unsqueeze(-1)
        assert torch.equal(streamed(ids, mask), expected)
        # Padding is not attended to, so leaving it out changes rounding only.
        assert (expected - padded).abs().max() <= (
            1e-5 if dtype == torch.float32 else 0.03
        ) * padded.abs().max()
    first = reports[: len(reports) // 2]
    assert (
        first == sorted(first)
        and first[-1][0] == first[-1][1]
        and len(first) == checkpoint.spec.text.num_layers
    )


@pytest.mark.slow
def test_streaming_leaves_no_threads_and_no_weights(tmp_path: Path) -> None:
    before = set(threading.enumerate())  # other tests keep pipelines that stream
    pipe = wanflow.load(
        "nano",
        device="cpu",
        resident_blocks=1,
        stream_from="disk",
        keep_experts=False,
        prefetch=True,
    )
    pipe.generate(
        "a red circle moves left on a blue background", frame_num=5, sample_steps=2, seed=1
    )
    pipe.parts.close()  # type: ignore[attr-defined]
    assert not any(
        thread.name.startswith("wanflow") for thread in set(threading.enumerate()) - before
    )


def test_quantised_blocks_stream_too(tmp_path: Path) -> None:
    """Rounded while they are read, in each pass or once; the same numbers as those that stay."""
    checkpoint = resolve(NANO_FOLDER)
    for mode in ("fp8", "int8", "nf4"):
        runtime = Runtime(quantize=mode, quantize_layers="all")  # type: ignore[arg-type]
        expected = load_expert(checkpoint, "high", torch.float32, "cpu", runtime=runtime)
        for home in ("ram", "disk"):
            where = Placement(
                torch.float32,
                CPU,
                Runtime(quantize=mode, quantize_layers="all", resident_blocks=1, stream_from=home),
            )  # type: ignore[arg-type]
            streamed = open_expert(checkpoint, "high", where)
            latent, text = (
                torch.randn(1, 16, 2, 8, 8),
                torch.randn(1, 9, checkpoint.spec.dit.text_dim),
            )
            with torch.no_grad():
                assert torch.equal(
                    streamed(latent, torch.tensor([900.0]), text),
                    expected(latent, torch.tensor([900.0]), text),
                )
            streamed.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["fp8", "int8"])
def test_blocks_that_round_tokens_stream_and_run_in_chunks(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose way of multiplying is forced here; a token is rounded by itself."""
    monkeypatch.setattr(quant, "choose_way", lambda mode, *_: ROUNDING[mode])
    checkpoint = resolve(NANO_FOLDER)
    runtime = Runtime(quantize=mode, quantize_layers="all")
    latent = torch.randn(1, 16, 2, 8, 8)
    text = torch.randn(1, 9, checkpoint.spec.dit.text_dim)
    whole = load_expert(checkpoint, "high", torch.bfloat16, "cpu", runtime=runtime)
    with torch.no_grad():
        want = whole(latent, torch.tensor([900.0]), text)
    ways = {leaf.way for leaf in whole.modules() if isinstance(leaf, quant.QuantLinear)}
    assert ways == {ROUNDING[mode]}
    for chunk in (0, 11):
        way = replace(runtime, resident_blocks=1, stream_from="ram", chunk_tokens=chunk)
        streamed = open_expert(checkpoint, "high", Placement(torch.bfloat16, CPU, way))
        with torch.no_grad():
            assert torch.equal(streamed(latent, torch.tensor([900.0]), text), want)
        streamed.close()  # type: ignore[union-attr]


def test_a_file_that_is_cut_while_blocks_are_streamed_is_named(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(NANO_FOLDER, tmp_path / "model")
    expert = next((tmp_path / "model" / "high_noise_model").glob("*.safetensors"))
    pipe = wanflow.load(tmp_path / "model", device="cpu", resident_blocks=0, stream_from="disk")
    pipe.parts.expert("high")
    with expert.open("r+b") as file:
        file.truncate(expert.stat().st_size // 2)
    with pytest.raises(wanflow.RequestError, match=expert.name):
        pipe.generate(
            "a red circle moves left on a blue background", frame_num=5, sample_steps=2, seed=1
        )


SOAK = """
import json
from helpers.memory import anonymous
import wanflow
ways = {
    "resident": {},
    "swapped, read ahead, streamed": {
        "keep_experts": False, "prefetch": True, "resident_blocks": 2, "stream_from": "disk",
        "chunk_tokens": 64,
    },
}
for name, runtime in ways.items():
    pipe = wanflow.load("nano", device="cpu", **runtime)
    seen = []
    for number in range(50):
        prompt = "a red circle moves left on a blue background"
        pipe.generate(prompt, frame_num=5, sample_steps=2, seed=number)
        seen.append(anonymous())
    print(json.dumps({"way": name, "early": min(seen[5:20]), "late": min(seen[35:])}))
"""


@pytest.mark.slow
@measurable
def test_fifty_generations_leak_nothing() -> None:
    for way in measured(SOAK):
        assert way["late"] - way["early"] < 8 << 20, way
