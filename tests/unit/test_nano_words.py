"""The words of nano's world: the prompt box, and advice on what nano cannot draw."""

from __future__ import annotations

import json
import random
import re

import pytest

from wanflow.advice import advice
from wanflow.cli import main
from wanflow.nano_words import GROUPS, cannot_draw, prompt_box
from wanflow.opening import resolve
from wanflow.request import Request
from wanflow.train import toy


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("red", "one word is no scene"),
        ("a bright video of red", "no shape is named"),
        ("a red circle spins on a blue background", "a circle that spins looks still"),
        ("a blue ball is rotating, white backdrop", "a circle that spins looks still"),
        ("a red star moves left on a red background", "a red star cannot be seen"),
        ("Purple background, a violet square grows", "a purple square cannot be seen"),
        ("a white cross falls on white", "a white cross cannot be seen"),
        ("a red circle and a blue square on black background", "names circle and square"),
        ("a red ball moves left, a green disc rises", "names circle and circle"),
        ("a red and blue star on a black background", "names red and blue"),
        ("a red star moves left and spins on black", "names left and spins"),
    ],
)
def test_what_nano_cannot_draw_is_named(prompt: str, words: str) -> None:
    assert any(words in note for note in cannot_draw("nano", prompt)), cannot_draw("nano", prompt)


def test_no_caption_that_it_learned_is_advised_against() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        caption = toy.caption(toy.sample_scene(rng, None), rng)
        assert cannot_draw("nano", caption) == [], caption


def test_the_advice_reaches_a_request() -> None:
    checkpoint = resolve("nano")
    notes = advice(Request("a zebra and a red circle").complete(checkpoint.spec), checkpoint)
    assert len(notes) == 1 and "zebra" in notes[0]
    notes = advice(Request("red").complete(checkpoint.spec), checkpoint)
    assert [note[:8] for note in notes] == ["one word"]


def test_the_groups_are_what_is_drawn() -> None:
    assert GROUPS["sizes"] == tuple(toy.SIZES) and GROUPS["speeds"] == tuple(toy.SPEEDS)
    vocabulary = resolve("nano").vocabulary
    listed = {
        word
        for values in prompt_box(vocabulary).values()
        for words in values.values()
        for phrase in words
        for word in re.split("[ -]", phrase)
    }
    assert listed <= set(vocabulary) and {"zebra"}.isdisjoint(listed)


def test_the_prompt_box(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nano", "--words"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for words in ("circle (disc, ball)", "turquoise", "moves left (slides left", "SHAPE MOTION"):
        assert words in out
    assert main(["inspect", "nano", "--words", "--json"]) == 0
    box = json.loads(capsys.readouterr().out)["words"]
    assert box["shapes"]["circle"] == ["circle", "disc", "ball"] and "gets bigger" in str(box)
