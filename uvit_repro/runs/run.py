"""Names that moved; to be removed when nothing imports them from here."""

# ruff: noqa: F401
from uvit_repro.runs.certificate import cached_certificate, certificate
from uvit_repro.runs.chapters import cell_seconds, execute, run_chapter
from uvit_repro.runs.checkpoints import load_weights
from uvit_repro.runs.evaluate import (
    measurements_of,
    missing_measurements,
    read_samples,
    samples_folder,
)
from uvit_repro.runs.experiment import (
    Run,
    chapter_parameters,
    is_done,
    open_experiment,
    repeat_command,
    run_experiment,
    run_folder,
)
from uvit_repro.runs.processes import default_workers
from uvit_repro.runs.training import plot_loss, read_log, train
