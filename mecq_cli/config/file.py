"""Settings as a TOML file: one that a user wrote, or the config.toml of a run.

Keys are the names of the fields of `QuantizeConfig`; per-layer overrides are ``[[layers]]`` tables:

    model = "resnet18"
    wbits = 2
    abits = 4
    data = "imagenet"

    [[layers]]
    pattern = "layer4.*"
    wbits = 4
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from mecq_cli.config.run import FLAG_ONLY, Allotted, LayerOverride, QuantizeConfig, settle_wbits
from mecq_cli.errors import UsageError
from mecq_cli.settings import Origin, absolute_data, absolute_model, label_of, near_match, validated


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a settings file; their values are not looked at yet.

    Raises:
        UsageError: the file cannot be read or parsed, or has a key that is unknown.
    """
    try:
        document = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, RuntimeError) as error:  # of the latter kind: nobody has this home folder
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"settings file {path}: {reason}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"settings file {path}: not valid TOML: {error}") from error
    for key in document:
        if key in FLAG_ONLY:
            raise UsageError(
                f"settings file {path}: '{key}' is a flag only: {label_of(key, 'flag')}"
            )
        _check_key(key, set(QuantizeConfig.model_fields) - FLAG_ONLY, str(path))
    for name, kind in (("layers", LayerOverride), ("allotted", Allotted)):
        tables = document.get(name, [])
        for table in tables if isinstance(tables, list) else []:
            for key in table if isinstance(table, dict) else {}:
                _check_key(key, set(kind.model_fields), f"{path}, [[{name}]]")
    return document


def from_toml(path: Path) -> QuantizeConfig:
    """Complete settings from one file, such as the config.toml of a run.

    Raises:
        UsageError: as `read_toml`, or a value is missing or out of its range.
    """
    values = read_toml(path)
    origins: dict[str, Origin] = dict.fromkeys(values, "file")
    settle_wbits(values, origins)
    return validated(QuantizeConfig, values, origins, path)


def to_toml(config: QuantizeConfig) -> str:
    """All settings as a TOML document that `from_toml` reads and that makes the same run again.

    Left out are ``output``, so that the file can be used for a second run, and the flags that say
    what to do now. Paths are absolute, so that it does not matter where it is read.
    """
    import tomli_w

    values = config.model_dump(exclude={"output", *FLAG_ONLY}, exclude_none=True)
    for key, value in values.items():
        if isinstance(value, Path):
            values[key] = str(value.absolute())
    values["model"], values["data"] = absolute_model(config.model), absolute_data(config.data)
    if config.target and not config.allotted:
        del values["wbits"]  # a guess, until the bits are allotted
    if not config.chosen:
        del values["chosen"]
    # TOML wants tables after the plain keys, and these are the last fields.
    return tomli_w.dumps(values)


def _check_key(key: str, known: set[str], where: str) -> None:
    if key not in known:
        raise UsageError(f"settings file {where}: unknown key {near_match(key, known)}")
