"""What a request needs, what a machine has, how it is run there, and whether to start: decided
before a weight is read.
"""

from wanflow.checkpoint.checkpoint import published
from wanflow.plan.gpus import Machine, described, this_machine
from wanflow.plan.solve import Plan, solve
from wanflow.plan.starting import (
    WHERE_ELSE,
    advice,
    enough_for_full_size,
    make_plan,
    needed_words,
    plan_or_raise,
    raise_if_unfit,
)

__all__ = [
    "WHERE_ELSE",
    "Machine",
    "Plan",
    "advice",
    "described",
    "enough_for_full_size",
    "make_plan",
    "needed_words",
    "plan_or_raise",
    "published",
    "raise_if_unfit",
    "solve",
    "this_machine",
]
