"""Measure a trained network again with other sampling."""

from dataclasses import replace

import pandas as pd

from uvit_repro.config import eval_id
from uvit_repro.runs.evaluate import samples_folder
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
    step, rows = run.exp.train.n_steps, []
    for fields in variations:
        evaluation = replace(
            run.exp.evaluation, num_samples=num_samples, curve_steps=(), loss_steps=()
        )
        sampling = replace(run.exp.sampling, **fields)
        exp = replace(run.exp, sampling=sampling, evaluation=evaluation)
        exp = run_experiment(exp, run.folder.parent, say, chapter=chapter, paper_ref=paper_ref).exp
        samples = samples_folder(exp, run.folder, step, num_samples)
        rows.append({**fields, "samples": samples, "eval_id": eval_id(exp, step, num_samples)})
    found = run.measurements()
    found = found[found.status == "ok"]
    for row in rows:
        own = found[found.eval_id == row["eval_id"]]
        row.update(own.set_index("metric").value.to_dict())
    return pd.DataFrame(rows)
