"""How a setting is declared, brought to its type, bounded and refused."""

import dataclasses
import difflib
import math
import numbers
import typing

LARGEST = 10**9
BELOW_1 = math.nextafter(1, 0)


class ParameterError(ValueError):
    "An impossible or unknown parameter, shown by notebooks and papermill as one line."

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


def setting(
    default,  # it stays out of the identity of a run
    doc: str,  # meaning and unit
    choices: tuple = None,  # allowed values
    low: float = -LARGEST,  # smallest allowed number
    high: float = LARGEST,  # largest allowed number
):  # a dataclass field
    "Declare a documented, checked field of a `Section`."
    rules = {"doc": doc, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=rules)


def shown(value) -> str:
    "A value as messages show it: on one line and short."
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits, a broken __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else f"{text[:50]}..."


def listed(names) -> str:
    "Allowed names as messages list them: the first dozen."
    names = list(map(str, names))
    return ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if names[12:] else "")


def closest(name: str, known) -> str:
    "A hint at the known names nearest to an unknown one."
    near = difflib.get_close_matches(name[:100], list(known), n=3)
    return f"did you mean {', '.join(near)}?" if near else f"known are {listed(known)}"


def refuse(name: str, value, reason: str):
    "Raise `ParameterError` for a value that is not allowed."
    raise ParameterError(f"{name} = {shown(value)}: {reason}")


def parse(name: str, text: str, kind: type):
    "Read a value from text, or raise `ParameterError`."
    words = {"true": True, "false": False, "1": True, "0": False}
    try:
        if text.isascii():
            return words[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        pass
    return refuse(name, text, f"expected {kind.__name__}")


def coerce(name: str, value, kind):
    "Bring a value to int, float, bool, str or a tuple of numbers, or raise `ParameterError`."
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
        if isinstance(value, str):  # 0.9,0.99
            value = [parse(name, v, kind) for v in value.strip("()[] ").split(",") if v.strip()]
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(coerce(name, v, kind) for v in values)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind in (int, float) and is_number:
        if not abs(value) < 1e18:
            refuse(name, value, "must be a finite number")
        if kind is float or value == int(value):
            return kind(value)
    elif isinstance(value, kind):
        return value
    return refuse(name, value, f"expected {kind.__name__}, not {type(value).__name__}")


class Section:
    "Base of the configuration dataclasses: brings each setting to its type and checks it."

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.metadata:
                value = coerce(field.name, getattr(self, field.name), field.type)
                object.__setattr__(self, field.name, value)
                check_value(field.name, value, **field.metadata)


def check_value(name: str, value, doc: str, choices: tuple, low: float, high: float):
    "Raise `ParameterError` for a value outside the choices or bounds of its setting."
    if choices and value not in choices:
        refuse(name, value, f"allowed are {', '.join(map(repr, choices))}")
    for number in value if isinstance(value, tuple) else [value]:
        if not isinstance(number, str) and not low <= number <= high:
            refuse(name, value, f"must be at least {low} and at most {high}")


def read_options(
    text: str,  # NAME=VALUE,NAME=VALUE, or empty
    options: type,  # the options of one backbone, a frozen dataclass derived from `Section`
):  # an instance of it
    "Parse the options of a backbone. Raises `ParameterError` with what it offers."
    known, given = {f.name: f for f in dataclasses.fields(options)}, {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (s.strip() for s in part.partition("="))
        if not equals or name not in known:
            offers = [f"{n}={f.metadata['choices'] or f.default}" for n, f in known.items()]
            refuse("options", part, f"allowed are {listed(offers)}")
        given[name] = parse(f"options: {name}", value, known[name].type)
    return options(**given)
