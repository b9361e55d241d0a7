"""Write our OpenAPI document: `python -m wanflow.serve.document > src/wanflow/serve/openapi.json`.

The document in the package is frozen: a test fails where the program offers something else, so a
change of the interface is a change of that file, which a reader of the history sees.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wanflow.presets import NANO
from wanflow.serve.fitting import Fitting
from wanflow.serve.folder import DataFolder
from wanflow.serve.http import create_app
from wanflow.serve.limits import Limits
from wanflow.serve.planner import Planner
from wanflow.serve.service import Service


def document() -> dict[str, Any]:
    """Return what the program offers; the version of the package is no part of it."""
    store: Any = None  # which nobody asks
    nowhere = Service(store, DataFolder(Path()), Limits(), NANO, {}, Fitting(Planner(None, {})))
    found = create_app(nowhere).openapi()
    found["info"]["version"] = "1"
    return found


if __name__ == "__main__":
    print(json.dumps(document(), indent=1, ensure_ascii=False))
