"""Rerun the tables of docs/results.md, or go on with them.

    python -m tests.studies.results [TABLE ...] --data DIR --weights DIR --work DIR
        [--threads N] [--brevitas PYTHON] [--arms NAME ...] [--bits W,A ...] [--seeds N ...]

Runs that have a record in docs/results/runs are not repeated, one that was stopped goes on where
it was. Start it twice with one thread each, and two runs share a machine with two cores. At each
end of a run the page is filled anew (`--fill` does only that).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from mecq_cli.events import Listener
from tests.studies.results.page import fill
from tests.studies.results.queue import Place, work_off
from tests.studies.results.tables import TABLES, Bits, Job


class Printing(Listener):
    """Says which run is next, and nothing of its steps."""

    def note(self, text: str) -> None:
        self._write(text)

    def warn(self, text: str) -> None:
        self._write(f"! {text}")

    def _write(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _bits(text: str) -> Bits:
    weights, activations = text.split(",")
    return float(weights), int(activations)


def main() -> None:
    """Work off the queue."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("tables", nargs="*", default=list(TABLES), help=", ".join(TABLES))
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--weights", type=Path, help="folder with the checkpoints")
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--brevitas", type=Path, help="a Python with Brevitas")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--arms", nargs="*", help="only these")
    parser.add_argument("--bits", nargs="*", help="only these, as 2,2")
    parser.add_argument("--seeds", nargs="*", type=int, help="only these")
    parser.add_argument("--fill", action="store_true", help="only fill the page")
    given = parser.parse_args()
    if not given.fill:
        if not (given.data and given.weights and given.work):
            parser.error("--data, --weights and --work are needed")
        torch.set_num_threads(given.threads)
        place = Place(given.data, given.weights, given.work, given.brevitas)
        bits = None if given.bits is None else [_bits(text) for text in given.bits]

        def wanted(job: Job) -> bool:
            asked = ((given.arms, job.arm.name), (bits, job.bits), (given.seeds, job.seed))
            return all(only is None or value in only for only, value in asked)

        for name in given.tables:
            work_off(TABLES[name], place, Printing(), wanted)
    fill()


if __name__ == "__main__":
    main()
