"""The golden cases of a transformer: its manifests, of whatever model, have one form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.golden import Json, case_tensors, close, filled
from wanflow.config import DiTConfig, from_mapping
from wanflow.models.dit import WanDiT


def built(manifest: Json) -> WanDiT:
    config = from_mapping(DiTConfig, manifest["config"], manifest["weights_file"])
    return filled(WanDiT(config), manifest["weights_file"], manifest)


def samples(manifests: Json, wanted: Callable[[Json], bool] = lambda case: True) -> list[Any]:
    """Parameters (model, case, sample) of a manifest's cases."""
    return [
        pytest.param(model, case, sample, id=f"{model}-{case['name']}-{sample}")
        for model, manifest in manifests["models"].items()
        for case in manifest["cases"]
        for sample in range(case["batch"])
        if wanted(case)
    ]


def batches(manifests: Json) -> list[Any]:
    """Parameters (model, case) of the cases whose samples are of one size."""
    return [
        pytest.param(model, case, id=f"{model}-{case['name']}")
        for model, manifest in manifests["models"].items()
        for case in manifest["cases"]
        if case["batch"] > 1 and len({tuple(grid) for grid in case["grids_after_patching"]}) == 1
    ]


def latent_of(found: dict[str, Tensor], sample: int) -> Tensor:
    """What the model sees: the latent, and behind it the condition where there is one."""
    seen = [found[f"{key}.{sample}"] for key in ("latent", "y") if f"{key}.{sample}" in found]
    return torch.cat(seen)


def times_of(found: dict[str, Tensor], case: Json, sample: int) -> Tensor:
    """A sample's timestep, [1] or [1, L]: padding, which the official code has, has none here."""
    t = found["t"][sample : sample + 1]
    return t if t.ndim == 1 else t[:, : case["tokens"][sample]]


def check_sample(network: WanDiT, manifest: Json, case: Json, sample: int) -> None:
    found = case_tensors(manifest["cases_file"], case)
    latent, text = latent_of(found, sample)[None], found[f"context.{sample}"][None]
    velocity = network(latent, times_of(found, case, sample), text)[0]
    close(velocity, found[f"output.{sample}"], manifest["tolerance"], f"output of {case['name']}")


def check_batch(network: WanDiT, manifest: Json, case: Json) -> None:
    """Samples of one size, as one batch: the caller pads the texts."""
    found, count = case_tensors(manifest["cases_file"], case), range(case["batch"])
    latent = torch.stack([latent_of(found, n) for n in count])
    text = nn.utils.rnn.pad_sequence([found[f"context.{n}"] for n in count], batch_first=True)
    t = found["t"] if found["t"].ndim == 1 else found["t"][:, : case["tokens"][0]]
    expected = torch.stack([found[f"output.{n}"] for n in count])
    close(network(latent, t, text), expected, manifest["tolerance"], f"output of {case['name']}")


def module_path(name: str) -> str:
    """`block1.self_attn` -> `blocks.1.self_attn`; other names are the module's own."""
    head, _, rest = name.partition(".")
    return (
        f"blocks.{head.removeprefix('block')}{'.' * bool(rest)}{rest}"
        if head.startswith("block")
        else name
    )


def check_intermediates(network: WanDiT, manifest: Json, case: Json, sample: int) -> None:
    middles = case_tensors(manifest["cases_file"], case, "intermediates")
    seen: dict[str, Tensor] = {}
    hooks = []
    for key in middles:
        name = key.removeprefix("mid.")

        def keep(module: nn.Module, args: object, output: Tensor, name: str = name) -> None:
            seen[name] = output

        hooks.append(network.get_submodule(module_path(name)).register_forward_hook(keep))
    try:
        check_sample(network, manifest, case, sample)
    finally:
        for hook in hooks:
            hook.remove()
    t = times_of(case_tensors(manifest["cases_file"], case), case, sample)
    for key, expected in middles.items():
        name, row = key.removeprefix("mid."), expected[min(sample, len(expected) - 1)]
        value = seen[name]
        if name.startswith("time") and t.ndim == 2:  # a row per token there, per time here
            value = value[0][torch.unique(t, return_inverse=True)[1]]
        if name.startswith(("block", "head")) or (name.startswith("time") and t.ndim == 2):
            row = row[: case["tokens"][sample]]  # the rest is padding
        close(value.reshape(row.shape), row, manifest["tolerance"], f"{name} of {case['name']}")
