"""One model on several ranks, each of which holds a shard of the weights (FSDP2).

In training, gradients and optimizer state are sharded as well. Parameters of a sharded model are
DTensors. A block's parameters are complete while it runs. `gather` returns complete tensors, so a
state saved by 8 ranks loads on 1 or 2.

Every rank must make the same calls in the same order, the same expert at each step included. The
others wait for a rank that does not until the group's timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from wanflow.config import RequestError
from wanflow.models.dit import WanDiT
from wanflow.parallel.groups import Group, ParallelContext
from wanflow.parallel.ranks import DistInfo
from wanflow.parallel.sharding import rows_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Training


def shard(model: WanDiT, info: DistInfo) -> None:
    """Shard every parameter over the ranks, in place; nothing where there is one rank.

    Call it on a loaded model, the same on every rank, on the CPU or on `info.device` (blocks on the
    CPU move one by one). Attach adapters before it, and make the optimizer after it: parameters are
    replaced. Gradients are averaged over the ranks. `forward` and each block's `text_kv` may be
    called; `text_states` alone may not.

    Raises:
        RequestError: for packed weights, and trainable parameters of more than one dtype.
    """
    if info.world_size == 1:
        return
    for name, parameter in model.named_parameters():
        if parameter.dtype not in FLOATS:
            raise RequestError(
                f"{name} is {parameter.dtype}: packed weights train on one process only; load them"
                " unpacked"
            )
    trainable = {p.dtype: name for name, p in model.named_parameters() if p.requires_grad}
    if len(trainable) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in trainable.items())
        raise RequestError(f"trainable parameters must have one dtype on several ranks: {found}")
    mesh = init_device_mesh(info.device.type, (info.world_size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        block.text_kv = _cloned(block.text_kv)  # type: ignore[method-assign, assignment]
        register_fsdp_forward_method(block, "text_kv")
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _cloned(
    text_kv: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Clone the results: an in-place change of these views would drop FSDP's backward hooks."""

    def cloned(text: Tensor) -> tuple[Tensor, Tensor]:
        k, v = text_kv(text)
        return k.clone(), v.clone()

    return cloned


def gather(tree: Any) -> Any:
    """Copy a nested state (dicts, lists, tuples) with complete tensors on the CPU.

    Every rank must call it. Ranks above 0 get None.
    """
    keep = not dist.is_initialized() or dist.get_rank() == 0
    gathered = _gather(tree, keep)
    return gathered if keep else None


def _gather(tree: Any, keep: bool) -> Any:
    if isinstance(tree, Mapping):
        return {key: _gather(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_gather(value, keep) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    if isinstance(tree, DTensor):
        full = tree.full_tensor()  # a collective: ranks that drop the result take part
        return full.detach().cpu() if keep else None
    return tree.detach().to("cpu", copy=True) if keep else None


def scatter(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that every rank has; all of it if `like` is not one."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def scatter_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Shard an optimizer's state from `gather` for this optimizer's `load_state_dict`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded: dict[int, dict[str, Any]] = {}
    for index, values in state["state"].items():
        like = parameters[index]
        sharded[index] = {
            name: (
                scatter(value, like)
                if isinstance(value, Tensor) and value.shape == like.shape
                else value
            )
            for name, value in values.items()
        }
    return {**state, "state": sharded}


@torch.no_grad()
def mean(value: Tensor, info: DistInfo) -> Tensor:
    """Return the average over the ranks of a tensor that each has its own of, such as a loss."""
    total = value.detach().clone()
    if info.world_size == 1:
        return total
    total = total.to(info.device)
    dist.all_reduce(total)
    return total / info.world_size


# Sampling


def shard_blocks(model: WanDiT, ctx: ParallelContext) -> None:
    """Let each rank hold some rows of every matmul weight of the blocks.

    Call it on a model on meta, before `load_module`, which then reads this rank's rows only. Packed
    and rounded weights are sharded like plain ones. Small parameters (norms, biases, modulation)
    and those outside the blocks (0.5 of 28.6 GB in bfloat16) stay complete, so that LoRAs may
    change them in place. `forward` and `text_states` may be called, the same on every rank. No
    gradient goes through it.
    """
    mesh, ignored = ctx.mesh, set(model.parameters())
    for block in model.blocks:
        sharded = {parameter for leaf in block.modules() for parameter in rows_of(leaf)}
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=True,
            ignored_params=set(block.parameters()) - sharded,
        )
        register_fsdp_forward_method(block, "text_kv")
        cast(FSDPModule, block).set_custom_all_gather(cast(Any, ByteAllGather(ctx.world)))
        ignored -= sharded
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    register_fsdp_forward_method(model, "text_states")

    def allocate(value: Tensor) -> Tensor:
        return (
            torch.empty_like(value, device=mesh.device_type)
            if isinstance(value, DTensor)
            else value
        )

    for block in model.blocks:
        block._apply(allocate)  # type: ignore[no-untyped-call]


class ByteAllGather:
    """FSDP's all-gather of a block, counted as "weights"; in bytes, as gloo has no float8."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.group.stats.add("weights", (self.group.size - 1) * input_tensor.nbytes)
        # all_gather_into_tensor is its name before PyTorch 2.13.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        output, values = output_tensor.view(torch.uint8), input_tensor.view(torch.uint8)
        return cast("dist.Work | None", all_gather(output, values, group, async_op))
