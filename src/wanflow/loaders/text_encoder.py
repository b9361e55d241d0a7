"""The text encoder without a place in memory: its blocks are read, used for every prompt, and
dropped, one after the other.

A prompt needs each of its weights once, so holding 11 GB of them until then, on whichever device,
would gain nothing. The next block is read by a thread while the current one works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.containers import Report, TensorSource
from wanflow.checkpoint.load import load_module, materialize_param
from wanflow.checkpoint.structure import build, lay_out, weight_names
from wanflow.models.umt5 import T5Block, UMT5Encoder

Read = list[tuple[nn.Module, str, Tensor]]


class StreamedEncoder:
    """Called like `UMT5Encoder`; reads the whole encoder at each call. Results are those of one
    prompt at a time, without its padding.

    Args:
        dtype: of the weights and of what is computed.
        device: where the blocks work. The table of tokens (2.1 GB) stays on the host, where a
            prompt's rows are taken out of it.
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
        """ids, mask [B, S] -> [B, S, D] on the device, zero past each prompt's end."""
        source = self.checkpoint.source("t5")
        model = build(UMT5Encoder, self.checkpoint.spec.text)
        lay_out(model, source, lambda name, info: self.dtype, self.dtype, self.device)
        names = weight_names(model)
        in_blocks = [name for name in names if name.startswith("blocks.")]
        load_module(model, source, "cpu", skip=in_blocks)
        model.norm.to(self.device)
        sizes = {name: source.tensors[name].nbytes for name in names}
        done = sum(size for name, size in sizes.items() if name not in in_blocks)

        def trunk(blocks: Iterable[T5Block], x: Tensor, buckets: Tensor, keys: Tensor) -> Tensor:
            nonlocal done
            buckets, lengths = buckets.to(self.device), mask.sum(1).tolist()
            # One prompt at a time: an encoding must not depend on what it was encoded beside.
            prompts = [
                x[row : row + 1, :length].to(self.device) for row, length in enumerate(lengths)
            ]
            attended = keys[:, :, :, : max(lengths)].to(self.device)
            for index, block in enumerate(self._read_ahead(list(blocks), source)):
                for row, length in enumerate(lengths):
                    prompts[row] = block(
                        prompts[row],
                        buckets[:length, :length],
                        attended[row : row + 1, :, :, :length],
                    )
                done += sum(
                    size for name, size in sizes.items() if name.startswith(f"blocks.{index}.")
                )
                if self.report is not None:
                    self.report(done, sum(sizes.values()))
            return torch.cat(
                [F.pad(prompt, (0, 0, 0, x.shape[1] - prompt.shape[1])) for prompt in prompts]
            )

        states: Tensor = model(ids.cpu(), mask.cpu(), trunk)
        return states.masked_fill(mask.unsqueeze(-1).to(self.device) == 0, 0)

    def _read_ahead(self, blocks: list[T5Block], source: TensorSource) -> Iterator[T5Block]:
        """Each block in its turn, with its weights on the device, and without them before and
        after.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="wanflow-text") as thread:
            reading = thread.submit(_read, blocks[0], "blocks.0", source)
            for index, block in enumerate(blocks):
                read = reading.result()
                if index + 1 < len(blocks):
                    reading = thread.submit(_read, blocks[index + 1], f"blocks.{index + 1}", source)
                for holder, key, value in read:
                    setattr(holder, key, nn.Parameter(value.to(self.device), requires_grad=False))
                del read
                yield block
                block.to("meta")


def _read(block: nn.Module, prefix: str, source: TensorSource) -> Read:
    """A block's parameters, on the host."""
    found: Read = []
    for name in weight_names(block):
        owner, _, key = name.rpartition(".")
        holder = block.get_submodule(owner)
        found += [
            (holder, part, value)
            for part, value in materialize_param(
                holder, key, f"{prefix}.{name}", source, {}
            ).items()
        ]
    return found
