"""Check nano with every feature on a device against the latents of the CPU in float32."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanflow.bench.gguf import write_q8_0
from wanflow.bench.record import Record, Skip
from wanflow.bench.tools import Scale, randn
from wanflow.pipeline import begin, decode, denoise
from wanflow.request import Request
from wanflow.runtime import Runtime
from wanflow.transforms.attention import installed

PROMPT = "a red circle moves left on a blue background"
# Root mean square distances, relative to that of the latent. Rounding grows over the steps with
# guidance; each bound is several times what the CPU itself shows between the same two forms.
ROUNDING, HALF, EIGHT, FOUR, TILES = 2e-3, 0.08, 0.15, 0.4, 0.02
# {feature: (settings, bound)}
FEATURES: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({"dtype": "float32"}, ROUNDING),
    "bfloat16": ({"dtype": "bfloat16"}, HALF),
    "2 resident blocks, from RAM": ({"resident_blocks": 2, "stream_from": "ram"}, ROUNDING),
    "2 resident blocks, from the disk": ({"resident_blocks": 2, "stream_from": "disk"}, ROUNDING),
    "the next expert read ahead": ({"prefetch": True, "keep_experts": False}, ROUNDING),
    "tokens in chunks": ({"chunk_tokens": 16}, ROUNDING),
    "fp8": ({"quantize": "fp8", "dtype": "bfloat16"}, EIGHT),
    "int8": ({"quantize": "int8", "dtype": "bfloat16"}, EIGHT),
    "nf4": ({"quantize": "nf4", "dtype": "bfloat16"}, FOUR),
    "GGUF Q8_0": ({"gguf": True}, EIGHT),
    "a live LoRA": ({"lora": "live"}, ROUNDING),
    "VAE tiles": ({"vae_tile": 64}, TILES),
    "compiled": ({"compile": True}, ROUNDING),
}


def nano(record: Record, scale: Scale) -> None:
    """Run nano on the CPU, then with each feature on the device."""
    without_ftfy()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lora = write_lora(folder)
        with record.asking("nano on the CPU"):
            truth = {
                with_lora: _latent(_plain(), lora if with_lora else None) for with_lora in (0, 1)
            }
            frames, moved = _frames(_plain()), rms(truth[1], truth[0])
            value = f"the reference of what follows; a LoRA moves it by {moved:.2g}"
            record.passed("nano on the CPU", moved > 10 * ROUNDING, value, "a LoRA moves it")
        if not record.findings or record.findings[-1].state == "failed":
            return  # nothing to compare with
        for feature, (given, bound) in FEATURES.items():
            what = f"nano, {feature}"
            with record.asking(what):
                settings = dict(given)
                files = _packed(folder) if settings.pop("gguf", False) else {}
                if settings.pop("compile", False):
                    settings |= compiled_setting(scale)
                settings = {"device": str(scale.device), "dtype": "float32", **settings}
                runtime = Runtime(**settings)
                adapter = lora if feature == "a live LoRA" else None
                if "vae_tile" in given:
                    found, true = _frames(runtime), frames
                else:
                    found, true = _latent(runtime, adapter, files), truth[adapter is not None]
                error = rms(found, true)
                record.passed(
                    what, error <= bound, f"{error:.2g} away", f"at most {bound:g}", error=error
                )


def _plain() -> Runtime:
    return Runtime(device="cpu", dtype="float32")


def _pipeline(runtime: Runtime, files: Mapping[Any, Path], request: Request) -> Any:
    from wanflow.assemble import assemble
    from wanflow.opening import resolve, settle

    checkpoint = resolve("nano", files)
    runtime, _ = settle(checkpoint, runtime, request)
    return assemble(checkpoint, runtime)


@torch.no_grad()
def _latent(
    runtime: Runtime, lora: Path | None = None, files: Mapping[Any, Path] | None = None
) -> Tensor:
    """Return the final latent of a short run."""
    adapters = () if lora is None else (str(lora),)
    request = Request(PROMPT, seed=1, frame_num=5, sample_steps=3, lora=adapters)
    pipe = _pipeline(runtime, files or {}, request)
    try:
        return denoise(pipe.engine, begin(pipe.engine, request)).state.x.cpu()
    finally:
        pipe.parts.close()


@torch.no_grad()
def _frames(runtime: Runtime) -> Tensor:
    """Return the frames of a run of one step, in 0..1, large enough for four tiles."""
    request = Request(PROMPT, seed=1, frame_num=5, sample_steps=1, size=(96, 96))
    pipe = _pipeline(runtime, {}, request)
    try:
        run = denoise(pipe.engine, begin(pipe.engine, request))
        parts = [torch.from_numpy(part) for part in decode(pipe.engine, run)]
        return torch.cat(parts).float() / 255
    finally:
        pipe.parts.close()


def rms(a: Tensor, b: Tensor) -> float:
    """Return the root mean square of a difference, relative to that of `b`."""
    a, b = a.double(), b.double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def compiled_setting(scale: Scale) -> dict[str, Any]:
    """Return the runtime's setting that compiles blocks; raises Skip where nothing compiles."""
    if not scale.cuda:
        raise Skip("needs CUDA: on a CPU a compiler takes a minute")
    refuse_without_compiler()
    return {"compile": "on"}


def refuse_without_compiler() -> None:
    """Raise Skip where torch's compiler lacks a C compiler, which Triton needs, or a package."""
    if not installed("filelock"):
        raise Skip("torch's compiler needs filelock (pip install filelock)")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl")):
        raise Skip("no C compiler is here (apt-get install gcc)")


def without_ftfy() -> None:
    """Stand in for ftfy where it is missing: it changes nothing in the prompt of this check."""
    if not installed("ftfy") and "ftfy" not in sys.modules:
        module = types.ModuleType("ftfy")
        module.fix_text = lambda text: text  # type: ignore[attr-defined]
        sys.modules["ftfy"] = module


def write_lora(folder: Path) -> Path:
    """Write a LoRA of random numbers for both of nano's experts."""
    from safetensors.torch import save_file

    from wanflow.presets import NANO

    torch.manual_seed(3)
    width, tensors = NANO.dit.dim, {}
    for block in range(NANO.dit.num_layers):
        for leaf in ("self_attn.q", "cross_attn.v"):
            name = f"diffusion_model.blocks.{block}.{leaf}"
            tensors[f"{name}.lora_A.weight"] = randn((4, width), torch.float32, "cpu")
            tensors[f"{name}.lora_B.weight"] = randn((width, 4), torch.float32, "cpu") * 0.02
    file = folder / "lora.safetensors"
    save_file(tensors, file)
    return file


def _packed(folder: Path) -> dict[str, Path]:
    """Write nano's experts as GGUF files of Q8_0 blocks; return them by part."""
    from wanflow.opening import resolve

    checkpoint, files = resolve("nano"), {}
    for part in checkpoint.spec.expert_names:
        files[str(part)] = folder / f"{part}.gguf"
        write_q8_0(checkpoint.source(part), files[str(part)])
    return files


def clip(record: Record, scale: Scale) -> None:
    """Make a clip of nano by the command line."""
    what = "a clip by the command line"
    with record.asking(what), tempfile.TemporaryDirectory() as name:
        missing = [one for one in ("av", "ftfy", "rich", "filelock") if not installed(one)]
        if missing:
            raise Skip(f"needs {', '.join(missing)}")
        target = Path(name) / "clip.mp4"
        words = ["generate", "--ckpt_dir", "nano", "--prompt", PROMPT, "--seed", "1"]
        words += ["--device", str(scale.device), "--save_file", str(target)]
        words += [] if scale.full else ["--sample_steps", "2", "--frame_num", "5"]
        command = [sys.executable, "-m", "wanflow", *words]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        size = target.stat().st_size if target.exists() else 0
        lines = done.stderr.strip().splitlines()
        value = f"{size:,} bytes" if size else "; ".join(lines[-3:])
        record.passed(what, done.returncode == 0 and size > 0, value, "an mp4", bytes=size)
