"""The composition root: a checkpoint and a `Runtime` become the parts of a pipeline, in one order.

What the machine decides (device, dtype, what stays in memory) is decided here, once, before a
weight is read.
"""

from __future__ import annotations

import gc
import logging
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from wanflow import __version__
from wanflow.checkpoint.checkpoint import Checkpoint, fingerprint, open_checkpoint
from wanflow.checkpoint.load import expert_bytes, load_text_encoder, load_tokenizer, load_vae
from wanflow.checkpoint.source import Part
from wanflow.checkpoint.structure import build
from wanflow.config import RequestError
from wanflow.download.fetch import cached
from wanflow.loaders.experts import Placement, Prefetcher, open_expert, refuse_packed
from wanflow.loaders.prompt_cache import TextCache, text_key
from wanflow.loaders.text_encoder import StreamedEncoder
from wanflow.lora.stack import LoraStack, Merged, find_loras, lora_fingerprints, shapes_of
from wanflow.models.dit import WanDiT
from wanflow.models.tokenizer import Tokenizer
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.parallel.groups import Layout, ParallelContext, make_groups, simulated_groups
from wanflow.parallel.ranks import DistInfo
from wanflow.parallel.sequence import connect
from wanflow.pipeline import Pipeline
from wanflow.presets import Expert
from wanflow.recipe import ModelRecord, Recipe
from wanflow.request import CompleteRequest, Lora
from wanflow.runtime import (
    Runtime,
    choose_device,
    choose_dtype,
    choose_text_dtype,
    is_small,
    recorded,
)
from wanflow.transforms import attention
from wanflow.transforms.block_streaming import Streaming
from wanflow.transforms.vae_tiling import check_tile

logger = logging.getLogger("wanflow")

NANO_FOLDER = Path(__file__).parent / "assets" / "nano"
Report = Callable[[str, int, int], None]  # what is being read, bytes done, bytes in all


class LoadedParts:
    """Reads each part when it is first needed and frees it when the run has no more use for it.

    A text encoder is freed before an expert is read, and one expert before the other, so that never
    two of them are on the device, unless the model is small or `keep_experts` is set. With
    `prefetch` the next expert is read into RAM meanwhile.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        runtime: Runtime,
        report: Report | None = None,
        team: ParallelContext | None = None,
    ) -> None:
        self.checkpoint, self.runtime = checkpoint, runtime
        self.team = team or simulated_groups(Layout())
        self.preset = checkpoint.spec
        self.device = choose_device(runtime.device)
        self.dtype = choose_dtype(
            runtime.dtype, self.device.type == "cpu", expert_bytes(checkpoint, torch.float32)
        )
        self.text_device = torch.device("cpu") if runtime.t5_cpu else self.device
        small = is_small(expert_bytes(checkpoint, self.dtype))
        self.keep = small if runtime.keep_experts is None else runtime.keep_experts
        self.keep_text = small
        self.text_dtype = choose_text_dtype(self.dtype, small)
        self.kernel = attention.choose_kernel(
            runtime.attention,
            self.device,
            self.dtype,
            self.preset.dit.dim // self.preset.dit.num_heads,
        )
        if self.team.layout.ring > 1 and self.kernel.with_lse is None:
            raise RequestError(
                f"ring_size {self.team.layout.ring}: the attention kernel {self.kernel.name} does"
                " not say the log-sum-exp, which a ring needs; take another, or leave ring_size"
                " to 1"
            )
        self.where = Placement(self.dtype, self.device, runtime, self.team)
        if runtime.quantize:
            refuse_packed(checkpoint, self.where)
        self.report = report
        self._model = ModelRecord(
            self.preset.name,
            str(checkpoint.folder),
            fingerprint(checkpoint),
            {part: str(path) for part, path in checkpoint.given.items()},
        )
        self._tokenizer: Tokenizer | None = None
        self._encoder: UMT5Encoder | None = None
        self._texts = self._text_cache()
        self._experts: dict[Expert, WanDiT | Streaming] = {}
        self._ahead: Prefetcher | None = None
        self.loras = LoraStack(shapes_of(build(WanDiT, self.preset.dit)), runtime.lora == "live")
        self._merged: dict[Expert, Merged] = {}  # the LoRAs fused into each expert in memory
        self._vae: WanVAE | None = None

    def recipe(self, request: CompleteRequest, loras: tuple[Lora, ...]) -> Recipe:
        """Return what a video that these parts make is made again from."""
        runtime, layout = self.runtime, str(layout_of(self.runtime))
        return Recipe(
            request,
            self._model,
            recorded(runtime, self.device, self.dtype, self.kernel.name, layout),
            versions(),
            runtime.noise_device,
            runtime.cfg_batch,
            lora_fingerprints(loras),
        )

    # text

    def _text_cache(self) -> TextCache | None:
        if self.runtime.text_cache is None or self.keep_text:
            return None
        return TextCache(
            Path(self.runtime.text_cache),
            text_key(self.checkpoint, self.text_dtype, self.text_device),
        )

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Text states [B, text_len, D] on the model's device, zero past each prompt's end.

        Of several processes the first one encodes, and the others are told.
        """
        if self.team.ranks.rank == 0:
            states = self._text(prompts)
        else:
            shape = self.preset.dit.text_len, self.preset.text.dim
            states = torch.empty(len(prompts), *shape, dtype=self.text_dtype, device=self.device)
        return self.team.world.from_first("text", states) if self.team.layout.size > 1 else states

    def _text(self, prompts: list[str]) -> Tensor:
        known = (
            {prompt: self._texts.get(prompt) for prompt in prompts}
            if self._texts is not None
            else {}
        )
        missing = [prompt for prompt in dict.fromkeys(prompts) if known.get(prompt) is None]
        for prompt, states in zip(missing, self._encode(missing) if missing else (), strict=True):
            known[prompt] = states
            if self._texts is not None:
                self._texts.put(prompt, states)
        return torch.stack([cast(Tensor, known[prompt]).to(self.device) for prompt in prompts])

    def _encode(self, prompts: list[str]) -> Tensor:
        """[B, text_len, D], zero past each prompt's end.

        One prompt at a time, so that an encoding does not depend on what it was encoded beside; and
        without its padding, to which nothing attends, and which would be most of the work.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.checkpoint)
        ids, mask = self._tokenizer(prompts)
        watch = self._watch("text encoder")
        if not self.keep_text:
            self._free()
            states = StreamedEncoder(self.checkpoint, self.text_dtype, self.text_device, watch)(
                ids, mask
            )
            self._release()
            return states
        if self._encoder is None:
            self._encoder = load_text_encoder(
                self.checkpoint, self.text_dtype, self.text_device, watch
            )
        states = torch.zeros(
            *ids.shape, self.preset.text.dim, dtype=self.text_dtype, device=self.text_device
        )
        for row, length in enumerate(mask.sum(1).tolist()):
            part = (slice(row, row + 1), slice(length))
            states[part] = self._encoder(
                ids[part].to(self.text_device), mask[part].to(self.text_device)
            )
        return states

    # LoRAs

    def find_loras(self, loras: tuple[Lora, ...]) -> tuple[Lora, ...]:
        """Return the LoRA files, with every strength settled."""
        return find_loras(loras)

    def use_loras(self, loras: tuple[Lora, ...], recorded: Mapping[str, str] | None = None) -> None:
        """Take these as the LoRAs of what follows; see `LoraStack.use`."""
        self.loras.use(loras, recorded)

    # experts

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> WanDiT | Streaming:
        """The expert with the LoRAs at these strengths, read now if it is not in memory.

        Args:
            strengths: one for each LoRA of `use_loras`; without, the expert is as it was published.
        """
        merged = self.loras.merged(strengths)
        if which not in self._experts or self._merged.get(which, ()) != merged:
            self._load(which, merged)
        self.loras.apply(self._experts[which], which, strengths)
        return self._experts[which]

    def prepare(self, which: Expert, strengths: tuple[float, ...] = ()) -> None:
        """Say that this expert will be wanted: with `prefetch` it is read into RAM from now on,
        beside the work.
        """
        merged = self.loras.merged(strengths)
        if not self.runtime.prefetch or which in self._experts:
            return
        if self._ahead is not None and (self._ahead.which, self._ahead.key) == (which, merged):
            return
        self._drop_ahead()
        self._ahead = Prefetcher(
            self.checkpoint, which, self.where, self.loras.fused(which, merged), merged
        )

    def _load(self, which: Expert, merged: Merged) -> None:
        """Read an expert, or take the one that was read ahead; the other one is freed first unless
        both are kept.
        """
        ahead = self._ahead
        if ahead is not None and (ahead.which, ahead.key) == (which, merged):
            self._ahead = None
        else:
            ahead = None
        self._forget([which] if self.keep else list(self._experts))
        if ahead is not None:
            self._experts[which] = ahead.take()
        else:
            watch = self._watch(f"{which}-noise expert")
            self._experts[which] = open_expert(
                self.checkpoint, which, self.where, watch, self.loras.fused(which, merged)
            )
        self._merged[which] = merged
        attention.set_attention(self._experts[which], self.kernel)
        connect(self._experts[which], self.team, self.kernel.attend, self.kernel.with_lse)

    def vae(self) -> WanVAE:
        """The VAE, float32."""
        self.loras.release()
        if self._vae is None:
            if not self.keep:
                self._free()
            self._vae = load_vae(self.checkpoint, torch.float32, self.device, self._watch("VAE"))
        return self._vae

    # memory

    def close(self) -> None:
        """Free all that is in memory; what is asked for afterwards is read again."""
        self._encoder = self._vae = None
        self.loras.release()
        self._free()

    def _watch(self, what: str) -> Callable[[int, int], None] | None:
        report = self.report
        return None if report is None else lambda done, total: report(what, done, total)

    def _free(self) -> None:
        self._drop_ahead()
        self._forget(list(self._experts))
        self._release()

    def _forget(self, experts: list[Expert]) -> None:
        for which in experts:
            model = self._experts.pop(which, None)
            self.loras.forget(which)
            self._merged.pop(which, None)
            if isinstance(model, Streaming):
                model.close()
        self._release()

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.drop()
        self._ahead = None

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def versions() -> dict[str, str]:
    """What a recipe notes about the software."""
    return {
        "wanflow": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def resolve(model: str | Path | None, given: Mapping[Part, str | Path] | None = None) -> Checkpoint:
    """A model's files.

    Args:
        model: `"nano"` is the embedded miniature, a name like `"Wan-AI/Wan2.2-T2V-A14B"` what
            Hugging Face's cache has of it, anything else a folder in any layout. None: where
            `given` says.
        given: parts (high, low, t5, vae, tokenizer) that are to be taken from other files.

    Raises:
        RequestError: when something is missing, damaged or of another model.
    """
    parts = {part: Path(path).expanduser() for part, path in (given or {}).items()}
    if str(model) == "nano":
        return open_checkpoint(NANO_FOLDER, parts)
    if model is None:
        if not parts:
            raise RequestError(
                "no model is named: give its folder, nano, or its files (high, low, t5, vae,"
                " tokenizer)"
            )
        return open_checkpoint(next(iter(parts.values())).parent, parts)
    folder = Path(model).expanduser()
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        found = cached(str(model))
        if found is None:
            raise RequestError(
                f"{model} is neither a folder here nor whole in Hugging Face's cache; get it with"
                f" `hf download {model}`, or the official weights into a folder with `wanflow"
                " download`"
            )
        folder = found
    return open_checkpoint(folder, parts)


def assemble(
    checkpoint: Checkpoint,
    runtime: Runtime,
    report: Report | None = None,
    ranks: DistInfo | None = None,
) -> Pipeline:
    """The parts in their order; nothing is read before every choice is made and found possible.

    Args:
        ranks: this process among those of the run, each of which must come here with the same
            Runtime, and works on its own device; None: it is alone.
    """
    if ranks is not None and ranks.size > 1:
        runtime = replace(runtime, device=str(ranks.device))
    _refuse(runtime, checkpoint.spec.dit.num_layers)
    team = (
        make_groups(layout_of(runtime), ranks)
        if ranks is not None and ranks.size > 1
        else simulated_groups(Layout())
    )
    refuse_together(runtime, checkpoint.spec.dit.num_layers, team.layout.size)
    parts = LoadedParts(checkpoint, runtime, report, team)
    for caution in attention.warnings_for(parts.kernel, runtime.quantize):
        logger.warning(caution)
    logger.debug("assembled %s", asdict(runtime))
    return Pipeline(parts, runtime.noise_device, runtime.cfg_batch, runtime.vae_tile or 0, team)


def layout_of(runtime: Runtime) -> Layout:
    """How processes share a forward, in a runtime that leaves none of it open."""
    return Layout(
        2 if runtime.cfg_parallel else 1, runtime.ring_size or 1, runtime.ulysses_size or 1
    )


def refuse_together(runtime: Runtime, layers: int, processes: int) -> None:
    """RequestError for what cannot go together on so many processes."""
    if processes == 1:
        if runtime.dit_fsdp:
            raise RequestError(
                "dit_fsdp shares the weights out over several processes, and there is one; start"
                " more, or leave it out"
            )
        return
    if runtime.vae_tile:
        raise RequestError(
            "vae_tile: several processes decode in strips, which take less memory already; leave"
            " it out"
        )
    if runtime.dit_fsdp:
        if runtime.resident_blocks not in (None, layers):
            raise RequestError(
                "dit_fsdp and resident_blocks: blocks are shared out over the processes or"
                " streamed, not both; leave one out"
            )
        if runtime.prefetch:
            raise RequestError(
                "dit_fsdp and prefetch: what is shared out is not read ahead; leave one out"
                " (keep_experts spares the reading)"
            )


def _refuse(runtime: Runtime, layers: int) -> None:
    """Raise RequestError for what this machine or this model cannot do."""
    if runtime.noise_device == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            "noise_device cuda: this machine has no CUDA GPU to draw the noise on; use cpu"
        )
    if runtime.resident_blocks is not None and runtime.resident_blocks > layers:
        raise RequestError(
            f"resident_blocks must be at most {layers}, the blocks of an expert"
            f" (got {runtime.resident_blocks})"
        )
    if runtime.vae_tile:
        check_tile(runtime.vae_tile)
