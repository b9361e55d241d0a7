"""The Wan2.2 autoencoder beside the numbers of the official code, and what those numbers catch.

The folder is WANFLOW_GOLDEN_FAMILY or tests/golden-family; its README.md describes the format. File
names, shapes, settings and tolerances come from the manifests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden import close
from safetensors.torch import load_file
from torch import Tensor, nn

from wanflow.checkpoint.structure import module_of
from wanflow.config import RequestError, VAE22Config, from_mapping
from wanflow.models.vae import AttentionBlock, ChannelNorm, Downsample, Upsample, flat
from wanflow.models.vae22 import Averages, Repeats, Unfold, WanVAE22
from wanflow.presets import LATENT_MEAN_22, LATENT_STD_22

FOLDER = Path(
    os.environ.get("WANFLOW_GOLDEN_FAMILY") or Path(__file__).parents[1] / "golden-family"
)
Json = dict[str, Any]
Way = str  # "encode" or "decode"


def manifest(kind: str) -> Json:
    """The folder's manifest of a kind; another folder need not have all."""
    found = (json.loads(file.read_text(encoding="utf-8")) for file in FOLDER.glob("*.json"))
    return next((one for one in found if one.get("kind") == kind), {})


VAE, SIZES = manifest("vae22"), manifest("sizes_family")
CASES = [pytest.param(case, id=case["name"]) for case in VAE.get("cases", ())]


def test_folder_holds_what_is_tested() -> None:
    if not os.environ.get("WANFLOW_GOLDEN_FAMILY"):
        assert VAE and SIZES
    assert FOLDER.is_dir()


@cache
def weights() -> dict[str, Tensor]:
    found = load_file(FOLDER / VAE["weights_file"])
    assert {name: list(value.shape) for name, value in found.items()} == {
        name: entry["shape"] for name, entry in VAE["weights"].items()
    }
    return found


def made() -> WanVAE22:
    settings = VAE["config"] | {key: VAE[key] for key in ("latent_mean", "latent_std")}
    vae = WanVAE22(from_mapping(VAE22Config, settings, "vae22.json"))
    vae.load_state_dict(weights(), strict=True)
    return vae.eval().requires_grad_(False)


@pytest.fixture
def vae() -> WanVAE22:
    return made()


@cache
def tensors() -> dict[str, Tensor]:
    return load_file(FOLDER / VAE["cases_file"])


def stored(case: Json, way: Way, entries: str = "tensors") -> dict[str, Tensor]:
    """A case's tensors without its name, as its manifest describes them."""
    found = {}
    for key, entry in case[way].get(entries, {}).items():
        found[key.removeprefix(f"{case['name']}.{way}.")] = value = tensors()[key]
        assert list(value.shape) == entry["shape"] and str(value.dtype) == f"torch.{entry['dtype']}"
    return found


def run(vae: WanVAE22, case: Json, way: Way, groups: int = 1) -> tuple[Tensor, Tensor]:
    """What the VAE makes of a case, and what is stored."""
    found = stored(case, way)
    if way == "encode":
        return vae.encode(found["video"], groups), found["latent"]
    return vae.decode(found["latent"], groups), found["video_unclamped"]


@pytest.mark.parametrize("groups", [1, 2, 3, 100])
@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize("case", CASES)
def test_numbers(vae: WanVAE22, case: Json, way: Way, groups: int) -> None:
    close(*run(vae, case, way, groups), VAE["tolerance"][way], f"{way} of {case['name']}")


@pytest.mark.parametrize("case", CASES)
def test_numbers_frame_by_frame(vae: WanVAE22, case: Json) -> None:
    found, start = stored(case, "decode"), 0
    for part in vae.decode_frames(found["latent"]):
        assert part.shape[2] == (VAE["temporal_stride"] if start else 1)
        expected = found["video_unclamped"][:, :, start : start + part.shape[2]]
        close(part, expected, VAE["tolerance"]["decode"], f"frames {start}.. of {case['name']}")
        close(part.clamp(-1, 1), expected.clamp(-1, 1), VAE["tolerance"]["decode"], "clamped")
        start += part.shape[2]
    assert start == case["frames"]


MIDDLES = [
    pytest.param(case.values[0], way, id=f"{case.id}-{way}")
    for case in CASES
    for way in ("encode", "decode")
    if "intermediates" in case.values[0][way]  # type: ignore[operator,index,call-overload]
]


def watched(layer: nn.Module, adds: bool) -> list[Tensor]:
    """What a layer gives out in this and later calls, or what it adds to its input in place."""
    before: list[Tensor] = []
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: before.append(args[0].clone()))
    layer.register_forward_hook(
        lambda _, args, out: seen.append(out - before[-1] if adds else out.clone())
    )
    return seen


@pytest.mark.parametrize(("case", "way"), MIDDLES)
def test_intermediates(vae: WanVAE22, case: Json, way: Way) -> None:
    """A stage ends with its shortcut, which adds in place."""
    middles = stored(case, way, "intermediates")
    seen = {}
    for key in middles:
        layer = vae.get_submodule(key.removeprefix("mid."))
        *_, last = flat(layer)
        seen[key] = watched(last, adds=last is layer and isinstance(layer, Averages | Repeats))
    run(vae, case, way)
    assert middles
    for key, expected in middles.items():
        close(torch.cat(seen[key], dim=2), expected, VAE["tolerance"][way], key)


# --- full size ---


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=name)
        for name, entry in SIZES.get("modules", {}).items()
        if entry["module"] == "vae 2.2"
    ],
)
def test_full_size(entry: Json) -> None:
    config = from_mapping(VAE22Config, entry["config"], "sizes_family.json")
    assert config == VAE22Config()  # the published one
    state = module_of(config).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == {
        name: value["shape"] for name, value in entry["state"].items()
    }
    assert len(state) == entry["tensors"]
    assert sum(value.numel() for value in state.values()) == entry["parameters"]
    assert sum(value.nbytes for value in state.values()) == entry["bytes_fp32"]


def test_the_published_statistics() -> None:
    assert list(LATENT_MEAN_22) == VAE.get("latent_mean", list(LATENT_MEAN_22))
    assert list(LATENT_STD_22) == VAE.get("latent_std", list(LATENT_STD_22))
    assert len(LATENT_MEAN_22) == len(LATENT_STD_22) == VAE22Config().z_dim


@pytest.mark.parametrize("mult", [(1, 3, 3), (1, 2, 4), (2, 1, 1), (1, 8, 8), (2,)])
def test_widths_without_a_shortcut_are_refused(mult: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"dim_mult .* fits no Wan2\.2 VAE.*\[1, 2, 4, 4\]"):
        VAE22Config(dim_mult=mult)


# --- mistakes: the numbers must catch each of them ---

Mistake = Callable[[WanVAE22, pytest.MonkeyPatch], object]


def reordered(layer: nn.Module, order: str) -> None:
    """Give a layer its 12 channels in another order than colour, column, row."""
    names = torch.arange(12).view(3, 2, 2)  # [colour, column, row]
    axes = {"colour": 0, "column": 1, "row": 2}
    taken = names.permute([axes[name] for name in order.split()]).flatten()
    layer.register_forward_pre_hook(lambda _, args: (args[0][:, taken], *args[1:]))


def unfold_reordered(vae: WanVAE22, patch: pytest.MonkeyPatch, order: str) -> None:
    layers = vae.decoder.layers()
    reordered(next(layer for layer in layers if isinstance(layer, Unfold)), order)
    patch.setattr(vae.decoder, "layers", lambda: layers)


def shortcut_takes(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Change what the shortcut of a halved time sees of the first group, its only frame."""
    take = Averages.take

    def taken(self: Averages, frames: int, state: Any) -> Tensor:
        kept = take(self, frames, state)
        return change(kept) if kept.shape[2] < self.time else kept

    patch.setattr(Averages, "take", taken)


def means(patch: pytest.MonkeyPatch, order: str, strided: bool = False) -> None:
    """Fold a shortcut's parts in another order, or take means over every nth of them."""

    def forward(self: Averages, x: Tensor, state: Any) -> Tensor:
        kept = self.take(x.shape[2] * self.time, state)
        kept = nn.functional.pad(kept, (0, 0, 0, 0, -kept.shape[2] % self.time, 0))
        parts = self.groups(kept, self.time)
        axes = [1 + ("channel", "time", "row", "column").index(name) for name in order.split()]
        folded = parts.permute(0, *axes, 5, 6, 7).flatten(1, 4)
        count = x.shape[1]
        split = (-1, count) if strided else (count, -1)
        return x.add_(folded.unflatten(1, split).mean(1 if strided else 2))

    patch.setattr(Averages, "forward", forward)


def no_shortcut(patch: pytest.MonkeyPatch, cls: type[nn.Module]) -> None:
    patch.setattr(cls, "forward", lambda self, x, state: x)


def repeats(patch: pytest.MonkeyPatch, change: Callable[[Repeats, Tensor, int], Tensor]) -> None:
    """Add other values than the repeated ones."""

    def add(self: Repeats, x: Tensor, kept: Tensor) -> Tensor:
        time = x.shape[2] // kept.shape[2]
        self.groups(x, time).add_(change(self, kept, x.shape[1])[:, :, -time:])
        return x

    patch.setattr(Repeats, "add", add)


def tiled_channels(self: Repeats, kept: Tensor, channels: int) -> Tensor:
    """Repeat all channels as a whole, a b c a b c, instead of each."""
    parts = channels * self.time * self.space**2
    wide = kept.repeat(1, parts // kept.shape[1], 1, 1, 1)
    return wide.unflatten(1, (channels, self.time, self.space, self.space))


def columns_choose(self: Repeats, kept: Tensor, channels: int) -> Tensor:
    time, rows, columns = self.lead
    return kept.unflatten(1, (channels, time, columns, rows))


def of_all(vae: WanVAE22, kind: type[nn.Module]) -> Iterator[Any]:
    yield from (layer for layer in vae.modules() if isinstance(layer, kind))


def pads_left_and_above(vae: WanVAE22) -> None:
    for layer in of_all(vae, Downsample):
        layer.resample[0].padding = (1, 0, 1, 0)


def epsilon_in_the_root(self: ChannelNorm, x: Tensor) -> Tensor:
    return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.gamma


def sees_the_first_frame(vae: WanVAE22) -> None:
    """Let a doubling of time look back at the first frame."""

    def look(layer: Any, args: tuple[Tensor, Any]) -> None:
        x, state = args
        if layer not in state:
            layer.time_conv(x, state)  # which keeps it

    for layer in of_all(vae, Upsample):
        if layer.time_conv is not None:
            layer.register_forward_pre_hook(look)


def exchanged_frames(vae: WanVAE22) -> None:
    for layer in of_all(vae, Upsample):
        if layer.time_conv is not None:
            for value in (layer.time_conv.weight, layer.time_conv.bias):
                value.copy_(torch.cat(value.chunk(2)[::-1]))


def log_variance(vae: WanVAE22, patch: pytest.MonkeyPatch) -> None:
    moments = vae.moments
    patch.setattr(vae, "moments", lambda *args: moments(*args)[::-1])


def inverted_deviation(vae: WanVAE22, patch: pytest.MonkeyPatch) -> None:
    statistics = vae._statistics

    def inverted(like: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = statistics(like)
        return shift, 1 / scale

    patch.setattr(vae, "_statistics", inverted)


def not_normalised(vae: WanVAE22, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vae, "_statistics", lambda like: (torch.zeros(()), torch.ones(())))


def skipped_attention(vae: WanVAE22, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AttentionBlock, "forward", lambda self, x, state: x)


BOTH: dict[str, Mistake] = {
    "epsilon in the root": lambda vae, patch: patch.setattr(
        ChannelNorm, "forward", epsilon_in_the_root
    ),
    "no attention": skipped_attention,
    "latent times its deviation": inverted_deviation,
    "latents not normalised": not_normalised,
}
MISTAKES: dict[Way, dict[str, Mistake]] = {
    "encode": {
        "row before column": lambda vae, patch: reordered(vae.encoder.conv1, "colour row column"),
        "colour fastest": lambda vae, patch: reordered(vae.encoder.conv1, "column row colour"),
        "padded behind": lambda vae, patch: shortcut_takes(
            patch, lambda kept: torch.cat([kept, torch.zeros_like(kept)], dim=2)
        ),
        "padded with its frame": lambda vae, patch: shortcut_takes(
            patch, lambda kept: torch.cat([kept, kept], dim=2)
        ),
        "strided means": lambda vae, patch: means(patch, "channel time row column", strided=True),
        "channel fastest": lambda vae, patch: means(patch, "time row column channel"),
        "no shortcuts": lambda vae, patch: no_shortcut(patch, Averages),
        "padded left and above": lambda vae, patch: pads_left_and_above(vae),
        "log variance": log_variance,
        **BOTH,
    },
    "decode": {
        "row before column": lambda vae, patch: unfold_reordered(vae, patch, "colour row column"),
        "colour fastest": lambda vae, patch: unfold_reordered(vae, patch, "column row colour"),
        "channels tiled": lambda vae, patch: repeats(patch, tiled_channels),
        "columns choose": lambda vae, patch: repeats(patch, columns_choose),
        "no shortcuts": lambda vae, patch: no_shortcut(patch, Repeats),
        "sees the first frame": lambda vae, patch: sees_the_first_frame(vae),
        "exchanged frames": lambda vae, patch: exchanged_frames(vae),
        **BOTH,
    },
}


@pytest.mark.parametrize(
    ("way", "name"), [(way, name) for way, mistakes in MISTAKES.items() for name in mistakes]
)
def test_a_mistake_shows(
    vae: WanVAE22, monkeypatch: pytest.MonkeyPatch, way: Way, name: str
) -> None:
    MISTAKES[way][name](vae, monkeypatch)
    tolerance = VAE["tolerance"][way]
    worst = 0.0
    for case in CASES:
        found, expected = run(vae, case.values[0], way)  # type: ignore[arg-type]
        worst = max(worst, float((found - expected).abs().max()))
    assert worst > 100 * tolerance["atol"]
