"""Say of a request that is allowed what is known to give poor videos.

The command line logs these notes, and `Pipeline.generate` gives them as Python warnings.
"""

from __future__ import annotations

import re

from wanflow.checkpoint.checkpoint import Checkpoint
from wanflow.nano_words import cannot_draw, knows_this_world
from wanflow.request import CompleteRequest
from wanflow.untrusted import printable


def advice(request: CompleteRequest, checkpoint: Checkpoint) -> list[str]:
    """Return warnings about a request that is allowed and known to give poor videos."""
    spec, notes = checkpoint.spec, []
    width, height = request.size
    if request.frame_num > spec.frame_num:
        notes.append(
            f"{request.frame_num} frames: trained on {spec.frame_num}; longer clips are known to"
            " repeat or burn out"
        )
    if request.fps != spec.fps:
        notes.append(
            f"{request.fps:g} fps: trained on motion at {spec.fps}, so it will look faster or"
            " slower"
        )
    if not checkpoint.vocabulary:
        return notes
    if request.size != spec.size:
        only = f"{spec.size[0]}*{spec.size[1]}"
        notes.append(f"{width}*{height}: {spec.name} was trained at {only} only")
    words = re.findall(r"[^\W_]+", request.prompt.lower())
    unknown = [word for word in dict.fromkeys(words) if word not in checkpoint.vocabulary]
    if unknown and not request.lora:  # which may teach it more words
        listed = printable(", ".join(unknown[:8]))
        notes.append(
            f"{spec.name} does not know {listed}: it draws one shape (circle,"
            " square, triangle, star, cross), its colour, size and motion, and the background's"
            " colour"
        )
    if not request.lora and knows_this_world(checkpoint.vocabulary):
        notes += cannot_draw(spec.name, request.prompt)
    return notes
