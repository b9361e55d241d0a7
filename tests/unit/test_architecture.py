"""The walls of docs and design, kept by reading the source: who may import whom, what stands only
where, how large things get.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import wanflow

ROOT = Path(wanflow.__file__).parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}

# A unit imports only from lines below its own; units that share a line never import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli", "__init__"),
    ("serve", "train", "bench"),
    ("opening",),
    ("plan", "convert", "inspect", "doctor", "extend"),
    ("assemble",),
    ("advice", "loaders", "download", "threads"),
    ("lora",),
    ("checkpoint",),
    ("front",),
    ("video",),
    (
        "choices",
        "clipfiles",
        "encoding",
        "keeping",
        "pictures",
        "wording",
        "outputs",
        "preview",
        "screen",
        "web",
    ),
    ("media", "transforms"),
    ("parallel",),
    ("api",),
    ("pipeline",),
    ("conditioning", "sanity"),
    ("options",),
    ("runtime",),
    ("recipe",),
    ("models", "sampling"),
    ("request", "described", "schema"),
    ("geometry",),
    ("presets",),
    ("settings", "remembered", "out_of_memory"),
    ("untrusted",),
    ("config",),
    ("files", "units", "nano_words", "hardware"),
)
LEVEL = {name: len(LAYERS) - n for n, names in enumerate(LAYERS) for name in names}
KERNELS = {
    "flash_attn",
    "flash_attn_interface",
    "sageattention",
    "sageattn3",
    "xformers",
    "spas_sage_attn",
    "triton",
    "bitsandbytes",
    "torchao",
}
# Statements, not lines: a limit on lines buys density.
MAX_FILE, MAX_FUNCTION = 280, 45


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(FILES[file].read_text(encoding="utf-8"), file)


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of every file, with the file's name."""
    for file in FILES:
        for node in ast.walk(tree(file)):
            yield file, node


def module_name(file: str) -> str:
    """`models/dit.py` -> `wanflow.models.dit`; a package's `__init__.py` is the package."""
    parts = ("wanflow", *Path(file).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(file: str, node: ast.AST) -> list[str]:
    """The full names that a node imports: `a.b` for a module, `a.b.c` for a name `c` out of it."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module_name(file).split(".")
            package = package if file.endswith("__init__.py") else package[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if (
        isinstance(node, ast.Call)
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    ):
        called = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        if called in ("import_module", "__import__"):
            return [node.args[0].value]
    return []


def all_imports() -> Iterator[tuple[str, str]]:
    for file, node in nodes():
        for name in imports(file, node):
            yield file, name


def unit(module: str) -> str:
    """The name in LAYERS that a module of ours belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def ours(name: str) -> str | None:
    """The module of ours that an imported name comes from."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def edges() -> Iterator[tuple[str, str]]:
    """(importing module, imported module), of ours, deferred imports too."""
    for file, name in all_imports():
        target = ours(name)
        # `from wanflow import __version__` reads a fact of the package, which is loaded before any
        # of its modules
        if target and name != "wanflow.__version__":
            yield module_name(file), target


def places(found: Iterator[str] | list[str]) -> None:
    found = sorted(set(found))
    assert not found, "\n" + "\n".join(found)


# Arrows that still point upwards while the packages move; this set must end empty.
PENDING: set[tuple[str, str]] = set()


def test_every_file_has_a_layer() -> None:
    places(
        [
            f"{file}: give it a line in LAYERS"
            for file in FILES
            if unit(module_name(file)) not in LEVEL
        ]
    )


def test_arrows() -> None:
    found = []
    for source, target in edges():
        a, b = unit(source), unit(target)
        if a != b and LEVEL.get(b, 0) >= LEVEL.get(a, 0) and (source, target) not in PENDING:
            found.append(f"{source} imports {target}, which does not stand below it")
    places(found)


def test_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for source, target in edges():
        if source != target:
            graph.setdefault(source, set()).add(target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_config_needs_only_the_standard_library() -> None:
    light = ("config", "untrusted", "settings", "presets", "geometry", "request")
    found = [
        name
        for file, name in all_imports()
        if file in (*(f"{name}.py" for name in light), "checkpoint/key_maps.py")
        and not name.startswith(tuple(f"wanflow.{name}" for name in light))
    ]
    places([name for name in found if name.split(".")[0] not in sys.stdlib_module_names])


def top(name: str) -> str:
    return name.partition(".")[0]


def test_distributed_only_in_parallel() -> None:
    found = [file for file, name in all_imports() if f"{name}.".startswith("torch.distributed.")]
    found += [
        file
        for file, node in nodes()
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed")
    ]
    places([f"{file}: torch.distributed" for file in found if not file.startswith("parallel/")])


def test_kernels_only_in_transforms() -> None:
    places(
        [
            f"{file}: {name}"
            for file, name in all_imports()
            if top(name) in KERNELS and not file.startswith("transforms/")
        ]
    )


def test_peers_and_oracles_nowhere() -> None:
    places(
        [
            f"{file}: {name}"
            for file, name in all_imports()
            if top(name) in ("diffusers", "transformers", "wan")
            and (file, name) != ("bench/against.py", "diffusers")  # what `--against` asks for
        ]
    )


def test_environment_only_in_two_places() -> None:
    words = ("environ", "environb", "getenv", "putenv", "unsetenv")
    found = [file for file, name in all_imports() if name in {f"os.{word}" for word in words}]
    for file, node in nodes():
        if (
            isinstance(node, ast.Attribute)
            and node.attr in words
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        ):
            found.append(file)
    places(
        [
            f"{file}: environment variables"
            for file in found
            if file not in ("cli.py", "parallel/ranks.py") and not file.startswith("cli/")
        ]
    )


def test_only_files_publishes() -> None:
    """Renaming and flushing to the disk have one home; the doctor times a flush."""
    words = {f"os.{word}" for word in ("replace", "rename", "renames", "link", "fsync")}
    found = [f"{file}: {name}" for file, name in all_imports() if name in words]
    found += [
        f"{file}: {ast.unparse(node)}"
        for file, node in nodes()
        if isinstance(node, ast.Attribute) and ast.unparse(node) in words
    ]
    homes = ("files.py: ", "doctor/environment.py: os.fsync")
    places([place for place in found if not place.startswith(homes)])


def test_only_screen_draws() -> None:
    drawing = [(file, name) for file, name in all_imports() if top(name) == "rich"]
    places([f"{file}: {name}" for file, name in drawing if file != "screen.py"])


def test_no_global() -> None:
    places(
        [
            f"{file}:{node.lineno}: global {', '.join(node.names)}"
            for file, node in nodes()
            if isinstance(node, ast.Global)
        ]
    )


def test_nothing_left_unfinished() -> None:
    marks = re.compile(r"\b(TODO|FIXME|NotImplementedError)\b")
    found = []
    for file, path in FILES.items():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if marks.search(line):
                found.append(f"{file}:{number}: {line.strip()}")
    places(found)


def statements(node: ast.AST) -> int:
    """Statements within a node, docstrings not counted."""
    return sum(
        isinstance(part, ast.stmt)
        and not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        for part in ast.walk(node)
    )


def test_files_are_small() -> None:
    counts = {file: statements(tree(file)) for file in FILES}
    places(
        [
            f"{file}: {count} statements, at most {MAX_FILE}"
            for file, count in counts.items()
            if count > MAX_FILE
        ]
    )


def test_functions_are_small() -> None:
    found = []
    for file, node in nodes():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = statements(node) - 1
            if count > MAX_FUNCTION:
                found.append(
                    f"{file}:{node.lineno}: {node.name} has {count} statements,"
                    f" at most {MAX_FUNCTION}"
                )
    places(found)


def test_benchmarks_import_what_there_is() -> None:
    found = []
    for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or top(node.module or "") != "wanflow":
                continue
            module = importlib.import_module(str(node.module))
            found += [
                f"{path.name}: {node.module} has no {alias.name}"
                for alias in node.names
                if not hasattr(module, alias.name) and f"{node.module}.{alias.name}" not in MODULES
            ]
    places(found)


def test_no_test_imports_another() -> None:
    tests = Path(__file__).parents[1]
    importing = re.compile(r"^\s*(?:from|import) (?:test_\w+|conftest)\b", re.MULTILINE)
    places(
        [
            f"{path.relative_to(tests)}: share it through helpers/"
            for path in tests.rglob("*.py")
            if importing.search(path.read_text(encoding="utf-8"))
        ]
    )


@pytest.mark.parametrize(
    "module",
    [
        "wanflow",
        "wanflow.config",
        "wanflow.request",
        "wanflow.runtime",
        "wanflow.checkpoint.key_maps",
    ],
)
def test_import_stays_light(module: str) -> None:
    """Importing the package, its settings or its tables of names loads no torch, and nothing else
    from outside.
    """
    code = (
        f"import sys; before = set(sys.modules); import {module}; print(*(set(sys.modules) -"
        " before))"
    )
    path = os.pathsep.join([str(ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    loaded = {top(name) for name in run.stdout.split()}
    assert "torch" not in loaded
    places([name for name in loaded - {"wanflow"} if name not in sys.stdlib_module_names])


# The rules themselves, on sources that break them: a net with a hole in it would pass everything.


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("models/dit.py", "import wanflow.pipeline", ["wanflow.pipeline"]),
        (
            "models/dit.py",
            "from wanflow import pipeline, media",
            ["wanflow.pipeline", "wanflow.media"],
        ),
        ("models/dit.py", "from . import vae", ["wanflow.models.vae"]),
        ("models/dit.py", "from ..config import DiTConfig", ["wanflow.config.DiTConfig"]),
        ("models/__init__.py", "from .dit import WanDiT", ["wanflow.models.dit.WanDiT"]),
        ("models/dit.py", "importlib.import_module('wanflow.cli')", ["wanflow.cli"]),
        (
            "models/dit.py",
            "from torch.distributed import all_gather",
            ["torch.distributed.all_gather"],
        ),
    ],
)
def test_imports_are_seen(file: str, line: str, expected: list[str]) -> None:
    assert [name for node in ast.walk(ast.parse(line)) for name in imports(file, node)] == expected


def test_levels() -> None:
    assert (
        LEVEL["cli"]
        > LEVEL["train"]
        == LEVEL["serve"]
        > LEVEL["plan"]
        > LEVEL["checkpoint"]
        > LEVEL["sampling"]
        > LEVEL["config"]
        > 0
    )
    assert (
        ours("wanflow.config.DiTConfig") == "wanflow.config"
        and unit("wanflow.models.dit") == "models"
        and unit("wanflow") == "__init__"
    )
    assert ours("wanflow.load") == "wanflow" and ours("torch.nn") is None


# --- the core ---

CORE = ("api", "conditioning", "config", "files", "geometry", "models", "pipeline")
CORE += ("presets", "recipe", "request", "sampling", "sanity")
# Tools below the core, which tell nothing of how a prompt becomes a video.
TOOLS = ("settings", "untrusted", "options")
CORE_LINES = 4000  # readable in an evening


def test_the_core_imports_nothing_of_the_rest() -> None:
    places(
        [
            f"{source} imports {target}, which is not of the core"
            for source, target in edges()
            if unit(source) in CORE and unit(target) not in (*CORE, *TOOLS)
        ]
    )


def test_options_are_types_only() -> None:
    """Type checkers and editors read `options`; nothing runs it."""
    guarded = {
        id(part)
        for file, node in nodes()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in ast.walk(node)
    }
    places(
        [
            f"{file}:{node.lineno}: import it under TYPE_CHECKING"
            for file, node in nodes()
            if isinstance(node, ast.ImportFrom)
            and node.module == "wanflow.options"
            and id(node) not in guarded
        ]
    )


def test_the_core_is_small() -> None:
    files = [path for file, path in FILES.items() if unit(module_name(file)) in CORE]
    assert {unit(module_name(file)) for file in FILES} >= set(CORE)
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) < CORE_LINES


def test_the_loop_knows_nothing_of_the_machine() -> None:
    words = re.compile(r"\b(ranks?|tiles?|strips?|loras?|caches?)\b", re.IGNORECASE)
    text = FILES["pipeline.py"].read_text(encoding="utf-8")
    places([line for line in text.splitlines() if words.search(line)])
