"""Every kind of step, whoever runs a program: the rooms that offer them are imported here, and here alone."""

from __future__ import annotations

from . import apart, children, commands, leaving, operations
from .words import STEP_KINDS

ROOMS = (apart, children, commands, leaving, operations)
do = operations.do

assert set(operations.OPERATIONS) == set(STEP_KINDS), "a kind of step without a function"
