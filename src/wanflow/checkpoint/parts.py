"""The parts of a model: names, kinds, and what messages call them. Imports no torch."""

from __future__ import annotations

import itertools
import re

from wanflow.checkpoint.key_maps import Kind
from wanflow.presets import ONLY, T2V_A14B, Expert, ModelSpec, title

Part = str  # the name of a network, "t5", "vae" or "tokenizer"

EXPERTS = T2V_A14B.expert_names
NETWORKS: tuple[Expert, ...] = (*EXPERTS, ONLY)  # a model has the experts, or the one network
WEIGHTS: tuple[Part, ...] = (*NETWORKS, "t5", "vae")
PARTS: tuple[Part, ...] = (*WEIGHTS, "tokenizer")
KINDS: dict[Part, Kind] = {**dict.fromkeys(NETWORKS, "dit"), "t5": "t5", "vae": "vae"}
WORDS: dict[Part, str] = {
    **{network: f"the {title(network)}" for network in NETWORKS},
    "t5": "the text encoder",
    "vae": "the VAE",
    "tokenizer": "the tokenizer",
}
ENDINGS = {".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin"}  # of files of weights
LORA_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
FLAGS = "--high, --low, --t5, --vae (TI2V-5B: --dit in place of the first two)"


def weights_of(spec: ModelSpec) -> tuple[Part, ...]:
    """Return the parts of a model that hold weights."""
    return (*spec.expert_names, "t5", "vae")


def kind_of(part: Part) -> Kind:
    """Return the kind of model that a part is; KeyError for the tokenizer."""
    return KINDS[part]


def expert_in_name(path: str) -> Expert | None:
    """Return the expert that a path names: `HighNoise/x.gguf`, `wan_low_noise.safetensors`.

    The last part of the path with an expert's name counts. A name counts as a word of its own or
    before "noise" (not the "low" in "flow" or "lowvram"). Names before "noise" come first. A part
    with several names gives None.
    """
    names = set(EXPERTS)
    for part in reversed(re.split(r"[/\\]", path)):
        words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)]
        before_noise = {word for word, after in itertools.pairwise(words) if after == "noise"}
        joined = {word.removesuffix("noise") for word in words if word.endswith("noise")}
        found = names & (before_noise | joined) or names & set(words)
        if found:
            return found.pop() if len(found) == 1 else None
    return None
