#!/usr/bin/env python3
"""The official entry point's name and flags: `python generate.py ...` is `wanflow generate ...`."""

import sys
from pathlib import Path

try:
    from wanflow.cli import entry
except ModuleNotFoundError as error:
    if error.name != "wanflow":
        sys.exit(
            f"generate.py: {error.name} is missing; run `make install`, then .venv/bin/python"
            " generate.py ..."
        )
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
    from wanflow.cli import entry

if __name__ == "__main__":
    entry(["generate", *sys.argv[1:]])
