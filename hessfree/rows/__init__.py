"""Rows of BᵀJ from the autograd graph of the outputs: as factors at Linear layers, whole elsewhere."""

from hessfree.rows.by_sample import Leading, sample_rows
from hessfree.rows.counting import Counts, counts_of
from hessfree.rows.factors import Factors, Rows, factored_rows
from hessfree.rows.gram import add_gram
from hessfree.rows.graph import OutputGraph
from hessfree.rows.reach import Uses

__all__ = [
    "Counts",
    "Factors",
    "Leading",
    "OutputGraph",
    "Rows",
    "Uses",
    "add_gram",
    "counts_of",
    "factored_rows",
    "sample_rows",
]
