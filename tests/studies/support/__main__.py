"""Fill the support matrix, or go on with it.

    python -m tests.studies.support [MODEL ...] [--timeout SECONDS] [--again] [--capture PATTERN]

Each model runs in a process of its own. What has a result in docs/support.json is not repeated;
--again repeats what failed. --capture PATTERN also tries, for all names that fit it, whether the
network can be captured and gets its quantizers. docs/support.md and the list behind `mecq models`
are made from the results after each one (--fill does only that).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
from typing import Any

from tests.studies.support.models import MODELS, Model
from tests.studies.support.page import fill, load, store

CAPTURE_SIZES = (64, 96, 224)


def row(model: Model, bits: int, timeout: float) -> dict[str, Any]:
    """Of a process of its own, which may be killed."""
    command = [sys.executable, "-m", "tests.studies.support.one", model.name]
    command += [str(model.size), str(bits)]
    base = {"size": model.size, "bits": bits}
    step = "quantize" if bits else "capture"
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {**base, step: f"took longer than {timeout:.0f} seconds"}
    except (IndexError, json.JSONDecodeError):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return {**base, step: f"ended with {done.returncode}: {' '.join(last)[:200]}"}
    return found


def failed(found: dict[str, Any]) -> bool:
    """Whether a step of a row gives a reason."""
    return any(isinstance(found.get(s), str) for s in ("capture", "quantize", "evaluate"))


def main() -> None:
    """Work off the models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("models", nargs="*", help="only these")
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--again", action="store_true", help="repeat what failed")
    parser.add_argument("--capture", metavar="PATTERN", help="names that are only captured")
    parser.add_argument("--fill", action="store_true", help="only make page and list")
    given = parser.parse_args()
    if not given.fill:
        for model in MODELS:
            known = load()["models"].get(model.name)
            wanted = not given.models or model.name in given.models
            done = known is not None and not (given.again and known.get("safetensors") is not True)
            if wanted and not done:
                say(f"{model.name} ...")
                found = {"kind": model.kind, **row(model, model.bits, given.timeout)}
                store("models", model.name, found)
                say(f"{model.name}: {found.get('safetensors') is True}")
        if given.capture:
            _capture_all(given.capture, given.timeout, again=given.again)
    fill()


def _capture_all(pattern: str, timeout: float, *, again: bool) -> None:
    from mecq_cli.models.libraries import model_names

    for name in model_names():
        known = load()["captured"].get(name)
        if not fnmatch.fnmatchcase(name, pattern) or (known and not (again and failed(known))):
            continue
        found: dict[str, Any] = {}
        for size in CAPTURE_SIZES:
            found = row(Model(name, "", size), 0, timeout)
            if not failed(found) or "integer form" in str(found["capture"]):
                break
        store("captured", name, found)
        say(f"{name}: {found['capture']}")


def say(text: str) -> None:
    """Print, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
