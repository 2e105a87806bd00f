"""The expert store: experts that do not all fit in fast memory live on disk or in host memory, and come when used.

A fast tier of fixed size (`slots`) over a slow one (`source`); a policy (`policies/`) says which expert leaves, and
a predictor (`predict`) which come early.
"""
