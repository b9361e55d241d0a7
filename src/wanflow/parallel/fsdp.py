"""One model on several processes, each of which holds a share of the weights; in training also of
gradients and optimizer (FSDP2).

Parameters of a sharded model are DTensors. They are whole while their block runs, and in what
`whole` and `gather` return, which does not depend on the number of processes: what 8 saved, 1 or 2
resume.

Every rank must make the same calls in the same order (the same expert at each step, too): one that
does not leaves the others waiting until the group's timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from wanflow.config import RequestError
from wanflow.models.dit import WanDiT
from wanflow.parallel.groups import Group, ParallelContext
from wanflow.parallel.ranks import DistInfo
from wanflow.parallel.sharding import rows_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shard(model: WanDiT, ranks: DistInfo) -> None:
    """Split every parameter over the ranks, in place; nothing where there is one.

    To be called on a loaded model, the same on every rank, on the CPU or on `ranks.device` (blocks
    on the CPU go over one by one), after adapters were attached and thawed, and before the
    optimizer is made: parameters are other objects after it. Gradients come out averaged over the
    ranks. `forward` and each block's `text_kv` may be called; `text_states` alone may not.

    Raises:
        RequestError: for packed weights, and trainable parameters of more than one dtype.
    """
    if ranks.size == 1:
        return
    for name, parameter in model.named_parameters():
        if parameter.dtype not in FLOATS:
            raise RequestError(
                f"{name} is {parameter.dtype}: packed weights are not split over processes; load"
                " them unpacked, or train on one"
            )
    kinds = {
        parameter.dtype: name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if len(kinds) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in kinds.items())
        raise RequestError(f"what is trained on several processes has one dtype: {found}")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        block.text_kv = _owning(block.text_kv)  # type: ignore[method-assign, assignment]
        register_fsdp_forward_method(block, "text_kv")
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _owning(
    text_kv: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Its results are views, on which FSDP's hooks for the backward pass would be lost by anything
    in place, and it warns of that.
    """

    def copied(text: Tensor) -> tuple[Tensor, Tensor]:
        k, v = text_kv(text)
        return k.clone(), v.clone()

    return copied


def whole(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Parameters by name (all, or these), whole and on the CPU: on rank 0, and nothing on the
    others. Every rank must call it.
    """
    kept = {
        name: parameter
        for name, parameter in model.named_parameters()
        if names is None or name in names
    }
    missing = set(names or ()) - set(kept)
    if missing:
        raise KeyError(f"no parameters {sorted(missing)}")
    return gather(kept) or {}


def gather(tree: Any) -> Any:
    """A copy of a nested state (dicts, lists, tuples), every tensor whole and on the CPU: on rank
    0, and None on the others.

    Every rank must call it.
    """
    keep = not dist.is_initialized() or dist.get_rank() == 0
    made = _gathered(tree, keep)
    return made if keep else None


def _gathered(tree: Any, keep: bool) -> Any:
    if isinstance(tree, Mapping):
        return {key: _gathered(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_gathered(value, keep) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    if isinstance(tree, DTensor):
        made = tree.full_tensor()  # a collective: the ranks that throw the result away take part
        return made.detach().cpu() if keep else None
    return tree.detach().to("cpu", copy=True) if keep else None


def scatter(value: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor that every rank has, split as `like` is; the tensor
    itself where `like` is whole.
    """
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def scatter_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's whole state, as `gather` made it, in the form that this optimizer's
    `load_state_dict` takes.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split: dict[int, dict[str, Any]] = {}
    for index, values in state["state"].items():
        like = parameters[index]
        split[index] = {
            name: (
                scatter(value, like)
                if isinstance(value, Tensor) and value.shape == like.shape
                else value
            )
            for name, value in values.items()
        }
    return {**state, "state": split}


@torch.no_grad()
def mean(value: Tensor, ranks: DistInfo) -> Tensor:
    """The average over the ranks of a tensor that each has its own of (a loss, say): on every rank,
    without gradient.
    """
    total = value.detach().clone()
    if ranks.size == 1:
        return total
    total = total.to(ranks.device)
    dist.all_reduce(total)
    return total / ranks.size


# sampling


def shard_blocks(model: WanDiT, team: ParallelContext) -> None:
    """Let each process keep some rows of every matmul weight of the blocks; a block is whole while
    it works.

    To be called on a model that is laid out on meta, before `load_module`, which then reads this
    process' rows alone. Packed and rounded weights are shared out like plain ones. What is small
    (norms, biases, modulation), and what stands outside the blocks (0.5 GB of 28.6 in bfloat16),
    stays whole, so that LoRAs may change it in place. `forward` and `text_states` may be called;
    every process must make the same calls. No gradient goes through it.
    """
    mesh, ignored = team.mesh, set(model.parameters())
    for block in model.blocks:
        shared = {parameter for leaf in block.modules() for parameter in rows_of(leaf)}
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=True,
            ignored_params=set(block.parameters()) - shared,
        )
        register_fsdp_forward_method(block, "text_kv")
        cast(FSDPModule, block).set_custom_all_gather(cast(Any, Gather(team.world)))
        ignored -= shared
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    register_fsdp_forward_method(model, "text_states")
    for block in model.blocks:  # memory for the shares, which had none
        block._apply(
            lambda value: (
                torch.empty_like(value, device=mesh.device_type)
                if isinstance(value, DTensor)
                else value
            )
        )  # type: ignore[no-untyped-call]


class Gather:
    """What FSDP calls to make a block whole: as bytes, since not every backend knows float8; and
    counted, as "weights".
    """

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
        self.group.traffic.add("weights", (self.group.size - 1) * input_tensor.nbytes)
        gather = (
            getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        )  # the second is its name before PyTorch 2.13
        return cast(
            "dist.Work | None",
            gather(
                output_tensor.view(torch.uint8), input_tensor.view(torch.uint8), group, async_op
            ),
        )
