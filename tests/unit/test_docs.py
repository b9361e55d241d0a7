"""What docs promise, held to the code: links, commands, messages, words, and the size of README."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest

import wanflow
from wanflow.cli import build_parser

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [
    *READMES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BANNED = re.compile(r"\b(told|said|anew|whoever|in vain|so long)\b|'s matter\b", re.IGNORECASE)
# Entries of the log are dated and never rewritten.
EXEMPT = {"docs/project/log.md"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def commands(page: Path) -> list[list[str]]:
    """Every `wanflow` command in a page's shell blocks, its lines joined, without comments."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip(), comments=True)
            if words and words[0] == "wanflow":
                found.append(words[1:])
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        build_parser().parse_args(words)


def test_both_readmes_have_the_same_parts() -> None:
    def parts(page: Path) -> tuple[int, ...]:
        text = page.read_text(encoding="utf-8")
        counted = (r"^## ", r"^```", r"^\|", r"\]\(")
        return tuple(len(re.findall(pattern, text, re.MULTILINE)) for pattern in counted)

    english, chinese = (parts(page) for page in READMES)
    assert english == chinese


@pytest.mark.parametrize("page", READMES, ids=name)
def test_readme_fits_in_one_sitting(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) < 200


@cache
def messages() -> str:
    """Every string of the source, with the mark of a gap in place of what is filled in."""
    found = []
    for path in (ROOT / "src" / "wanflow").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_quotes_real_messages() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(quoted) > 40
    assert [phrase for phrase in quoted if phrase not in messages()] == []


def test_plain_words() -> None:
    pages = [page for page in PAGES if name(page) not in EXEMPT]
    found = []
    for path in [*pages, *sorted((ROOT / "src").rglob("*.py"))]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found += [f"{name(path)}:{number}: {match[0]}" for match in BANNED.finditer(line)]
    assert not found, "\n" + "\n".join(found)


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == wanflow.__version__ and len(set(headings)) == len(headings)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
