"""What every settings class shares: how values are checked, and how one that is wrong is told."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mecq_cli.errors import UsageError

Origin = Literal["default", "checkpoint", "run", "file", "flag"]
"""Where the value of a setting came from."""

SettingsModel = TypeVar("SettingsModel", bound="Settings")


def _within(words: str, check: Callable[[Any], bool]) -> AfterValidator:
    """Refuse what fails ``check``; ``words`` tell the user what passes."""

    def validate(value: Any) -> Any:
        if not check(value):
            raise ValueError(words)
        return value

    return AfterValidator(validate)


Bits = Annotated[
    int, _within("1 to 8, or 32 to leave it in float", lambda v: 1 <= v <= 8 or v == 32)
]
AverageBits = Annotated[float, _within("1 to 8", lambda v: 1 <= v <= 8)]
ResidualBits = Annotated[int, _within("8, or 32 to leave it in float", lambda v: v in (8, 32))]
Count = Annotated[int, _within("1 or more", lambda v: v >= 1)]
CountOrZero = Annotated[int, _within("0 or more", lambda v: v >= 0)]
Positive = Annotated[float, _within("more than 0", lambda v: v > 0)]
PositiveOrZero = Annotated[float, _within("0 or more", lambda v: v >= 0)]
Fraction = Annotated[float, _within("0 to 1", lambda v: 0 <= v <= 1)]
Decay = Annotated[float, _within("0, or less than 1", lambda v: 0 <= v < 1)]
LowerFrom = Annotated[int, _within("0 to 8", lambda v: 0 <= v <= 8)]
CropPct = Annotated[float, _within("more than 0, at most 1", lambda v: 0 < v <= 1)]
Share = Annotated[float, _within("between 0 and 1", lambda v: 0 < v < 1)]
Name = Annotated[str, _within("a name, not an empty one", lambda v: bool(v.strip()))]


def _joined(*names: str) -> AfterValidator:
    """One or more of ``names``, joined by "+", each once."""

    def check(value: str) -> bool:
        parts = value.split("+")
        return set(parts) <= set(names) and len(set(parts)) == len(parts)

    return _within(f"one or more of {', '.join(names)}, joined by '+'", check)


TaskName = Literal["auto", "classify", "segment", "detect"]

SITES = ("penultimate", "stages", "layers", "weights")
Sites = Annotated[str, _joined(*SITES)]
# The names are those of mecq_cli.entropy.EXPERTS, which is not imported: it needs torch.
EXPERTS = ("linear", "head_order1", "head_order2", "centred", "chebyshev", "exact")
Experts = Annotated[str, _joined("all", *EXPERTS)]

_SIZE_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip


def bytes_of(size: str) -> int | None:
    """Bytes that a text such as 300kB, 1.2MB, 4 MiB or 65536 says; None where it says none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([a-z]*)", size.strip(), re.IGNORECASE)
    if found is None or found[2].lower() not in _SIZE_UNITS:
        return None
    count = float(found[1]) * _SIZE_UNITS[found[2].lower()]
    return int(count + 1e-6) if math.isfinite(count) else None


Size = Annotated[str, _within("a size, such as 300kB or 1.2MB", lambda v: bool(bytes_of(v)))]
"""Kept as it was written."""

UserPath = Annotated[Path, Field(strict=False), AfterValidator(Path.expanduser)]

OWN = "python:"
"""How a run names a model or images that are objects of the program that started it."""

LOCAL, HUB = "local-dir:", "hf-hub:"
"""How a model begins that says itself what it is: in a folder, on the Hugging Face Hub (timm's)."""
_HUB_TOO = "hf_hub:"


def split_model_name(model: str) -> tuple[str, str]:
    """(source, rest) of a model's name: (`LOCAL`, "my/net"); the source of others is empty."""
    for beginning in (LOCAL, HUB, _HUB_TOO):
        if model.startswith(beginning):
            rest = model.removeprefix(beginning)
            if beginning == LOCAL:
                return LOCAL, str(Path(rest).expanduser()) if rest.startswith("~") else rest
            return HUB, rest
    return "", model


def absolute_model(model: str) -> str:
    """The same model, named so that it does not matter from where."""
    source, rest = split_model_name(model)
    return f"{LOCAL}{Path(rest).absolute()}" if source == LOCAL else model


def short_model(model: str) -> str:
    """The name of a model without where it is from."""
    source, rest = split_model_name(model.removeprefix(OWN))
    if source == LOCAL:
        return Path(rest).absolute().name
    return rest.rpartition("/")[2] if source else rest


DATA_PREFIXES = ("tar", "wds", "hfds", "hfids", "tfds")


def split_data_name(data: str) -> tuple[str, str]:
    """(prefix, rest) of what ``--data`` says: ("wds", "shards"); the prefix may be empty."""
    prefix, slash, rest = data.partition("/")
    return (prefix.lower(), rest) if slash and prefix.lower() in DATA_PREFIXES else ("", data)


def _local(data: Any) -> Any:
    """Paths as text, "~" expanded."""
    if not isinstance(data, (str, Path)):
        return data
    prefix, rest = split_data_name(str(data))
    if rest.startswith("~"):
        rest = str(Path(rest).expanduser())
    return f"{prefix}/{rest}" if prefix else rest


def absolute_data(data: str) -> str:
    """The same data set, named so that it does not matter from where."""
    prefix, rest = split_data_name(data)
    # A name on the Hugging Face Hub is no path.
    on_hub = prefix in ("hfids", "tfds") or (prefix == "hfds" and not Path(rest).exists())
    if on_hub or data.startswith(OWN):
        return data
    return f"{prefix}/{Path(rest).absolute()}" if prefix else str(Path(rest).absolute())


DataName = Annotated[
    str, BeforeValidator(_local), _within("a folder, a .tar file, wds/PATH or hfds/NAME", bool)
]
"""See mecq_cli.data.sources."""


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def validated(
    kind: type[SettingsModel],
    values: Mapping[str, Any],
    origins: Mapping[str, Origin],
    file: Path | None = None,
) -> SettingsModel:
    """``values`` as settings; ``origins`` and ``file`` serve the message if one is wrong.

    Raises:
        UsageError: a value is missing or out of its range.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors(include_url=False)
    missing = [p["loc"][0] for p in problems if p["type"] == "missing" and len(p["loc"]) == 1]
    if missing:
        names = ", ".join(label_of(str(key), "flag") for key in missing)
        raise UsageError(f"missing: {names}; every setting is explained by --help")
    problem = problems[0]
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        raise UsageError(f"unknown setting {near_match(str(problem['loc'][0]), kind.model_fields)}")
    if not problem["loc"]:  # of several settings together, which the message names
        raise UsageError(_allowed(problem))
    key, *inner = problem["loc"]
    inside = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner)
    label = label_of(str(key), origins.get(str(key), "default"), file, inside)
    if problem["type"] == "missing":
        raise UsageError(f"{label} is missing")
    got = problem["input"]
    shown = str(got) if isinstance(got, Path) else got
    raise UsageError(f"{label}: got {shown!r}; allowed: {_allowed(problem)}")


def near_match(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """``name`` in quotes, and what it may be a slip of; ``otherwise`` where nothing is near."""
    near = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else otherwise or "see mecq quantize --help"
    return f"'{name}'; {hint}"


def label_of(key: str, origin: Origin, file: Path | None = None, inside: str = "") -> str:
    """How the user wrote a setting down; ``inside`` leads to a part of it, as "[0].wbits"."""
    if origin == "file":
        return f"'{key}{inside}' in {file or 'the settings file'}"
    if key in _ARGUMENTS:
        return key.upper()
    return "--" + key.replace("_", "-")


_ARGUMENTS = frozenset({"model", "target", "run"})

_TYPE_NAMES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "[[layers]] tables",
    "model_type": "a table with pattern, wbits, abits",
}


_BOUNDS = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "at most {}"),
    "less_than": ("lt", "less than {}"),
}


def _allowed(problem: Mapping[str, Any]) -> str:
    """What would have been right, from one entry of ``ValidationError.errors()``."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return words.format(context[name])
    return _TYPE_NAMES.get(kind, str(problem["msg"]))
