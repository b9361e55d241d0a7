"""What rounding costs one layer at full width: the error of its results on easy and on hard
numbers, its time and its memory.

    python benchmarks/quant_layers.py [--tokens 64] [--no-time | --no-errors]

The last line of output is JSON. Errors are signal-to-noise ratios in dB of x @ w.T against the same
product unrounded: of all results (`all`), of the worst token and of the worst output feature, since
large ones hide small ones in a sum. `fp8 tensor` and `int8 tensor` are the naive choice, one scale
for a whole weight and one for all tokens; `fp8 cast` has no scale at all, so that what is above 448
is cut off (null: not finite). Names with `w8a8` round the tokens too, the others the weight alone.
Where torchao is installed, it is timed beside ours. `moved` has the GB that a product of 75,600
tokens moves beside itself, as a plan counts them, and its milliseconds by the rates of some cards.

Weights: `normal`; `rows`, 8 output features 20 to 100 times as large; `columns`, 8 input features
    so. Tokens: `normal`; `channels`, 8 input features 20 to 100 times as large; `tokens`, 4 tokens
    100 to 1000 times as large.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanflow.plan.cards import GPUS
from wanflow.plan.estimate import compute_seconds
from wanflow.plan.trace import fake, materialise
from wanflow.transforms.quant import NF4, QuantLinear
from wanflow.transforms.ways import TOKENS, Way

SHAPES = ((5120, 5120), (13824, 5120), (5120, 13824))  # out, in: attention, the feed-forward's two
OURS: tuple[tuple[Any, Way], ...] = (
    ("fp8", "weight-only"),
    ("int8", "weight-only"),
    ("nf4", "weight-only"),
    ("fp8", "scaled_mm"),
    ("int8", "int_mm"),
)
LARGEST = {"fp8": 448.0, "int8": 127.0}


# numbers


def hard(shape: tuple[int, int], size: float, kind: str, seed: int) -> Tensor:
    """Normal values, of which 8 rows or columns (or 4 tokens) are larger by factors that are evenly
    spread.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * size
    side = {"rows": 0, "tokens": 0, "columns": 1, "channels": 1}.get(kind)
    if side is not None:
        count, low, high = (4, 100, 1000) if kind == "tokens" else (8, 20, 100)
        which = torch.randperm(shape[side], generator=generator)[:count]
        factors = torch.linspace(low, high, count)
        values.transpose(0, side)[which] *= factors.unsqueeze(-1)
    return values


def decibels(error: Tensor, want: Tensor) -> float | None:
    """None where something is not finite."""
    value = float(10 * torch.log10(want.square().mean() / error.square().mean()))
    return round(value, 1) if math.isfinite(value) else None


def worst(error: Tensor, want: Tensor, side: int) -> float | None:
    """The lowest of any token (side 0) or output feature (side 1), all of the other side counting
    alike, whatever their size.
    """
    alike = want.square().mean(side, keepdim=True).sqrt()
    ratio = (want / alike).square().mean(1 - side) / (error / alike).square().mean(1 - side)
    value = float(10 * torch.log10(ratio.min()))
    return round(value, 1) if math.isfinite(value) else None


# ways


def layer(weight: Tensor, mode: Any, way: Way, dtype: torch.dtype) -> QuantLinear:
    leaf = QuantLinear(weight.shape[1], weight.shape[0], False, mode, dtype, way)
    for name, value in leaf.quantise(weight).items():
        setattr(leaf, name, nn.Parameter(value, requires_grad=False))
    return leaf


def by_tensor(values: Tensor, mode: str) -> Tensor:
    """Rounded with one scale for all of them, and put back."""
    scale = values.abs().max() / LARGEST[mode]
    return (
        (values / scale).to(torch.float8_e4m3fn).float()
        if mode == "fp8"
        else torch.round(values / scale)
    ) * scale


def ways(weight: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """(name, x -> results in float32), one after the other, so that one weight is in memory."""
    for mode, way in OURS:
        leaf = layer(weight, mode, way, torch.bfloat16 if way == "scaled_mm" else torch.float32)
        yield (
            f"{mode} row" + ("" if way == "weight-only" else " w8a8") if mode != "nf4" else "nf4",
            leaf,
        )
    cast = weight.to(torch.float8_e4m3fn).float()
    yield "fp8 cast", lambda x: x @ cast.T
    yield "fp8 cast w8a8", lambda x: x.to(torch.float8_e4m3fn).float() @ cast.T
    for mode in LARGEST:
        rounded = by_tensor(weight, mode)
        yield f"{mode} tensor", lambda x, rounded=rounded: x @ rounded.T  # type: ignore[misc]
        yield (
            f"{mode} tensor w8a8",
            lambda x, rounded=rounded, mode=mode: by_tensor(x, mode) @ rounded.T,
        )  # type: ignore[misc]


def errors(count: int) -> dict[str, Any]:
    """{shape: {weights / tokens: {way: {all, token, feature}}}}."""
    table: dict[str, Any] = {}
    for out, columns in SHAPES:
        cases = table[f"{out} x {columns}"] = {}
        for kind in ("normal", "rows", "columns"):
            weight = hard((out, columns), 0.02, kind, 0)
            tokens = {
                other: hard((count, columns), 1.0, other, 1)
                for other in ("normal", "channels", "tokens")
            }
            exact = {other: x @ weight.T for other, x in tokens.items()}
            for name, way in ways(weight):
                for other, x in tokens.items():
                    want = exact[other]
                    error = way(x).float() - want
                    found = {
                        "all": decibels(error, want),
                        "token": worst(error, want, 0),
                        "feature": worst(error, want, 1),
                    }
                    cases.setdefault(f"{kind} / {other}", {})[name] = found
                    print(
                        f"{out:6} x {columns:5}  weights {kind:8} tokens {other:9} {name:18}"
                        f" {found}"
                    )
    return table


def scales_of_nf4() -> dict[str, float | None]:
    """dB of a normal weight in nf4 by the dtype of its scales; small: the same where the weight is
    10^-5 of usual.
    """
    levels, result = torch.tensor(NF4), {}
    for name, size in (("usual", 0.02), ("small", 2e-7)):
        blocks = hard((512, 5120), size, "normal", 0).view(-1, 64)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            scale = blocks.abs().amax(1, keepdim=True).to(dtype).float()
            codes = torch.bucketize(blocks / scale.clamp_min(1e-30), (levels[1:] + levels[:-1]) / 2)
            result[f"{name}, {dtype}".replace("torch.", "")] = decibels(
                levels[codes] * scale - blocks, blocks
            )
    return result


# time and memory


class Peak:
    """Seconds of CPU time, and MB of anonymous memory over what there was."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.base = self.most = self.now()
        self.working, self.began = True, time.thread_time()
        self.watch = threading.Thread(target=self.look)
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.working = round(time.thread_time() - self.began, 2), False
        self.watch.join()
        self.mb = round(self.most - self.base)

    def now(self) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon"))

    def look(self) -> None:
        while self.working:
            self.most = max(self.most, self.now())
            time.sleep(0.001)


def peers(weight: Tensor) -> dict[str, Callable[[], Any]]:
    """torchao's, each as a function that makes the layer; empty where it is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

    def made(config: Any) -> nn.Module:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        quantize_(plain, config)
        return plain

    def nf4() -> Callable[[Tensor], Tensor]:
        packed = to_nf4(weight.bfloat16())
        return lambda x: linear_nf4(x, packed)

    configs = {
        "fp8": Float8WeightOnlyConfig(),
        "int8": Int8WeightOnlyConfig(),
        "int8 w8a8": Int8DynamicActivationInt8WeightConfig(),
    }
    return {
        f"torchao {name}": lambda config=config: made(config) for name, config in configs.items()
    } | {"torchao nf4": nf4}  # type: ignore[misc]


def times() -> dict[str, Any]:
    """Of 5120 -> 13824 in bfloat16: rounding its weight, and multiplying 1, 64 and 512 tokens (the
    best of five, in ms).

    CPU time of the one thread that works, which others on the machine do not lengthen much.
    """
    weight = hard((13824, 5120), 0.02, "normal", 0)
    tokens = {count: hard((count, 5120), 1.0, "normal", 1).bfloat16() for count in (1, 64, 512)}
    want = tokens[64].float() @ weight.T
    plain = weight.bfloat16()
    makers: dict[str, Callable[[], Any]] = {"bfloat16": lambda: lambda x: F.linear(x, plain)}
    for mode, way in OURS:
        makers[f"ours {mode} {way}"] = lambda mode=mode, way=way: layer(
            weight, mode, way, torch.bfloat16
        )  # type: ignore[misc]
    result: dict[str, Any] = {}
    for name, make in (makers | peers(weight)).items():
        with torch.no_grad():
            make()  # what is made but once: imports, kernels
            with Peak() as peak:
                work = make()
            found: dict[str, Any] = {
                "seconds_to_round": peak.seconds,
                "peak_mb": peak.mb,
                "snr": decibels(work(tokens[64]).float() - want, want),
            }
            for count, x in tokens.items():
                spans = []
                for _ in range(5):
                    began = time.thread_time()
                    work(x)
                    spans.append(time.thread_time() - began)
                found[f"ms_{count}"] = round(min(spans) * 1000)
        result[name] = found
        print(f"{name:24} {found}")
    return result


def moved() -> dict[str, Any]:
    """{way: {out x in: {GB, ms by card}}} of products in bfloat16, without memory."""
    result: dict[str, Any] = {}
    for mode, way in OURS:
        for out, columns in SHAPES:
            with torch.device("meta"):
                leaf = QuantLinear(columns, out, True, mode, torch.bfloat16, way)
            with fake() as trace:
                materialise(leaf)
                x = torch.empty(TOKENS, columns, dtype=torch.bfloat16)
                trace.mark()
                leaf(x)
            found = result.setdefault(f"{mode} {way}", {})[f"{out} x {columns}"] = {
                "gb": round(trace.work.traffic / 1e9, 1)
            }
            for card in ("a100-80gb", "h100-80gb", "rtx4090"):
                seconds = compute_seconds(trace.work, GPUS[card].rates, False)
                found[card] = round(1000 * seconds, 1)
            print(f"{mode:4} {way:11} {out:6} x {columns:5} {found}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--no-errors", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": "python " + " ".join(["benchmarks/quant_layers.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, one thread",
        "torch": torch.__version__,
        "time": {} if args.no_time else times(),
        "moved": moved(),
        "nf4_scales": scales_of_nf4(),
        "snr": {} if args.no_errors else errors(args.tokens),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
