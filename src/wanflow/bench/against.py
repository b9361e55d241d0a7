"""Time a step and a decode beside diffusers, in turn, on the same weights and inputs."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanflow.bench.run import Measured
from wanflow.bench.stages import Show
from wanflow.bench.tools import Scale, distance, random_expert, random_vae
from wanflow.checkpoint.key_maps import Kind, to_official
from wanflow.choices import dtype_of_name
from wanflow.config import DiTConfig, RequestError
from wanflow.convert.configs import autoencoder
from wanflow.geometry import geometry_of
from wanflow.models.dit import WanDiT
from wanflow.presets import ModelSpec
from wanflow.runtime import Runtime
from wanflow.transforms.attention import installed, set_attention, synchronize
from wanflow.transforms.attention_kernels import BACKENDS
from wanflow.transforms.compile import Compiler

Calls = dict[str, Callable[[], Any]]
# Relative to the largest value: float32 is equal to rounding, other dtypes round inside.
BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def refuse_without_diffusers() -> None:
    """Raise RequestError where diffusers is not installed."""
    if not installed("diffusers"):
        raise RequestError(
            "--against diffusers: it is not installed; pip install diffusers, or leave out"
            " --against"
        )


def give(kind: Kind, ours: nn.Module, theirs: nn.Module) -> None:
    """Copy our weights into the peer, in the dtype it holds them in."""
    state = ours.state_dict()
    names = to_official(kind, list(theirs.state_dict()))
    theirs.load_state_dict(
        {
            name: state[names[name]].reshape(value.shape).to(value.dtype)
            for name, value in theirs.state_dict().items()
        }
    )


def rounds(
    calls: Calls, count: int, device: torch.device, show: Show = lambda *_: None
) -> dict[str, list[float]]:
    """Return the seconds of each call, in turn, `count` times, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(count + 1):
        for name, call in calls.items():
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            if number:
                times[name].append(time.perf_counter() - began)
        show("beside diffusers", number + 1, count + 1, "round")
    return times


def faster(times: dict[str, list[float]], prefix: str) -> str:
    """Return the fastest way of a side, by its median."""
    names = (name for name in times if name.startswith(prefix))
    return min(names, key=lambda name: statistics.median(times[name]))


def compared(times: dict[str, list[float]], difference: float) -> dict[str, Any]:
    """Return how the fastest ways of both sides compare; above 1 ours is faster."""
    ours, theirs = faster(times, "wanflow"), faster(times, "diffusers")
    ratio = statistics.median(b / a for a, b in zip(times[ours], times[theirs], strict=True))
    return {
        "seconds": {name: round(statistics.median(one), 6) for name, one in times.items()},
        "ours": ours,
        "theirs": theirs,
        "ratio": round(ratio, 3),
        "max_difference": difference,
        "rounds": len(times[ours]),
    }


def transformer(config: DiTConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """Return diffusers' transformer of this shape, in the dtypes of `from_pretrained`."""
    cls = import_module("diffusers").WanTransformer3DModel
    theirs = cls(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        eps=config.eps,
        rope_max_seq_len=1024,
    )
    theirs = theirs.eval().requires_grad_(False)
    kept = tuple(theirs._keep_in_fp32_modules or ())
    for name, parameter in theirs.named_parameters():
        if not any(mark in name for mark in kept):
            parameter.data = parameter.data.to(dtype)
    return theirs.to(device)


def step_calls(
    ours: WanDiT, theirs: Any, latent: Tensor, text: Tensor, dtype: torch.dtype
) -> Calls:
    """Return a guided step of each side, in one batch and in two passes.

    Args:
        ours, theirs: with the same weights.
        latent: [1, C, T, H, W].
        text: [2, S, D].
        dtype: of the peer's inputs.
    """
    timestep, both = torch.tensor([500.0], device=latent.device), latent.repeat(2, 1, 1, 1, 1)
    states = ours.text_states(text)
    halves = [tuple((k[n : n + 1], v[n : n + 1]) for k, v in states) for n in range(2)]

    def peer(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return cast(Tensor, theirs(x.to(dtype), t, context.to(dtype), return_dict=False)[0])

    return {
        "wanflow, one batch": lambda: ours(both, timestep.expand(2), states),
        "wanflow, two passes": lambda: torch.cat([ours(latent, timestep, row) for row in halves]),
        "diffusers, one batch": lambda: peer(both, timestep.expand(2), text),
        "diffusers, two passes": lambda: torch.cat(
            [peer(latent, timestep, text[n : n + 1]) for n in range(2)]
        ),
    }


def _step(found: Measured, scale: Scale, count: int, show: Show) -> dict[str, Any]:
    dit, latent = scale.spec.dit, scale.latents[0]
    runtime = Runtime(chunk_tokens=found.settings.get("chunk_tokens") or 0)
    ours = random_expert(scale, dit.num_layers, runtime)
    set_attention(ours, BACKENDS[found.kernel])
    theirs = transformer(dit, scale.dtype, scale.device)
    give("dit", ours, theirs)
    x = torch.randn(1, dit.in_dim, *latent[1:], device=scale.device)  # with a picture's channels
    text = torch.randn(2, dit.text_len, dit.text_dim, device=scale.device)
    if found.compiled:
        Compiler(scale.device, True, None, "bench").attach(ours)
        theirs.compile_repeated_blocks()
    calls = step_calls(ours, theirs, x, text, scale.dtype)
    many = scale.tokens(latent) > 8192  # one batch of a large video takes twice the memory
    calls = {name: call for name, call in calls.items() if not many or "two passes" in name}
    return _compared(calls, scale, count, show, BOUND[scale.dtype])


def decode_calls(scale: Scale) -> Calls:
    """Return a decode of each side, of one latent by the same random weights."""
    config, ours = scale.spec.vae, random_vae(scale)
    described = json.loads(json.dumps(autoencoder(config)))  # as a folder's config.json has it
    theirs = import_module("diffusers").AutoencoderKLWan.from_config(described)
    theirs = theirs.eval().requires_grad_(False).to(scale.device)
    give("vae", ours, theirs)
    z = torch.randn(scale.vae_latent, device=scale.device)
    both = config.latent_mean, config.latent_std
    mean, std = (torch.tensor(one, device=z.device).view(1, -1, 1, 1, 1) for one in both)
    scaled = z * std + mean  # as the peer's pipeline hands it over
    return {
        # The peer returns the whole video, so ours is asked for it too.
        "wanflow": lambda: ours.decode(z).clamp_(-1, 1),
        "diffusers": lambda: theirs.decode(scaled, return_dict=False)[0],
    }


def _compared(calls: Calls, scale: Scale, count: int, show: Show, bound: float) -> dict[str, Any]:
    a, b = (calls[next(n for n in calls if n.startswith(s))]() for s in ("wanflow", "diffusers"))
    difference = distance(a.float(), b.float())
    del a, b
    result = compared(rounds(calls, count, scale.device, show), difference)
    return {**result, "equal": difference <= bound, "bound": bound}


@torch.no_grad()
def beside(found: Measured, spec: ModelSpec, count: int, show: Show) -> dict[str, Any]:
    """Return how a step and a decode of the size that was measured compare with diffusers'.

    Args:
        found: what was measured: its size, dtype, kernel.
        spec: the model, with as many blocks as were measured.
        count: rounds.
        show: called with how far it is.

    Raises:
        RequestError: where diffusers is not installed.
    """
    refuse_without_diffusers()
    width, height = found.request["size"]
    latent = geometry_of(spec).latent_shape((width, height), found.request["frame_num"])
    device = torch.device(found.settings["device"])
    dtype = dtype_of_name(found.about["dtype"])
    scale = Scale(device, spec, dtype, (latent,), (1, *latent), 0)
    sides = {"step": _step(found, scale, count, show)}
    scale.empty()
    sides["decode"] = _compared(decode_calls(scale), scale, count, show, BOUND[torch.float32])
    return {"version": import_module("diffusers").__version__, **sides}


def words(sides: dict[str, Any]) -> Iterator[str]:
    """Yield the comparison in lines."""
    yield f"beside diffusers {sides['version']}, in turn, with the same weights"
    for what in ("step", "decode"):
        one = sides[what]
        ours, theirs = one["seconds"][one["ours"]], one["seconds"][one["theirs"]]
        equal = "" if one["equal"] else "; THE RESULTS DIFFER"
        yield (
            f"{what}: {one['ratio']:.3g} times as fast ({ours:.4g} s, {theirs:.4g} s; median of"
            f" {one['rounds']}; {one['max_difference']:.2g} apart{equal})"
        )
