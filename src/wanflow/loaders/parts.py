"""Decide what stays in memory: read each part of a model when it is needed, and free it in time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.containers import Report as Bytes
from wanflow.checkpoint.load import expert_bytes, load_expert, load_module, load_vae
from wanflow.checkpoint.structure import build, expert_structure, set_chunk
from wanflow.choices import choose_text_dtype, is_small
from wanflow.config import RequestError
from wanflow.geometry import geometry_of
from wanflow.loaders.placement import Changes, Placement
from wanflow.loaders.prompts import PromptEncoder
from wanflow.models.dit import WanDiT
from wanflow.models.vae import WanVAE
from wanflow.presets import Expert, title
from wanflow.request import CompleteRequest, Lora
from wanflow.transforms.attention import set_attention
from wanflow.transforms.attention_kernels import Backend

if TYPE_CHECKING:
    from wanflow.loaders.less_memory import Stage
    from wanflow.loaders.streamed import Prefetcher
    from wanflow.lora.stack import LoraStack, Merged
    from wanflow.transforms.block_streaming import Streaming
    from wanflow.transforms.compile import Compiler

Report = Callable[[str, int, int], None]  # the part that is read, bytes done, bytes in total


class LoadedParts:
    """The parts of one model on this process' device.

    The text encoder is freed before an expert is read, and one expert before the other, unless the
    model is small or `keep_experts` is set; then a new prompt is encoded beside the experts where
    there is room. With `prefetch` the next expert is read into RAM while
    the current one computes.

    Args:
        checkpoint: where parts are read from.
        placement: dtype, device, settings and ranks.
        kernel: the attention kernel.
        report: called while weights are read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        kernel: Backend,
        report: Report | None = None,
    ) -> None:
        self.checkpoint, self.placement, self.kernel = checkpoint, placement, kernel
        self.ctx, self.report = placement.ctx, report
        self.spec, self.device, self.runtime = checkpoint.spec, placement.device, placement.runtime
        small = is_small(expert_bytes(checkpoint, placement.dtype))
        keep = self.runtime.keep_experts
        self.keep = small if keep is None else keep
        self.texts = PromptEncoder(
            checkpoint,
            choose_text_dtype(placement.dtype, small),
            torch.device("cpu") if self.runtime.t5_cpu else self.device,
            small,
            self.runtime.text_cache,
            self._reporter("text encoder"),
        )
        self._loras: LoraStack | None = None
        self._experts: dict[Expert, WanDiT | Streaming] = {}
        self._merged: dict[Expert, Merged] = {}  # the LoRAs that are fused into each expert
        self._ahead: Prefetcher | None = None
        self._vae: WanVAE | None = None
        self._compiler: Compiler | None = None
        self._colours: Tensor | None = None
        # After memory ran out: settings in use in place of the given ones, and further ones with
        # which another process goes on with a run that ended.
        self.adapted, self.go_on_with = dict[str, int](), dict[str, Any]()

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Return text states [B, text_len, D] on the device, zero past each prompt's end.

        The first process of a run encodes, and broadcasts the result.
        """
        if self.ctx is None or self.ctx.info.rank == 0:
            encoded = self.texts(prompts, self._room_for_text)
            states = torch.stack([one.to(self.device) for one in encoded])
        else:
            shape = len(prompts), self.spec.dit.text_len, self.spec.text.dim
            states = torch.empty(shape, dtype=self.texts.dtype, device=self.device)
        if self.ctx is None:
            return states
        if not self.ctx.from_rank0(len(self._experts)) and self._experts:
            self._free()  # all ranks read an expert together
        return self.ctx.world.broadcast("text", states)

    def remember(self, prompts: list[str]) -> None:
        """Encode prompts that several runs will ask for, so that each is encoded once."""
        if self.ctx is None or self.ctx.info.rank == 0:
            self.texts.remember(prompts, self._room_for_text)

    @property
    def loras(self) -> LoraStack:
        """The LoRAs in use; made when it is first asked for."""
        if self._loras is None:
            from wanflow.lora.stack import LoraStack, shapes_of

            shapes = shapes_of(build(WanDiT, self.spec.dit))
            self._loras = LoraStack(shapes, self.runtime.lora == "live", self.spec.expert_names)
        return self._loras

    def use_loras(self, loras: tuple[Lora, ...], recorded: Mapping[str, str]) -> None:
        """Make these the LoRAs of the steps that follow; see `LoraStack.use`."""
        if loras or self._loras is not None:
            self.loras.use(loras, recorded)

    @property
    def compiler(self) -> Compiler:
        """What compiles the blocks; made when it is first asked for."""
        if self._compiler is None:
            from wanflow.transforms.compile import Compiler

            runtime, what = self.runtime, (self.spec.dit.dim, self.placement.dtype)
            strict, folder = runtime.compile == "on", runtime.machine_cache
            self._compiler = Compiler(self.device, strict, folder, *what, runtime.quantize)
        return self._compiler

    def compile(self, recorded: object) -> None:
        """Let blocks run compiled from now on or not, as asked for; `auto`: as a recipe records."""
        asked = self.runtime.compile
        wanted = (recorded if asked == "auto" else asked) == "on"
        if wanted or self._compiler is not None:
            self.compiler.wanted = wanted

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> WanDiT | Streaming:
        """Return an expert, reading it if it is not in memory.

        Args:
            which: its name.
            strengths: one for each LoRA in use; without them the expert is the published one.
        """
        merged = self._merge(strengths)
        if which not in self._experts or self._merged.get(which, ()) != merged:
            self._load(which, merged)
        if self._loras is not None:
            self._loras.apply(self._experts[which], which, strengths)
        if self._compiler is not None:
            self._compiler.attach(self._experts[which])
        return self._experts[which]

    def prepare(self, which: Expert, strengths: tuple[float, ...] = ()) -> None:
        """Begin to read the expert that comes next into RAM, where `prefetch` is set."""
        if not self.runtime.prefetch or which in self._experts:
            return
        from wanflow.loaders.streamed import Prefetcher

        merged = self._merge(strengths)
        if self._ahead is not None and (self._ahead.which, self._ahead.key) == (which, merged):
            return
        self._drop_ahead()
        self._ahead = Prefetcher(
            self.checkpoint, which, self.placement, self._changes(which, merged), merged
        )

    def vae(self) -> WanVAE:
        """Return the VAE, float32."""
        self._release_loras()
        if self._vae is None:
            if not self.keep:
                self._free()
            report = self._reporter("VAE")
            self._vae = load_vae(self.checkpoint, torch.float32, self.device, report)
        return self._vae

    @torch.no_grad()
    def encode(self, clip: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Return the normalised latent of a clip, [1, z, t, h, w] on the device.

        The first process of a run encodes, and broadcasts the result.

        Args:
            clip: its first frame, then groups of four, [1, 3, n, H, W] each.
            shape: of the latent.
        """
        encoded = torch.empty(shape, device=self.device)
        if self.ctx is None or self.ctx.info.rank == 0:
            encoded = self.vae().encode_parts(clip)
            if not self.keep:  # it makes room for the text encoder
                self._vae = None
                self._empty_cache()
        return encoded if self.ctx is None else self.ctx.world.broadcast("picture", encoded)

    def colours(self) -> Tensor:
        """Return the factors of previews, [2, z + 1, 3]; see `wanflow.preview`.

        The first time on a machine the VAE is read, beside the experts on the CPU.
        """
        if self._colours is None:
            from wanflow.checkpoint.checkpoint import vae_fingerprint
            from wanflow.preview import remembered_colours

            device = torch.device("cpu") if self._experts else self.device
            report = self._reporter("VAE")
            self._colours = remembered_colours(
                self.runtime.machine_cache,
                f"{vae_fingerprint(self.checkpoint)} {self.spec.vae!r}",
                self.spec.vae.z_dim,
                lambda: self._vae or load_vae(self.checkpoint, torch.float32, device, report),
            )
            self._empty_cache()
        return self._colours

    def holds(self, which: Expert) -> bool:
        """Return whether an expert is in memory."""
        return which in self._experts

    def next_try(self, error: Exception, stage: Stage, size: int) -> dict[str, int]:
        """Return settings that take less memory; see `less_memory.next_try`."""
        from wanflow.loaders.less_memory import next_try

        return next_try(error, self, stage, size)

    def makes_room(self, error: Exception) -> bool:
        """Return whether pictures fit without the experts; see `less_memory.makes_room`."""
        from wanflow.loaders.less_memory import makes_room

        return makes_room(error, self)

    def ran_out(self, stage: Stage, request: CompleteRequest) -> None:
        """Set with what a run goes on after memory ran out in another rank."""
        from wanflow.loaders.less_memory import give_way

        side = max(request.size)
        give_way(self, stage, side if stage == "decode" else self.own_tokens(request))

    def own_tokens(self, request: CompleteRequest) -> int:
        """Return how many tokens this rank has in a forward, at most."""
        ranks = 1 if self.ctx is None else self.ctx.layout.sequence
        return -(-geometry_of(self.spec).tokens(request.size, request.frame_num) // ranks)

    def instead(self) -> dict[str, Any]:
        """Return settings in place of those that memory did not suffice for."""
        return {**self.adapted, **self.go_on_with}

    def adapt(self, **settings: int) -> None:
        """Go on with settings that take less memory, and free what is cached."""
        self.adapted |= settings
        self.runtime = replace(self.runtime, **settings)  # type: ignore[arg-type]
        self.placement = replace(self.placement, runtime=self.runtime)
        for model in self._experts.values():
            set_chunk(model, self.runtime.chunk_tokens or 0)
        self._empty_cache()

    def close(self) -> None:
        """Free all memory; a part that is asked for later is read again."""
        self._vae = None
        self.texts.close()
        self._release_loras()
        self._free()

    def _merge(self, strengths: tuple[float, ...]) -> Merged:
        return () if self._loras is None else self._loras.merged(strengths)

    def _changes(self, which: Expert, merged: Merged) -> Changes | None:
        return None if self._loras is None else self._loras.fused(which, merged)

    def _release_loras(self) -> None:
        if self._loras is not None:
            self._loras.release()

    def _load(self, which: Expert, merged: Merged) -> None:
        """Read an expert, or take the prefetched one; without `keep` the other is freed before."""
        ahead = self._ahead
        if ahead is not None and (ahead.which, ahead.key) == (which, merged):
            self._ahead = None
        else:
            ahead = None
        self._forget([which] if self.keep else list(self._experts))
        if ahead is not None:
            model = ahead.take()
            set_chunk(model, self.runtime.chunk_tokens or 0)  # it may be smaller by now
        else:
            report = self._reporter(title(which))
            changes = self._changes(which, merged)
            model = open_expert(self.checkpoint, which, self.placement, report, changes)
        self._experts[which], self._merged[which] = model, merged
        set_attention(model, self.kernel)
        if self.ctx is not None and self.ctx.layout.sequence > 1:
            from wanflow.parallel.sequence import connect

            connect(model, self.ctx, self.kernel.attend, self.kernel.with_lse)

    def _reporter(self, what: str) -> Bytes | None:
        report = self.report
        return None if report is None else lambda done, total: report(what, done, total)

    def _room_for_text(self) -> None:
        """Free the experts, unless they may stay and a text encoder has room beside them."""
        self._forget([])  # give back what is cached
        if self.keep and self._experts:
            from wanflow.loaders.text_encoder import has_room

            if has_room(self.checkpoint, self.texts.dtype, self.texts.device):
                return
        self._free()

    def _free(self) -> None:
        self._drop_ahead()
        self._forget(list(self._experts))

    def _forget(self, experts: list[Expert]) -> None:
        if not self.keep:
            self._vae = None  # it may hold gigabytes, and is read again for the next video
        for which in experts:
            model = self._experts.pop(which, None)
            if self._loras is not None:
                self._loras.forget(which)
            self._merged.pop(which, None)
            if model is not None and not isinstance(model, WanDiT):
                model.close()
            del model
        self._empty_cache()

    def _empty_cache(self) -> None:
        gc.collect()
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.drop()
        self._ahead = None


def refuse_packed(checkpoint: Checkpoint, where: Placement) -> None:
    """Raise RequestError for an expert whose file holds its weights packed already."""
    from wanflow.transforms.quant import QuantLinear

    for which in checkpoint.spec.expert_names:
        model = expert_structure(
            checkpoint.spec.dit, checkpoint.source(which), where.runtime, where.dtype, where.device
        )
        if not any(isinstance(leaf, QuantLinear) for leaf in model.modules()):
            raise RequestError(
                f"quantize {where.runtime.quantize}: the file of the {title(which)} holds"
                " packed weights already; leave out --quantize"
            )


def open_expert(
    checkpoint: Checkpoint,
    which: Expert,
    where: Placement,
    report: Bytes | None = None,
    changes: Changes | None = None,
) -> WanDiT | Streaming:
    """Load an expert to its device: resident, sharded (this rank's rows), or streamed."""
    if where.runtime.dit_fsdp and where.ctx is not None:
        from wanflow.parallel.fsdp import shard_blocks

        source = checkpoint.source(which)
        model = expert_structure(
            checkpoint.spec.dit, source, where.runtime, where.dtype, where.device, changes or {}
        )
        shard_blocks(model, where.ctx)
        load_module(model, source, where.device, report, changes, memory=where.memory)
        return model
    if where.runtime.resident_blocks in (None, checkpoint.spec.dit.num_layers):
        return load_expert(
            checkpoint,
            which,
            where.dtype,
            where.device,
            report,
            changes,
            where.runtime,
            where.memory if where.shares() else None,
        )
    from wanflow.loaders.streamed import open_streamed

    return open_streamed(checkpoint, which, where, report, changes)
