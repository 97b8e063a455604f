"""Published numbers: one row each, with source, condition, provenance and confidence."""

import functools
import re
from importlib import resources

import pandas as pd

from uvit_repro.config import Experiment

COUNTS = {  # column: the unit of the number that it takes from the condition
    "num_samples": "samples|validation prompts",
    "steps": "iterations",
    "nfe": r"(?:[\w-]+ )?steps",
}
PANELS = {
    "a": "Long skip",
    "b": "Time",
    "c": "Extra convolution",
    "d": "Patch embedding",
    "e": "Position embedding",
}
CURVES = (  # panel, curve, the changed field of `ModelConfig`; the adopted one comes first
    ("a", "(1) Linear(Concat(h_m, h_s))", {}),
    ("a", "(2) h_m + h_s", {"skip": "add"}),
    ("a", "(3) h_m + Linear(h_s)", {"skip": "add_linear"}),
    ("a", "(4) Linear(h_m + h_s)", {"skip": "linear_add"}),
    ("a", "(5) No long skip", {"skip": "none"}),
    ("b", "(1) Time as a token", {}),
    ("b", "(2) AdaLN", {"time": "adaln"}),
    ("c", "(1) After the linear layer", {}),
    ("c", "(2) Before the linear layer", {"conv": "before"}),
    ("c", "(3) None", {"conv": "none"}),
    ("d", "(1) Linear", {}),
    ("d", "(2) Stack of convolutions", {"patch_embed": "conv"}),
    ("e", "(1) 1-D learnable", {}),
    ("e", "(2) 2-D sinusoidal", {"pos_embed": "sincos2d"}),
    ("e", "(3) None", {"pos_embed": "none"}),
)
FIGURE2 = {  # panel: title, and its curves with the changed fields
    panel: (title, [(curve, fields) for p, curve, fields in CURVES if p == panel])
    for panel, title in PANELS.items()
}
PROCESSES = {"vp": "VP-SDE continuous", "sd": "Stable Diffusion discrete (1000 steps)"}
SAMPLERS = {
    "euler_maruyama": "Euler-Maruyama SDE",
    "dpm_solver_fast": "DPM-Solver-fast",
    "dpm_solver_pp_fast": "DPM-Solver++ (fast, order 3)",
}


def read_table(name: str) -> pd.DataFrame:
    "A file of paper/tables, every cell as text (`none` is a word here, not a gap)."
    path = resources.files("uvit_repro") / "paper" / "tables" / name
    try:
        with path.open(encoding="utf-8") as file:
            return pd.read_csv(file, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise damaged_table(name, error) from None


def damaged_table(name: str, error: Exception) -> ValueError:
    "The error for a file of paper/tables that cannot be read."
    what = f"{type(error).__name__}: {error}"[:200]
    return ValueError(f"paper/tables/{name} can't be read ({what}): reinstall uvit_repro")


def require(what: str, value: str, known):
    "Raise `ValueError` with the known values for one that is not among them."
    if value not in known:
        raise ValueError(f"{what} = {value!r}: known are {', '.join(map(repr, known))}")


def parse_count(text: str, unit: str):
    "The number before a unit, or NA: `parse_count('10K samples', 'samples')` is 10000."
    match = re.search(rf"(\d+(?:\.\d+)?)([KM]?) (?:{unit})\b", text)
    if not match:
        return pd.NA
    return round(float(match[1]) * {"": 1, "K": 1000, "M": 1_000_000}[match[2]])


@functools.cache
def all_numbers() -> pd.DataFrame:
    "The tables of all papers with the parsed columns; `load_paper` gives copies."
    ours = read_table("uvit_tables.csv").assign(paper="U-ViT")
    df = pd.concat([ours, read_table("other_tables.csv")], ignore_index=True)
    df["number"] = pd.to_numeric(df["value"], errors="coerce")
    for name, unit in COUNTS.items():
        df[name] = pd.array([parse_count(c, unit) for c in df["condition"]], dtype="Int64")
    error = df["condition"].str.extract(r"\+-(\d+(?:\.\d+)?)", expand=False)
    return df.assign(reading_error=error.astype(float))


def load_paper(
    source: str = None,  # `Table 1`, `Figure 2a`, ...; None: all
    dataset: str = None,  # as the paper writes it: `CIFAR10`, `ImageNet 256x256`; None: all
    metric: str = None,  # `FID`, `params_M`, ...; None: all
    paper: str = "U-ViT",  # U-ViT | DiffiT | GenViT; None: all
) -> pd.DataFrame:  # `value` as printed; `number`, `num_samples`, `steps`, `nfe`, `reading_error`
    "Published numbers, one per row. `ValueError` with the known values for an unknown name."
    df = all_numbers()
    wanted = {"paper": paper, "source": source, "dataset": dataset, "metric": metric}
    for name, value in wanted.items():
        if value is not None:
            require(name, value, df[name].unique())
            df = df[df[name] == value]
    return df.reset_index(drop=True).copy()


def published(
    source: str,  # as in `load_paper`
    dataset: str,  # as in `load_paper`; `""` for rows about a model alone
    method: str,  # the row's method, as printed
    metric: str,  # as in `load_paper`
    paper: str = "U-ViT",  # U-ViT | DiffiT | GenViT
    **conditions,  # num_samples, steps, nfe, confidence, ...; `condition`: whole words of the text
) -> float:
    "One published number; `ValueError` naming the candidates where none or several match."
    rows = load_paper(source, dataset, metric, paper)
    hits = rows[rows["method"] == method]
    for name, value in conditions.items():
        require("condition", name, rows.columns)
        same = hits[name] == value
        if name == "condition":
            same = hits[name].str.contains(rf"(?<![\w.]){re.escape(value)}(?!\w)")
        hits = hits[same.fillna(False).astype(bool)]
    if "confidence" not in conditions:
        hits = hits[hits["confidence"] != "low"]
    if len(hits) == 1 and pd.notna(hits["number"].iloc[0]):
        return float(hits["number"].iloc[0])
    what = "the value is a word" if len(hits) == 1 else f"{len(hits) or 'no'} rows match"
    near = next(r for r in (hits, rows[rows["method"] == method], rows) if len(r))
    listing = "; ".join(
        f"{r.method!r} ({r.condition or 'no condition'}; confidence {r.confidence}) = {r.value}"
        for r in near.head(12).itertuples()
    )
    more = f"; and {len(near) - 12} more" if len(near) > 12 else ""
    where = f"{source}, {dataset}, {method!r}, {metric}, {conditions}"
    raise ValueError(f"{what} for {where}. Candidates: {listing}{more}")


def figure2(
    panel: str = None,  # a | b | c | d | e; None: all five
) -> pd.DataFrame:  # panel, variant, overrides, steps, fid (10K samples), error, confidence
    "The curves of Figure 2 as digitised, the adopted variant of each panel first."
    if panel is None:
        return pd.concat(map(figure2, FIGURE2), ignore_index=True)
    require("panel", panel, FIGURE2)
    curves = load_paper(f"Figure 2{panel}", "CIFAR10", "FID").sort_values("steps")
    curves = curves.rename(columns={"number": "fid", "reading_error": "error"})
    parts = []
    for label, overrides in FIGURE2[panel][1]:
        part = curves[curves["method"].str.contains(label[:3], regex=False)]  # its number: "(2)"
        fields = [dict(overrides) for _ in range(len(part))]
        part = part.assign(panel=panel, variant=label, overrides=fields)
        parts.append(part[["panel", "variant", "overrides", "steps", "fid", "error", "confidence"]])
    return pd.concat(parts, ignore_index=True).astype({"steps": int})


def table2() -> pd.DataFrame:  # layers, hidden_size, mlp_size, heads, params_M
    "Table 2, one row per model, in the paper's order."
    df = load_paper("Table 2")
    wide = df.pivot(index="method", columns="metric", values="number").rename_axis(columns=None)
    return wide.loc[df["method"].unique(), df["metric"].unique()].astype(int)


def as_table5(exp: Experiment) -> dict:
    "The row of Table 5 that an experiment amounts to, without settings that do not apply."
    d, t, s = exp.data, exp.train, exp.sampling
    row = {
        "weight_decay": t.weight_decay,
        "lr_schedule": ("linear warm-up then " if t.warmup_steps else "") + t.lr_schedule,
        "ema_rate": t.ema_rates[0],
        "prediction": exp.diffusion.prediction,
        "grad_clip": t.grad_clip or "none",
        "mixed_precision": t.precision,
        "patch_size": exp.model.patch_size,
        "batch_size": t.batch_size,
        "iterations": t.n_steps,
        "lr": t.lr,
        "beta1": t.betas[0],
        "beta2": t.betas[1],
        "warmup_steps": t.warmup_steps,
        "noise_schedule": PROCESSES.get(exp.diffusion.process, exp.diffusion.process),
        "sampler": SAMPLERS.get(s.sampler, s.sampler),
        "sampling_steps": s.nfe,
        "n_eval_samples": exp.evaluation.num_samples,
        "horizontal_flip": "yes" if d.flip else "no",
        "final_conv3x3": "yes" if exp.model.conv == "after" else "no",
        "latent_shape" if s.decoder else "image_shape": f"{d.in_chans}x{d.img_size}x{d.img_size}",
    }
    if s.decoder:
        decoder = "ft-EMA" if s.decoder == "ema" else s.decoder
        row |= {"decoder": decoder, "latent_scale": d.latent_scale}
    if t.p_uncond:
        row |= {"p_uncond": t.p_uncond, "cfg_scale": round(s.cfg_scale - 1, 10)}
    return row


def figure7(setting: str) -> pd.DataFrame:
    "The 13x13 CKA of `concatenation`, `addition` or `no long skip` (Figure 7), as digitised."
    df = read_table("uvit_fig7_cka.csv")
    require("setting", setting, df["setting"].unique())
    df = df[df["setting"] == setting].astype({"block_i": int, "block_j": int, "cka": float})
    return df.pivot(index="block_i", columns="block_j", values="cka")
