"""This process's place among those that torchrun started, as torchrun says it in the environment. Imports no torch."""

import os

from offline_bkd.pipeline import UserError


def rank() -> int:
    """Which of all processes this is, from 0."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Which of this machine's processes this is, from 0."""
    return _number("LOCAL_RANK", 0)


def local_world() -> int:
    """How many processes of this machine there are."""
    return _number("LOCAL_WORLD_SIZE", 1)


def world() -> int:
    """How many processes there are."""
    return _number("WORLD_SIZE", 1)


def _number(name: str, alone: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"the environment's {name} is {text!r}, where torchrun sets a number; unset it, or start by torchrun")
    return int(text or alone)
