"""Check a whole expert: one pass beside the plan, streamed blocks, and copies from RAM."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wanflow.bench.block import auto_kernel
from wanflow.bench.record import Record, Skip
from wanflow.bench.tools import (
    Scale,
    expert_inputs,
    fill,
    once,
    randn,
    random_expert,
    seconds,
    weighing,
)
from wanflow.checkpoint.structure import expert_structure
from wanflow.hardware import memory
from wanflow.models.dit import TextStates, WanDiT
from wanflow.plan.cards import GPUS, Overheads, Rates
from wanflow.plan.estimate import compute_seconds
from wanflow.plan.trace import Traced, fake, materialise
from wanflow.runtime import Runtime
from wanflow.transforms.attention import set_attention, synchronize
from wanflow.transforms.attention_kernels import BACKENDS
from wanflow.transforms.block_streaming import (
    BlockBuffers,
    Streaming,
    evenly_spaced_resident,
    load_to_host,
)
from wanflow.transforms.host_memory import HostMemory, as_tensor, clear_error, private_memory
from wanflow.units import memory_size

RESIDENT = 22 / 40  # of the blocks; the rest is streamed
CHUNK = 8192  # tokens, where a pass would not fit
ROOM = 0.9  # of free memory that a check takes
BUFFER = 703_000_000  # bytes of a published block in bfloat16


def pass_of(scale: Scale, layers: int, chunk: int) -> Traced:
    """Trace one pass of so many blocks: its activations and its work."""
    config = replace(scale.spec.dit, num_layers=layers)
    runtime = Runtime(chunk_tokens=chunk)
    model = expert_structure(config, None, runtime, scale.dtype, torch.device("cpu"))
    with fake() as trace:
        weights = materialise(model)
        trace.mark()
        latent, timestep, text = expert_inputs(config, scale.latents[0], "cpu")
        states = model.text_states(text)
        model(latent, timestep, states)
        return trace.result(weights)


def block_bytes(scale: Scale) -> int:
    """Return the bytes of a block's matmul weights."""
    config = replace(scale.spec.dit, num_layers=1)
    model = expert_structure(config, None, Runtime(), scale.dtype, scale.device)
    return BlockBuffers(next(iter(model.blocks))).layout.nbytes


def that_fit(scale: Scale, resident: float = 1.0) -> tuple[int, int]:
    """Return how many blocks fit on the device, all of the model's if they can, and the chunk."""
    layers, each = scale.spec.dit.num_layers, block_bytes(scale)
    if not scale.cuda:
        return layers, 0
    free = int(ROOM * torch.cuda.mem_get_info(scale.device)[0])
    for chunk in (0, CHUNK):
        left = free - pass_of(scale, 1, chunk).activations - 4 * each
        if left >= layers * resident * each:
            return layers, chunk
    return max(2, min(layers, int(left / each / resident))), CHUNK


def _model(scale: Scale, layers: int, chunk: int) -> WanDiT:
    model = random_expert(scale, layers, Runtime(chunk_tokens=chunk))
    set_attention(model, BACKENDS[auto_kernel(scale, scale.tokens(scale.latents[0]))])
    return model


def _rates(scale: Scale) -> Rates | None:
    if not scale.cuda:
        return None
    card = torch.cuda.get_device_properties(scale.device)
    known = (each for each in GPUS.values() if each.same_as(card.name, card.total_memory))
    return next((each.rates for each in known), None)


def expert(record: Record, scale: Scale) -> None:
    """Run one pass of a random expert; compare its time and memory with the plan's."""
    layers, chunk = that_fit(scale)
    what = f"a pass of {layers} blocks"
    model = _model(scale, layers, chunk)
    weights = sum(value.nbytes for value in model.parameters())
    latent, timestep, text = expert_inputs(model.config, scale.latents[0], scale.device)
    with weighing(scale.device) as peak:
        states = model.text_states(text)
        model(latent[..., :8, :8], timestep, states)  # a small pass that prepares kernels
        took = once(lambda: model(latent, timestep, states), scale.device)
    traced, rates = pass_of(scale, layers, chunk), _rates(scale)
    planned = weights + traced.activations
    rate = traced.work.total() / took
    expected = f"{memory_size(planned)} in tensors"
    seconds_expected = None
    if rates is not None:
        seconds_expected = compute_seconds(traced.work, rates, False)
        expected = f"{seconds_expected:.4g} s, {expected}"
    value = f"{took:.4g} s, {rate / 1e12:.3g} TFLOP/s in all"
    numbers = {"seconds": took, "planned_seconds": seconds_expected, "planned_tensors": planned}
    numbers |= {"layers": layers, "chunk_tokens": chunk, "flops": traced.work.total()}
    if not peak.allocated:
        return record.measured(what, value, expected, **numbers)
    fragmentation = max(0.0, peak.reserved / peak.allocated - 1)
    record.calibrate(fragmentation=round(fragmentation, 4))
    besides = Overheads()
    device = round(planned * (1 + besides.gaps)) + besides.context
    record.measured(
        what,
        f"{value}; {memory_size(peak.allocated)} in tensors, {memory_size(peak.reserved)} kept by"
        f" PyTorch, {memory_size(peak.driver)} by the driver",
        f"{expected}, {memory_size(device)} by the driver",
        planned_device=device,
        fragmentation=fragmentation,
        **numbers,
        **peak.numbers(),
    )
    over = peak.allocated / planned - 1
    record.passed("the plan's memory of a pass", over < 0.05, f"{over:+.1%}", "at most 5 % more")


def streaming(record: Record, scale: Scale) -> None:
    """Compare a pass with 22 of 40 blocks resident to one with all, on the same inputs."""
    layers, chunk = that_fit(scale)
    resident = max(1, round(RESIDENT * layers))
    each, (_, free, _) = block_bytes(scale), memory()
    if free:
        layers = min(layers, resident + int(ROOM * free / each / 1.1))
    what = f"a pass with {resident} of {layers} blocks resident"
    if layers <= resident:
        raise Skip(f"{memory_size(free)} of RAM hold no block")
    # The smaller size: there is less work that a copy can hide behind, and twice the passes fit.
    latent, timestep, text = expert_inputs(scale.spec.dit, scale.latents[1], scale.device)
    states, template, all_resident = _all_resident(scale, layers, chunk, (latent, timestep, text))
    scale.empty()

    def fetch(index: int, views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            view.copy_(template[name])

    streamed = _streamed(scale, layers, chunk, resident, fetch)
    set_attention(streamed, BACKENDS[auto_kernel(scale, scale.tokens(scale.latents[0]))])
    try:
        with torch.no_grad():
            took = seconds(lambda: streamed(latent, timestep, states), scale.device, 1)
    finally:
        streamed.close()
    copied = (layers - resident) * each
    record.measured(
        what,
        f"{took:.4g} s, {took / all_resident:.1%} of {all_resident:.4g} s with all resident;"
        f" {memory_size(copied)} are copied in a pass",
        "at most 103 %" if scale.cuda else "",
        seconds=took,
        all_resident=all_resident,
        copied=copied,
    )


def _all_resident(
    scale: Scale, layers: int, chunk: int, inputs: tuple[Tensor, ...]
) -> tuple[TextStates, dict[str, Tensor], float]:
    """Return the states of a text, a block's weights on the host, and the seconds of a pass."""
    model, (latent, timestep, text) = _model(scale, layers, chunk), inputs
    states = model.text_states(text)
    took = seconds(lambda: model(latent, timestep, states), scale.device, 1)
    leaves = BlockBuffers(next(iter(model.blocks))).leaves
    return states, {name: getattr(leaf, key).cpu() for name, (leaf, key) in leaves.items()}, took


def _streamed(scale: Scale, layers: int, chunk: int, resident: int, fetch: Any) -> Streaming:
    """Return an expert that streams the blocks which are not resident, from RAM."""
    config = replace(scale.spec.dit, num_layers=layers)
    runtime = Runtime(chunk_tokens=chunk)
    model = expert_structure(config, None, runtime, scale.dtype, scale.device)
    leaves = [BlockBuffers(block).leaves for block in model.blocks]
    shells = [(leaf, key, getattr(leaf, key)) for block in leaves for leaf, key in block.values()]
    for leaf, key, value in shells:  # filled with the rest, they would be the whole expert
        setattr(leaf, key, torch.nn.Parameter(value.new_empty(0), requires_grad=False))
    fill(model, scale.device)
    for leaf, key, value in shells:
        setattr(leaf, key, value)
    stay = evenly_spaced_resident(layers, resident)
    ram = HostMemory(scale.cuda)
    host = load_to_host(model, fetch, ram, skip=stay)
    return Streaming(model, fetch, stay, scale.device, host, memory=ram)


def copies(record: Record, scale: Scale) -> None:
    """Time registering memory, and copies from it to the device."""
    if not scale.cuda:
        return record.skipped("copies from RAM", "needs CUDA")
    target = torch.empty(BUFFER, dtype=torch.uint8, device=scale.device)
    runtime: Any = torch.cuda.cudart()
    for kind in ("untouched", "touched", "huge pages"):
        with record.asking(f"registering {kind} memory"):
            buffer = as_tensor(private_memory(BUFFER), BUFFER, kind == "huge pages")
            if kind != "untouched":
                buffer.fill_(1)
            began = time.perf_counter()
            code = int(runtime.cudaHostRegister(buffer.data_ptr(), BUFFER, 0))
            registered = time.perf_counter() - began
            if code:
                clear_error(runtime)
                record.measured(f"registering {kind} memory", f"the driver returns {code}")
                continue
            took = seconds(lambda b=buffer: target.copy_(b, non_blocking=True), scale.device)  # type: ignore[misc]
            synchronize(scale.device)
            began = time.perf_counter()
            runtime.cudaHostUnregister(buffer.data_ptr())
            freed = time.perf_counter() - began
            record.calibrate(copy=BUFFER / took)
            gb = BUFFER / 1e9
            record.measured(
                f"registering {kind} memory",
                f"{gb / registered:.3g} GB/s, released at {gb / freed:.3g}, copied at"
                f" {gb / took:.3g}",
                register=registered,
                unregister=freed,
                copy=took,
            )
    with record.asking("a pageable copy"):
        plain = randn((BUFFER // 4,), torch.float32, "cpu").view(torch.uint8)
        took = seconds(lambda: target[: plain.numel()].copy_(plain), scale.device)
        record.measured("a pageable copy", f"{BUFFER / 1e9 / took:.3g} GB/s", seconds=took)
