"""What a run takes with every setting settled: bytes on the device and in RAM, phase by phase, and
disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from wanflow.plan.decoding import kept_features
from wanflow.plan.phases import Traces
from wanflow.plan.trace import Held, Work
from wanflow.presets import Expert
from wanflow.runtime import Runtime

GB = 10**9
# Beside tensors, a process that uses a GPU has a context on it with its kernels (0.4 to 0.6 GB are
# usual), and PyTorch's allocator rounds and scatters what it hands out (a few percent). cuDNN's
# convolutions take a workspace. None of it was measured here.
CONTEXT, SCATTER, WORKSPACE = 600_000_000, 0.04, 500_000_000
# Python with PyTorch, before a weight is read: 0.25 GB here; a process that uses CUDA has its
# libraries' memory too (not measured here).
PROCESS, PROCESS_CUDA = 300_000_000, 1_500_000_000
READING = (
    200_000_000  # what is between a file and a weight: chunks, headers, the video that is written
)
OUTPUT_DISK = GB

Kind = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Phase:
    """A stretch of a run. Bytes on the device: weights, and the most that is there beside them;
    bytes of RAM; what it computes.

    host: what lies in RAM, where the device has memory of its own. work: of one step, of which
        there are `steps`. read: bytes of files that are read before. copied, read_in_step: bytes
        that go to the device, or are read, in every step.

    Of several processes all this is of one, the one with the most to do. here: how many the machine
    has; alone: the first does this and the others wait. sent: bytes that it sends in a step, by
    what they are, in so many `messages`; gathered: bytes of others' shares of the weights that it
    receives in a step.
    """

    name: str
    kind: Kind
    weights: int
    beside: int
    host: int
    work: Work
    steps: int = 1
    read: int = 0
    copied: int = 0
    read_in_step: int = 0
    workspace: int = 0
    top: tuple[Held, ...] = ()
    here: int = 1
    alone: bool = False
    sent: Mapping[str, int] = field(default_factory=dict)
    messages: int = 0
    gathered: int = 0

    @property
    def tensors(self) -> int:
        return self.weights + self.beside

    @property
    def device(self) -> int:
        """Bytes of GPU memory, with what is there beside tensors; 0 on a CPU."""
        return (
            0
            if self.kind == "cpu"
            else round(self.tensors * (1 + SCATTER)) + self.workspace + CONTEXT
        )

    @property
    def ram(self) -> int:
        """Bytes of anonymous memory on one machine, all its processes together: mapped files, which
        the system can drop, are not in it.
        """
        each = self.tensors + self.host if self.kind == "cpu" else self.host
        return (
            self.here * (PROCESS if self.kind == "cpu" else PROCESS_CUDA)
            + (1 if self.alone else self.here) * each
        )


@dataclass(frozen=True)
class Need:
    """Of one run."""

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
    """What a run takes with this Runtime, in which nothing is open."""
    phases = (
        text_phase(traces, runtime, kind),
        *expert_phases(traces, runtime, kind),
        decode_phase(traces, runtime, kind),
    )
    return Need(phases, traces.model.disk_bytes + OUTPUT_DISK)


def text_phase(traces: Traces, runtime: Runtime, kind: Kind) -> Phase:
    """The text encoder: whole where the model is small, else its table in RAM and its blocks in
    turn, the next one being read ahead.
    """
    traced, held = traces.text(), traces.text_encoder()
    read = traces.model.file_bytes("t5")
    on_host = kind == "cpu" or bool(runtime.t5_cpu)
    if traces.small:
        weights, host = held.total, held.largest
    else:
        rest, block = held.total - sum(held.blocks), max(held.blocks)
        weights, host = (rest + 2 * block, 0) if on_host else (block, rest + 2 * block)
    if kind == "gpu" and on_host:
        beside = READING + weights + traced.beside
        return Phase(
            "text encoder on the CPU",
            kind,
            0,
            0,
            beside,
            traced.work,
            read=read,
            top=traced.top,
            here=traces.here,
            alone=True,
        )
    return Phase(
        "text encoder",
        kind,
        weights,
        traced.beside,
        READING + host,
        traced.work,
        read=read,
        top=traced.top,
        here=traces.here,
        alone=True,
    )


def expert_phases(traces: Traces, runtime: Runtime, kind: Kind) -> list[Phase]:
    """Denoising, by expert, and with and without guidance."""
    working = list(dict.fromkeys(traces.working))
    phases = []
    for number, which in enumerate(working):
        after = working[number + 1] if number + 1 < len(working) else None
        before = working[:number] if runtime.keep_experts else []
        for indexes in traces.kinds(which).values():
            phases.append(_denoise(traces, runtime, kind, which, indexes, before, after))
    return phases


def on_device(traces: Traces, which: Expert, runtime: Runtime) -> int:
    """Bytes of an expert's weights on the device: all, or resident blocks, two slots for the
    others, and the small tensors.

    With dit_fsdp: a share of the blocks' matmul weights, and the rest.
    """
    held = traces.expert(which, runtime)
    loras = traces.lora_bytes(which, runtime)
    if runtime.dit_fsdp:
        return held.total - held.shared + held.share + loras
    streamed = len(held.blocks) - resident(traces, runtime)
    if streamed <= 0:
        return held.total + loras
    # Blocks of one form are alike; where they are not (GGUF), those that are streamed are taken as
    # average ones, the slots as the largest.
    return (
        held.total
        + loras
        - round(streamed * sum(held.blocks) / len(held.blocks))
        + 2 * max(held.blocks)
    )


def resident(traces: Traces, runtime: Runtime) -> int:
    layers = traces.model.spec.dit.num_layers
    return layers if runtime.resident_blocks is None else min(layers, runtime.resident_blocks)


def streamed_bytes(traces: Traces, which: Expert, runtime: Runtime) -> int:
    """Bytes of the blocks that are not on the device, in the form in which they move; with dit_fsdp
    none move.
    """
    if runtime.dit_fsdp:
        return 0
    held = traces.expert(which, runtime)
    return round(
        sum(held.blocks) * (len(held.blocks) - resident(traces, runtime)) / len(held.blocks)
    )


def _denoise(
    traces: Traces,
    runtime: Runtime,
    kind: Kind,
    which: Expert,
    indexes: list[int],
    before: list[Expert],
    after: Expert | None,
) -> Phase:
    held, streamed = traces.expert(which, runtime), streamed_bytes(traces, which, runtime)
    guided = traces.guided(indexes[-1])
    traced = traces.step(which, indexes[-1], runtime, streamed > 0, kind == "cpu")
    passes = 2 if guided and traces.layout.cfg == 1 and not traces.batched(runtime) else 1
    others = sum(on_device(traces, other, runtime) for other in before)
    size = traces.layout.size
    from_ram = streamed > 0 and runtime.stream_from == "ram"
    host = READING + (held.largest if kind == "gpu" else 0)
    if from_ram:
        host += sum(streamed_bytes(traces, each, runtime) for each in (which, *before))
    elif streamed and kind == "gpu":
        host += 2 * max(held.blocks)  # through which files reach the GPU
    if runtime.prefetch and after is not None:
        host += traces.expert(after, runtime).total
    file = traces.model.file_bytes(which)
    from_files = 0 if from_ram else round(file * streamed / held.total)
    return Phase(
        f"{which}-noise expert{'' if guided else ' without guidance'}",
        kind,
        # What is kept of the other expert has nothing of this one's steps on it.
        on_device(traces, which, runtime) + others,
        traced.beside,
        host,
        traced.work,
        len(indexes),
        read=file - from_files,
        copied=passes * streamed if kind == "gpu" else 0,
        read_in_step=passes * from_files,
        top=traced.top,
        here=traces.here,
        sent=traced.sent,
        messages=traced.messages,
        gathered=passes * (size - 1) * held.share if runtime.dit_fsdp else 0,
    )


def decode_phase(traces: Traces, runtime: Runtime, kind: Kind) -> Phase:
    tile, kept = runtime.vae_tile or 0, set(traces.working) if runtime.keep_experts else set()
    traced, weights = traces.decode(tile), traces.vae_bytes()
    weights += sum(on_device(traces, which, runtime) for which in kept)
    width, height = traces.request.size
    kept_in_ram = kept_features(traces.model.spec.vae, traces.latent_shape())
    host = READING + (traces.request.frame_num * width * height * 3 + kept_in_ram if tile else 0)
    if runtime.stream_from == "ram":
        host += sum(streamed_bytes(traces, which, runtime) for which in kept)
    return Phase(
        "VAE",
        kind,
        weights,
        traced.beside,
        host,
        traced.work,
        read=traces.model.file_bytes("vae"),
        workspace=WORKSPACE if kind == "gpu" else 0,
        top=traced.top,
        here=traces.here,
        sent=traced.sent,
        messages=traced.messages,
    )
