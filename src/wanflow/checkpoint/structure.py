"""Modules on meta, in the form that they will have in memory: shapes, dtypes and packed leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from wanflow.checkpoint.containers import TensorInfo, TensorSource
from wanflow.config import DiTConfig, RequestError, TextConfig, VAE22Config, VAEConfig
from wanflow.models.dit import Block, Head, SelfAttention, WanDiT
from wanflow.models.umt5 import UMT5Encoder
from wanflow.models.vae import WanVAE
from wanflow.runtime import Runtime

if TYPE_CHECKING:
    from wanflow.transforms.ways import Gpu

ChooseDtype = Callable[[str, TensorInfo], torch.dtype]  # tensor -> its dtype in memory
Config = DiTConfig | TextConfig | VAEConfig
# Packings with float8 in them, which Apple's MPS has not.
FLOAT8 = ("F8", "nvfp4", "mxfp8", "NVFP4")
M = TypeVar("M", bound=nn.Module)


def _vae22(config: VAE22Config) -> nn.Module:
    from wanflow.models.vae22 import WanVAE22

    return WanVAE22(config)


MODULES: dict[type, Callable[[Any], nn.Module]] = {
    DiTConfig: WanDiT,
    TextConfig: UMT5Encoder,
    VAEConfig: WanVAE,
    VAE22Config: _vae22,
}


class _Unfilled(TorchFunctionMode):
    """Skips parameter initialisation: on meta it has no effect, but imports for a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def build(cls: Callable[[Any], M], config: Config) -> M:
    """Return the module on meta: structure without memory."""
    with torch.device("meta"), _Unfilled():
        return cls(config).eval().requires_grad_(False)


def module_of(config: Config) -> nn.Module:
    """Return the module that a config describes, on meta."""
    return build(MODULES[type(config)], config)


def vae_of(config: VAEConfig) -> WanVAE:
    """Return the VAE that a config describes, on meta."""
    return cast(WanVAE, module_of(config))


def compare(module: nn.Module, headers: TensorSource) -> dict[str, list[str]]:
    """Compare the names, shapes and dtypes of a file with a module's parameters.

    Returns:
        {what: tensors}, of the kinds "missing", "unexpected", "of the wrong shape" and "not
        floating-point".
    """
    found = headers.tensors
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    shared = {name: found[name] for name in shapes if name in found}
    return {
        "missing": [name for name in shapes if name not in found],
        "unexpected": [name for name in found if name not in shapes],
        "of the wrong shape": [
            f"{name} is {list(info.shape)}, not {list(shapes[name])}"
            for name, info in shared.items()
            if info.shape != shapes[name]
        ],
        "not floating-point": [
            f"{name} is {info.dtype}"
            for name, info in shared.items()
            if not info.dtype.is_floating_point
        ],
    }


def check(module: nn.Module, headers: TensorSource) -> None:
    """Raise a RequestError unless the file holds exactly the module's parameters, in shape."""
    faults = [
        f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for what, names in compare(module, headers).items()
        if names
    ]
    if faults:
        raise RequestError(
            f"{headers.path} does not fit the {type(module).__name__}: tensors {'; '.join(faults)}"
        )


def expert_dtypes(model: nn.Module, dtype: torch.dtype) -> ChooseDtype:
    """Return the dtype rule of an expert: `dtype` for Linear and Conv weights, else float32."""
    kinds = (nn.Linear, nn.Conv3d)
    matmuls = {
        f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, kinds)
    }
    return lambda name, info: dtype if name in matmuls else torch.float32


def lay_out(
    module: nn.Module,
    headers: TensorSource | None,
    choose_dtype: ChooseDtype,
    compute: torch.dtype,
    device: torch.device | str,
    touched: Collection[str] = (),
) -> None:
    """Give a module on meta its form in memory: dtypes, and leaves that keep weights packed.

    The headers say which tensors are packed; without headers none is. Leaves with packed weights
    multiply in the dtype `compute`. Tensors in `touched` change while they are read, and are
    therefore unpacked.

    Raises:
        RequestError: when names or shapes differ from the file's.
    """
    if headers is not None:
        check(module, headers)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        info = (
            TensorInfo(tuple(parameter.shape), parameter.dtype)
            if headers is None
            else headers.tensors[name]
        )
        value = nn.Parameter(parameter.detach().to(choose_dtype(name, info)), requires_grad=False)
        setattr(module.get_submodule(owner), leaf, value)
    if headers is None:
        return
    packings = {
        name: info.packing
        for name, info in headers.tensors.items()
        if info.packing is not None and name not in touched
    }
    if torch.device(device).type == "mps":
        packings = {name: kind for name, kind in packings.items() if not kind.startswith(FLOAT8)}
    if not packings:
        return
    from wanflow.transforms.packed import PackedLeaf, replace_with_packed

    replace_with_packed(module, packings, compute)
    for path, leaf in module.named_modules():
        if isinstance(leaf, PackedLeaf):
            leaf.expect(headers.tensors[f"{path}.weight"].scale)


def expert_structure(
    config: DiTConfig,
    headers: TensorSource | None,
    runtime: Runtime,
    dtype: torch.dtype,
    device: torch.device | str,
    touched: Collection[str] = (),
    gpu: Gpu | None = None,
) -> WanDiT:
    """Return an expert on meta in its form at run time: matmuls in `dtype`, packed or quantised.

    The headers are those of the expert's file; None stands for a file of plain weights. LoRAs are
    fused into the tensors in `touched`. `gpu` stands for the device of a machine that is described.
    """
    model = build(WanDiT, config)
    lay_out(model, headers, expert_dtypes(model, dtype), dtype, device, touched)
    if runtime.quantize:
        from wanflow.transforms.quant import quantizable_layers, replace_with_quantised

        layers = quantizable_layers(model, runtime.quantize_layers)
        replace_with_quantised(
            model, layers, runtime.quantize, dtype, device, gpu=gpu, folder=runtime.machine_cache
        )
    set_chunk(model, runtime.chunk_tokens or 0)
    return model


def set_chunk(model: nn.Module, tokens: int) -> None:
    """Set how many tokens go through MLP and projections at a time (0: all); equal to rounding."""
    for module in model.modules():
        if isinstance(module, SelfAttention | Block | Head):
            module.chunk = tokens


def has_other_form(leaf: nn.Module) -> bool:
    """Return whether a leaf is packed or quantised: its weight is its parameter `data`."""
    return hasattr(leaf, "data")


def weight_names(module: nn.Module) -> list[str]:
    """Return the file's tensors that make up a module, in its order.

    A leaf that holds its weight in another form counts as one `weight`.
    """
    names: dict[str, None] = {}
    for path, owner in module.named_modules():
        for key, _ in owner.named_parameters(recurse=False):
            other = has_other_form(owner) and key != "bias"
            names[f"{path}.{'weight' if other else key}" if path else key] = None
    return list(names)
