"""Published files: repository, place, size and hash of each, and the variants they make up.

The sizes are for help texts and for offline use. A download relies on the hub's own listing. The
hashes are in `published.sha256`, by the end of a file's path.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Literal

from wanflow.checkpoint.parts import PARTS, expert_in_name
from wanflow.config import RequestError
from wanflow.presets import FAMILY, ONLY, T2V_A14B, Expert, ModelSpec
from wanflow.untrusted import printable

COMFY = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
COMFY_2_1 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"  # the same text encoder in 16 bits
GGUF_T5 = "city96/umt5-xxl-encoder-gguf"

Role = str  # a part of a model, or "config"
ROLES: tuple[Role, ...] = (*PARTS, "config")
Source = Literal["huggingface", "modelscope"]
BOTH: tuple[Source, ...] = ("huggingface", "modelscope")

# Bytes. Of A14B's official shards only the data are known; headers and indexes are taken from
# Wan2.1-T2V-14B, which has the same tensors.
HEADERS_FP32, HEADERS_16 = 208_111, 117_000
I2V_MORE = 409_600  # numbers by which an expert of I2V-A14B is larger than one of T2V-A14B
T2V_FP32, T2V_16, T2V_FP8 = 57_153_966_336, 28_576_983_168, 14_293_923_632
TI2V_FP32, TI2V_16 = 19_999_307_500, 9_999_658_848
EXPERT_SIZES = (T2V_FP8, T2V_FP8 + 2 * I2V_MORE)  # of experts whose hash is known
T5_BF16, T5_FP16, T5_FP8, T5_Q8 = 11_361_920_418, 11_366_399_385, 6_735_906_897, 6_043_068_256
VAE_FP32, VAE_16 = 507_609_880, 253_815_318
VAE22_FP32, VAE22_16 = 2_818_839_170, 1_409_400_960
TOKENIZER, LIGHTNING = 21_454_081, 1_226_977_424
# A network in GGUF: the forms, and their sizes for A14B and TI2V-5B. Published are A14B's Q5_K_M
# and Q4_K_M, and TI2V-5B's Q8_0; the others follow from them.
GGUF_SIZES = {
    "q8": ("Q8_0", 15_400_000_000, 5_400_179_040),
    "q6": ("Q6_K", 12_000_000_000, 4_210_000_000),
    "q5": ("Q5_K_M", 10_790_416_896, 3_810_000_000),
    "q4": ("Q4_K_M", 9_650_090_496, 3_430_000_000),
}


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
    task: str = T2V_A14B.task

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def folder(self) -> str:
        """The default folder."""
        kind = "weights" if self.name == "official" else self.name
        return f"{self.task.upper().replace('-', '_')}_{kind}"

    def select(self, only: Sequence[str]) -> tuple[Part, ...]:
        """Return the parts with one of these roles; all without roles; RequestError for none."""
        parts = tuple(part for part in self.parts if not only or part.role in only)
        if not parts:
            have = ", ".join(dict.fromkeys(part.role for part in self.parts))
            raise RequestError(
                f"--only {' '.join(only)} leaves nothing of {self.name}, which has {have}"
            )
        return parts


def _official(spec: ModelSpec, network: int, vae: str, vae_size: int) -> tuple[Part, ...]:
    repo = f"Wan-AI/{spec.name}"
    patterns: dict[Role, tuple[str, ...]] = {ONLY: ("diffusion_pytorch_model*", "config.json")}
    if ONLY not in spec.expert_names:
        patterns = {name: (f"{folder}/*",) for name, folder in spec.expert_folders}
    return (
        *(Part(role, repo, files, network) for role, files in patterns.items()),
        Part("t5", repo, ("models_t5_umt5-xxl-enc-bf16.pth",), T5_BF16),
        Part("vae", repo, (f"{vae}.pth",), vae_size),
        _tokenizer(spec),
        Part("config", repo, ("configuration.json", "README.md", "LICENSE*"), optional=True),
    )


def _tokenizer(spec: ModelSpec) -> Part:
    return Part("tokenizer", f"Wan-AI/{spec.name}", ("google/umt5-xxl/*",), TOKENIZER)


def _diffusers(spec: ModelSpec, network: int, vae_size: int) -> tuple[Part, ...]:
    repo, folders = f"Wan-AI/{spec.name}-Diffusers", ("transformer", "transformer_2")
    return (
        *(
            Part(role, repo, (f"{folder}/*",), network)
            for role, folder in zip(spec.expert_names, folders, strict=False)
        ),
        Part("t5", repo, ("text_encoder/*",), 11_361_820_672),
        Part("vae", repo, ("vae/*",), vae_size),
        Part("tokenizer", repo, ("tokenizer/*",), TOKENIZER),
        Part("config", repo, ("model_index.json", "scheduler/*")),
    )


def _split_file(role: Role, path: str, size: int, repo: str = COMFY) -> Part:
    return Part(role, repo, (f"split_files/{path}",), size, "split_files/")


def _comfy(spec: ModelSpec, kind: str, network: int, text: Part) -> tuple[Part, ...]:
    stem, one = f"diffusion_models/wan2.2_{spec.dit.model_type}", spec.expert_names == (ONLY,)
    vae = ("vae/wan2.2_vae", VAE22_16) if one else ("vae/wan_2.1_vae", VAE_16)
    files = {role: f"{stem}_{role}_noise_14B_{kind}" for role in spec.expert_names}
    if one:
        files = {ONLY: f"{stem}_5B_{kind}"}
    return (
        *(_split_file(role, f"{file}.safetensors", network) for role, file in files.items()),
        text,
        _split_file("vae", f"{vae[0]}.safetensors", vae[1]),
        _tokenizer(spec),
    )


def _gguf(spec: ModelSpec, quant: str, network: int) -> tuple[Part, ...]:
    repo, one = f"QuantStack/{spec.name}-GGUF", spec.expert_names == (ONLY,)
    vae = ("VAE/Wan2.2_VAE", VAE22_16) if one else ("VAE/Wan2.1_VAE", VAE_16)
    folders = {role: f"{role.capitalize()}Noise/" for role in spec.expert_names if role != ONLY}
    return (
        *(
            Part(role, repo, (f"{folder}*-{quant}.gguf",), network)
            for role, folder in (folders or {ONLY: ""}).items()
        ),
        Part("vae", repo, (f"{vae[0]}.safetensors",), vae[1]),
        # Eight bits for the text encoder in every variant: it runs once a prompt and decides what
        # is drawn.
        Part("t5", GGUF_T5, ("umt5-xxl-encoder-Q8_0.gguf",), T5_Q8),
        _tokenizer(spec),
    )


def _loras(spec: ModelSpec, version: str) -> tuple[Part, ...]:
    stem = f"split_files/loras/wan2.2_{spec.dit.model_type}_lightx2v_4steps_lora_{version}"
    return tuple(
        Part(role, COMFY, (f"{stem}_{role}_noise.safetensors",), LIGHTNING, "split_files/loras/")
        for role in spec.expert_names
    )


_T5_FP8 = _split_file("t5", "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", T5_FP8)
_T5_FP16 = _split_file("t5", "text_encoders/umt5_xxl_fp16.safetensors", T5_FP16, COMFY_2_1)
FLOAT32 = {2: "float32 experts, as published", 1: "float32, as published"}


def _variants(spec: ModelSpec) -> Iterator[Variant]:
    """Yield the forms in which a model was published."""
    two, task = len(spec.expert_names) == 2, spec.task
    more = I2V_MORE if spec.conditioning == "channels" else 0
    full, half = T2V_FP32 + 4 * more + HEADERS_FP32, T2V_16 + 2 * more + HEADERS_16
    vae, vae_size = ("Wan2.1_VAE", VAE_FP32) if two else ("Wan2.2_VAE", VAE22_FP32)
    if not two:
        full, half = TI2V_FP32, TI2V_16
    official = _official(spec, full, vae, vae_size)
    yield Variant("official", FLOAT32[len(spec.expert_names)], official, BOTH, task=task)
    if two:
        parts = _official(spec, half, vae, vae_size)
        about = "the same in bfloat16; ModelScope only"
        yield Variant("official-bf16", about, parts, ("modelscope",), "bf16", task)
    about = f"the Diffusers layout, float32{' experts' if two else ''}"
    yield Variant("diffusers", about, _diffusers(spec, full, vae_size), BOTH, task=task)
    parts = _comfy(spec, "fp16", half, _T5_FP16)
    yield Variant("comfy-fp16", "ComfyUI's files, float16", parts, task=task)
    if two:
        parts = _comfy(spec, "fp8_scaled", T2V_FP8 + 2 * more, _T5_FP8)
        yield Variant("comfy-fp8", "ComfyUI's files, 8-bit float with scales", parts, task=task)
    for name, (quant, *sizes) in GGUF_SIZES.items():
        parts = _gguf(spec, quant, sizes[0 if two else 1])
        yield Variant(f"gguf-{name}", f"GGUF {quant}", parts, task=task)
    if two:
        about = "LoRA pair for 4 steps, on top of any of the others"
        yield Variant("lightning", about, _loras(spec, "v1" if more else "v1.1"), task=task)


CATALOGUE: dict[str, dict[str, Variant]] = {
    spec.task: {variant.name: variant for variant in _variants(spec)} for spec in FAMILY
}
VARIANTS = CATALOGUE[T2V_A14B.task]


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


def find(name: str, task: str = T2V_A14B.task) -> Variant:
    """Return a variant of a model by its name; RequestError that lists them all."""
    variants = CATALOGUE[task]
    if name not in variants:
        raise RequestError(
            f"there is no variant {printable(name, 60)!r} of {task}; there are"
            f" {', '.join(variants)}"
        )
    return variants[name]


def how_to_get(folder: Path, task: str = T2V_A14B.task) -> str:
    """Return the command that fills a folder of a model; a variant's own folder gets that one."""
    named = (one for each in CATALOGUE.values() for one in each.values())
    official = CATALOGUE[task]["official"]
    variant = next((one for one in named if one.folder == folder.name), official)
    words = "" if variant.task == T2V_A14B.task else f" --task {variant.task}"
    words += "" if variant.name == "official" else f" --variant {variant.name}"
    return f"get the weights with `wanflow download{words} --local_dir {folder}`"
