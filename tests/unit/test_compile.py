"""Compiled blocks: as many graphs as we say, the numbers of uncompiled ones, few bytes, and words
for what fails.
"""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import PROMPT, filled
from helpers.compiled import no_recompile, traced
from helpers.features import latent, pipeline, plain_latent
from helpers.gguf_blocks import blocks
from helpers.packed_leaves import fill_packed
from helpers.tiny import TINY
from torch import Tensor, nn

import wanflow
from wanflow.assemble import compiles
from wanflow.cli import main
from wanflow.config import RequestError
from wanflow.models.dit import Block, Conditioning, WanDiT
from wanflow.presets import T2V_A14B
from wanflow.remembered import of_device
from wanflow.request import Request
from wanflow.runtime import Quantization, runtime_of
from wanflow.transforms import compile as compiling
from wanflow.transforms.compile import UNMEASURED_S, Compiler, missing_here
from wanflow.transforms.deltas import LowRank
from wanflow.transforms.lora import Adapters
from wanflow.transforms.packed import FP8, Packed, replace_with_packed
from wanflow.transforms.quant import quantizable_layers, replace_with_quantised
from wanflow.transforms.ways import Way

CPU = torch.device("cpu")
WIDE = replace(TINY, dim=256, ffn_dim=512)  # a block of a K-quant has 256 values


def compiler(strict: bool = True, folder: Path | None = None) -> Compiler:
    return Compiler(CPU, strict, folder, "test")


def inputs(batch: int, height: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    latent = torch.randn(batch, 16, 2, height, 4, generator=generator)
    timesteps = torch.linspace(500, 700, batch)
    return latent, timesteps, torch.randn(batch, 8, 24, generator=generator)


@torch.no_grad()
def test_one_pair_of_graphs_serves_all() -> None:
    """Every block, both experts, one sample and two, chunks, sizes, and strengths of a LoRA."""
    made, low_rank = compiler(), LowRank(torch.randn(32, 2), torch.randn(2, 32))
    with traced(), no_recompile():
        for seed in (0, 1):
            expert = filled(WanDiT(TINY), seed)
            made.attach(expert)
            adapters, paths = Adapters(expert), ("self_attn.q", "cross_attn.o")
            deltas = {f"blocks.{n}.{path}.weight": low_rank for n in (0, 1) for path in paths}
            adapters.attach("one", deltas, 0.3)
            for batch, height, chunk, strength in ((1, 6, 0, 0.3), (2, 6, 0, 0.0), (1, 8, 5, 0.9)):
                adapters.set_strength("one", strength)
                for module in expert.modules():
                    if hasattr(module, "chunk"):
                        module.chunk = chunk  # type: ignore[assignment]
                made.wanted = False
                expected = expert(*inputs(batch, height))
                made.wanted = True
                torch.testing.assert_close(expert(*inputs(batch, height)), expected)
        assert made.graphs == 2


@pytest.mark.slow
@torch.no_grad()
def test_timesteps_of_tokens_are_one_more_pair() -> None:
    made, expert = compiler(), filled(WanDiT(TINY), 0)
    plain = filled(WanDiT(TINY), 0)
    made.attach(expert)
    latent, _, text = inputs(1)
    with traced():
        for levels in (2, 3, 4):
            times = (torch.arange(12) % levels * 100.0)[None]
            torch.testing.assert_close(expert(latent, times, text), plain(latent, times, text))
    assert made.graphs in (2, 4)  # torch may keep the number of levels as a symbol from the second


@pytest.mark.slow
@pytest.mark.parametrize(
    "runtime",
    [
        {"resident_blocks": 1, "stream_from": "disk", "chunk_tokens": 7, "cfg_batch": False},
        {"resident_blocks": 0, "stream_from": "ram", "cfg_batch": True},
        {"prefetch": True, "keep_experts": False},
        {"quantize": "fp8", "quantize_layers": "all"},
    ],
)
def test_a_run_compiles_two_graphs(runtime: dict[str, Any]) -> None:
    """Streamed or quantised, over both experts, with guidance and without."""
    request = {"lora": ("both.safetensors@high=1,low=0.5",), "cfg_low": 1.0}
    with traced(), no_recompile():
        result = latent({"compile": "on"} | runtime, request)
        settings = tuple(sorted(({"compile": "on"} | runtime).items()))
        made = pipeline("nano", settings, "nano").parts.compiler
    assert made.graphs == 2
    expected = latent(runtime, request)
    assert (result - expected).abs().mean() <= 1e-3 * expected.abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F8_E4M3", "Q4_K", "Q6_K", "Q5_0", "IQ4_XS"])
@torch.no_grad()
def test_packed_weights_compile(kind: str) -> None:
    """Forms of fp8 and GGUF files are unpacked inside the graphs."""
    expert, plain = filled(WanDiT(WIDE), 0), filled(WanDiT(WIDE), 0)
    names = [f"{path}.weight" for path in quantizable_layers(expert, "all")]
    replace_with_packed(expert, dict.fromkeys(names, kind), torch.float32)
    for name in names:
        leaf, bare = (one.get_submodule(name[: -len(".weight")]) for one in (expert, plain))
        rows, columns = shape = tuple(bare.weight.shape)  # type: ignore[operator, arg-type]
        if kind in FP8:
            data = (torch.randn(shape) * 0.2).to(FP8[kind])
            fill_packed(leaf, Packed(kind, shape, data, torch.tensor(0.5)))
        else:
            fill_packed(leaf, Packed(kind, shape, blocks(kind, rows, columns)))
        leaf.bias.data.copy_(bare.bias)  # type: ignore[operator, arg-type]
    compare(expert)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "way"), [("fp8", "scaled_mm"), ("int8", "int_mm"), ("nf4", None)])
@torch.no_grad()
def test_quantised_weights_compile(mode: Quantization, way: Way | None) -> None:
    expert, plain = filled(WanDiT(WIDE), 0), filled(WanDiT(WIDE), 0)
    paths = quantizable_layers(expert, "all")
    for path in paths:
        leaf = expert.get_submodule(path)
        leaf.weight.data = leaf.weight.bfloat16()  # type: ignore[operator, union-attr]
    replace_with_quantised(expert, paths, mode, torch.bfloat16, CPU, way)
    for path in paths:
        leaf, bare = expert.get_submodule(path), plain.get_submodule(path)
        for name, value in leaf.quantise(bare.weight).items():  # type: ignore[operator]
            setattr(leaf, name, nn.Parameter(value, requires_grad=False))
        leaf.bias.data.copy_(bare.bias)  # type: ignore[operator, arg-type]
    compare(expert)


def compare(expert: WanDiT) -> None:
    made, expected = compiler(), expert(*inputs(1))
    made.attach(expert)
    with traced(), no_recompile():
        torch.testing.assert_close(expert(*inputs(1)), expected)
    assert made.graphs == 2 and expected.isfinite().all()


# What fails


def broken(graph: Any, example_inputs: Any) -> Any:
    raise RuntimeError("no code today\nand a long trace")


@torch.no_grad()
def test_auto_goes_on_without_a_compiler_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    made, expert = compiler(strict=False), filled(WanDiT(TINY), 0)
    expected = expert(*inputs(1))
    made.attach(expert)
    with traced(broken):
        assert torch.equal(expert(*inputs(1)), expected)
        assert torch.equal(expert(*inputs(1)), expected)
    (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert "compile auto: the compiler failed (RuntimeError: no code today); blocks run" in (
        warning.getMessage()
    )


@torch.no_grad()
def test_on_ends_in_one_line_where_the_compiler_fails() -> None:
    made, expert = compiler(), filled(WanDiT(TINY), 0)
    made.attach(expert)
    with traced(broken), pytest.raises(RequestError) as refused:
        expert(*inputs(1))
    assert str(refused.value) == (
        "compile on: the compiler failed (RuntimeError: no code today); --compile off runs without"
        " it"
    )


@torch.no_grad()
def test_an_interruption_and_a_lack_of_memory_pass_through() -> None:
    made, expert = compiler(strict=False), filled(WanDiT(TINY), 0)
    made.attach(expert)

    def interrupted(graph: Any, example_inputs: Any) -> Any:
        raise KeyboardInterrupt

    def full(graph: Any, example_inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with traced(interrupted), pytest.raises(KeyboardInterrupt):
        expert(*inputs(1))
    with traced(full), pytest.raises(torch.OutOfMemoryError):
        expert(*inputs(1))


def test_on_is_refused_where_a_compiler_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    from torch._inductor import config

    line = ["generate", "--ckpt_dir", "nano", "--prompt", PROMPT, "--compile", "on"]
    with config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        assert main([*line, "--device", "cpu"]) == 2
        assert not compiler(strict=False).pays(1e9)
    assert "compile on: this machine lacks a C++ compiler (g++" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "headers", "words"),
    [
        ({"triton": False}, True, "Triton for this GPU"),
        ({"triton": True, "cc": False}, True, "a C compiler"),
        ({"triton": True, "cc": True}, True, ""),
        ({"triton": True, "cc": True}, False, "Python.h"),
    ],
)
def test_what_a_gpu_needs(
    found: dict[str, bool],
    headers: bool,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import torch.utils._triton

    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: found["triton"])
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "cc" if found["cc"] else None)
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    lacking = missing_here(torch.device("cuda"))
    assert words in lacking and bool(lacking) == bool(words)
    assert "the device mps" in missing_here(torch.device("mps"))


# What pays


def test_auto_weighs_the_compile_against_the_run(tmp_path: Path) -> None:
    pipe = wanflow.load("nano", device="cpu", machine_cache=tmp_path)
    assert not compiles(pipe.parts, Request(PROMPT, frame_num=5).complete(pipe.spec))
    assert pipe.parts._compiler is None  # nothing was imported for it
    pipe.parts.spec = replace(pipe.spec, dit=T2V_A14B.dit)
    small = Request(PROMPT, frame_num=1, sample_steps=20).complete(pipe.spec)
    large = Request(PROMPT, size=(832, 480), frame_num=81).complete(pipe.spec)
    assert compiles(pipe.parts, large) and not compiles(pipe.parts, small)
    key = ("compile", T2V_A14B.dit.dim, torch.float32, "")
    of_device(tmp_path, CPU).put(4.0, *key)
    pipe.parts._compiler = None
    assert pipe.parts.compiler.expected_seconds() == 4 < UNMEASURED_S
    for value in ("quick", True, -1, math.inf, [1]):
        of_device(tmp_path, CPU).put(value, *key)
        pipe.parts._compiler = None
        assert pipe.parts.compiler.expected_seconds() == UNMEASURED_S


def test_a_recipe_records_the_choice() -> None:
    request = Request(PROMPT, frame_num=5, sample_steps=1)
    for asked, made in (("auto", "off"), ("off", "off"), ("on", "on")):
        run = pipeline("nano", (("compile", asked),)).begin(request)
        assert run.recipe.runtime["compile"] == made == runtime_of(run.recipe).compile


@torch.no_grad()
def test_the_cost_is_said_and_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made, expert = compiler(folder=tmp_path), filled(WanDiT(TINY), 0)
    made.attach(expert)
    with traced():
        expert(*inputs(1))
    first, last = [one.getMessage() for one in caplog.records if one.name == "wanflow"]
    assert first == "compiling a block, once for all: about 45 s"
    assert last.startswith("compiled a block: ") and last.endswith(" s, kept for the next run")
    assert 0 < compiler(folder=tmp_path).expected_seconds() < UNMEASURED_S


# With inductor


@pytest.mark.slow
@torch.no_grad()
def test_bytes_that_a_compiled_block_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes for each token and channel of `dim`, with bfloat16 matmuls, but for matmuls and
    attention; and no complex numbers.
    """
    from torch._inductor import config as inductor
    from torch._inductor import metrics
    from torch._inductor.compile_fx import inductor_metrics_log

    # inductor counts where it logs, and reads no cache
    monkeypatch.setattr(inductor_metrics_log, "level", logging.INFO)
    config, tokens = replace(T2V_A14B.dit, dim=512, ffn_dim=1382, num_heads=4), 512
    block = Block(config).requires_grad_(False)
    for leaf in block.modules():
        if isinstance(leaf, nn.Linear):
            leaf.weight.data = leaf.weight.bfloat16()
    x, rope = torch.randn(1, tokens, 512), torch.rand(tokens, 64, 2)
    conditioning = Conditioning(torch.randn(1, 1, 512), torch.randn(1, 1, 6, 512), None, rope, ())
    text = torch.randn(1, 512, 4, 128).bfloat16()
    expected = block(x, conditioning, (text, text))
    torch._dynamo.reset()
    compiler().attach(block)
    metrics.reset()
    with inductor.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*complex")
        result = block(x, conditioning, (text, text))
    torch.testing.assert_close(result, expected, atol=0.1, rtol=0.02)
    numbers = sum(
        count for node, count in metrics.nodes_num_elem if not type(node).__name__.startswith("Ext")
    )
    assert 40 < 4 * numbers / x.numel() <= 70


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nano", "fp8", "gguf-q8_0"])
def test_a_compiled_run_is_the_run(model: str) -> None:
    torch._dynamo.reset()
    pipe = pipeline(model, (("compile", "on"),))
    run = pipe.begin(Request(PROMPT, frame_num=5, sample_steps=3, seed=3))
    result = pipe.resume(run).state.x
    expected = plain_latent((("model", model),) if model != "nano" else ())
    assert pipe.parts.compiler.graphs == 2
    assert (result - expected).abs().max() <= 1e-3 * expected.abs().max()
