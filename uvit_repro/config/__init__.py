"""What one experiment is, and what its run is called."""

from uvit_repro.config.core import *  # noqa: F403
