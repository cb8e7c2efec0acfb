"""Where the settings of a run come from, and what becomes of them.

Four places, the later ones winning:

    default  ->  checkpoint (the config.toml of the run that --resume continues)
             ->  file (--config FILE)  ->  flag

The config.toml of a run may be such a FILE. What the program chose there is open again, since its
reasons may be gone: the learning rate that suits 2 bits when the file, or a flag, now says 4.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from mecq_cli.config.file import from_toml, read_toml
from mecq_cli.config.run import FLAG_ONLY, TARGETS, QuantizeConfig, settle_wbits
from mecq_cli.errors import UsageError
from mecq_cli.settings import Origin, Settings, label_of, validated

_OF_ALLOTMENT = ("wbits", "allotted", "allotment")
_SETTLED_BY_TARGET = (*_OF_ALLOTMENT, *TARGETS)

CHANGEABLE_ON_RESUME = frozenset(
    {
        "data",
        "checkpoint",
        "output",
        "workers",
        "device",
        "checkpoint_every",
        "keep_checkpoints",
        "eval_every",
        "log",
        "accumulate",
    }
)
"""What a continued run may do otherwise than before without becoming another run: where its images
and weights are (they must be the same ones), and how it is carried out."""


_CHANGEABLE = ", ".join(label_of(key, "flag") for key in sorted(CHANGEABLE_ON_RESUME - {"output"}))


_CHOSEN = frozenset({"task", "amp", "compile"})
"""Of these a run stores what "auto" chose, which then holds. Elsewhere "auto" is a value."""


def resolve(
    file: Path | None, flags: Mapping[str, Any], *, restarts: bool = False
) -> tuple[QuantizeConfig, dict[str, Origin]]:
    """The settings of a run, and the origin of each.

    Args:
        file: the TOML file named by --config.
        flags: by field name; None stands for a flag that was not given.
        restarts: a launcher repeats this very command when a process fails, so it continues what
            it finds in the output folder.

    Raises:
        UsageError: an unknown or missing key, a value out of its range, flags that contradict
            each other, or a resumed run that is asked to become another one.
    """
    read = {} if file is None else _reopened(read_toml(file))
    values, origins = _gathered({"file": read, "flag": flags})
    if restarts and not values.get("dry_run"):
        _check_repeatable(values)
        values["resume"] = True
    if values.get("resume") and values.get("force"):
        raise UsageError("--resume and --force: one continues a run, the other starts it over")
    output = values.get("output")
    if values.get("resume") and output is None:
        model = values.get("model")
        named = isinstance(model, str) and Path(model).expanduser().is_dir()
        which = model if named else "RUN; runs/latest names the latest"
        raise UsageError(f"--resume: which run? give --output {which}")
    if values.get("resume") and isinstance(output, (str, Path)):
        _continue_stored(Path(output).expanduser() / "config.toml", values, origins)
    settle_wbits(values, origins)
    return validated(QuantizeConfig, values, origins, file), origins


def _gathered(
    sources: Mapping[Origin, Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, Origin]]:
    """The values of all sources, of which later ones win, and where each is from."""
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(QuantizeConfig.model_fields, "default")
    for origin, source in sources.items():
        given = {key: value for key, value in source.items() if value is not None}
        if given.keys() & {"wbits", *TARGETS}:
            # Another answer to the same question, which takes the place of an earlier one.
            _drop(_SETTLED_BY_TARGET, values, origins)
        values |= given
        origins |= dict.fromkeys(given, origin)
    _forget_other_allotments(values, origins)
    return values, origins


def _drop(
    keys: Iterable[str], values: dict[str, Any], origins: MutableMapping[str, Origin]
) -> None:
    for key in keys:
        values.pop(key, None)
        origins[key] = "default"


def _reopened(stored: dict[str, Any]) -> dict[str, Any]:
    """Settings of a file without what the program chose, unless somebody has changed it since."""
    chosen = stored.get("chosen")
    choices = chosen if isinstance(chosen, dict) else {}
    return {
        key: value
        for key, value in stored.items()
        if key != "chosen" and not (key in choices and choices[key] == value)
    }


_ASKED = (
    "target_size", "sensitivity", "mec_distortion", "quantizer", "first_last_bits", "reduce_range",
    "reset_classifier", "img_size",
)  # fmt: skip


def question(values: Mapping[str, Any]) -> str:
    """What bits are allotted by, in short: the same text says the same of each of it.

    Args:
        values: settings by name, as they were given or as `QuantizeConfig` has them.
    """
    fields = QuantizeConfig.model_fields
    asked = {key: values.get(key, fields[key].default) for key in _ASKED}
    average, weights = values.get("target_avg_bits"), values.get("checkpoint")
    rules = _comparable(values.get("layers", ()))
    asked |= {
        "model": values.get("model"),
        "target_avg_bits": None if average is None else float(average),
        "checkpoint": None if weights is None else Path(weights).name,  # it may have been moved
        "layers": [(r.get("pattern"), r["wbits"]) for r in rules if r.get("wbits") is not None],
    }
    told = json.dumps(asked, sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _forget_other_allotments(values: dict[str, Any], origins: dict[str, Origin]) -> None:
    """Bits of layers that were allotted for another network, target or quantizer."""
    known = values.get("allotment")
    asked = known.get("asked") if isinstance(known, dict) else None
    if values.get("allotted") and asked != question(values):
        _drop(_OF_ALLOTMENT, values, origins)


def explain(file: Path | None, flags: Mapping[str, Any], run: Path | None) -> dict[str, Any]:
    """Every setting with its value and origin; those that must be given may be missing.

    Args:
        file: the TOML file named by --config.
        flags: by field name; None stands for a flag that was not given.
        run: the config.toml of a run to start from, whose values have the origin "run" where they
            are not the default.

    Raises:
        UsageError: as `resolve`.
    """
    read = {} if file is None else _reopened(read_toml(file))
    stored = {} if run is None else read_toml(run)
    given = read.keys() | {key for key, value in flags.items() if value is not None}
    if given - CHANGEABLE_ON_RESUME - stored.get("chosen", {}).keys():
        stored = _reopened(stored)
    defaults = {key: field.default for key, field in QuantizeConfig.model_fields.items()}
    own = {key: value for key, value in stored.items() if value not in (defaults[key], [])}
    values, origins = _gathered({"run": own, "file": read, "flag": flags})
    settle_wbits(values, origins)
    required = [key for key, field in QuantizeConfig.model_fields.items() if field.is_required()]
    missing = [key for key in required if key not in values]
    # Any value of the type will do for the check.
    filled = {key: {"wbits": 8, "abits": 8}.get(key, key) for key in missing}
    config = validated(QuantizeConfig, values | filled, origins, file or run)
    shown = config.model_dump(mode="json", exclude={"allotment", "chosen", *FLAG_ONLY})
    return {
        "settings": {
            key: {"value": None, "origin": "missing"}
            if key in missing
            else {"value": value, "origin": origins[key]}
            for key, value in shown.items()
        }
    }


def _check_repeatable(values: Mapping[str, Any]) -> None:
    """Whether the same command, given again, goes on with the run it began."""
    if values.get("output") is None:
        raise UsageError(
            "--output is missing: the launcher may restart this command (--max-restarts), which "
            "then has to find its run; give --output DIR"
        )
    if values.get("force"):
        raise UsageError(
            "--force: the launcher may restart this command (--max-restarts), which would start "
            "over each time; leave it out and give another --output"
        )


def _continue_stored(stored_file: Path, values: dict[str, Any], origins: dict[str, Origin]) -> None:
    """Fill ``values`` up with what the run was started with; refuse what would change it."""
    if not stored_file.is_file():
        if not (
            {"model", "abits", "data"} <= values.keys() and values.keys() & {"wbits", *TARGETS}
        ):
            raise UsageError(
                f"--resume: {stored_file.parent} holds no run to continue; name another --output, "
                "or give MODEL, --wbits or a target, --abits and --data to start one there"
            )
        return
    stored = from_toml(stored_file)
    if stored.target and "wbits" in values and not values.get("allotted"):
        raise UsageError(
            f"{label_of('wbits', origins['wbits'])}: {stored_file.parent} was started with "
            f"{stored.target}, which allots the bits of the weights; leave it out to continue, or "
            "give another --output"
        )
    for key in QuantizeConfig.model_fields.keys() - FLAG_ONLY:
        before = getattr(stored, key)
        if key not in values or (key in _CHOSEN and values[key] == "auto"):
            values[key] = before
            origins[key] = "checkpoint"
        elif key not in CHANGEABLE_ON_RESUME:
            asked = _comparable(values[key])
            if asked != _comparable(before):
                raise UsageError(
                    f"{label_of(key, origins[key])}: got {asked!r}, but {stored_file.parent} was "
                    f"started {_with(before)}; leave it out to continue (--resume may "
                    f"change {_CHANGEABLE}), or give another --output"
                )


def _with(before: Any) -> str:
    return "without it" if before is None else f"with {_comparable(before)!r}"


def _comparable(value: Any) -> Any:
    """Per-layer overrides as dictionaries, however they were given."""
    if isinstance(value, (list, tuple)):
        return [
            item.model_dump(exclude_none=True) if isinstance(item, Settings) else item
            for item in value
        ]
    return value
