# ruff: noqa: F403  (the names of this room are those of its modules)
"""What one experiment is, and what its run is called."""

from uvit_repro.config.identity import *
from uvit_repro.config.presets import *
from uvit_repro.config.protocols import *
from uvit_repro.config.schema import *
from uvit_repro.config.settings import *
