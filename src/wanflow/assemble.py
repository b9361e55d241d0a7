"""The composition root: a checkpoint and a `Runtime` become the parts of a pipeline, in one order.

What the machine decides (device, dtype, what stays in memory) is decided here, once, before a weight is read.
"""

from __future__ import annotations

import gc
import logging
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanflow import __version__
from wanflow.config import Lora, RequestError, Runtime
from wanflow.models.dit import WanDiT
from wanflow.models.tokenizer import Tokenizer
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.pipeline import Pipeline
from wanflow.sampling.experts import Expert
from wanflow.transforms.lora import Adapters
from wanflow.weights import loras as lora_files
from wanflow.weights.fetch import cached
from wanflow.weights.layouts import PARTS
from wanflow.weights.load import (
    Checkpoint,
    build,
    expert_bytes,
    fingerprint,
    load_expert,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    open_checkpoint,
)
from wanflow.weights.source import Part

logger = logging.getLogger("wanflow")

NANO_FOLDER = Path(__file__).parent / "assets" / "nano"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 2 * 2**30  # bytes: models up to here stay in memory whole, and run in float32 on a CPU
Report = Callable[[str, int, int], None]  # what is being read, bytes done, bytes in all


def choose_device(wanted: str) -> torch.device:
    """`auto` is the first accelerator that is there, else the CPU.

    Raises:
        RequestError: for a device this machine lacks.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise RequestError(f"device {wanted!r} is not one PyTorch knows; use auto, cpu, cuda, cuda:1 or mps") from None
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, False):
        raise RequestError(f"device {wanted!r}: this machine has none; --device auto takes what is here")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise RequestError(f"device {wanted!r}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    return device


def choose_dtype(wanted: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """`auto` is bfloat16, but float32 for a small model on a CPU, where it costs little and rounds less."""
    if wanted == "auto":
        return torch.float32 if device.type == "cpu" and expert_bytes(checkpoint, torch.float32) < SMALL else torch.bfloat16
    if wanted not in DTYPES:
        raise RequestError(f"dtype {wanted!r} is none of auto, {', '.join(DTYPES)}")
    return DTYPES[wanted]


class LoadedParts:
    """Reads each part when it is first needed and frees it when the run has no more use for it.

    A text encoder is freed before an expert is read, and one expert before the other, so that never two of them are in memory,
    unless the model is small or `keep_experts` is set.
    """

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime, report: Report | None = None) -> None:
        self.checkpoint = checkpoint
        self.preset = checkpoint.preset
        self.device = choose_device(runtime.device)
        self.dtype = choose_dtype(runtime.dtype, self.device, checkpoint)
        self.text_device = torch.device("cpu") if runtime.t5_cpu else self.device
        small = expert_bytes(checkpoint, self.dtype) < SMALL
        self.keep = small if runtime.keep_experts is None else runtime.keep_experts
        self.keep_text = small
        # The large encoder is published in bfloat16, and its activations overflow float16.
        self.text_dtype = self.dtype if small and self.dtype != torch.float16 else torch.bfloat16
        self.report = report
        self.made_by: dict[str, Any] = {
            "model": {"name": self.preset.name, "folder": str(checkpoint.folder), "fingerprint": fingerprint(checkpoint)},
            "runtime": {
                "device": self.device.type, "dtype": str(self.dtype).removeprefix("torch."), "t5_cpu": runtime.t5_cpu, "lora": runtime.lora,
            },
            "versions": versions(),
        }  # fmt: skip
        if checkpoint.given:
            self.made_by["model"]["parts"] = {part: str(path) for part, path in checkpoint.given.items()}
        self._tokenizer: Tokenizer | None = None
        self._encoder: UMT5Encoder | None = None
        self._experts: dict[Expert, WanDiT] = {}
        self._adapters: dict[Expert, Adapters] = {}  # live: what is on each expert in memory
        self._fused: dict[Expert, tuple[tuple[str, float], ...]] = {}  # fused: what is in each, and how much of it
        self._loras: dict[str, Lora] = {}  # by names that follow their files' content
        self._lora_mode = runtime.lora
        self._shapes = lora_files.shapes_of(build(WanDiT, self.preset.dit))
        self._vae: WanVAE | None = None

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Text states [B, text_len, D] on the model's device, zero past each prompt's end."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.checkpoint)
        ids, mask = self._tokenizer(prompts)
        if self._encoder is None:
            if not self.keep_text:
                self._free()
            self._encoder = load_text_encoder(self.checkpoint, self.text_dtype, self.text_device, self._watch("text encoder"))
        ids, mask = ids.to(self.text_device), mask.to(self.text_device)
        # One prompt at a time: an encoding must not depend on what it was encoded beside.
        states = torch.cat([self._encoder(ids[row : row + 1], mask[row : row + 1]) for row in range(len(prompts))])
        states = (states * mask.unsqueeze(-1).to(states.dtype)).to(self.device)
        if not self.keep_text:
            self._encoder = None
            self._release()
        return states

    def find_loras(self, wanted: tuple[Lora, ...]) -> tuple[Lora, ...]:
        """The files that are meant, with every strength settled, and what they are told by."""
        return lora_files.find_loras(wanted)

    def lora_prints(self, loras: tuple[Lora, ...]) -> dict[str, str]:
        """{file: fingerprint}, for the recipe."""
        return {lora.path: lora_files.lora_print(lora.path) for lora in loras}

    def use_loras(self, loras: tuple[Lora, ...]) -> None:
        """Take these as the LoRAs of what follows; RequestError where one does not fit the model."""
        named = lora_files.named(loras)
        if named != self._loras:
            lora_files.check_loras(loras, self._shapes)
        self._loras = named  # also when only their order is another: strengths go by it

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> WanDiT:
        """The expert with the LoRAs at these strengths, read now if it is not in memory.

        Args:
            strengths: one for each LoRA of `use_loras`; without, the expert is as it was published.
        """
        if not strengths:
            self._loras = {}
        if self._lora_mode == "fused":
            return self._expert_fused(which, strengths)
        if which not in self._experts:
            self._load(which)
        if self._loras or which in self._adapters:
            adapters = self._adapters.setdefault(which, Adapters(self._experts[which]))
            lora_files.attach(adapters, which, self._loras, strengths, self._shapes)
        return self._experts[which]

    def _expert_fused(self, which: Expert, strengths: tuple[float, ...]) -> WanDiT:
        """The expert with the LoRAs in its weights; where they were fused otherwise, it is read again."""
        wanted = tuple((name, strength) for name, strength in zip(self._loras, strengths, strict=True) if strength)
        if which not in self._experts or self._fused.get(which, ()) != wanted:
            self._experts.pop(which, None)
            loras = [(self._loras[name], strength) for name, strength in wanted]
            self._load(which, lora_files.fused(which, loras, self._shapes))
            self._fused[which] = wanted
        return self._experts[which]

    def _load(self, which: Expert, changes: Mapping[str, Callable[[str, Tensor], Tensor]] | None = None) -> None:
        """Read an expert; the other one is freed first unless both are kept."""
        if not self.keep:
            self._free()
        watch = self._watch(f"{which}-noise expert")
        self._experts[which] = load_expert(self.checkpoint, which, self.dtype, self.device, watch, changes)

    def vae(self) -> WanVAE:
        """The VAE, float32."""
        if self._vae is None:
            if not self.keep:
                self._free()
            self._vae = load_vae(self.checkpoint, torch.float32, self.device, self._watch("VAE"))
        return self._vae

    def _watch(self, what: str) -> Callable[[int, int], None] | None:
        report = self.report
        return None if report is None else lambda done, total: report(what, done, total)

    def _free(self) -> None:
        self._experts.clear()
        self._adapters.clear()
        self._fused.clear()
        self._release()

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def versions() -> dict[str, str]:
    """What a recipe notes about the software."""
    return {"wanflow": __version__, "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}


def resolve(model: str | Path | None, given: Mapping[Part, str | Path] | None = None) -> Checkpoint:
    """A model's files.

    Args:
        model: `"nano"` is the embedded miniature, a name like `"Wan-AI/Wan2.2-T2V-A14B"` what Hugging Face's cache has of it, anything
            else a folder in any layout. None: where `given` says.
        given: parts (high, low, t5, vae, tokenizer) that are to be taken from other files.

    Raises:
        RequestError: when something is missing, damaged or of another model.
    """
    parts = {part: Path(path).expanduser() for part, path in (given or {}).items()}
    if str(model) == "nano":
        return open_checkpoint(NANO_FOLDER, parts)
    if model is None:
        if not parts:
            raise RequestError("no model is named: give its folder, nano, or its files (high, low, t5, vae, tokenizer)")
        return open_checkpoint(next(iter(parts.values())).parent, parts)
    folder = Path(model).expanduser()
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        found = cached(str(model))
        if found is None:
            raise RequestError(
                f"{model} is neither a folder here nor whole in Hugging Face's cache; get it with `hf download {model}`, or the official"
                " weights into a folder with `wanflow download`"
            )
        folder = found
    return open_checkpoint(folder, parts)


def load(model: str | Path | None = "nano", report: Report | None = None, **options: Any) -> Pipeline:
    """A pipeline for a model.

    Args:
        model: `"nano"`, or a folder in any layout, or a repository's name if Hugging Face's cache has it.
        report: called while weights are read, with (what, bytes done, bytes in all).
        options: high, low, t5, vae, tokenizer: files in place of the model's own; and the fields of `wanflow.Runtime` (device, dtype,
            t5_cpu, keep_experts, cfg_batch, noise_device, lora).

    Raises:
        RequestError: when weights are missing or damaged, or the machine lacks what was asked for.
    """
    given = {part: options.pop(part) for part in PARTS if options.get(part) is not None}
    unknown = sorted(set(options) - {f.name for f in fields(Runtime)})
    if unknown:
        known = ", ".join([*(f.name for f in fields(Runtime)), *PARTS])
        raise RequestError(f"load does not know {', '.join(unknown)}; it knows {known}")
    checkpoint = resolve(model, given)
    for note in checkpoint.notes:
        logger.warning(note)
    return assemble(checkpoint, Runtime(**options), report)


def assemble(checkpoint: Checkpoint, runtime: Runtime, report: Report | None = None) -> Pipeline:
    """The parts in their order; nothing is read before every choice is made and found possible."""
    if runtime.noise_device not in ("cpu", "cuda"):
        raise RequestError(f"noise_device {runtime.noise_device!r} is neither cpu nor cuda")
    if runtime.noise_device == "cuda" and not torch.cuda.is_available():
        raise RequestError("noise_device cuda: this machine has no CUDA GPU to draw the noise on; use cpu")
    if runtime.lora not in ("live", "fused"):
        raise RequestError(f"lora {runtime.lora!r} is neither live nor fused")
    parts = LoadedParts(checkpoint, runtime, report)
    logger.debug("assembled %s", asdict(runtime))
    return Pipeline(parts, runtime.noise_device, runtime.cfg_batch)
