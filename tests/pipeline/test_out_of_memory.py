"""Memory that runs out: known by every library's words, answered by smaller pieces with the bits of
a run in such pieces, and told in words that name what takes less.
"""

from __future__ import annotations

import errno
import logging
import re
import shlex
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.common import PROMPT

import wanflow
from wanflow.cli import main
from wanflow.clipfiles import read_frames, read_recipe
from wanflow.config import RequestError
from wanflow.loaders import less_memory
from wanflow.models.dit import Block
from wanflow.models.vae import WanVAE
from wanflow.out_of_memory import is_out_of_memory, words
from wanflow.pipeline import Run

TORCH = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"
RAN_OUT: dict[str, BaseException] = {
    "torch": torch.OutOfMemoryError(TORCH),
    "runtime": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported late"),
    "driver": RuntimeError("CUDA driver error: out of memory"),
    "cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cuBLAS, at first": RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cuDNN, no room": RuntimeError("FIND was unable to find an engine to execute this computation"),
    "NCCL": RuntimeError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error"
        " (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call"
        " to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 608 bytes"
    ),
    "NCCL, plain": RuntimeError("NCCL error: ...\nLast error:\nCuda failure 2 'out of memory'"),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
    "Python": MemoryError(),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "Apple": RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GiB)"),
}
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasGemmEx(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`"),
    RuntimeError(
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 700 'an"
        " illegal memory access was encountered' in CUDACachingAllocator"
    ),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    RequestError("the prompt says out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("name", RAN_OUT)
def test_every_library_is_understood(name: str) -> None:
    assert is_out_of_memory(RAN_OUT[name])


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_failures_are_no_want_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


# Going on


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces for videos of a test's size: 12 tokens of 32, 64 pixels."""
    monkeypatch.setattr(less_memory, "CHUNKS", (20, 12))
    monkeypatch.setattr(less_memory, "TILES", (128, 64))


class Failing:
    """Block.forward that fails at its n-th call and, until `ends` says so, at later ones."""

    def __init__(self, at: int, error: BaseException, ends: Callable[[Block], bool]) -> None:
        self.at, self.error, self.ends = at, error, ends
        self.calls, self.failed, self.held = 0, 0, list[weakref.ref[torch.Tensor]]()
        self.forward = Block.forward

    def __call__(self, block: Block, x: torch.Tensor, *given: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls >= self.at and not self.ends(block):
            self.failed += 1
            taken = torch.empty(1000)
            self.held += [weakref.ref(x), weakref.ref(taken)]
            # A new one each time: a traceback of the last would be kept by the test.
            raise type(self.error)(*self.error.args)
        assert not any(ref() is not None for ref in self.held), "tensors of the failed try"
        return self.forward(block, x, *given)


def fail_in_blocks(monkeypatch: pytest.MonkeyPatch, failing: Failing) -> Failing:
    monkeypatch.setattr(Block, "forward", lambda block, *given: failing(block, *given))
    return failing


CLIP: dict[str, Any] = {"frame_num": 5, "sample_steps": 2, "seed": 3, "size": (64, 64)}


@cache
def latent(**runtime: Any) -> torch.Tensor:
    pipe = wanflow.load("nano", device="cpu", **runtime)
    run = pipe.begin(wanflow.Request(PROMPT, **CLIP))
    return pipe.resume(run).state.x


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("torch", {}),
        ("torch", {"resident_blocks": 2}),
        *(
            (name, {})
            for name in ("runtime", "cuBLAS", "cuBLAS, at first", "cuDNN, no room", "CPU")
        ),
    ],
)
@pytest.mark.usefixtures("small_pieces")
def test_a_step_goes_on_in_chunks_with_the_bits_of_such_a_run(
    name: str,
    runtime: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = latent(chunk_tokens=12)
    pipe = wanflow.load("nano", device="cpu", **runtime)
    # In the second block of the first step: everything before it is done again.
    failing = fail_in_blocks(
        monkeypatch, Failing(2, RAN_OUT[name], lambda block: block.chunk == 12)
    )
    steps = []
    with caplog.at_level(logging.WARNING):
        run = pipe.resume(
            pipe.begin(wanflow.Request(PROMPT, **CLIP)),
            lambda progress: steps.append(progress.run.recipe.runtime["chunk_tokens"]),
        )
    assert torch.equal(run.state.x, expected)
    assert failing.failed == 2  # in one chunk, and in chunks of 20 tokens
    assert steps == [12, 12] and run.recipe.runtime["chunk_tokens"] == 12
    assert pipe.begin(wanflow.Request(PROMPT, **CLIP)).recipe.runtime["chunk_tokens"] == 12
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and all("--chunk_tokens" in line for line in told)


def test_the_experts_that_come_later_have_the_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for prefetch in (False, True):
        pipe = wanflow.load("nano", device="cpu", keep_experts=False, prefetch=prefetch)
        pipe.parts.expert("high")
        pipe.parts.prepare("low")
        pipe.parts.adapt(chunk_tokens=32)
        assert pipe.parts.expert("high").blocks[0].chunk == 32
        model = pipe.parts.expert("low")
        assert {module.chunk for module in model.modules() if isinstance(module, Block)} == {32}


def test_a_real_clip_takes_2048_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published numbers: 8,192 and then 2,048 tokens, 512 and then 256 pixels."""
    assert (less_memory.CHUNKS, less_memory.TILES) == ((8192, 2048), (512, 256))
    parts = wanflow.load("nano", device="cpu").parts
    ran_out = RAN_OUT["torch"]
    tried = []
    while settings := less_memory.next_try(ran_out, parts, "step", 75_600):
        parts.adapt(**settings)
        tried.append(settings)
    while settings := less_memory.next_try(ran_out, parts, "decode", 1280):
        parts.adapt(**settings)
        tried.append(settings)
    assert tried == [
        *({"chunk_tokens": tokens} for tokens in (8192, 2048)),
        *({"vae_tile": pixels} for pixels in (512, 256)),
    ]
    for stage, size in (("step", 2048), ("decode", 256)):
        pieces = wanflow.load("nano", device="cpu").parts
        assert not less_memory.next_try(ran_out, pieces, stage, size)  # type: ignore[arg-type]
    assert not less_memory.next_try(RuntimeError("a kernel failed"), parts, "step", 75_600)


@pytest.mark.parametrize("part", [3, 4])
@pytest.mark.usefixtures("small_pieces")
def test_a_decode_goes_on_in_tiles_with_the_bits_of_such_a_run(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = wanflow.Request(PROMPT, size=(128, 64), frame_num=17, sample_steps=1, seed=3)
    tiled = wanflow.load("nano", device="cpu", vae_tile=64)
    run = tiled.resume(tiled.begin(request))
    expected = tiled.finish(run).frames
    decode = WanVAE.decode_frames

    def failing(vae: WanVAE, latent: torch.Tensor) -> Any:
        for number, frames in enumerate(decode(vae, latent), 1):
            if number == part:
                raise torch.OutOfMemoryError(TORCH)
            yield frames

    monkeypatch.setattr(WanVAE, "decode_frames", failing)
    pipe = wanflow.load("nano", device="cpu", vae_tile=0)
    video = pipe.finish(run)
    difference = np.abs(video.frames.astype(int) - expected)
    # Frames that were given out before stay; all others are those of the tiled decode.
    kept = 0 if part <= 3 else 1 + 4 * (part - 2)
    assert not difference[kept:].any() and difference.max() <= 1
    assert video.recipe["runtime"]["vae_tile"] == 64


# Words


@pytest.mark.parametrize(
    ("stage", "runtime", "named", "go_on"),
    [
        ("step", {"keep_experts": True}, "--offload_model True", {"offload_model": True}),
        ("step", {"keep_experts": False}, "--resident_blocks 3", {"resident_blocks": 3}),
        ("step", {"resident_blocks": 0, "keep_experts": False}, "--chunk_tokens 512", {}),
        ("expert", {"keep_experts": False}, "--quantize fp8", {"resident_blocks": 3}),
        ("decode", {}, "--vae_tile 128", {"vae_tile": 128}),
        ("prompts", {}, "--t5_cpu", {"t5_cpu": True}),
    ],
)
def test_what_remains_names_the_flags_that_help(
    stage: Any, runtime: dict[str, Any], named: str, go_on: dict[str, Any]
) -> None:
    size = 2048 if stage == "step" else 256
    pieces = {"chunk_tokens": 2048, "vae_tile": 256}
    parts = wanflow.load("nano", device="cpu", **pieces, **runtime).parts
    parts.device = torch.device("cuda")  # where the text encoder may leave
    error = torch.OutOfMemoryError(TORCH)
    assert less_memory.next_try(error, parts, stage, size) == {}
    (line,) = words(error).splitlines()
    assert line.startswith(f"out of memory in {less_memory.NAMES[stage]}: CUDA out of memory.")
    assert named in line and line.endswith("last a smaller --size or fewer frames")
    assert parts.go_on_with == (go_on or {"chunk_tokens": 512})


def test_python_reads_of_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_blocks(monkeypatch, Failing(1, RAN_OUT["torch"], lambda block: False))
    pipe = wanflow.load("nano", device="cpu", keep_experts=False)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        pipe.generate(PROMPT, **CLIP)
    (note,) = caught.value.__notes__
    assert "resident_blocks 3" in note and "--" not in note


def test_ranks_end_instead_of_waiting_for_each_other() -> None:
    """One of them is out of a pass in which the others wait: nothing is tried again."""
    parts = wanflow.load("nano", device="cpu").parts
    parts.ctx = SimpleNamespace(layout=SimpleNamespace(sequence=2))
    error = torch.OutOfMemoryError(TORCH)
    assert less_memory.next_try(error, parts, "step", 37_800) == {}
    assert parts.go_on_with == {"chunk_tokens": 8192} and "--chunk_tokens 8192" in words(error)
    less_memory.next_try(torch.OutOfMemoryError(TORCH), parts, "decode", 1280)
    assert parts.go_on_with == {"vae_tile": 256}


MAKE = ["generate", "--ckpt_dir", "nano", "--device", "cpu", "--prompt", PROMPT, "--seed", "3"]


def test_a_run_never_goes_on_with_a_plan_that_failed(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command that goes on asks for less, until it suffices."""
    clip = ["--frame_num", "5", "--sample_steps", "2", "--save_file", "a.mp4"]
    assert main([*MAKE, *clip]) == 0
    expected = read_frames(Path("a.mp4"))[0]
    enough = [False]
    # 6 blocks a step: the second step fails, in whichever way.
    failing = fail_in_blocks(monkeypatch, Failing(7, RAN_OUT["torch"], lambda block: enough[0]))
    flags = ["--chunk_tokens", "0", "--resident_blocks", "6"]
    assert main([*MAKE, *clip, *flags, "--overwrite"]) == 1
    plans = []
    for _ in range(4):
        failing.calls = 7
        said = capsys.readouterr().err
        assert "out of memory in a denoising step" in said
        (command,) = re.findall(r"stopped at step 1 of 2; go on with: wanflow (.*)", said)
        plans.append(command)
        assert main(shlex.split(command)) == 1
    assert len(set(plans)) == 4, plans
    assert "--offload_model True" in plans[0] and "--resident_blocks 3" in plans[1]
    assert "--resident_blocks 0" in plans[3]
    enough[0] = True
    command = re.findall(r"go on with: wanflow (.*)", capsys.readouterr().err)[0]
    assert main(shlex.split(command)) == 0
    assert np.array_equal(read_frames(Path("a.mp4"))[0], expected)


def test_a_decode_that_failed_is_not_made_again(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by the command that is printed, nor by one without its flags."""

    def failing(vae: WanVAE, latent: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError(TORCH)
        yield

    monkeypatch.setattr(WanVAE, "decode_frames", failing)
    clip = ["--frame_num", "5", "--sample_steps", "1", "--size", "128*64", "--save_file", "a.mp4"]
    assert main([*MAKE, *clip, "--vae_tile", "0"]) == 1
    said = capsys.readouterr().err
    assert "out of memory in decoding" in said
    (command,) = re.findall(r"is stored in .*; finish it with: wanflow (.*)", said)
    assert "--vae_tile 64" in command
    state = Path("a.latent.safetensors")
    assert Run.load(state).recipe.runtime["vae_tile"] == 64
    assert main(["decode", str(state), "--device", "cpu"]) == 0
    assert read_recipe(Path("a.mp4"))["runtime"]["vae_tile"] == 64


@pytest.mark.usefixtures("small_pieces")
def test_the_video_says_in_which_tiles_it_was_decoded(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(vae: WanVAE, latent: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError(TORCH)
        yield

    monkeypatch.setattr(WanVAE, "decode_frames", failing)
    clip = ["--frame_num", "5", "--sample_steps", "1", "--size", "128*64", "--save_file", "a.mp4"]
    assert main([*MAKE, *clip]) == 0
    assert read_recipe(Path("a.mp4"))["runtime"]["vae_tile"] == 64
    assert caplog.text.count("out of memory in decoding") == 1


def test_a_training_names_its_own_flags(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finetune(*given: object) -> None:
        raise torch.OutOfMemoryError(TORCH)

    monkeypatch.setattr("wanflow.train.finetune.finetune", finetune)
    monkeypatch.setattr("wanflow.train.finetune.check_outputs", lambda *given: None)
    Path("clips").mkdir()
    words_ = ["train", "--data", "clips", "--ckpt_dir", "nano", "--out", "lora", "--device", "cpu"]
    assert main([*words_, "--batch", "4"]) == 1
    said = capsys.readouterr().err
    assert "out of memory in training: CUDA out of memory." in said
    assert "--activation_checkpointing, --grad_accum 4, --fsdp take less" in said
