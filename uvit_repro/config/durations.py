"""Durations as text and back."""

import re

from uvit_repro.config.settings import ParameterError

UNITS = {"s": 1, "m": 60, "h": 3600}  # seconds


def format_duration(seconds: float) -> str:
    "A duration for people: 42s, 3m05s, 1h02m, 12.5 days, 3.1 years."
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    days = seconds / 86400
    return f"{days:.3g} days" if days < 400 else f"{days / 365.25:.3g} years"


def parse_duration(text: str) -> float:
    "Seconds of 540, 90s, 9m or 1h. Raises `ParameterError`."
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip(), re.ASCII)
    if not match:
        raise ParameterError(f"{text!r} is not a duration: write seconds, or 90s, 10m, 1h")
    return float(match[1]) * UNITS.get(match[2], 1)
