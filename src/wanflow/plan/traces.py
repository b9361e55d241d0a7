"""The stretches of a run, each traced once: the pipeline's own code with parts whose tensors have no memory.

An expert and the text encoder are traced with one block, since blocks are alike: a further block adds its weights (which are
counted, not traced) and the keys and values that it keeps of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from wanflow.config import CompleteRequest, Lora, Preset, Runtime
from wanflow.models.dit import WanDiT
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import State, WanVAE, stream
from wanflow.pipeline import FEW_TOKENS, Frames, Pipeline
from wanflow.plan.model import FirstBlocks, Model
from wanflow.plan.trace import Held, Trace, Work, fake, materialise
from wanflow.sampling.experts import Expert, experts
from wanflow.sampling.schedule import make_schedule
from wanflow.sampling.solvers import SolverState, advance
from wanflow.transforms import tiling
from wanflow.transforms.lora import Adapters, Change, Decomposed, LowRank
from wanflow.transforms.offload import Frame, InLine, Streaming
from wanflow.transforms.packed import PackedLeaf
from wanflow.transforms.quant import QuantLinear
from wanflow.weights.adapters import describe_adapter, open_adapter
from wanflow.weights.load import build, expert_structure, lay_out

STEADY = 3  # latent frames after which every further one takes what the one before did


@dataclass(frozen=True)
class Traced:
    """What a stretch takes beside its weights, in bytes, what it computes, and the largest storages at its peak."""

    beside: int
    work: Work
    top: tuple[Held, ...] = ()


@dataclass(frozen=True)
class Weights:
    """Bytes of an expert's weights: all of them, those that are streamed when no block is resident, and the largest tensor of them."""

    total: int
    blocks: tuple[int, ...]
    largest: int


@dataclass(frozen=True)
class FakeLora:
    """What a plan knows of a LoRA file: how many numbers it holds, its rank, and whether the changed weight is made for each call."""

    lora: Lora
    numbers: int
    rank: int
    through_weight: bool

    def works_on(self, which: Expert) -> bool:
        return bool(self.lora.resolved(None).strength(which, self.lora.first or 1))


def known_lora(lora: Lora) -> FakeLora:
    """By its header; RequestError for a file that cannot be read."""
    source = open_adapter(Path(lora.path))
    told = describe_adapter(source) or {"ranks": [], "kinds": {}}
    numbers = sum(torch.Size(info.shape).numel() for info in source.tensors.values())
    return FakeLora(lora, numbers, max(told["ranks"], default=1), any(kind not in ("LoRA", "difference") for kind in told["kinds"]))


@dataclass
class FakeParts:
    """Parts for a pipeline whose tensors have no memory."""

    preset: Preset
    model: Any  # is called as a WanDiT is
    text_dtype: torch.dtype
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    made_by: dict[str, Any] = field(default_factory=dict)

    def text(self, prompts: list[str]) -> Tensor:
        dit = self.preset.dit
        return torch.empty(len(prompts), dit.text_len, dit.text_dim, dtype=self.text_dtype)

    def find_loras(self, wanted: tuple[Lora, ...]) -> tuple[Lora, ...]:
        return wanted

    def lora_prints(self, loras: tuple[Lora, ...]) -> dict[str, str]:
        return {}

    def use_loras(self, loras: tuple[Lora, ...]) -> None: ...

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> Any:
        return self.model

    def prepare(self, which: Expert, strengths: tuple[float, ...] = ()) -> None: ...

    def vae(self) -> WanVAE:
        raise AssertionError("a denoising step decodes nothing")


class Enough(Exception):
    """Ends a traced decode when it repeats itself."""


class Traces:
    """All of one model, request and dtype, on one kind of device; what differs between candidates is in the arguments."""

    TRACED_BLOCKS = 1  # of an expert; a test traces all and compares

    def __init__(self, model: Model, request: CompleteRequest, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.request, self.dtype, self.device = model, request, dtype, device
        self.small = model.small(dtype)
        # As `assemble` has it: the large encoder's activations overflow float16.
        self.text_dtype = dtype if self.small and dtype != torch.float16 else torch.bfloat16
        self.schedule = make_schedule(request.sample_solver, request.sample_steps, request.sample_shift)
        self.working = experts(self.schedule, request.boundary)
        self.loras = tuple(known_lora(lora) for lora in request.loras)
        self._done: dict[Any, Any] = {}

    # what the request says

    def guided(self, step: int) -> bool:
        return self.request.guidance(self.working[step], step + 1) != 1

    def kinds(self, which: Expert) -> dict[bool, list[int]]:
        """The steps of an expert, by whether they are guided (two branches) or not."""
        kinds: dict[bool, list[int]] = {}
        for index, expert in enumerate(self.working):
            if expert == which:
                kinds.setdefault(self.guided(index), []).append(index)
        return kinds

    def batched(self, runtime: Runtime) -> bool:
        """Whether both branches of guidance go through the model as one batch."""
        return self.tokens() <= FEW_TOKENS if runtime.cfg_batch is None else runtime.cfg_batch

    def latent_shape(self) -> tuple[int, int, int, int, int]:
        vae, (width, height) = self.model.preset.vae, self.request.size
        frames = (self.request.frame_num - 1) // vae.temporal_stride + 1
        return 1, vae.z_dim, frames, height // vae.spatial_stride, width // vae.spatial_stride

    def tokens(self) -> int:
        _, _, frames, rows, columns = self.latent_shape()
        return frames * rows * columns // 4

    # an expert

    def expert(self, which: Expert, runtime: Runtime) -> Weights:
        """Its weights as they are held, LoRAs aside."""
        key = ("expert", self._form(which), runtime.quantize, runtime.quantize_layers)
        if key not in self._done:
            model = expert_structure(self.model.preset.dit, self.model.source(which), runtime, self.dtype, self.device)
            sizes = [value.nbytes for value in model.parameters()]
            self._done[key] = Weights(sum(sizes), tuple(Frame(block).layout.nbytes for block in model.blocks), max(sizes))
        return cast(Weights, self._done[key])

    def lora_bytes(self, which: Expert, runtime: Runtime) -> int:
        """Live LoRAs lie on the device in the dtype that their leaves compute in."""
        return 0 if runtime.lora == "fused" else sum(lora.numbers * self.dtype.itemsize for lora in self.loras if lora.works_on(which))

    def step(self, which: Expert, index: int, runtime: Runtime, streamed: bool) -> Traced:
        """One denoising step, with the solver's state and all keys and values of the text."""
        live = runtime.lora == "live" and tuple(lora for lora in self.loras if lora.works_on(which))
        settings = (runtime.quantize, runtime.quantize_layers, runtime.chunk_tokens, runtime.cfg_batch)
        key = ("step", self._form(which), self.guided(index), min(index, 2), streamed, live, *settings)
        if key not in self._done:
            self._done[key] = self._step(which, index, runtime, streamed, live or ())
        return cast(Traced, self._done[key])

    def _form(self, which: Expert) -> Any:
        """Experts of one form are traced once."""
        source = self.model.source(which)
        return None if source is None else tuple((name, info.packing) for name, info in source.tensors.items() if info.packing)

    def _step(self, which: Expert, index: int, runtime: Runtime, streamed: bool, loras: tuple[FakeLora, ...]) -> Traced:
        preset = replace(self.model.preset, dit=replace(self.model.preset.dit, num_layers=self.TRACED_BLOCKS))
        # Leaves that unpack weights do so in many small steps: they are traced by themselves (`_leaves`), once.
        plain = expert_structure(preset.dit, None, replace(runtime, quantize=""), self.dtype, self.device)
        with fake() as trace:
            model: Any = plain
            materialise(plain, but=set(Frame(next(iter(plain.blocks))).leaves) if streamed else ())
            if streamed:
                model = Streaming(plain, lambda _, views: None, (), torch.device("cpu"), worker=InLine())
            if loras:
                _attach(plain, loras)
            parts = FakeParts(preset, model, self.text_dtype)
            pipe = Pipeline(parts, "cpu", runtime.cfg_batch)
            weights = trace.live
            trace.mark()
            text = _text_bytes(model.text_states(parts.text([""] * (2 if self.guided(index) else 1))))
            before = trace.work
            velocity = pipe.velocity(self.request, self.schedule, index)
            x = torch.empty(self.latent_shape())
            past = min(2, index)
            state = SolverState(index, x, tuple(torch.empty_like(x) for _ in range(past)), torch.empty_like(x) if past else None)
            inside = Inside(trace, next(iter(plain.blocks)))
            trace.mark()
            advance(self.schedule, state, velocity)
            beside = trace.peak - weights
        layers = self.model.preset.dit.num_layers
        others = layers - self.TRACED_BLOCKS
        excess, more = self._leaves(which, runtime, inside.calls)
        work = trace.work + before.scaled(-1) + inside.work.scaled(others) + more.scaled(layers)
        return Traced(beside + excess + text // self.TRACED_BLOCKS * others, work, tuple(trace.top()))

    def _leaves(self, which: Expert, runtime: Runtime, passes: int) -> tuple[int, Work]:
        """What packed or quantised leaves of a block need beyond plain ones: the most bytes of one, and the work of all in a step.

        The first block stands for all; in GGUF files others may be packed otherwise, which changes the weights' bytes but not these.
        """
        if not runtime.quantize and not self._form(which):
            return 0, Work()
        source, dit = self.model.source(which), replace(self.model.preset.dit, num_layers=1)
        forms = [expert_structure(dit, source and FirstBlocks(source, 1), runtime, self.dtype, self.device)]
        forms.append(expert_structure(dit, None, replace(runtime, quantize=""), self.dtype, self.device))
        ours, plain = (dict(next(iter(model.blocks)).named_modules()) for model in forms)
        tokens = self.tokens()
        rows = min(runtime.chunk_tokens or tokens, tokens)
        excess, work, done = 0, Work(), {}
        for path, leaf in ours.items():
            if not isinstance(leaf, PackedLeaf | QuantLinear):
                continue
            # The text's keys and values are made once a run; they count for memory only.
            form = (type(leaf), getattr(leaf, "kind", ""), *plain[path].weight.shape)
            if form not in done:
                done[form] = [_one_leaf(module, rows) for module in (leaf, plain[path])]
            (most, its), (least, other) = done[form]
            excess = max(excess, most - least)
            if not path.startswith(("cross_attn.k", "cross_attn.v")):
                work = work + (its + other.scaled(-1)).scaled(passes * -(-tokens // rows))
        return excess, work

    # the other parts

    def text_encoder(self) -> Weights:
        """Its weights as they are held."""
        if "t5" not in self._done:
            module = cast(UMT5Encoder, self.model.module("t5"))
            lay_out(module, self.model.source("t5"), lambda name, info: self.text_dtype, self.text_dtype, self.device)
            blocks = tuple(sum(value.nbytes for value in block.parameters()) for block in module.blocks)
            sizes = [value.nbytes for value in module.parameters()]
            self._done["t5"] = Weights(sum(sizes), blocks, max(sizes))
        return cast(Weights, self._done["t5"])

    def vae_bytes(self) -> int:
        return 4 * self.model.parameters["vae"]

    def text(self) -> Traced:
        """Encoding the prompts, one at a time."""
        if "text" not in self._done:
            config, source = self.model.preset.text, self.model.source("t5")
            layers = 1
            encoder = build(UMT5Encoder, replace(config, num_layers=layers))
            lay_out(encoder, source and FirstBlocks(source, layers), lambda name, info: self.text_dtype, self.text_dtype, self.device)
            with fake() as trace:
                materialise(encoder)
                weights = trace.live
                ids = torch.zeros(1, self.model.preset.dit.text_len, dtype=torch.long)
                inside = Inside(trace, next(iter(encoder.blocks)))
                trace.mark()
                encoder(ids, torch.ones_like(ids))
            prompts = 2 if any(self.guided(index) for index in range(len(self.working))) else 1
            work = (trace.work + inside.work.scaled(config.num_layers - layers)).scaled(prompts)
            self._done["text"] = Traced(trace.peak - weights, work, tuple(trace.top()))
        return cast(Traced, self._done["text"])

    def decode(self, tile: int) -> Traced:
        """The VAE, in float32: until it repeats itself. In tiles, the features that are kept in RAM are not counted."""
        if ("decode", tile) not in self._done:
            self._done["decode", tile] = self._tiled(tile) if tile else self._whole()
        return cast(Traced, self._done["decode", tile])

    def _whole(self) -> Traced:
        frames, work = self.latent_shape()[2], Work()
        vae = build(WanVAE, self.model.preset.vae)
        with fake() as trace:
            weights = materialise(vae)
            latent = torch.empty(self.latent_shape())
            trace.mark()
            for number, _ in enumerate(vae.decode_frames(latent)):
                done, trace.work = trace.work, Work()
                work = work + done.scaled(1 if number < STEADY - 1 else frames - STEADY + 1)
                if number == STEADY - 1:
                    break
        return Traced(trace.peak - weights, work, tuple(trace.top()))

    def _tiled(self, tile: int) -> Traced:
        """The layers that see whole frames, then those that do not, for the tile that sees the most around it."""
        shape, preset = self.latent_shape(), self.model.preset
        stride, frames = preset.vae.spatial_stride, min(STEADY, shape[2])
        boxes = tiling.tiles(preset.vae, shape[3] * stride, shape[4] * stride, tile)

        def first_part(vae: WanVAE) -> None:
            with suppress(Enough):
                for _ in tiling.decode_frames(vae, torch.empty(*shape[:2], frames, *shape[3:]), tile, _as_numpy, _enough):
                    pass

        def one_tile(vae: WanVAE) -> None:
            _, local = tiling.halves(vae)
            shown, layers = max((tiling.trimmed(local, box, *shape[3:]) for box in boxes), key=lambda found: _area(found[0]))
            part = torch.empty(1, vae.config.dim * vae.config.dim_mult[-1], 1, shown.bottom - shown.top, shown.right - shown.left)
            state: State = {}
            for _ in range(frames):
                torch.cat(list(stream(layers, part.contiguous(memory_format=torch.channels_last_3d), state)), dim=2)

        whole, local = (self._decoding(run) for run in (first_part, one_tile))
        # The first part keeps its features in RAM; its run here has gone one frame into a tile.
        whole = replace(whole, beside=whole.beside - self._features(frames, *shape[3:]))
        work = whole.work.scaled(shape[2] / frames) + local.work.scaled(len(boxes) * shape[2] / frames)
        return replace(max((whole, local), key=lambda traced: traced.beside), work=work)

    def _decoding(self, run: Callable[[WanVAE], None]) -> Traced:
        vae = build(WanVAE, self.model.preset.vae)
        with fake() as trace:
            weights = materialise(vae)
            trace.mark()
            run(vae)
        return Traced(trace.peak - weights, trace.work, tuple(trace.top()))

    def kept_features(self) -> int:
        """Bytes of what a tiled decode keeps in RAM between its two halves."""
        return self._features(*self.latent_shape()[2:])

    def _features(self, frames: int, rows: int, columns: int) -> int:
        vae = self.model.preset.vae
        return vae.dim * vae.dim_mult[-1] * 4 * frames * rows * columns


def _area(box: tiling.Box) -> int:
    return (box.bottom - box.top) * (box.right - box.left)


def _as_numpy(part: Tensor) -> Frames:
    """What stands for a fake tensor's frames; numpy's memory is the system's until it is written to."""
    _, _, count, rows, columns = part.shape
    return np.empty((count, rows, columns, 3), dtype=np.uint8)


def _enough(done: int, _: int) -> None:
    raise Enough


def _one_leaf(leaf: nn.Module, rows: int) -> tuple[int, Work]:
    """The most that a leaf takes beside its parameters and its input, and its work."""
    with fake() as trace:
        materialise(leaf)
        x = torch.empty(rows, cast(int, leaf.in_features), dtype=cast(torch.dtype, leaf.compute_dtype))
        trace.mark()
        start = trace.live
        leaf(x)
        return trace.peak - start, trace.work


class Inside:
    """The work of every call of a module, from now on."""

    def __init__(self, trace: Trace, module: nn.Module) -> None:
        self.work = before = Work()
        self.calls = 0

        def enter(*_: Any) -> None:
            nonlocal before
            before = trace.work + Work()

        def leave(*_: Any) -> None:
            self.work = self.work + trace.work + before.scaled(-1)
            self.calls += 1

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def _text_bytes(states: Iterable[tuple[Tensor, Tensor]]) -> int:
    return sum(value.untyped_storage().nbytes() for pair in states for value in pair)


def _attach(model: WanDiT, loras: Iterable[FakeLora]) -> None:
    """LoRAs of these ranks on every matmul of the blocks."""
    adapters = Adapters(model)
    leaves: dict[str, Any] = {
        name: leaf for name, leaf in model.named_modules() if name.startswith("blocks.") and hasattr(leaf, "in_features")
    }
    for number, lora in enumerate(loras):
        changes: dict[str, Change] = {}
        for name, leaf in leaves.items():
            change = LowRank(torch.empty(leaf.out_features, lora.rank), torch.empty(lora.rank, leaf.in_features))
            changes[f"{name}.weight"] = Decomposed(change, torch.empty(leaf.out_features)) if lora.through_weight else change
        adapters.attach(str(number), changes)
