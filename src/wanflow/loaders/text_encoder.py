"""Run the text encoder block by block: read a block, use it for every prompt, drop it.

A prompt needs each weight once, so keeping 11 GB of them in memory would gain nothing. A thread
reads the next block while the current one computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.containers import Report, TensorSource
from wanflow.checkpoint.load import load_module, materialize_param
from wanflow.checkpoint.structure import build, lay_out, weight_names
from wanflow.hardware import memory, thread_on
from wanflow.models.umt5 import T5Block, UMT5Encoder

Parameters = list[tuple[nn.Module, str, Tensor]]  # owner, name, value
READING = 200_000_000  # bytes between a file and a weight: chunks and headers


def has_room(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a `StreamedEncoder` fits the memory that is free now, on host and device.

    Where the free memory is unknown, it does not.
    """
    spec, source = checkpoint.spec.text, checkpoint.source("t5")
    model = build(UMT5Encoder, spec)
    lay_out(model, source, lambda name, info: dtype, dtype, device)
    block = max(_nbytes(block) for block in model.blocks)
    rest = _nbytes(model) - sum(_nbytes(block) for block in model.blocks)
    length = checkpoint.spec.dit.text_len
    # Scores with their bias and softmax, and the feed-forward's tensors, float32 at most.
    working = 4 * length * (3 * spec.num_heads * length + 4 * spec.dim_ffn)
    host = rest + 2 * block + READING
    if device.type != "cuda":
        return host + working <= memory()[1]
    return host <= memory()[1] and block + working <= torch.cuda.mem_get_info(device)[0]


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


class StreamedEncoder:
    """A `UMT5Encoder` that reads its weights at each call, and runs prompts one at a time.

    Args:
        dtype: of the weights and the computation.
        device: of the blocks. The token table (2.1 GB) stays on the host.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        report: Report | None = None,
    ) -> None:
        self.checkpoint, self.dtype, self.device, self.report = checkpoint, dtype, device, report

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids, mask [B, S] -> [B, S, D] on the device, zero past each prompt's end."""
        source = self.checkpoint.source("t5")
        model = build(UMT5Encoder, self.checkpoint.spec.text)
        lay_out(model, source, lambda name, info: self.dtype, self.dtype, self.device)
        sizes = {name: source.tensors[name].nbytes for name in weight_names(model)}
        in_blocks = {name for name in sizes if name.startswith("blocks.")}
        load_module(model, source, "cpu", skip=in_blocks)
        model.norm.to(self.device)
        done, total = sum(sizes[name] for name in sizes.keys() - in_blocks), sum(sizes.values())

        def trunk(blocks: Iterable[T5Block], x: Tensor, buckets: Tensor, keys: Tensor) -> Tensor:
            nonlocal done
            buckets, lengths = buckets.to(self.device), mask.sum(1).tolist()
            # One prompt at a time: an encoding must not depend on the others in its batch.
            prompts = [x[n : n + 1, :length].to(self.device) for n, length in enumerate(lengths)]
            attended = keys[:, :, :, : max(lengths)].to(self.device)
            for index, block in enumerate(self._loaded(list(blocks), source)):
                for n, length in enumerate(lengths):
                    bias, key_mask = buckets[:length, :length], attended[n : n + 1, :, :, :length]
                    prompts[n] = block(prompts[n], bias, key_mask)
                prefix = f"blocks.{index}."
                done += sum(sizes[name] for name in in_blocks if name.startswith(prefix))
                if self.report is not None:
                    self.report(done, total)
            padded = [F.pad(prompt, (0, 0, 0, x.shape[1] - prompt.shape[1])) for prompt in prompts]
            return torch.cat(padded)

        states: Tensor = model(ids.cpu(), mask.cpu(), trunk)
        return states.masked_fill(mask.unsqueeze(-1).to(self.device) == 0, 0)

    def _loaded(self, blocks: list[T5Block], source: TensorSource) -> Iterator[T5Block]:
        """Yield each block with its weights on the device; before and after, they are on meta."""
        with thread_on(self.device, "wanflow-text") as thread:
            reading = thread.submit(_read, blocks[0], "blocks.0", source)
            for index, block in enumerate(blocks):
                parameters = reading.result()
                if index + 1 < len(blocks):
                    reading = thread.submit(_read, blocks[index + 1], f"blocks.{index + 1}", source)
                for owner, key, value in parameters:
                    setattr(owner, key, nn.Parameter(value.to(self.device), requires_grad=False))
                del parameters
                yield block
                block.to("meta")


def _read(block: nn.Module, prefix: str, source: TensorSource) -> Parameters:
    """Read a block's parameters into host memory."""
    found: Parameters = []
    for name in weight_names(block):
        path, _, key = name.rpartition(".")
        owner = block.get_submodule(path)
        values = materialize_param(owner, key, f"{prefix}.{name}", source, {})
        found += [(owner, parameter, value) for parameter, value in values.items()]
    return found
