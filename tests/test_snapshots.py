"""What the model makes, what Python and the command line offer, and what is refused: as recorded.

The records are in tests/snapshots; an intended change is named in `INTENDED` of its record.py, or,
for a test of a refusal, in `RENAMED` below.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from snapshots import record

TESTS = Path(__file__).parent

# {"test_old_name": "test_new_name, or why it is gone"}
RENAMED: dict[str, str] = {
    # Streaming and LoRAs.
    "test_a_file_that_is_cut_while_blocks_are_streamed_ends_in_words": (
        "test_a_file_that_is_cut_while_blocks_are_streamed_is_named"
    ),
    "test_a_pass_that_breaks_off_leaves_the_next_one_whole": (
        "test_an_abandoned_pass_leaves_the_next_one_right"
    ),
    "test_an_expert_that_cannot_be_read_ahead_is_told_when_it_is_wanted": (
        "test_a_prefetch_that_failed_raises_when_the_expert_is_needed"
    ),
    "test_parts_know_only_what_they_are_asked_for": (
        "test_a_missing_file_is_found_before_anything_is_read"
    ),
    # Several ranks: the scenarios were cut to those that differ.
    "test_a_bad_request_to_torchrun_is_said_once": (
        "test_a_request_that_all_ranks_refuse_names_none"
    ),
    "test_a_run_of_one_process_goes_on_with_two": "test_a_run_of_one_process_resumes_on_two",
    "test_a_run_that_was_cut_goes_on_with_another_number_of_processes": (
        "test_all_ranks_end_and_the_run_resumes"
    ),
    "test_gpus_and_torchrun_do_not_both_start_processes": (
        "test_gpus_and_torchrun_do_not_both_start_ranks"
    ),
    "test_names_that_are_no_parameters": "gone with `fsdp.whole`, which only tests called",
    # Plan and doctor.
    "test_a_planner_that_fails_costs_only_its_advice": (
        "test_a_plan_that_fails_costs_only_its_advice"
    ),
    "test_planning_nano_imports_no_compiler": (
        "test_planning_nano_imports_neither_tracing_nor_a_compiler"
    ),
}


@pytest.mark.slow
def test_bits() -> None:
    """Every latent, frame, file and recipe is what it was, where the machine can tell."""
    lines = record.check("bits")
    assert not lines, "\n".join(lines)


def test_api() -> None:
    """Every public name is there, with its signature, its fields and its defaults."""
    lines = record.check("api")
    assert not lines, "\n".join(lines)


def test_flags() -> None:
    """Every flag of every command is there, and takes and means what it did."""
    lines = record.check("flags")
    assert not lines, "\n".join(lines)


def test_refusals() -> None:
    """Every test that saw something refused is there."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in TESTS.rglob("test_*.py"))
    functions = {
        node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }
    gone = set(record.recorded("refusals")) - functions - set(RENAMED)
    gone |= {new for new in RENAMED.values() if new.startswith("test_")} - functions
    assert not gone, "\n".join(sorted(gone))


def test_a_difference_is_seen() -> None:
    """What is gone or another is said, what is new is not."""
    recorded = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    found = {"a": {"b": 2, "new": 0}, "e": 0}
    assert record.differences(recorded, recorded, "x") == []
    assert record.differences(recorded, found, "x") == [
        "x/a/b: was 1, is 2",
        "x/a/c: is gone",
        "x/d: is gone",
    ]
