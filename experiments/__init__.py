"""Experiments with the optimizers: data, models, flow matching, comparisons at equal seconds.

Imported from the clone after `pip install -e ".[experiments]"`; not part of the installed package.
"""
