"""Experiments: records, statistics, tables, figures, costs, ensembles, the paper's numbers.

`plots`, `cost`, `embeddings`, `ensemble` and `paper` are imported by their own names, so that this
package stays light.
"""

from __future__ import annotations

from .records import (
    append_record,
    config_hash,
    make_record,
    merge_records,
    missing,
    read_records,
    record_key,
    select,
)
from .stats import accuracy_error, holm, spread, welch, wilcoxon

__all__ = [
    "accuracy_error",
    "append_record",
    "config_hash",
    "holm",
    "make_record",
    "merge_records",
    "missing",
    "read_records",
    "record_key",
    "select",
    "spread",
    "welch",
    "wilcoxon",
]
