"""Name fields where a message names flags: a caller from Python has no flags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from wanflow.config import RequestError
from wanflow.sanity import OutputError

# Commands stay as they are: they are typed into a shell.
FLAG = re.compile(r"(`[^`]*`|\bwanflow [a-z]+( --\w+)+)|--(\w+)")
FIELDS = {"ckpt_dir": "model", "lora_mode": "lora", "base_seed": "seed", "save_file": "path"}


def in_fields(text: str) -> str:
    """Return a message with `name` in place of each flag `--name`."""
    text = text.replace("--offload_model False", "keep_experts True")
    return FLAG.sub(lambda found: found[1] or FIELDS.get(found[3], found[3]), text)


@contextmanager
def without_flags() -> Iterator[None]:
    """Let the refusals of a block, and notes on errors, speak of fields."""
    try:
        yield
    except (RequestError, OutputError) as error:
        error.args = tuple(in_fields(str(line)) for line in error.args)
        raise
    except Exception as error:
        if hasattr(error, "__notes__"):
            error.__notes__ = [in_fields(note) for note in error.__notes__]
        raise
