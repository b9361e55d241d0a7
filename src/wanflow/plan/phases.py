"""The stretches of a run, each traced once: the pipeline's own code with parts whose tensors have
no memory.

An expert and the text encoder are traced with one block, since blocks are alike: a further block
adds its weights (which are counted, not traced) and the keys and values that it keeps of the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.structure import build, expert_structure, lay_out
from wanflow.geometry import geometry_of
from wanflow.loaders.velocity import make_velocity
from wanflow.lora.reader import describe_adapter, open_adapter
from wanflow.models.dit import WanDiT
from wanflow.models.umt5 import UMT5Encoder
from wanflow.parallel.cfg import split_guidance
from wanflow.parallel.groups import CommStats, Layout, simulated_groups, sizes
from wanflow.parallel.sequence import connect, sharded
from wanflow.parallel.sharding import rows_of, shard_bytes
from wanflow.plan import decoding
from wanflow.plan.model import FirstBlocks, small
from wanflow.plan.trace import Trace, Traced, Work, fake, materialise
from wanflow.presets import Expert, ModelSpec
from wanflow.request import CompleteRequest, Lora
from wanflow.runtime import Runtime, batch_guidance, choose_text_dtype
from wanflow.sampling.solvers import SolverState, advance
from wanflow.sampling.timeline import schedule_of, timeline
from wanflow.transforms.attention_kernels import BACKENDS
from wanflow.transforms.block_streaming import BlockBuffers, Streaming, SyncExecutor
from wanflow.transforms.deltas import Decomposed, LowRank, WeightDelta
from wanflow.transforms.lora import Adapters
from wanflow.transforms.packed import PackedLeaf
from wanflow.transforms.quant import QuantLinear

# The kernel of the trace: on fake CPU tensors its attention stays one operation, with the
# log-sum-exp too.
KERNEL = BACKENDS["sdpa"]


@dataclass(frozen=True)
class Weights:
    """Bytes of an expert's weights: all of them, those that are streamed when no block is resident,
    and the largest tensor of them.

    shared: of what is cut into shares with dit_fsdp, whole; share: what one process keeps of that;
        gathered: of one block, filled up to shares of one size, as it is when all of them are put
        together.
    """

    total: int
    blocks: tuple[int, ...]
    largest: int
    shared: int = 0
    share: int = 0
    gathered: int = 0


@dataclass(frozen=True)
class FakeLora:
    """What a plan knows of a LoRA file: how many numbers it holds, its rank, and whether the
    changed weight is made for each call.
    """

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
    return FakeLora(
        lora,
        numbers,
        max(told["ranks"], default=1),
        any(kind not in ("LoRA", "difference") for kind in told["kinds"]),
    )


@dataclass
class FakeParts:
    """Experts whose tensors have no memory."""

    spec: ModelSpec
    model: Any  # is called as a WanDiT is
    text_dtype: torch.dtype

    def text(self, prompts: list[str]) -> Tensor:
        dit = self.spec.dit
        return torch.empty(len(prompts), dit.text_len, dit.text_dim, dtype=self.text_dtype)

    def expert(self, which: Expert, strengths: tuple[float, ...] = ()) -> Any:
        return self.model

    def prepare(self, which: Expert, strengths: tuple[float, ...] = ()) -> None: ...


class Traces:
    """All of one model, request, dtype and layout, on one kind of device; what differs between
    candidates is in the arguments.

    Of several processes the last is traced: what does not divide leaves it the most tokens and the
    most heads. here: how many of them one machine has.
    """

    TRACED_BLOCKS = 1  # of an expert; a test traces all and compares

    def __init__(
        self,
        model: Checkpoint,
        request: CompleteRequest,
        dtype: torch.dtype,
        device: torch.device,
        layout: Layout = Layout(),  # noqa: B008 (it is frozen)
        here: int = 1,
    ) -> None:
        self.model, self.request, self.dtype, self.device = model, request, dtype, device
        self.layout, self.here = layout, here
        self.small = small(model, dtype)
        self.text_dtype = choose_text_dtype(dtype, self.small)
        self.schedule = schedule_of(request)
        self.steps = timeline(request, model.spec)
        self.working = tuple(step.expert for step in self.steps)
        self.geometry = geometry_of(model.spec)
        self.loras = tuple(known_lora(lora) for lora in request.loras)
        self._done: dict[Any, Any] = {}

    # what the request says

    def guided(self, step: int) -> bool:
        return self.steps[step].guided

    def kinds(self, which: Expert) -> dict[bool, list[int]]:
        """The steps of an expert, by whether they are guided (two branches) or not."""
        kinds: dict[bool, list[int]] = {}
        for step in self.steps:
            if step.expert == which:
                kinds.setdefault(step.guided, []).append(step.index)
        return kinds

    def batched(self, runtime: Runtime) -> bool:
        """Whether both branches of guidance go through the model as one batch."""
        return batch_guidance(runtime.cfg_batch, self.tokens())

    def latent_shape(self) -> tuple[int, int, int, int, int]:
        return 1, *self.geometry.latent_shape(self.request.size, self.request.frame_num)

    def tokens(self) -> int:
        return self.geometry.tokens(self.request.size, self.request.frame_num)

    def own_tokens(self) -> int:
        """Those of a process that has the most."""
        return max(sizes(self.tokens(), self.layout.sequence))

    # an expert

    def expert(self, which: Expert, runtime: Runtime) -> Weights:
        """Its weights as they are held, LoRAs aside."""
        key = ("expert", self._form(which), runtime.quantize, runtime.quantize_layers)
        if key not in self._done:
            model = expert_structure(
                self.model.spec.dit, self.model.source(which), runtime, self.dtype, self.device
            )
            sizes = [value.nbytes for value in model.parameters()]
            blocks = [
                [value for leaf in block.modules() for value in rows_of(leaf)]
                for block in model.blocks
            ]
            shares = [
                sum(shard_bytes(value, self.layout.size) for value in block) for block in blocks
            ]
            self._done[key] = Weights(
                sum(sizes),
                tuple(BlockBuffers(block).layout.nbytes for block in model.blocks),
                max(sizes),
                sum(value.nbytes for block in blocks for value in block),
                sum(shares),
                max(shares) * self.layout.size,
            )
        return cast(Weights, self._done[key])

    def lora_bytes(self, which: Expert, runtime: Runtime) -> int:
        """Live LoRAs lie on the device in the dtype that their leaves compute in."""
        return (
            0
            if runtime.lora == "fused"
            else sum(
                lora.numbers * self.dtype.itemsize for lora in self.loras if lora.works_on(which)
            )
        )

    def step(
        self, which: Expert, index: int, runtime: Runtime, streamed: bool, gloo: bool = False
    ) -> Traced:
        """One denoising step, with the solver's state, all keys and values of the text, and blocks
        put together from shares.

        Args:
            gloo: what the processes speak, on a CPU: it makes a copy of what it gathers.
        """
        live = runtime.lora == "live" and tuple(lora for lora in self.loras if lora.works_on(which))
        settings = (
            runtime.quantize,
            runtime.quantize_layers,
            runtime.chunk_tokens,
            runtime.cfg_batch,
        )
        gathered = self.expert(which, runtime).gathered if runtime.dit_fsdp else 0
        key = (
            "step",
            self._form(which),
            self.guided(index),
            min(index, 2),
            streamed,
            live,
            *settings,
            gathered,
            gloo,
        )
        if key not in self._done:
            self._done[key] = self._step(
                which, index, runtime, streamed, live or (), (gathered, gloo)
            )
        return cast(Traced, self._done[key])

    def _form(self, which: Expert) -> Any:
        """Experts of one form are traced once."""
        source = self.model.source(which)
        return (
            None
            if source is None
            else tuple(
                (name, info.packing) for name, info in source.tensors.items() if info.packing
            )
        )

    def _step(
        self,
        which: Expert,
        index: int,
        runtime: Runtime,
        streamed: bool,
        loras: tuple[FakeLora, ...],
        together: tuple[int, bool],
    ) -> Traced:
        preset = replace(
            self.model.spec, dit=replace(self.model.spec.dit, num_layers=self.TRACED_BLOCKS)
        )
        # Leaves that unpack weights do so in many small steps: they are traced by themselves
        # (`_leaves`), once.
        plain = expert_structure(
            preset.dit, None, replace(runtime, quantize=""), self.dtype, self.device
        )
        with fake() as trace:
            model: Any = plain
            materialise(
                plain, but=set(BlockBuffers(next(iter(plain.blocks))).leaves) if streamed else ()
            )
            if streamed:
                model = Streaming(
                    plain, lambda _, views: None, (), torch.device("cpu"), worker=SyncExecutor()
                )
            if loras:
                _attach(plain, loras)
            parts = FakeParts(preset, model, self.text_dtype)
            ctx = simulated_groups(self.layout, self.layout.size - 1)
            connect(plain, ctx, KERNEL.attend, KERNEL.with_lse)
            weights = trace.live
            trace.mark()
            branches = 2 if self.guided(index) and self.layout.cfg == 1 else 1
            text = _text_bytes(model.text_states(parts.text([""] * branches)))
            before = trace.work
            velocity = make_velocity(
                parts, self.request, index, runtime.cfg_batch, sharded(ctx), split_guidance(ctx)
            )
            x = torch.empty(self.latent_shape())
            past = min(2, index)
            state = SolverState(
                index,
                x,
                tuple(torch.empty_like(x) for _ in range(past)),
                torch.empty_like(x) if past else None,
            )
            inside = ModuleCounter(trace, next(iter(plain.blocks)), ctx.stats)
            if together[0]:
                hold_gathered(plain, together[0], self.model.spec.dit.num_layers > 1, together[1])
            trace.mark()
            advance(self.schedule, state, velocity)
            beside = trace.peak - weights
        layers = self.model.spec.dit.num_layers
        others = layers - self.TRACED_BLOCKS
        excess, more = self._leaves(which, runtime, inside.calls)
        work = trace.work + before.scaled(-1) + inside.work.scaled(others) + more.scaled(layers)
        sent = Counter({what: count for what, count in ctx.stats.sent.items() if count})
        sent.update({what: count * others for what, count in inside.sent.items()})
        messages = sum(ctx.stats.calls.values()) + inside.messages * others
        return Traced(
            beside + excess + text // self.TRACED_BLOCKS * others,
            work,
            tuple(trace.top()),
            sent,
            messages,
        )

    def _leaves(self, which: Expert, runtime: Runtime, passes: int) -> tuple[int, Work]:
        """What packed or quantised leaves of a block need beyond plain ones: the most bytes of one,
        and the work of all in a step.

        The first block stands for all; in GGUF files others may be packed otherwise, which changes
        the weights' bytes but not these.
        """
        if not runtime.quantize and not self._form(which):
            return 0, Work()
        source, dit = self.model.source(which), replace(self.model.spec.dit, num_layers=1)
        forms = [
            expert_structure(
                dit, source and FirstBlocks(source, 1), runtime, self.dtype, self.device
            )
        ]
        forms.append(
            expert_structure(dit, None, replace(runtime, quantize=""), self.dtype, self.device)
        )
        ours, plain = (dict(next(iter(model.blocks)).named_modules()) for model in forms)
        tokens = self.own_tokens()
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
            lay_out(
                module,
                self.model.source("t5"),
                lambda name, info: self.text_dtype,
                self.text_dtype,
                self.device,
            )
            blocks = tuple(
                sum(value.nbytes for value in block.parameters()) for block in module.blocks
            )
            sizes = [value.nbytes for value in module.parameters()]
            self._done["t5"] = Weights(sum(sizes), blocks, max(sizes))
        return cast(Weights, self._done["t5"])

    def vae_bytes(self) -> int:
        return 4 * self.model.parameters("vae")

    def text(self) -> Traced:
        """Encoding the prompts, one at a time."""
        if "text" not in self._done:
            config, source = self.model.spec.text, self.model.source("t5")
            layers = 1
            encoder = build(UMT5Encoder, replace(config, num_layers=layers))
            lay_out(
                encoder,
                source and FirstBlocks(source, layers),
                lambda name, info: self.text_dtype,
                self.text_dtype,
                self.device,
            )
            with fake() as trace:
                materialise(encoder)
                weights = trace.live
                ids = torch.zeros(1, self.model.spec.dit.text_len, dtype=torch.long)
                inside = ModuleCounter(trace, next(iter(encoder.blocks)))
                trace.mark()
                encoder(ids, torch.ones_like(ids))
            prompts = 2 if any(self.guided(index) for index in range(len(self.working))) else 1
            work = (trace.work + inside.work.scaled(config.num_layers - layers)).scaled(prompts)
            self._done["text"] = Traced(trace.peak - weights, work, tuple(trace.top()))
        return cast(Traced, self._done["text"])

    def decode(self, tile: int) -> Traced:
        """The VAE, in float32: until it repeats itself; in strips on several processes."""
        if ("decode", tile) not in self._done:
            vae, shape = self.model.spec.vae, self.latent_shape()
            if self.layout.size > 1:
                self._done["decode", tile] = decoding.in_strips(vae, shape, self.layout)
            else:
                self._done["decode", tile] = (
                    decoding.tiled(vae, shape, tile) if tile else decoding.whole(vae, shape)
                )
        return cast(Traced, self._done["decode", tile])


def _one_leaf(leaf: nn.Module, rows: int) -> tuple[int, Work]:
    """The most that a leaf takes beside its parameters and its input, and its work."""
    with fake() as trace:
        materialise(leaf)
        x = torch.empty(
            rows, cast(int, leaf.in_features), dtype=cast(torch.dtype, leaf.compute_dtype)
        )
        trace.mark()
        start = trace.live
        leaf(x)
        return trace.peak - start, trace.work


def hold_gathered(model: WanDiT, nbytes: int, many: bool, gloo: bool) -> None:
    """Hold in a trace what FSDP holds, which does not itself run on tensors without memory.

    That is the block at work, put together from all processes' shares, and beside it the message in
    which it came, until the next one has come or the forward is over.

    Args:
        nbytes: of a block.
        many: other blocks come before the ones that are traced.
        gloo: it copies what it gathers.
    """
    held: list[Tensor] = []

    def block() -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def enter(*_: Any) -> None:
        if many and not held:
            held.append(block())
        message, copy = block(), block() if gloo else None
        del copy
        held[:] = [message]
        held.append(block())

    def leave(*_: Any) -> None:
        held.pop()

    for module in model.blocks:
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    model.register_forward_hook(lambda *_: held.clear())


class ModuleCounter:
    """The work of every call of a module from now on, and what it sends."""

    def __init__(self, trace: Trace, module: nn.Module, traffic: CommStats | None = None) -> None:
        self.work = before = Work()
        self.calls = self.messages = 0
        self.sent = sent_before = Counter[str]()
        traffic = traffic or CommStats()

        def enter(*_: Any) -> None:
            nonlocal before, sent_before
            before, sent_before = trace.work + Work(), Counter(traffic.sent)
            self.messages -= sum(traffic.calls.values())

        def leave(*_: Any) -> None:
            self.work = self.work + trace.work + before.scaled(-1)
            self.sent.update(Counter(traffic.sent) - sent_before)
            self.messages += sum(traffic.calls.values())
            self.calls += 1

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def _text_bytes(states: Iterable[tuple[Tensor, Tensor]]) -> int:
    return sum(value.untyped_storage().nbytes() for pair in states for value in pair)


def _attach(model: WanDiT, loras: Iterable[FakeLora]) -> None:
    """LoRAs of these ranks on every matmul of the blocks."""
    adapters = Adapters(model)
    leaves: dict[str, Any] = {
        name: leaf
        for name, leaf in model.named_modules()
        if name.startswith("blocks.") and hasattr(leaf, "in_features")
    }
    for number, lora in enumerate(loras):
        changes: dict[str, WeightDelta] = {}
        for name, leaf in leaves.items():
            change = LowRank(
                torch.empty(leaf.out_features, lora.rank), torch.empty(lora.rank, leaf.in_features)
            )
            changes[f"{name}.weight"] = (
                Decomposed(change, torch.empty(leaf.out_features))
                if lora.through_weight
                else change
            )
        adapters.attach(str(number), changes)
