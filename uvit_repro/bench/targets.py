"""How fast the package wants to be, and whether it is."""

from dataclasses import dataclass

S2, L2, H2 = "U-ViT-S/2", "U-ViT-L/2", "U-ViT-H/2"
H200_RATE = 790e12  # FLOP/s of bf16 matrix products on an H200, measured
COMMAND = "uvit-repro bench --targets --peer DIR --publish"
KEPT, WARM = "checkpointing, 2 widths kept", "compile, filled cache"


@dataclass(frozen=True)
class Target:
    "A bound on one row of a benchmark."

    device: str  # cpu | cuda
    what: str
    model: str
    metric: str
    least: float | None = None  # the value must be at least this
    most: float | None = None  # the value must be at most this
    batch: int = 0  # 0: any
    precision: str = "bf16"
    option: str = ""
    scale: float = 1.0  # a value is divided by it

    def fits(self, row: dict) -> bool:
        "Whether a row is the one that the target is about."
        fields = ("what", "model", "metric", "precision", "option")
        same = all(row.get(f, "") == getattr(self, f) for f in fields)
        return same and row["impl"] == "ours" and self.batch in (0, row.get("batch"))


TARGETS = (
    Target("cuda", "train", S2, "speedup", 1.7, batch=128),
    Target("cuda", "train", S2, "flops_per_second", 0.42, batch=128, scale=H200_RATE),
    Target("cuda", "train", L2, "speedup", 1.8, batch=128),
    Target("cuda", "train", L2, "flops_per_second", 0.55, batch=128, scale=H200_RATE),
    Target("cuda", "train", H2, "speedup", 1.8, batch=128),
    Target("cuda", "train", H2, "flops_per_second", 0.55, batch=128, scale=H200_RATE),
    Target("cuda", "train", H2, "peak_memory", None, 20, 128, option=KEPT, scale=1e9),
    Target("cuda", "train", H2, "worth", 0.87, batch=128, option=KEPT),
    Target("cuda", "sample", S2, "seconds", None, 1.7, 500),
    Target("cuda", "sample", H2, "seconds", None, 14, 500),
    Target("cuda", "start", S2, "seconds", None, 30, option=WARM),
    Target("cuda", "start", S2, "seconds", None, 5, option="without compile"),
    Target("cpu", "train", S2, "speedup", 2.1, batch=8),
    Target("cpu", "train", S2, "speedup", 0.99, batch=8, precision="fp32"),
    Target("cpu", "sample", S2, "speedup", 1.89, batch=8),
    Target("cpu", "sample", S2, "speedup", 0.99, batch=8, precision="fp32"),
    Target("cpu", "start", S2, "seconds", None, 5, option="without compile"),
)


def check_targets(
    rows: list,  # of a benchmark
    device: str,  # cpu | cuda: where they were measured
) -> list:  # dicts: target, device, wanted, measured, met (True, False, None), note
    "Each target beside what was measured."
    out = []
    for t in TARGETS:
        values = [r["value"] for r in rows if t.device == device and t.fits(r)]
        value = values[0] / t.scale if values and values[0] is not None else None
        met = None
        if value is not None:
            met = value >= t.least if t.most is None else value <= t.most
        name = " ".join(filter(None, (t.what, t.model, t.precision, t.option, t.metric)))
        wanted = f">= {t.least}" if t.most is None else f"<= {t.most}"
        note = "" if t.device == device else f"needs a {t.device.upper()}: {COMMAND}"
        row = {"target": name, "device": t.device, "wanted": wanted}
        out.append({**row, "measured": value, "met": met, "note": note})
    return out
