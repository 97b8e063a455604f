"""Measure a trained network again with other sampling."""

import pandas as pd

from uvit_repro.config import with_overrides
from uvit_repro.runs.evaluate import measurements_of, samples_folder
from uvit_repro.runs.experiment import Run, run_experiment


def remeasure(
    run: Run,  # a finished run, of `run_experiment`
    num_samples: int,  # images of each measurement
    variations: list,  # dicts of fields of SamplingConfig, each one measurement
    say=print,  # progress
    chapter="07_imagenet",  # noted beside the measurements
    paper_ref="",  # noted beside the measurements
) -> pd.DataFrame:  # a row per variation: its fields, folder of samples, eval_id, every metric
    "Measure a network with other sampling. Nothing is trained; what is recorded is not repeated."
    about, once = (
        {"chapter": chapter, "paper_ref": paper_ref},
        {"curve_steps": (), "loss_steps": ()},
    )
    rows = []
    for fields in variations:
        exp = with_overrides(run.exp, num_samples=num_samples, **once, **fields)
        again = run_experiment(exp, run.folder.parent, say, **about)
        m, found = measurements_of(again.exp)[-1], again.measurements()
        own = found[(found.eval_id == m.eval_id) & (found.status == "ok")]
        samples = samples_folder(m.exp, run.folder, m.step, num_samples)
        values = own.set_index("metric").value.to_dict()
        rows.append({**fields, "samples": samples, "eval_id": m.eval_id, **values})
    return pd.DataFrame(rows)
