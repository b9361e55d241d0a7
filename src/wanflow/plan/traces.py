"""Trace each stretch of a run once: the pipeline's own code, with parts that have no memory.

An expert and the text encoder are traced with one block, since blocks are alike. Each further block
adds its weights, which are counted, and the keys and values that it holds of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.structure import build, expert_structure, lay_out
from wanflow.choices import batch_guidance, choose_text_dtype, is_small
from wanflow.conditioning import TextToVideo, conditioning_of, encoded_shape
from wanflow.geometry import geometry_of
from wanflow.loaders.velocity import make_velocity
from wanflow.lora.reader import describe_adapter, open_adapter
from wanflow.models.dit import WanDiT
from wanflow.models.umt5 import UMT5Encoder
from wanflow.parallel.cfg import split_guidance
from wanflow.parallel.groups import Layout, simulated_groups, sizes
from wanflow.parallel.sequence import connect, sharded
from wanflow.parallel.sharding import rows_of, shard_bytes
from wanflow.plan import decoding
from wanflow.plan.gpus import Machine, described
from wanflow.plan.trace import Traced, Work, fake, materialise
from wanflow.presets import Expert, ModelSpec, title
from wanflow.request import CompleteRequest, Lora
from wanflow.runtime import Runtime
from wanflow.sampling.solvers import SolverState, advance
from wanflow.sampling.timeline import schedule_of, timeline
from wanflow.transforms.attention_kernels import BACKENDS
from wanflow.transforms.block_streaming import BlockBuffers, Streaming, SyncExecutor
from wanflow.transforms.deltas import Decomposed, LowRank, WeightDelta
from wanflow.transforms.lora import Adapters
from wanflow.transforms.packed import PackedLeaf
from wanflow.transforms.quant import QuantLinear
from wanflow.transforms.ways import Gpu, Way

T = TypeVar("T")
Shape = tuple[int, ...]

# On fake CPU tensors this kernel stays one operation, with the log-sum-exp too.
KERNEL = BACKENDS["sdpa"]
NO_MACHINE = described("none")
MATH = "math"  # the only kernel that holds a matrix of scores


@dataclass(frozen=True)
class Weights:
    """Bytes of a part's weights as they are held.

    Attributes:
        blocks: of each block, those that streaming moves.
        largest: of one tensor.
        sharded: of all that dit_fsdp shards; shard: what one rank holds of that.
        gathered: of one block whose shards are gathered, padded to one size.
    """

    total: int
    blocks: tuple[int, ...]
    largest: int
    sharded: int = 0
    shard: int = 0
    gathered: int = 0


@dataclass(frozen=True)
class FakeLora:
    """A LoRA file by its header: its numbers, its rank, and whether it needs the full weight."""

    lora: Lora
    numbers: int
    rank: int
    full_weight: bool

    @classmethod
    def open(cls, lora: Lora) -> FakeLora:
        """Read the header; raises RequestError for an unreadable file."""
        source = open_adapter(Path(lora.path))
        found = describe_adapter(source) or {"ranks": [], "kinds": {}}
        numbers = sum(torch.Size(info.shape).numel() for info in source.tensors.values())
        full_weight = any(kind not in ("LoRA", "difference") for kind in found["kinds"])
        return cls(lora, numbers, max(found["ranks"], default=1), full_weight)

    def applies_to(self, expert: Expert) -> bool:
        return bool(self.lora.resolved(None).strength(expert, self.lora.first or 1))


@dataclass
class FakeParts:
    """The parts that a velocity asks for, without memory."""

    spec: ModelSpec
    model: Any  # called as a WanDiT is
    text_dtype: torch.dtype

    def text(self, prompts: list[str]) -> Tensor:
        dit = self.spec.dit
        return torch.empty(len(prompts), dit.text_len, dit.text_dim, dtype=self.text_dtype)

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> Any:
        return self.model

    def prepare(self, which: Expert, strengths: tuple[float, ...] = ()) -> None: ...


class Traces:
    """The traces of one model, request, dtype and layout; candidates differ in the arguments.

    Of several ranks the last is traced: uneven shards leave it the most tokens and heads.

    Args:
        device: that the experts run on; what a device lacks, such as float8, changes their form.
        here: how many ranks one machine has.
        report: called with what is traced next.
        gpu: of a machine that is described, which decides how quantised layers multiply.
        machine: that the run is planned for.
    """

    TRACED_BLOCKS = 1  # of an expert; a test traces all and compares

    def __init__(
        self,
        checkpoint: Checkpoint,
        request: CompleteRequest,
        dtype: torch.dtype,
        device: torch.device,
        layout: Layout = Layout(),  # noqa: B008 (it is frozen)
        here: int = 1,
        report: Callable[[str], object] = str,
        gpu: Gpu | None = None,
        machine: Machine = NO_MACHINE,
    ) -> None:
        self.report, self.gpu, self.machine = report, gpu, machine
        self.checkpoint, self.request, self.dtype, self.device = checkpoint, request, dtype, device
        self.spec, self.layout, self.here = checkpoint.spec, layout, here
        self.steps = timeline(request, self.spec)
        self.experts = tuple(dict.fromkeys(step.expert for step in self.steps))  # in order of use
        self.layers = self.spec.dit.num_layers
        self.small = is_small(checkpoint.parameters(self.spec.expert_names[0]) * dtype.itemsize)
        self.text_dtype = choose_text_dtype(dtype, self.small)
        geometry, size, frames = geometry_of(self.spec), request.size, request.frame_num
        self.latent_shape = (1, *geometry.latent_shape(size, frames))
        self.tokens = geometry.tokens(size, frames)
        self.own_tokens = max(sizes(self.tokens, layout.sequence))
        self.loras = tuple(FakeLora.open(lora) for lora in request.loras)
        given = request.image or request.last_image
        # Whether the VAE encodes pictures first; a model that cannot do without is given one later.
        self.pictures = given is not None or self.spec.conditioning == "channels"
        self._done: dict[Any, Any] = {}

    def of(self, request: CompleteRequest) -> Traces:
        """Return the traces of another request."""
        how = self.dtype, self.device, self.layout, self.here, self.report, self.gpu, self.machine
        return Traces(self.checkpoint, request, *how)

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._done:
            self._done[key] = make()
        return cast(T, self._done[key])

    def passes(self, guided: bool, runtime: Runtime) -> int:
        """Return how often a step runs the model."""
        batched = batch_guidance(runtime.cfg_batch, self.tokens)
        return 2 if guided and self.layout.cfg == 1 and not batched else 1

    def block_numbers(self, guided: bool) -> int:
        """Return how many numbers, a channel of a token each, the blocks of a step work on."""
        branches = 2 if guided and self.layout.cfg == 1 else 1
        return branches * self.own_tokens * self.spec.dit.dim * self.layers

    # weights

    def expert(self, expert: Expert, runtime: Runtime) -> Weights:
        """Return an expert's weights as they are held, without LoRAs."""
        return self._once(
            ("expert", *self._form(expert, runtime)),
            lambda: _expert_weights(self._structure(expert, runtime), self.layout.size),
        )

    def _structure(self, expert: Expert, runtime: Runtime) -> WanDiT:
        source = self.checkpoint.source(expert)
        return self._once(
            ("structure", *self._form(expert, runtime)),
            lambda: expert_structure(
                self.spec.dit, source, runtime, self.dtype, self.device, gpu=self.gpu
            ),
        )

    def _form(self, expert: Expert, runtime: Runtime) -> tuple[Any, ...]:
        """Return what tells the forms of experts apart: packed tensors, and quantisation."""
        tensors = self.checkpoint.source(expert).tensors
        packed = tuple((name, info.packing) for name, info in tensors.items() if info.packing)
        return packed, runtime.quantize, runtime.quantize_layers

    def ways(self, runtime: Runtime) -> tuple[Way, ...]:
        """Return how the quantised layers of the experts multiply."""
        leaves = [
            leaf for each in self.experts for leaf in self._structure(each, runtime).modules()
        ]
        return tuple(dict.fromkeys(leaf.way for leaf in leaves if isinstance(leaf, QuantLinear)))

    def live_loras(self, expert: Expert, runtime: Runtime) -> tuple[FakeLora, ...]:
        """Return the LoRAs that an expert holds next to its weights; a fused one takes nothing."""
        loras = self.loras if runtime.lora == "live" else ()
        return tuple(lora for lora in loras if lora.applies_to(expert))

    def held_loras(self, experts: tuple[Expert, ...]) -> int:
        """Return the RAM of the LoRAs that these experts have yet to take: all of it, in float32.

        A file that serves two experts is held once.
        """
        used = (lora for lora in self.loras if any(lora.applies_to(each) for each in experts))
        return sum(4 * lora.numbers for lora in used)

    @cached_property
    def text_encoder(self) -> Weights:
        """The text encoder's weights as they are held."""
        encoder = self._text_encoder()
        blocks = [sum(value.nbytes for value in b.parameters()) for b in encoder.blocks]
        tensors = [value.nbytes for value in encoder.parameters()]
        return Weights(sum(tensors), tuple(blocks), max(tensors))

    def _text_encoder(self) -> UMT5Encoder:
        encoder, source = build(UMT5Encoder, self.spec.text), self.checkpoint.source("t5")
        lay_out(encoder, source, lambda *_: self.text_dtype, self.text_dtype, self.device)
        return encoder

    # a denoising step

    def step(
        self, expert: Expert, index: int, runtime: Runtime, streamed: bool, gloo: bool = False
    ) -> Traced:
        """Trace one step, with the solver's state and the text's keys and values of all blocks.

        Ranks that talk through gloo hold a copy of what they gather.
        """
        loras = self.live_loras(expert, runtime)
        gathered = self.expert(expert, runtime).gathered if runtime.dit_fsdp else 0
        key = (
            "step",
            *self._form(expert, runtime),
            (runtime.chunk_tokens, runtime.cfg_batch, runtime.attention == MATH, gathered, gloo),
            (self.steps[index].guided, min(index, 2), streamed, loras),
        )
        return self._once(
            key, lambda: self._step(expert, index, runtime, streamed, loras, gathered, gloo)
        )

    def _step(
        self,
        expert: Expert,
        index: int,
        runtime: Runtime,
        streamed: bool,
        loras: tuple[FakeLora, ...],
        gathered: int,
        gloo: bool,
    ) -> Traced:
        self.report(f"planning a step of the {title(expert)}")
        # Quantised leaves unpack weights in many operations, so `_leaves` traces each form once.
        spec = replace(self.spec, dit=replace(self.spec.dit, num_layers=self.TRACED_BLOCKS))
        model: Any = self._plain(spec, runtime)
        plain, further = model, self.layers - self.TRACED_BLOCKS
        group = simulated_groups(self.layout, self.layout.size - 1)
        guided = self.steps[index].guided
        with fake(group.stats, fused=not gloo) as trace:
            materialise(plain, skip=BlockBuffers(plain.blocks[0]).leaves if streamed else ())
            if streamed:
                worker = SyncExecutor()
                model = Streaming(plain, lambda *_: None, (), torch.device("cpu"), worker=worker)
            if loras:
                _attach(plain, loras)
            kernel = BACKENDS[MATH] if runtime.attention == MATH else KERNEL
            connect(plain, group, kernel.attend, kernel.with_lse)
            trace.repeat(plain.blocks[0], 1 + further)
            if gathered:
                _hold_gathered(plain, gathered, self.layers > 1, gloo)
            parts = FakeParts(spec, model, self.text_dtype)
            weights = trace.live
            trace.mark()
            branches = 2 if guided and self.layout.cfg == 1 else 1
            text = _nbytes(model.text_states(parts.text([""] * branches)))
            text_work = trace.work  # once a run, and not in each step
            trunk, guidance = sharded(group), split_guidance(group)
            seen, how = self._conditioning(), (index, runtime.cfg_batch, trunk, guidance)
            velocity = make_velocity(parts, self.request, *how, conditioning=seen)
            state = _solver_state(index, self.latent_shape)
            trace.mark()
            seen.held(advance(schedule_of(self.request), state, velocity).x)
            traced = trace.result(weights)
        excess, work = self._leaves(expert, runtime, self.passes(guided, runtime))
        return replace(
            traced,
            activations=traced.activations + excess + text // self.TRACED_BLOCKS * further,
            work=traced.work - text_work + work.scaled(self.layers),
        )

    def _conditioning(self) -> TextToVideo:
        shape = encoded_shape(self.spec, self.request)
        encoded = torch.empty(shape) if self.pictures else None
        return conditioning_of(self.spec, self.request, encoded)

    def _plain(self, spec: ModelSpec, runtime: Runtime) -> WanDiT:
        plain = replace(runtime, quantize="")
        return expert_structure(spec.dit, None, plain, self.dtype, self.device)

    def _leaves(self, expert: Expert, runtime: Runtime, passes: int) -> tuple[int, Work]:
        """Return what packed leaves of a block need beyond plain ones: bytes of one, work of all.

        The first block stands for all. Other blocks of a GGUF file may be packed in other types,
        which changes the weights' bytes but not these.
        """
        packed, quantize, _ = self._form(expert, runtime)
        if not packed and not quantize:
            return 0, Work()
        ours = _first(self._structure(expert, runtime).blocks).named_modules()
        one = replace(self.spec, dit=replace(self.spec.dit, num_layers=1))
        plain = dict(_first(self._plain(one, runtime).blocks).named_modules())
        rows = min(runtime.chunk_tokens or self.own_tokens, self.own_tokens)
        calls = passes * -(-self.own_tokens // rows)
        excess, work, done = 0, Work(), {}
        for path, leaf in ours:
            if not isinstance(leaf, PackedLeaf | QuantLinear):
                continue
            form = (type(leaf), getattr(leaf, "kind", ""), *plain[path].weight.shape)
            if form not in done:
                done[form] = _leaf(leaf, rows), _leaf(plain[path], rows)
            its, other = done[form]
            excess = max(excess, its.activations - other.activations)
            # The text's keys and values are made once a run: they count for memory only.
            if not path.startswith(("cross_attn.k", "cross_attn.v")):
                work = work + (its.work - other.work).scaled(calls)
        return excess, work

    # the other parts

    @cached_property
    def text(self) -> Traced:
        """The text encoder on the prompts, one at a time."""
        self.report("planning the text encoder")
        encoder = self._text_encoder()
        block = _first(encoder.blocks)
        encoder.blocks = cast(Any, nn.ModuleList([block]))
        with fake() as trace:
            weights = materialise(encoder)
            trace.repeat(block, self.spec.text.num_layers)
            ids = torch.zeros(1, self.spec.dit.text_len, dtype=torch.long)
            trace.mark()
            encoder(ids, torch.ones_like(ids))
            traced = trace.result(weights)
        prompts = 2 if any(step.guided for step in self.steps) else 1
        return replace(traced, work=traced.work.scaled(prompts))

    @cached_property
    def encode(self) -> Traced:
        """The VAE in float32 on the clip of the pictures."""
        self.report("planning the VAE's encoder")
        return decoding.clip(self.spec, self.request)

    def decode(self, tile: int) -> Traced:
        """Trace the VAE in float32: in strips on several ranks, else in tiles or full frames."""
        self.report("planning the VAE")
        vae, shape = self.spec.vae, self.latent_shape
        if self.layout.size > 1:
            return self._once("decode", lambda: decoding.strips(vae, shape, self.layout))
        return self._once(
            ("decode", tile),
            lambda: decoding.tiles(vae, shape, tile) if tile else decoding.frames(vae, shape),
        )


def _first(blocks: Iterable[T]) -> T:
    return next(iter(blocks))


def _expert_weights(model: WanDiT, ranks: int) -> Weights:
    tensors = [value.nbytes for value in model.parameters()]
    rows = [
        [value for leaf in block.modules() for value in rows_of(leaf)] for block in model.blocks
    ]
    shards = [sum(shard_bytes(value, ranks) for value in block) for block in rows]
    return Weights(
        sum(tensors),
        tuple(BlockBuffers(block).layout.nbytes for block in model.blocks),
        max(tensors),
        sum(value.nbytes for block in rows for value in block),
        sum(shards),
        max(shards) * ranks,
    )


def _attach(model: WanDiT, loras: Iterable[FakeLora]) -> None:
    """Attach LoRAs of these ranks to every matmul of the blocks."""
    adapters = Adapters(model)
    leaves: dict[str, Any] = {
        name: leaf
        for name, leaf in model.named_modules()
        if name.startswith("blocks.") and hasattr(leaf, "in_features")
    }
    for number, lora in enumerate(loras):
        changes: dict[str, WeightDelta] = {}
        for name, leaf in leaves.items():
            up, down = (leaf.out_features, lora.rank), (lora.rank, leaf.in_features)
            delta = LowRank(torch.empty(up), torch.empty(down))
            full = Decomposed(delta, torch.empty(leaf.out_features)) if lora.full_weight else delta
            changes[f"{name}.weight"] = full
        adapters.attach(str(number), changes)


def _hold_gathered(model: WanDiT, nbytes: int, several: bool, gloo: bool) -> None:
    """Hold what FSDP holds, which itself does not run on tensors without memory.

    That is the gathered block of `nbytes`, and the message that it arrived in, until the next one
    arrived or the forward ended. With `several` blocks, the message of the one before is there too;
    `gloo` copies the gathered bytes.
    """
    held: list[Tensor] = []

    def hold(blocks: int) -> None:
        held.clear()
        held.append(torch.empty(blocks * nbytes, dtype=torch.uint8))

    def enter(*_: Any) -> None:
        hold(1 + several + gloo)  # while it arrives
        hold(2)

    for block in model.blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(lambda *_: hold(1))
    model.register_forward_hook(lambda *_: held.clear())


def _nbytes(states: Iterable[tuple[Tensor, Tensor]]) -> int:
    return sum(value.untyped_storage().nbytes() for pair in states for value in pair)


def _solver_state(index: int, shape: Shape) -> SolverState:
    """Return the state of a solver at this step, which holds up to two earlier velocities."""
    x, past = torch.empty(shape), min(2, index)
    earlier = tuple(torch.empty_like(x) for _ in range(past))
    return SolverState(index, x, earlier, torch.empty_like(x) if past else None)


def _leaf(leaf: nn.Module, rows: int) -> Traced:
    """Trace one leaf on so many rows; its activations are without parameters and input."""
    with fake() as trace:
        materialise(leaf)
        dtype = cast(torch.dtype, leaf.compute_dtype)
        x = torch.empty(rows, cast(int, leaf.in_features), dtype=dtype)
        trace.mark()
        start = trace.live
        leaf(x)
        return trace.result(start)
