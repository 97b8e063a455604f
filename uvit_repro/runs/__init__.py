"""One experiment, its record, its checkpoints."""

import importlib

_PUBLIC = {
    "run_experiment": "uvit_repro.runs.experiment",
    "load_results": "uvit_repro.runs.records",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    "Import on first use: light modules of this folder must not load the heavy ones."
    if name not in _PUBLIC:
        raise AttributeError(f"module 'uvit_repro.runs' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
