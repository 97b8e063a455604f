"""How fast the package wants to be, and whether it is."""

from dataclasses import dataclass

S2, L2, H2 = "U-ViT-S/2", "U-ViT-L/2", "U-ViT-H/2"
H200_RATE = 790e12  # FLOP/s of bf16 matrix products on an H200, measured
COMMAND = "uvit-repro bench --targets --peer DIR --publish"


@dataclass(frozen=True)
class Target:
    "A bound on one row of a benchmark."

    device: str  # cpu | cuda
    what: str
    model: str
    metric: str
    wanted: str  # >= or <=, a space, a number
    batch: int = 0  # 0: any
    precision: str = "bf16"
    option: str = ""
    scale: float = 1.0  # a value is divided by it

    @property
    def name(self) -> str:
        parts = (self.what, self.model, str(self.batch or ""), self.precision, self.option)
        return " ".join(filter(None, (*parts, self.metric)))

    def fits(self, row: dict) -> bool:
        "Whether a row is the one that the target is about."
        fields = ("what", "model", "metric", "precision", "option")
        same = all(row.get(f, "") == getattr(self, f) for f in fields)
        return same and row["impl"] == "ours" and self.batch in (0, row.get("batch"))

    def met(self, value: float) -> bool:
        "Whether a value keeps the bound."
        sign, bound = self.wanted.split()
        return value >= float(bound) if sign == ">=" else value <= float(bound)


KEPT = "checkpointing, 2 widths kept"
TARGETS = (
    Target("cuda", "train", S2, "speedup", ">= 1.7", 128),
    Target("cuda", "train", S2, "flops_per_second", ">= 0.42", 128, scale=H200_RATE),
    Target("cuda", "train", L2, "speedup", ">= 1.8", 128),
    Target("cuda", "train", L2, "flops_per_second", ">= 0.55", 128, scale=H200_RATE),
    Target("cuda", "train", H2, "speedup", ">= 1.8", 128),
    Target("cuda", "train", H2, "flops_per_second", ">= 0.55", 128, scale=H200_RATE),
    Target("cuda", "train", H2, "peak_memory", "<= 20", 128, option=KEPT, scale=1e9),
    Target("cuda", "train", H2, "worth", ">= 0.87", 128, option=KEPT),
    Target("cuda", "sample", S2, "seconds", "<= 1.7", 500),
    Target("cuda", "sample", H2, "seconds", "<= 14", 500),
    Target("cuda", "sample", S2, "solver_share", "<= 5", 500),
    Target("cuda", "start", S2, "seconds", "<= 30", option="compile, filled cache"),
    Target("cuda", "start", S2, "seconds", "<= 5", option="without compile"),
    Target("cpu", "train", S2, "speedup", ">= 2.1", 8),
    Target("cpu", "train", S2, "speedup", ">= 0.99", 8, "fp32"),
    Target("cpu", "sample", S2, "speedup", ">= 1.89", 8),
    Target("cpu", "sample", S2, "speedup", ">= 0.99", 8, "fp32"),
    Target("cpu", "sample", S2, "solver_share", "<= 5", 8),
    Target("cpu", "start", S2, "seconds", "<= 5", option="without compile"),
)


def check_targets(
    rows: list,  # of a benchmark
    device: str,  # cpu | cuda: where they were measured
) -> list:  # dicts: target, device, wanted, measured, met (True, False, None), note
    "Each target beside what was measured."
    out = []
    for t in TARGETS:
        entry = {"target": t.name, "device": t.device, "wanted": t.wanted}
        found = [r for r in rows if t.device == device and t.fits(r)]
        value = next((r["value"] for r in found if r["value"] is not None), None)
        note = found[0].get("note", "") if found else "not run"
        if t.device != device:
            note = f"needs a {'GPU' if t.device == 'cuda' else 'CPU'}: {COMMAND}"
        if value is not None:
            value /= t.scale
        met = None if value is None else t.met(value)
        out.append({**entry, "measured": value, "met": met, "note": note})
    return out
