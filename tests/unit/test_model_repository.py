"""The model repository without weights, `Wan2.2-T2V-A14B/`: names, sizes and configurations agree
with the code, and no weight is in it.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from wanflow.config import DiTConfig, from_mapping
from wanflow.models.dit import WanDiT
from wanflow.presets import T2V_A14B

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "Wan2.2-T2V-A14B"
SHARDS = [f"diffusion_pytorch_model-{number:05d}-of-00006.safetensors" for number in range(1, 7)]
SHARD_LIMIT = 10 * 10**9
SMALL = (
    10**6
)  # bytes: no file here is larger; the smallest weight file of the model is the VAE, 0.5 GB
EXPERTS = pytest.mark.parametrize("expert", ["high_noise_model", "low_noise_model"])


@cache
def tensor_bytes() -> dict[str, int]:
    """Every tensor of an expert in the model's order, and its bytes in float32."""
    with torch.device("meta"):
        state = WanDiT(T2V_A14B.dit).state_dict()
    return {name: 4 * value.numel() for name, value in state.items()}


def read(*parts: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(FOLDER.joinpath(*parts).read_text(encoding="utf-8"))
    return value


def index(expert: str) -> dict[str, Any]:
    return read(expert, "diffusion_pytorch_model.safetensors.index.json")


@EXPERTS
def test_config_is_the_published_shape(expert: str) -> None:
    config = read(expert, "config.json")
    assert config["_class_name"] == "WanModel"
    assert from_mapping(DiTConfig, config, f"{expert}/config.json") == T2V_A14B.dit


@EXPERTS
def test_index_names_every_tensor_and_no_other(expert: str) -> None:
    names = list(index(expert)["weight_map"])
    assert len(names) == 1095
    assert names == sorted(tensor_bytes())


@EXPERTS
def test_index_gives_the_total_size(expert: str) -> None:
    assert index(expert)["metadata"] == {"total_size": 57_153_966_336}
    assert sum(tensor_bytes().values()) == 57_153_966_336


@EXPERTS
def test_shards_follow_the_models_order_and_hold_at_most_10_gb(expert: str) -> None:
    weight_map = index(expert)["weight_map"]
    shards = [weight_map[name] for name in tensor_bytes()]
    assert sorted(set(shards)) == SHARDS
    assert shards == sorted(shards)
    held: Counter[str] = Counter()
    for name, size in tensor_bytes().items():
        held[weight_map[name]] += size
    assert max(held.values()) <= SHARD_LIMIT


def test_shards_have_the_published_sizes() -> None:
    """A shard is its tensors, 8 bytes, and a JSON header padded to 8. Known are the first shard and
    the last, from a public manifest.
    """
    weight_map = index("high_noise_model")["weight_map"]
    with torch.device("meta"):
        shapes = {
            name: list(value.shape) for name, value in WanDiT(T2V_A14B.dit).state_dict().items()
        }
    sizes = []
    for shard in SHARDS:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in sorted(name for name, file in weight_map.items() if file == shard):
            header[name] = {
                "dtype": "F32",
                "shape": shapes[name],
                "data_offsets": [at, at + tensor_bytes()[name]],
            }
            at += tensor_bytes()[name]
        text = len(json.dumps(header, separators=(",", ":")))
        sizes.append(8 + text + -text % 8 + at)
    assert (sizes[0], sizes[-1]) == (9_992_481_544, 7_595_559_224)


def test_both_experts_are_described_alike() -> None:
    for name in ("config.json", "diffusion_pytorch_model.safetensors.index.json"):
        assert read("high_noise_model", name) == read("low_noise_model", name)


def test_modelscope_configuration() -> None:
    configuration = read("configuration.json")
    assert (configuration["framework"], configuration["task"]) == ("pytorch", "text-to-video")


def committed() -> list[Path]:
    """The folder's files that are, or would be, in git; without git, all of them."""
    command = [
        "git",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        FOLDER.name,
    ]
    try:
        listed = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        return [path for path in FOLDER.rglob("*") if path.is_file()]
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def test_no_weights_are_committed() -> None:
    files = committed()
    assert FOLDER / "README.md" in files
    assert {path.suffix for path in files} <= {".json", ".md"}
    assert {path.name for path in files if path.stat().st_size > SMALL} == set()


def test_readme_states_the_true_sizes() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    sizes = {
        "experts": 57_153_966_336,
        "t5": 11_361_920_418,
        "vae": 507_609_880,
        "tokenizer": 21_454_081,
    }
    total = sizes["experts"] + sum(sizes.values())
    for number in (*sizes.values(), total):
        assert f"{number:,}" in text
    assert f"{total / 1e9:.1f}" == "126.2"
    assert f"{total / 2**30:.1f}" == "117.5"
