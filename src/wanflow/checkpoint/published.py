"""Published files: repository, place, size and hash of each, and the variants they make up.

The sizes are for help texts and for offline use. A download relies on the hub's own listing. The
hashes are in `published.sha256`, by the end of a file's path.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Literal

from wanflow.checkpoint.parts import EXPERTS, PARTS, expert_in_name
from wanflow.config import RequestError
from wanflow.presets import Expert
from wanflow.untrusted import printable

OFFICIAL = "Wan-AI/Wan2.2-T2V-A14B"
DIFFUSERS = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
COMFY = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
COMFY_2_1 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"  # the same text encoder in 16 bits
GGUF = "QuantStack/Wan2.2-T2V-A14B-GGUF"
GGUF_T5 = "city96/umt5-xxl-encoder-gguf"

Role = str  # a part of a model, or "config"
ROLES: tuple[Role, ...] = (*PARTS, "config")
Source = Literal["huggingface", "modelscope"]
BOTH: tuple[Source, ...] = ("huggingface", "modelscope")

# Bytes. Of the official shards only the sum is published; headers and indexes are taken from
# Wan2.1-T2V-14B, which has the same tensors.
EXPERT_FP32, EXPERT_FP8 = 57_154_174_447, 14_293_923_632
EXPERT_16 = 28_577_100_000  # half of the float32 tensors and a header
EXPERT_SIZES = (EXPERT_FP8,)  # of experts whose hash is known
T5_BF16, T5_FP16, T5_FP8, T5_Q8 = 11_361_920_418, 11_366_399_385, 6_735_906_897, 6_043_068_256
VAE_FP32, VAE_16 = 507_609_880, 253_815_318
TOKENIZER, LIGHTNING = 21_454_081, 1_226_977_424


@dataclass(frozen=True)
class Part:
    """The files of one repository for one role."""

    role: Role
    repo: str
    patterns: tuple[str, ...]  # paths in the repository; * also matches a slash
    bytes: int = 0
    strip: str = ""  # prefix of a path that the local path lacks
    optional: bool = False  # the variant is complete without it

    def local(self, path: str) -> str | None:
        """Return the local path of a repository's file; None for a file of another part."""
        known = any(fnmatchcase(path, pattern) for pattern in self.patterns)
        return path.removeprefix(self.strip) if known else None


@dataclass(frozen=True)
class Variant:
    """One form of the weights."""

    name: str
    about: str
    parts: tuple[Part, ...]
    sources: tuple[Source, ...] = ("huggingface",)
    revision: str | None = None  # of the first part's repository; None: the default branch

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def folder(self) -> str:
        """The default folder."""
        return "T2V_A14B_weights" if self.name == "official" else f"T2V_A14B_{self.name}"

    def select(self, only: Sequence[str]) -> tuple[Part, ...]:
        """Return the parts with one of these roles; all without roles; RequestError for none."""
        parts = tuple(part for part in self.parts if not only or part.role in only)
        if not parts:
            have = ", ".join(dict.fromkeys(part.role for part in self.parts))
            raise RequestError(
                f"--only {' '.join(only)} leaves nothing of {self.name}, which has {have}"
            )
        return parts


def _official(expert: int) -> tuple[Part, ...]:
    return (
        Part("high", OFFICIAL, ("high_noise_model/*",), expert),
        Part("low", OFFICIAL, ("low_noise_model/*",), expert),
        Part("t5", OFFICIAL, ("models_t5_umt5-xxl-enc-bf16.pth",), T5_BF16),
        Part("vae", OFFICIAL, ("Wan2.1_VAE.pth",), VAE_FP32),
        _TOKENIZER,
        Part("config", OFFICIAL, ("configuration.json", "README.md", "LICENSE*"), optional=True),
    )


def _split_file(role: Role, path: str, size: int, repo: str = COMFY) -> Part:
    return Part(role, repo, (f"split_files/{path}",), size, "split_files/")


def _comfy(kind: str, expert: int, text: Part) -> tuple[Part, ...]:
    stem = "diffusion_models/wan2.2_t2v"
    return (
        _split_file("high", f"{stem}_high_noise_14B_{kind}.safetensors", expert),
        _split_file("low", f"{stem}_low_noise_14B_{kind}.safetensors", expert),
        text,
        _split_file("vae", "vae/wan_2.1_vae.safetensors", VAE_16),
        _TOKENIZER,
    )


def _gguf(quant: str, expert: int) -> tuple[Part, ...]:
    return (
        Part("high", GGUF, (f"HighNoise/*-{quant}.gguf",), expert),
        Part("low", GGUF, (f"LowNoise/*-{quant}.gguf",), expert),
        Part("vae", GGUF, ("VAE/Wan2.1_VAE.safetensors",), VAE_16),
        # Eight bits for the text encoder in every variant: it runs once a prompt and decides what
        # is drawn.
        Part("t5", GGUF_T5, ("umt5-xxl-encoder-Q8_0.gguf",), T5_Q8),
        _TOKENIZER,
    )


_TOKENIZER = Part("tokenizer", OFFICIAL, ("google/umt5-xxl/*",), TOKENIZER)
_T5_FP8 = _split_file("t5", "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", T5_FP8)
_T5_FP16 = _split_file("t5", "text_encoders/umt5_xxl_fp16.safetensors", T5_FP16, COMFY_2_1)
_DIFFUSERS = (
    Part("high", DIFFUSERS, ("transformer/*",), EXPERT_FP32),
    Part("low", DIFFUSERS, ("transformer_2/*",), EXPERT_FP32),
    Part("t5", DIFFUSERS, ("text_encoder/*",), 11_361_820_672),
    Part("vae", DIFFUSERS, ("vae/*",), VAE_FP32),
    Part("tokenizer", DIFFUSERS, ("tokenizer/*",), TOKENIZER),
    Part("config", DIFFUSERS, ("model_index.json", "scheduler/*")),
)
_LORAS = tuple(
    Part(
        role,
        COMFY,
        (f"split_files/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_{role}_noise.safetensors",),
        LIGHTNING,
        "split_files/loras/",
    )
    for role in EXPERTS
)
_COMFY_FP16 = _comfy("fp16", EXPERT_16, _T5_FP16)
_COMFY_FP8 = _comfy("fp8_scaled", EXPERT_FP8, _T5_FP8)

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("official", "float32 experts, as published", _official(EXPERT_FP32), BOTH),
        Variant(
            "official-bf16",
            "the same in bfloat16; ModelScope only",
            _official(EXPERT_16),
            ("modelscope",),
            "bf16",
        ),
        Variant("diffusers", "the Diffusers layout, float32 experts", _DIFFUSERS, BOTH),
        Variant("comfy-fp16", "ComfyUI's files, float16", _COMFY_FP16),
        Variant("comfy-fp8", "ComfyUI's files, 8-bit float with scales", _COMFY_FP8),
        Variant("gguf-q8", "GGUF Q8_0", _gguf("Q8_0", 15_400_000_000)),
        Variant("gguf-q6", "GGUF Q6_K", _gguf("Q6_K", 12_000_000_000)),
        Variant("gguf-q5", "GGUF Q5_K_M", _gguf("Q5_K_M", 10_790_416_896)),
        Variant("gguf-q4", "GGUF Q4_K_M", _gguf("Q4_K_M", 9_650_090_496)),
        Variant("lightning", "LoRA pair for 4 steps, on top of any of the others", _LORAS),
    )
}


@cache
def known_hashes() -> dict[str, str]:
    """Return the sha256 of files that are the same wherever they are, by the end of their path."""
    lines = Path(__file__).with_suffix(".sha256").read_text(encoding="utf-8").splitlines()
    return {end: sha256 for sha256, end in map(str.split, lines)}


def published_as(sha256: str | None) -> str | None:
    """Return the end of the path under which a file of this hash was published."""
    return next((end for end, known in known_hashes().items() if known == sha256), None)


def known_sha256(name: str) -> str | None:
    """Return the published sha256 of a file, by the end of its path; None for other files."""
    path = f"/{name}"
    hashes = known_hashes().items()
    return next((sha256 for end, sha256 in hashes if path.endswith(f"/{end}")), None)


def expert_by_hash(file: Path, compute: bool = False) -> Expert | None:
    """Return the expert in a published file, by the sha256 that names it in Hugging Face's cache.

    With `compute`, hash a file of a published expert's size (14 GB in half a minute).
    """
    sha256 = Path(os.path.realpath(file)).name
    if compute and file.stat().st_size in EXPERT_SIZES:
        with file.open("rb") as data:
            sha256 = hashlib.file_digest(data, "sha256").hexdigest()
    return expert_in_name(published_as(sha256) or "")


def whole_repository(repo: str) -> Variant:
    """Return a variant of all files in a repository, for `--repo`; RequestError for no name."""
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo, re.ASCII):
        raise RequestError(f"{printable(repo, 60)!r} is not the name of a repository, OWNER/NAME")
    return Variant(
        repo.rpartition("/")[2], f"everything in {repo}", (Part("config", repo, ("*",)),), BOTH
    )


def find(name: str) -> Variant:
    """Return a variant by its name; RequestError that lists them all."""
    if name not in VARIANTS:
        raise RequestError(
            f"there is no variant {printable(name, 60)!r}; there are {', '.join(VARIANTS)}"
        )
    return VARIANTS[name]


def how_to_get(folder: Path) -> str:
    """Return the command that fills a folder; a variant's own folder gets that variant."""
    variants = (f" --variant {name}" for name, one in VARIANTS.items() if one.folder == folder.name)
    variant = next(variants, "").replace(" --variant official", "")
    return f"get the weights with `wanflow download{variant} --local_dir {folder}`"
