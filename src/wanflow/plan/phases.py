"""Compute what a run takes with every setting chosen: GPU memory, RAM and work, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from wanflow.loaders.placement import host_copies
from wanflow.plan.cards import GB, Overheads
from wanflow.plan.decoding import kept_features
from wanflow.plan.gpus import Kind
from wanflow.plan.trace import Traced
from wanflow.plan.traces import Traces
from wanflow.presets import Expert, title
from wanflow.runtime import Runtime

# RAM of Python with PyTorch, before a weight is read: 0.25 GB measured; with CUDA's libraries 1.5
# GB, not measured.
PROCESS, PROCESS_CUDA = 300_000_000, 1_500_000_000
READING = 200_000_000  # bytes between a file and a weight: chunks, headers, the video being written
OUTPUT_DISK = GB
# Bytes that the elementwise operations of a block move, for each token and channel in bfloat16: as
# they stand, and as a compiler fuses them. Tests hold the code to both.
EAGER, COMPILED = 147, 70


@dataclass(frozen=True, kw_only=True)
class Phase(Traced):
    """What a phase of a run takes, on the rank with the most to do.

    Work and communication are those of one of the `steps`.

    Attributes:
        weights: bytes on the device, next to `activations`.
        host: bytes of RAM, where the device has memory of its own.
        read: bytes of files that are read before the first step.
        copied, read_in_step: bytes that are copied to the device, or read, in each step.
        overheads: of the GPU's memory.
        workspace: bytes of cuDNN's; nccl: of NCCL's buffers.
        shared: bytes of RAM of which a machine holds so many `copies` for all its ranks.
        here: how many ranks the machine has.
        alone: whether rank 0 does this while the others wait.
        gathered: bytes of other ranks' shards that it receives in a step.
        fused: bytes that a compiler saves of the work's traffic, in each step.
        frames: bytes of RAM for finished frames, which rank 0 keeps or encodes.
    """

    name: str
    kind: Kind
    weights: int
    host: int
    here: int
    copies: int
    read: int
    overheads: Overheads
    nccl: int
    expert: Expert | None = None
    steps: int = 1
    copied: int = 0
    read_in_step: int = 0
    workspace: int = 0
    shared: int = 0
    alone: bool = False
    gathered: int = 0
    fused: int = 0
    frames: int = 0

    @property
    def tensors(self) -> int:
        return self.weights + self.activations

    @property
    def device(self) -> int:
        """Bytes of GPU memory, everything included; 0 on a CPU."""
        if self.kind == "cpu":
            return 0
        besides = self.overheads.context + self.workspace + self.nccl
        return round(self.tensors * (1 + self.overheads.gaps)) + besides

    @property
    def ram(self) -> int:
        """Bytes of anonymous memory of all ranks on a machine.

        Mapped files are not counted, since the system can drop them.
        """
        each = self.tensors + self.host if self.kind == "cpu" else self.host
        process = PROCESS if self.kind == "cpu" else PROCESS_CUDA
        each *= 1 if self.alone else self.here
        return self.here * process + each + self.copies * self.shared + self.frames


@dataclass(frozen=True)
class Need:
    """What a complete run takes; `disk` is in bytes."""

    phases: tuple[Phase, ...]
    disk: int

    @property
    def device(self) -> Phase:
        """The phase that needs the most GPU memory."""
        return max(self.phases, key=lambda phase: phase.device)

    @property
    def ram(self) -> Phase:
        """The phase that needs the most RAM."""
        return max(self.phases, key=lambda phase: phase.ram)


def need(traces: Traces, runtime: Runtime, kind: Kind) -> Need:
    """Return what a run takes with a Runtime in which nothing is open."""
    text = text_phase(traces, runtime, kind)
    decoding = decode_phase(traces, runtime, kind)
    pictures = (picture_phase(traces, kind),) if traces.pictures else ()
    others = *expert_phases(traces, runtime, kind), decoding
    if runtime.keep_experts and not traces.small:
        # A further prompt is encoded beside the experts where that fits what a run takes anyway;
        # elsewhere `LoadedParts` frees them, unless it finds more memory.
        kept = sum(on_device(traces, expert, runtime) for expert in traces.experts)
        beside = replace(
            text,
            weights=text.weights + kept,
            host=text.host + ((traces.here - 1) * kept if kind == "cpu" else 0),
            shared=decoding.shared,
            copies=decoding.copies,
        )
        if beside.device <= max(phase.device for phase in others) and (
            beside.ram <= max(phase.ram for phase in others)
        ):
            text = beside
    phases = *pictures, text, *others
    return Need(phases, traces.checkpoint.disk_bytes + OUTPUT_DISK)


def picture_phase(traces: Traces, kind: Kind) -> Phase:
    """Return the phase of the VAE that encodes the pictures; rank 0 does it."""
    return Phase(
        **vars(traces.encode),
        name="VAE encoder",
        kind=kind,
        weights=vae_bytes(traces),
        host=READING,
        read=traces.checkpoint.file_bytes("vae"),
        **_of_ranks(traces),
        workspace=traces.machine.overheads.workspace if kind == "gpu" else 0,
        alone=True,
    )


def vae_bytes(traces: Traces) -> int:
    """Return the bytes of the VAE's weights: it runs in float32."""
    return 4 * traces.checkpoint.parameters("vae")


def _kept_vae(traces: Traces, runtime: Runtime) -> int:
    """Return the bytes of a VAE that stays on the device between pictures and video."""
    return vae_bytes(traces) if traces.pictures and runtime.keep_experts else 0


def text_phase(traces: Traces, runtime: Runtime, kind: Kind) -> Phase:
    """Return the text encoder's phase.

    A small model's stays on the device. Else its table is in RAM, and its blocks are read in turn,
    one ahead.
    """
    traced, held = traces.text, traces.text_encoder
    on_cpu = kind == "cpu" or bool(runtime.t5_cpu)
    rest, two_blocks = held.total - sum(held.blocks), 2 * max(held.blocks)
    if traces.small:
        weights, host = held.total, held.largest
    elif on_cpu:
        weights, host = rest + two_blocks, 0
    else:
        weights, host = max(held.blocks), rest + two_blocks
    name = "text encoder"
    if kind == "gpu" and on_cpu:
        name = "text encoder on the CPU"
        weights, host = 0, weights + traced.activations
        traced = replace(traced, activations=0)
    return Phase(
        **vars(traced),
        name=name,
        kind=kind,
        weights=weights + _kept_vae(traces, runtime),
        host=READING + host + traces.held_loras(traces.experts),
        read=traces.checkpoint.file_bytes("t5"),
        **_of_ranks(traces),
        alone=True,
    )


def _of_ranks(traces: Traces) -> dict[str, Any]:
    """Return what every phase of a run has."""
    over, here = traces.machine.overheads, traces.here
    nccl, copies = (
        over.nccl if traces.layout.size > 1 else 0,
        host_copies(here, traces.machine.system),
    )
    return {"here": here, "copies": copies, "overheads": over, "nccl": nccl}


def expert_phases(traces: Traces, runtime: Runtime, kind: Kind) -> list[Phase]:
    """Return the denoising phases: each expert, with guidance and without."""
    phases = []
    for position, expert in enumerate(traces.experts):
        by_guidance: dict[bool, list[int]] = {}
        for step in traces.steps:
            if step.expert == expert:
                by_guidance.setdefault(step.guided, []).append(step.index)
        for steps in by_guidance.values():
            phases.append(_denoise(traces, runtime, kind, position, steps))
    return phases


def _denoise(
    traces: Traces, runtime: Runtime, kind: Kind, position: int, steps: list[int]
) -> Phase:
    """Return the phase of the expert at a position in the order of use, for some of its steps."""
    expert = traces.experts[position]
    others = traces.experts[:position] if runtime.keep_experts else ()  # they hold no activations
    held, streamed = traces.expert(expert, runtime), streamed_bytes(traces, expert, runtime)
    guided = traces.steps[steps[-1]].guided
    traced = traces.step(expert, steps[-1], runtime, streamed > 0, kind == "cpu")
    passes = traces.passes(guided, runtime)
    from_ram = streamed > 0 and runtime.stream_from == "ram"
    host = READING + (held.largest if kind == "gpu" else 0)
    host += traces.held_loras(traces.experts[position:])
    shared = 0
    if from_ram:
        shared += sum(streamed_bytes(traces, each, runtime) for each in (expert, *others))
    elif streamed and kind == "gpu":
        host += 2 * max(held.blocks)  # buffers between files and GPU
    if runtime.prefetch and position + 1 < len(traces.experts):
        ahead = traces.expert(traces.experts[position + 1], runtime)
        shared += sum(ahead.blocks)
        host += ahead.total - sum(ahead.blocks)
    file = traces.checkpoint.file_bytes(expert)
    read_in_step = 0 if from_ram else round(file * streamed / held.total)
    return Phase(
        **vars(traced),
        name=f"{title(expert)}{'' if guided else ' without guidance'}",
        kind=kind,
        weights=sum(on_device(traces, each, runtime) for each in (expert, *others))
        + _kept_vae(traces, runtime),
        host=host,
        shared=shared,
        read=file - read_in_step,
        **_of_ranks(traces),
        expert=expert,
        steps=len(steps),
        copied=passes * streamed if kind == "gpu" else 0,
        read_in_step=passes * read_in_step,
        fused=(EAGER - COMPILED) * traces.block_numbers(guided) if kind == "gpu" else 0,
        gathered=passes * (traces.layout.size - 1) * held.shard if runtime.dit_fsdp else 0,
    )


def on_device(traces: Traces, expert: Expert, runtime: Runtime) -> int:
    """Return the bytes of an expert's weights on the device, LoRAs included.

    Streaming holds the resident blocks and two buffers of the largest block's size. dit_fsdp holds
    a shard of the blocks' matmul weights, and all of the rest.
    """
    held = traces.expert(expert, runtime)
    numbers = sum(lora.numbers for lora in traces.live_loras(expert, runtime))
    total = held.total + numbers * traces.dtype.itemsize
    if runtime.dit_fsdp:
        return total - held.sharded + held.shard
    streamed = streamed_bytes(traces, expert, runtime)
    return total - streamed + 2 * max(held.blocks) if streamed else total


def streamed_bytes(traces: Traces, expert: Expert, runtime: Runtime) -> int:
    """Return the bytes of the blocks that are streamed; none are with dit_fsdp.

    Blocks of a GGUF file differ: streamed ones count as average.
    """
    if runtime.dit_fsdp or runtime.resident_blocks is None:
        return 0
    blocks = traces.expert(expert, runtime).blocks
    return round(sum(blocks) * max(0, len(blocks) - runtime.resident_blocks) / len(blocks))


def decode_phase(traces: Traces, runtime: Runtime, kind: Kind) -> Phase:
    """Return the VAE's phase."""
    tile, kept = runtime.vae_tile or 0, traces.experts if runtime.keep_experts else ()
    traced, host = traces.decode(tile), READING
    width, height = traces.request.size
    frames = traces.request.frame_num * width * height * 3
    if tile:
        host += frames + kept_features(traces.spec.vae, traces.latent_shape)
    shared = 0
    if runtime.stream_from == "ram":
        shared = sum(streamed_bytes(traces, expert, runtime) for expert in kept)
    return Phase(
        **vars(traced),
        name="VAE",
        kind=kind,
        weights=vae_bytes(traces) + sum(on_device(traces, expert, runtime) for expert in kept),
        host=host,
        shared=shared,
        read=traces.checkpoint.file_bytes("vae"),
        **_of_ranks(traces),
        workspace=traces.machine.overheads.workspace if kind == "gpu" else 0,
        frames=2 * frames,  # Python joins them to one array; an encoder looks ahead on less
    )
