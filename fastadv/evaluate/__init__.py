"""Evaluation: attacks on fast twins, the verdict on the model itself in float32."""

from ..attacks.suite import PAPER
from .corruptions import corruption_stages
from .curve import distances
from .networks import check_fits, check_names, from_code, from_run
from .record import Record
from .report import describe, rates, table
from .search import accuracies, correct, run

__all__ = [
    "PAPER",
    "Record",
    "accuracies",
    "check_fits",
    "check_names",
    "correct",
    "corruption_stages",
    "describe",
    "distances",
    "from_code",
    "from_run",
    "rates",
    "run",
    "table",
]
