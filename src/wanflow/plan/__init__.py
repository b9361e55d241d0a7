"""What a request needs, what a machine has, how it is run there, and whether to start: decided
before a weight is read.
"""

from wanflow.plan.gpus import Machine, described, this_machine
from wanflow.plan.model import Model, describe, published
from wanflow.plan.opening import load
from wanflow.plan.solve import Plan, settle
from wanflow.plan.starting import (
    WHERE_ELSE,
    advice,
    enough_for_full_size,
    guard,
    needed_words,
    planned,
    refuse,
)

__all__ = [
    "WHERE_ELSE",
    "Machine",
    "Model",
    "Plan",
    "advice",
    "describe",
    "described",
    "enough_for_full_size",
    "guard",
    "load",
    "needed_words",
    "planned",
    "published",
    "refuse",
    "settle",
    "this_machine",
]
