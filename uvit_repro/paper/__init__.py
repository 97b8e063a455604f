# ruff: noqa: F401  (the names that users of the library need)
"""Published numbers, the registry that maps each to an experiment, and claims."""

from uvit_repro.paper.claims import fixed_list, load_claims
from uvit_repro.paper.numbers import figure2, figure7, load_paper, published, table2
from uvit_repro.paper.registry import registry, select
