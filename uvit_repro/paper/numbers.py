"""Every published number is a row of a table that ships with the package: with its source, its condition, where it was seen, and how far to trust it."""

import functools
import re
from importlib import resources

import pandas as pd

from uvit_repro.config import Experiment


def read_table(
    name: str,  # a file of uvit_repro/paper/tables
) -> pd.DataFrame:
    "A file of the record with every cell as text, as printed (`none` is a word here, not a gap)."
    path = resources.files("uvit_repro") / "paper" / "tables" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} is not in uvit_repro/paper/tables: the installation is incomplete; reinstall the package"
        )
    with path.open(encoding="utf-8") as f:
        return pd.read_csv(f, dtype=str, keep_default_na=False)


def parse_count(
    text: str,  # a condition, as in `10K samples; 1M iterations`
    unit: str,  # regular expression of the unit
):  # the number before the unit, or NA
    "`parse_count('10K samples', 'samples')` is 10000."
    m = re.search(rf"(\d+(?:\.\d+)?)([KM]?) (?:{unit})\b", text)
    return round(float(m[1]) * {"": 1, "K": 1000, "M": 1_000_000}[m[2]]) if m else pd.NA


@functools.lru_cache(None)
def all_numbers() -> pd.DataFrame:
    "Both tables under each other with the parsed columns. Cached: do not change it in place, use `load_paper`."
    ours = read_table("uvit_tables.csv")
    ours.insert(0, "paper", "U-ViT")
    df = pd.concat([ours, read_table("other_tables.csv")], ignore_index=True)
    counts = {
        "num_samples": "samples|validation prompts",
        "steps": "iterations",
        "nfe": r"(?:[\w-]+ )?steps",
    }
    df["number"] = pd.to_numeric(df["value"], errors="coerce")
    for col, unit in counts.items():
        df[col] = pd.array([parse_count(c, unit) for c in df["condition"]], dtype="Int64")
    df["reading_error"] = (
        df["condition"].str.extract(r"\+-(\d+(?:\.\d+)?)", expand=False).astype(float)
    )
    return df


def load_paper(
    source: str = None,  # `Table 1`, `Figure 2a`, ...; None: all
    dataset: str = None,  # as the paper writes it: `CIFAR10`, `ImageNet 256x256`; None: all
    metric: str = None,  # `FID`, `params_M`, ...; None: all
    paper: str = "U-ViT",  # U-ViT | DiffiT | GenViT; None: all
) -> pd.DataFrame:  # rows; `value` as printed, `number`, `num_samples`, `steps` (iterations), `nfe`, `reading_error` where there are any
    "Published numbers, one per row. `ValueError` with the known values for a name that is not there."
    df = all_numbers()
    for col, want in {
        "paper": paper,
        "source": source,
        "dataset": dataset,
        "metric": metric,
    }.items():
        if want is None:
            continue
        known = list(dict.fromkeys(df[col]))
        if want not in known:
            raise ValueError(f"{col} = {want!r}: known are {', '.join(map(repr, known))}")
        df = df[df[col] == want]
    return df.copy().reset_index(drop=True)


def published(
    source: str,  # as in `load_paper`
    dataset: str,  # as in `load_paper`; `""` for rows about a model alone
    method: str,  # the row's method, as printed
    metric: str,  # as in `load_paper`
    paper: str = "U-ViT",  # U-ViT | DiffiT | GenViT
    **cond,  # further columns (num_samples, steps, nfe, confidence, ...); `condition` may be any part of the text, in whole words
) -> float:  # the one number
    "The published number that these names single out; `ValueError` naming the candidates when none or several match."
    rows = load_paper(source, dataset, metric, paper)
    if bad := set(cond) - set(rows.columns):
        raise ValueError(
            f"unknown condition {', '.join(sorted(bad))}: columns are {', '.join(rows.columns)}"
        )
    hits = rows[rows["method"] == method]
    for k, v in cond.items():
        same = (
            hits[k].str.contains(rf"(?<![\w.]){re.escape(v)}(?!\w)")
            if k == "condition"
            else hits[k] == v
        )
        hits = hits[same.fillna(False).astype(bool)]
    if "confidence" not in cond:
        hits = hits[hits["confidence"] != "low"]
    if len(hits) == 1 and pd.notna(hits["number"].iloc[0]):
        return float(hits["number"].iloc[0])
    near = (
        hits
        if len(hits)
        else rows[rows["method"] == method]
        if (rows["method"] == method).any()
        else rows
    )
    what = "the value is a word" if len(hits) == 1 else f"{len(hits) or 'no'} rows match"
    listing = "; ".join(
        f"{r.method!r} ({r.condition or 'no condition'}; confidence {r.confidence}) = {r.value}"
        for r in near.head(12).itertuples()
    )
    raise ValueError(
        f"{what} for {source}, {dataset}, {method!r}, {metric}, {cond}. Candidates: {listing}"
        + (f"; and {len(near) - 12} more" if len(near) > 12 else "")
    )


FIGURE2 = {  # panel: (title, [(label, fields of ModelConfig), ...]), the adopted variant first
    "a": (
        "Long skip",
        [
            ("(1) Linear(Concat(h_m, h_s))", {}),
            ("(2) h_m + h_s", {"skip": "add"}),
            ("(3) h_m + Linear(h_s)", {"skip": "add_linear"}),
            ("(4) Linear(h_m + h_s)", {"skip": "linear_add"}),
            ("(5) No long skip", {"skip": "none"}),
        ],
    ),
    "b": ("Time", [("(1) Time as a token", {}), ("(2) AdaLN", {"time": "adaln"})]),
    "c": (
        "Extra convolution",
        [
            ("(1) After the linear layer", {}),
            ("(2) Before the linear layer", {"conv": "before"}),
            ("(3) None", {"conv": "none"}),
        ],
    ),
    "d": (
        "Patch embedding",
        [("(1) Linear", {}), ("(2) Stack of convolutions", {"patch_embed": "conv"})],
    ),
    "e": (
        "Position embedding",
        [
            ("(1) 1-D learnable", {}),
            ("(2) 2-D sinusoidal", {"pos_embed": "sincos2d"}),
            ("(3) None", {"pos_embed": "none"}),
        ],
    ),
}


def figure2(
    panel: str = None,  # a | b | c | d | e; None: all five
) -> pd.DataFrame:  # panel, variant, overrides, steps (iterations), fid (10K samples), error (of reading, +-), confidence
    "The curves of Figure 2 as digitised, the adopted variant of each panel first."
    if panel is not None and panel not in FIGURE2:
        raise ValueError(f"panel = {panel!r}: known are {', '.join(FIGURE2)}")
    rows = []
    for p in FIGURE2 if panel is None else [panel]:
        curves = load_paper(f"Figure 2{p}", "CIFAR10", "FID").sort_values("steps")
        for label, overrides in FIGURE2[p][1]:
            mine = curves[
                curves["method"].str.contains(label[:3], regex=False)
            ]  # "(2)": the paper's numbering is in both
            rows += [
                {
                    "panel": p,
                    "variant": label,
                    "overrides": dict(overrides),
                    "steps": int(r.steps),
                    "fid": r.number,
                    "error": r.reading_error,
                    "confidence": r.confidence,
                }
                for r in mine.itertuples()
            ]
    return pd.DataFrame(rows)


def table2() -> (
    pd.DataFrame
):  # index: method; columns layers, hidden_size, mlp_size, heads, params_M
    "Table 2, one row per model."
    df = load_paper("Table 2")
    wide = df.pivot(index="method", columns="metric", values="number").astype(int)
    return wide.loc[
        list(dict.fromkeys(df["method"])), list(dict.fromkeys(df["metric"]))
    ].rename_axis(columns=None)


def table5() -> (
    pd.DataFrame
):  # index: (dataset, method); a column per setting, NaN where a configuration has none
    "The released configurations that Table 5 summarises, one row per (dataset, method)."
    df = load_paper("Table 5")
    df = df[df["condition"].str.contains("value in the official config", regex=False)]
    df["cell"] = df["number"].astype(object).where(df["number"].notna(), df["value"])
    wide = df.pivot(index=["dataset", "method"], columns="metric", values="cell")
    wide = wide.loc[
        list(dict.fromkeys(zip(df["dataset"], df["method"]))), list(dict.fromkeys(df["metric"]))
    ].rename_axis(columns=None)
    wide = wide.infer_objects()
    whole = [
        c for c in wide.select_dtypes("number") if (wide[c] % 1 == 0).all()
    ]  # a missing value is not whole
    return wide.astype(dict.fromkeys(whole, int))


def as_table5(
    exp: Experiment,  # any
) -> dict:  # setting of Table 5 -> value, without those that do not apply
    "The row of Table 5 that an experiment amounts to."
    m, d, t, s = exp.model, exp.data, exp.train, exp.sampling
    process = {"vp": "VP-SDE continuous", "sd": "Stable Diffusion discrete (1000 steps)"}.get(
        exp.diffusion.process, exp.diffusion.process
    )
    sampler = {
        "euler_maruyama": "Euler-Maruyama SDE",
        "dpm_solver_fast": "DPM-Solver-fast",
        "dpm_solver_pp_fast": "DPM-Solver++ (fast, order 3)",
    }.get(s.sampler, s.sampler)
    row = {
        "weight_decay": t.weight_decay,
        "lr_schedule": ("linear warm-up then " if t.warmup_steps else "") + t.lr_schedule,
        "ema_rate": t.ema_rates[0],
        "prediction": exp.diffusion.prediction,
        "grad_clip": t.grad_clip or "none",
        "mixed_precision": t.precision,
        "patch_size": m.patch_size,
        "batch_size": t.batch_size,
        "iterations": t.n_steps,
        "lr": t.lr,
        "beta1": t.betas[0],
        "beta2": t.betas[1],
        "warmup_steps": t.warmup_steps,
        "noise_schedule": process,
        "sampler": sampler,
        "sampling_steps": s.nfe,
        "n_eval_samples": exp.evaluation.num_samples,
        "horizontal_flip": "yes" if d.flip else "no",
        "final_conv3x3": "yes" if m.conv == "after" else "no",
    }
    row["latent_shape" if s.decoder else "image_shape"] = f"{d.in_chans}x{d.img_size}x{d.img_size}"
    if s.decoder:
        row.update(decoder={"ema": "ft-EMA"}.get(s.decoder, s.decoder), latent_scale=d.latent_scale)
    if t.p_uncond:
        row.update(p_uncond=t.p_uncond, cfg_scale=round(s.cfg_scale - 1, 10))
    return row


def figure7(
    setting: str,  # `concatenation`, `addition` or `no long skip`
) -> pd.DataFrame:  # 13x13 CKA between the outputs of layers 0..12
    "One matrix of Figure 7 as digitised."
    df = read_table("uvit_fig7_cka.csv")
    known = list(dict.fromkeys(df["setting"]))
    if setting not in known:
        raise ValueError(f"setting = {setting!r}: known are {', '.join(map(repr, known))}")
    df = df[df["setting"] == setting].astype({"block_i": int, "block_j": int, "cka": float})
    return df.pivot(index="block_i", columns="block_j", values="cka")


def load_claims() -> (
    pd.DataFrame
):  # one row per claim; `protocol` is the code in front of `cheapest_protocol`
    "The checkable claims of the papers."
    df = read_table("claims.csv")
    df["protocol"] = df["cheapest_protocol"].str.split().str[0]
    return df
