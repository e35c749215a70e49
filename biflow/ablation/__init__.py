"""Ablations: rows of a table, each a flow and maybe a learned inverse, trained from several seeds and compared."""

from biflow.ablation.curves import steps_to_reach
from biflow.ablation.orderings import Ordering, compare, read_orderings
from biflow.ablation.runner import AblationRow, read_row, run_ablation
from biflow.ablation.semantics import SemanticsConfig
from biflow.ablation.semantics_table import semantics_table
from biflow.ablation.table import orderings_table, table

__all__ = [
    "AblationRow",
    "Ordering",
    "SemanticsConfig",
    "compare",
    "orderings_table",
    "read_orderings",
    "read_row",
    "run_ablation",
    "semantics_table",
    "steps_to_reach",
    "table",
]
