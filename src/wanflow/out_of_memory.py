"""Tell whether memory ran out, and what takes less: by type, and by the words of libraries."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

from wanflow.untrusted import printable

# cuBLAS and cuDNN allocate when they make a handle or look for an algorithm, and NCCL when it makes
# a communicator: each fails in its own words.
WORDS = re.compile(
    r"out of memory|can(no|')t allocate memory|DefaultCPUAllocator|bad_alloc|_ALLOC\w*_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `?cublas\w*Create"
    r"|unable to find an engine"
    r"|ncclUnhandledCudaError.*\b\w*alloc\b",
    re.IGNORECASE | re.DOTALL,
)
# What takes less, where nothing is known of what ran out.
WAYS = (
    "--chunk_tokens 2048",
    "--resident_blocks",
    "--vae_tile 256",
    "--offload_model True",
    "--quantize fp8",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or a CPU."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:  # torch's, unimported
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and WORDS.search(str(error)) is not None


def cause(error: BaseException) -> str:
    """Return the first line of an error, shortened."""
    lines = str(error).splitlines() or [type(error).__name__]
    return printable(lines[0], 160).rstrip(".")


def words(error: BaseException) -> str:
    """Return one line: where memory ran out, and what takes less; both are in a note if known."""
    note = next(iter(getattr(error, "__notes__", ())), f": {listed(WAYS)}")
    place, _, ways = note.partition(": ")
    return f"out of memory{place and ' '}{place}: {cause(error)}; {ways}"


def listed(ways: Sequence[str]) -> str:
    """Return a sentence of flags that take less memory; the size of the video comes last."""
    last = "a smaller --size or fewer frames"
    if not ways:
        return f"{last} take less"
    return f"{', '.join(ways)} {'take' if len(ways) > 1 else 'takes'} less, and last {last}"
