"""The parts of a model: names, kinds, and what messages call them. Imports no torch."""

from __future__ import annotations

import itertools
import re

from wanflow.checkpoint.key_maps import Kind
from wanflow.presets import T2V_A14B, Expert

Part = str  # the name of an expert, "t5", "vae" or "tokenizer"

EXPERTS = T2V_A14B.expert_names
WEIGHTS: tuple[Part, ...] = (*EXPERTS, "t5", "vae")
PARTS: tuple[Part, ...] = (*WEIGHTS, "tokenizer")
KINDS: dict[Part, Kind] = {**dict.fromkeys(EXPERTS, "dit"), "t5": "t5", "vae": "vae"}
WORDS: dict[Part, str] = {
    **{expert: f"the {expert}-noise expert" for expert in EXPERTS},
    "t5": "the text encoder",
    "vae": "the VAE",
    "tokenizer": "the tokenizer",
}
ENDINGS = {".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin"}  # of files of weights
FLAGS = ", ".join(f"--{part}" for part in WEIGHTS)


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
