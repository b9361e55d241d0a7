#!/usr/bin/env python3
"""Downloads the weights of Wan2.2-T2V-A14B: `python download_T2V_A14B_weights.py ...` is `wanflow
download ...`.
"""

import sys
from pathlib import Path

NAME, HOME = Path(__file__).name, Path(__file__).resolve().parent

if sys.version_info < (3, 11):  # noqa: UP036 - whoever starts a script may have an older Python
    sys.exit(
        f"{NAME}: this is Python {sys.version_info[0]}.{sys.version_info[1]}, and wanflow needs"
        " 3.11 or newer"
    )

try:
    from wanflow.cli import entry
except ModuleNotFoundError:
    sys.path.insert(0, str(HOME / "src"))
    try:
        from wanflow.cli import entry
    except ModuleNotFoundError as error:
        sys.exit(
            f"{NAME}: {error.name} is not installed; say `pip install .` in {HOME}, or `make"
            " install` and use .venv/bin/python"
        )

if __name__ == "__main__":
    entry(["download", *sys.argv[1:]])
