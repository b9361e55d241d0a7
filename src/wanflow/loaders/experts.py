"""Load an expert: resident, sharded (this rank's rows), or with streamed blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.checkpoint.containers import Report
from wanflow.checkpoint.load import load_expert, load_module
from wanflow.checkpoint.structure import expert_structure
from wanflow.config import RequestError
from wanflow.loaders.placement import Changes, Placement
from wanflow.models.dit import WanDiT
from wanflow.presets import Expert

if TYPE_CHECKING:
    from wanflow.transforms.block_streaming import Streaming


def refuse_packed(checkpoint: Checkpoint, where: Placement) -> None:
    """Raise RequestError for an expert whose file holds its weights packed already."""
    from wanflow.transforms.quant import QuantLinear

    for which in checkpoint.spec.expert_names:
        model = expert_structure(
            checkpoint.spec.dit, checkpoint.source(which), where.runtime, where.dtype, where.device
        )
        if not any(isinstance(leaf, QuantLinear) for leaf in model.modules()):
            raise RequestError(
                f"quantize {where.runtime.quantize}: the file of the {which}-noise expert holds"
                " packed weights already; leave out --quantize"
            )


def open_expert(
    checkpoint: Checkpoint,
    which: Expert,
    where: Placement,
    report: Report | None = None,
    changes: Changes | None = None,
) -> WanDiT | Streaming:
    """Load an expert to its device: resident, sharded (this rank's rows), or streamed."""
    if where.sharded and where.ctx is not None:
        from wanflow.parallel.fsdp import shard_blocks

        source = checkpoint.source(which)
        model = expert_structure(
            checkpoint.spec.dit, source, where.runtime, where.dtype, where.device, changes or {}
        )
        shard_blocks(model, where.ctx)
        load_module(model, source, where.device, report, changes)
        return model
    if where.runtime.resident_blocks in (None, checkpoint.spec.dit.num_layers):
        return load_expert(
            checkpoint, which, where.dtype, where.device, report, changes, where.runtime
        )
    from wanflow.loaders.streamed import open_streamed

    return open_streamed(checkpoint, which, where, report, changes)
