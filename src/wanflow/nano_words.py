"""The words of nano's world: what its captions say, and what it cannot draw.

Training draws captions from these words, advice on prompts looks for them, and
`wanflow inspect nano --words` lists them. Standard library only.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Collection, Iterator

RGB = tuple[int, int, int]  # 0..255

COLOURS: dict[str, RGB] = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (240, 220, 50),
    "purple": (150, 50, 190), "orange": (245, 140, 30), "cyan": (60, 210, 220),
    "white": (245, 245, 245),
}  # fmt: skip
BACKGROUNDS: dict[str, RGB] = {"black": (15, 15, 18), "gray": (128, 128, 128)} | {
    name: COLOURS[name] for name in ("white", "red", "green", "blue", "yellow", "purple")
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
MOTIONS = ("left", "right", "up", "down", "grows", "shrinks", "still", "spins")

# The words for a value, the plain one first; an empty word is left out.
NAMES = {
    value: tuple(words.split(", "))
    for value, words in {
        "red": "red",
        "green": "green",
        "blue": "blue",
        "yellow": "yellow",
        "purple": "purple, violet",
        "orange": "orange",
        "cyan": "cyan, turquoise",
        "white": "white",
        "black": "black",
        "gray": "gray, grey",
        "circle": "circle, disc, ball",
        "square": "square, box",
        "triangle": "triangle",
        "star": "star, five-pointed star",
        "cross": "cross, plus sign",
        "small": "small, tiny, little",
        "medium": "",
        "large": "large, big, huge",
        "slow": "slowly, gently",
        "normal": "",
        "fast": "quickly, fast, rapidly",
    }.items()
}
# Each verb as a finite form and a continuous one.
VERBS = {
    motion: tuple(tuple(verb.split("/")) for verb in verbs.split(", "))
    for motion, verbs in {
        "left": (
            "moves left/moving left, slides left/sliding left, moves to the left/moving to "
            "the left, goes left/going left, drifts left/drifting left"
        ),
        "right": (
            "moves right/moving right, slides right/sliding right, moves to the right/moving "
            "to the right, goes right/going right, drifts right/drifting right"
        ),
        "up": (
            "moves up/moving up, rises/rising, slides up/sliding up, goes up/going up, floats "
            "upwards/floating upwards, moves upward/moving upward"
        ),
        "down": (
            "moves down/moving down, falls/falling, slides down/sliding down, drops/dropping, "
            "sinks downwards/sinking downwards, goes down/going down"
        ),
        "grows": (
            "grows/growing, gets bigger/getting bigger, expands/expanding, gets "
            "larger/getting larger"
        ),
        "shrinks": "shrinks/shrinking, gets smaller/getting smaller, contracts/contracting",
        "still": (
            "stays still/staying still, does not move/not moving, stands still/standing "
            "still, is static/resting, stays in place/staying in place"
        ),
        "spins": (
            "spins/spinning, rotates/rotating, turns around/turning around, spins "
            "around/spinning around"
        ),
    }.items()
}

GRAMMAR = "a [SIZE] COLOUR SHAPE MOTION [SPEED] on a BACKGROUND background"
EXAMPLE = "a red star moves left slowly on a blue background"
# The values of each group, in the order of the prompt box.
GROUPS: dict[str, tuple[str, ...]] = {
    "shapes": SHAPES,
    "colours": tuple(COLOURS),
    "backgrounds": tuple(BACKGROUNDS),
    "sizes": ("small", "medium", "large"),
    "speeds": ("slow", "normal", "fast"),
}
WIDTH = 78


def prompt_box(vocabulary: Collection[str]) -> dict[str, dict[str, list[str]]]:
    """Return the words of each value by group, the plain one first; `other` has the rest.

    Args:
        vocabulary: every word that the model knows.
    """
    box = {
        group: {value: [word for word in NAMES[value] if word] for value in values}
        for group, values in GROUPS.items()
    }
    box["motions"] = {motion: [verb for verb, _ in VERBS[motion]] for motion in MOTIONS}
    named = {
        word
        for names in (*NAMES.values(), *(pair for verbs in VERBS.values() for pair in verbs))
        for name in names
        for word in re.split(r"[ -]", name)
    }
    box["other"] = {"": [word for word in vocabulary if word not in named]}
    return box


def box_lines(model: str, vocabulary: Collection[str]) -> Iterator[str]:
    """Yield the prompt box as text; `model` is what `--ckpt_dir` takes."""
    yield "a prompt names one shape on one background:"
    yield f"  {GRAMMAR}"
    yield f'  wanflow generate --ckpt_dir {shlex.quote(model)} --prompt "{EXAMPLE}"'
    yield "words in brackets mean the same"
    for group, values in prompt_box(vocabulary).items():
        texts = [
            f"{words[0]} ({', '.join(words[1:])})" if len(words) > 1 else words[0]
            for words in values.values()
            if words and group != "other"
        ]
        texts = texts or values[""]
        yield ""
        yield f"{group}:"
        for text in texts if group == "motions" else (", ".join(texts),):
            yield from textwrap.wrap(
                text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
            )
    yield ""
    yield "A size and a speed may be left out; a motion may end in -ing: rising, moving left."
    yield "Not possible: two shapes, a circle that is seen to spin, a shape in its background's"
    yield "colour. A word that is not listed here has no effect."


def knows_this_world(vocabulary: Collection[str]) -> bool:
    """Return whether a model of few words is nano, or one that was trained on its world."""
    return set(SHAPES) | set(COLOURS) <= set(vocabulary)


def cannot_draw(model: str, prompt: str) -> list[str]:
    """Return what a prompt asks for, in known words, that nano does not draw as meant."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    text = f" {' '.join(words)} "
    shapes = _found(text, {value: NAMES[value] for value in SHAPES})
    motions = _found(text, {motion: sum(VERBS[motion], ()) for motion in MOTIONS})
    behind = re.search(r" (\w+) (?:background|backdrop) ", text) or re.search(
        r" (?:on|over|against)(?: an?| the| plain)* (\w+) ", text
    )
    background = _found(f" {behind[1]} " if behind else " ", _names(BACKGROUNDS))
    colours = _found(text.replace(behind[0], " ", 1) if behind else text, _names(COLOURS))
    notes = []
    if len(words) == 1:
        notes.append(f"one word is no scene for {model}; write a sentence like: {EXAMPLE}")
    elif not shapes:
        notes.append(f"no shape is named, and {model} draws one of {', '.join(SHAPES)}")
    if len(shapes) > 1:
        notes.append(f"{model} draws one shape, and the prompt names {_and(shapes)}")
    if len(shapes) == 1 and len(set(colours)) > 1:
        notes.append(f"{model} draws a shape in one colour, and the prompt names {_and(colours)}")
    if len(set(motions)) > 1:
        notes.append(f"{model} draws one motion, and the prompt names {_and(motions)}")
    if shapes == ["circle"] and "spins" in motions:
        notes.append("a circle that spins looks still; spin a square, triangle, star or cross")
    if background and colours == background:
        what = shapes[0] if len(shapes) == 1 else "shape"
        notes.append(
            f"a {colours[0]} {what} cannot be seen on a {background[0]} background; change one of"
            " the colours"
        )
    return notes


def _and(values: list[str]) -> str:
    return " and ".join(values)


def _names(values: Collection[str]) -> dict[str, tuple[str, ...]]:
    return {value: NAMES[value] for value in values}


def _found(text: str, names: dict[str, tuple[str, ...]]) -> list[str]:
    """Return a value for each of its names in a text, in the text's order; the longest name counts.

    Args:
        text: words with one space around each.
        names: of each value.
    """
    phrases = {
        " ".join(re.findall(r"[^\W_]+", name)): value
        for value, all_names in names.items()
        for name in all_names
        if name
    }
    longest = sorted(phrases, key=len, reverse=True)
    pattern = rf"(?<= )(?:{'|'.join(map(re.escape, longest))})(?= )"
    return [phrases[found] for found in re.findall(pattern, text)]
