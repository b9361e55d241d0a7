"""The page's files: words in both languages, nothing from elsewhere, nothing that a CSP forbids."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import get_args

import pytest

import wanflow
from wanflow.serve.errors import Code

PAGE = Path(wanflow.__file__).parent / "serve" / "page"
OURS = sorted(PAGE.glob("*.js"))
LIBRARY = "72284e8e9079c87817145df1110f74e8a2aa040b2fc384922e18dfcb46fc1fd7"  # of htm 3.1.1 on npm


def words(language: str) -> dict[str, str]:
    text = (PAGE / "words.js").read_text(encoding="utf-8")
    block = re.search(rf"^const {language} = \{{$(.*?)^\}};$", text, re.MULTILINE | re.DOTALL)
    assert block
    return dict(re.findall(r'^  (\w+): "(.*)",$', block[1], re.MULTILINE))


def test_both_languages_have_the_same_keys_with_the_same_gaps() -> None:
    english, chinese = words("en"), words("zh")
    assert len(english) > 100
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key


def test_every_word_that_is_spoken_exists_and_every_one_that_exists_is_spoken() -> None:
    text = "\n".join(file.read_text(encoding="utf-8") for file in OURS if file.name != "words.js")
    keys = words("en")
    spoken = set(re.findall(r'say\("(\w+)"', text))
    assert spoken and spoken <= set(keys)
    # Others are chosen by a name: "stage_" with a stage, or a key in quotes in a table.
    quoted = set(re.findall(r'"(\w+)"', text)) | set(re.findall(r'"(\w+)"', words_code()))
    built = re.compile(r"(stage|expert|now|theme|error)_\w+")
    unused = [key for key in keys if key not in quoted | SHORT and not built.fullmatch(key)]
    assert unused == []


def test_every_code_of_an_error_has_words_in_both_languages() -> None:
    sent = set(get_args(Code))
    for file in (PAGE.parent).glob("*.py"):  # of jobs: a worker says them by messages
        text = file.read_text(encoding="utf-8")
        found = re.findall(r'code="(\w+)"|"code": "(\w+)"|_failed\(\w+[^,]*, "(\w+)"', text)
        assert {one for group in found for one in group if one} <= sent, file.name
    for language in ("en", "zh"):
        known = {key for key in words(language) if key.startswith("error_")}
        assert known == {f"error_{code}" for code in sent} | {"error_other"}


SHORT = {"failed", "cancelled"}  # names of states


def words_code() -> str:
    return (PAGE / "words.js").read_text(encoding="utf-8").rpartition("const WORDS")[2]


@pytest.mark.parametrize("file", [*OURS, PAGE / "index.html"], ids=lambda file: file.name)
def test_nothing_is_inline_foreign_or_unsafe(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    # Prompts are strangers' texts: they become text nodes, never HTML.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text)
    assert not re.search(r"dangerouslySetInnerHTML|new Function", text)
    assert not re.search(r"https?://|[\"'`]//", text)
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=[\"']|javascript:", text)


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.name)
def test_imports_are_files_of_the_page_that_export_the_names(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    imports = re.findall(r"import \{([^}]*)\} from \"(\./[\w/.-]+)\";", text)
    for names, source in imports:
        exported = (PAGE / source).read_text(encoding="utf-8")
        used = text.replace(f"{{{names}}}", "", 1)
        for name in filter(None, (one.strip() for one in names.split(","))):
            declared = rf"export (async )?(function|const|class) {name}\b|\bas {name}\b"
            assert re.search(declared, exported), f"{name} of {source}"
            assert re.search(rf"\b{name}\b", used), f"{name} is imported and not used"


def test_the_library_is_the_published_file() -> None:
    data = (PAGE / "lib" / "htm-preact.js").read_bytes()
    assert hashlib.sha256(data).hexdigest() == LIBRARY
    assert (PAGE / "lib" / "LICENSE.htm").is_file() and (PAGE / "lib" / "LICENSE.preact").is_file()


def test_the_page_is_small() -> None:
    assert sum(file.stat().st_size for file in PAGE.rglob("*") if file.is_file()) < 200_000
