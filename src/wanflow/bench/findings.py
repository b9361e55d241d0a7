"""Put the findings of a check on a page, and what was measured into one document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from wanflow.bench.check import Result
from wanflow.bench.record import Finding
from wanflow.config import RequestError
from wanflow.plan.calibration import from_json
from wanflow.units import measured

MARKS = {"passed": "right", "failed": "**WRONG**", "measured": "", "skipped": "skipped"}
LONGEST = 400  # characters of a cell


def page(results: Sequence[Result], seconds: float, stopped: bool = False) -> str:
    """Return the findings in Markdown: what is wrong first, then every part."""
    return "\n".join(_lines(results, seconds, stopped)) + "\n"


def _lines(results: Sequence[Result], seconds: float, stopped: bool) -> Iterator[str]:
    about = about_of(results)
    versions = ", ".join(f"{name} {value}" for name, value in about.get("versions", {}).items())
    yield f"# Findings on {about.get('device', 'an unknown device')}"
    yield ""
    yield f"wanflow bench --check took {measured(seconds)}. {versions}"
    yield ""
    yield f"**{verdict(results)}**" + (" The check was interrupted." if stopped else "")
    wrong = [(result, one) for result in results for one in result.findings if is_wrong(one)]
    if wrong:
        yield from ("", "## What is wrong", "")
        for result, one in wrong:
            expected = f"; expected {one.expected}" if one.expected else ""
            yield f"- {result.part.name}: {_cell(one.what)}: {_cell(one.value)}{_cell(expected)}"
    for result in results:
        yield from ("", f"## {result.part.name}: {result.part.title}", "")
        yield f"{measured(result.seconds)}."
        yield from ("", "| asked | found | expected | |", "|---|---|---|---|")
        for one in result.findings:
            cells = (one.what, one.value, one.expected, MARKS[one.state])
            yield f"| {' | '.join(map(_cell, cells))} |"
    yield from ("", "`wanflow plan --calibration FILE` takes what was measured here: FILE is the")
    yield "`check.json` beside this page."


def _cell(text: str) -> str:
    short = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return short.replace("|", "\\|").replace("\n", " ")


def is_wrong(finding: Finding) -> bool:
    """Return whether a finding makes the check fail."""
    return finding.state == "failed"


def verdict(results: Sequence[Result]) -> str:
    """Return the result of a check in a sentence."""
    states = [one.state for result in results for one in result.findings]
    wrong, right = states.count("failed"), states.count("passed")
    rest = f"{states.count('measured')} measured, {states.count('skipped')} skipped"
    return f"{wrong} wrong, {right} right, {rest}."


def about_of(results: Sequence[Result]) -> dict[str, Any]:
    """Return what the parts say of the device; a part that died early says nothing."""
    return dict(next((result.about for result in results if result.about), {}))


def calibration_of(results: Sequence[Result]) -> dict[str, Any] | None:
    """Return the calibration that the parts measured; None where it is none."""
    about, merged = about_of(results), dict[str, Any]()
    for result in results:
        merged |= result.calibration
    try:
        return from_json({"format": 1, **about, **merged}, "what was measured").to_json()
    except RequestError:
        return None


def document(results: Sequence[Result], seconds: float, folder: str) -> dict[str, Any]:
    """Return the findings for programs."""
    about = about_of(results)
    return {
        "passed": bool(results) and not any(result.failed for result in results),
        "verdict": verdict(results),
        **{name: about.get(name) for name in ("device", "device_memory", "dtype", "versions")},
        "seconds": round(seconds, 3),
        "folder": folder,
        "parts": [
            {
                "name": result.part.name,
                "title": result.part.title,
                "passed": not result.failed,
                "seconds": round(result.seconds, 3),
                "findings": [asdict(one) for one in result.findings],
            }
            for result in results
        ],
        "calibration": calibration_of(results),
    }
