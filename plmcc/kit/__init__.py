"""Building blocks for passes, public for third parties."""

from plmcc.ir.calibration import observing
from plmcc.ir.probes import positions_of, probe_inputs
from plmcc.ir.sharing import unlike
from plmcc.kit.attention import beams_as_queries, bias_of_places, queries_as_beams
from plmcc.kit.integers import check_counts, check_range, check_starts
from plmcc.kit.linear import HardLinear, matched_linears, weight_of
from plmcc.kit.replay import Replay
from plmcc.kit.soft import Trainable
from plmcc.kit.stacks import matched_stacks
from plmcc.kit.tables import (
    CompressedTable,
    LearningRate,
    Table,
    common_layout,
    matched_tables,
    reconstruction,
    table_of,
    weights_of,
)
from plmcc.utils.distributed import sum_over_processes
from plmcc.utils.files import matching_files
from plmcc.utils.numerics import relative_difference
from plmcc.utils.progress import Progress
from plmcc.utils.text import first_line

__all__ = [
    "CompressedTable",
    "HardLinear",
    "LearningRate",
    "Progress",
    "Replay",
    "Table",
    "Trainable",
    "beams_as_queries",
    "bias_of_places",
    "check_counts",
    "check_range",
    "check_starts",
    "common_layout",
    "first_line",
    "matched_linears",
    "matched_stacks",
    "matched_tables",
    "matching_files",
    "observing",
    "positions_of",
    "probe_inputs",
    "queries_as_beams",
    "reconstruction",
    "relative_difference",
    "sum_over_processes",
    "table_of",
    "unlike",
    "weight_of",
    "weights_of",
]
