"""Tell the machine of a worker to those who plan for it: as JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from wanflow.plan.cards import GPUS
from wanflow.plan.gpus import Machine

LEFT_OUT = ("rates", "overheads")  # tables, which the reader looks up again


def facts(machine: Machine) -> dict[str, Any]:
    """Return a machine as JSON."""
    return {name: value for name, value in asdict(machine).items() if name not in LEFT_OUT}


def machine_of(facts: Mapping[str, Any]) -> Machine:
    """Return the machine of these facts; of another version's, what is known."""
    known = {one.name for one in fields(Machine)} - set(LEFT_OUT)
    machine = Machine(**{name: value for name, value in facts.items() if name in known})
    cards = (card for card in GPUS.values() if card.same_as(machine.gpu_name, machine.gpu))
    card = next(cards, None)
    return machine if card is None else replace(machine, rates=card.rates)
