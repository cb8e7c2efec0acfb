"""The page of results says what its records say, and the artifacts are what it says they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.command import mecq
from tests.realdata import real_data
from tests.studies.results import page
from tests.studies.results.queue import FOLDER
from tests.studies.results.tables import TABLES, jobs

RECORDS = [json.loads(p.read_text()) for p in sorted((FOLDER / "runs").glob("*.json"))]
ARTIFACTS = sorted(p for p in FOLDER.glob("*.safetensors") if ".float." not in p.name)


def test_the_page_is_filled_from_the_records() -> None:
    """Whoever adds a record fills the pages, and nobody writes figures by hand."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, FOLDER) == text
    text = page.README.read_text(encoding="utf-8")
    assert page.summarised(text, FOLDER) == text


def test_means_spread_and_drop(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for seed, top1 in enumerate((88.0, 89.0, 90.0)):
        record = {
            "table": "compare", "wbits": 2, "abits": 2, "arm": "mecq", "seed": seed,
            "top1": top1, "fp_top1": 92.0, "seconds": 120.0, "epochs": 20,
        }  # fmt: skip
        (tmp_path / "runs" / f"{seed}.json").write_text(json.dumps(record))
    text = page.filled(page.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "| W2 A2 | mecq | 88.00, 89.00, 90.00 | 89.00 | 1.00 | 3.00 | 2.0 |" in text
    assert "| W2 A2 | PACT | not run yet" in text
    front = page.summarised(page.README.read_text(encoding="utf-8"), tmp_path)
    assert "|  | W2 A2 | 10,000, 20 | 92.00 | 89.00 (1.00) | 3.00 |  |  |" in front


def test_every_record_is_of_a_run_that_a_table_asks_for() -> None:
    keys = {job.key: job for table in TABLES.values() for job in jobs(table)}
    for path in (FOLDER / "runs").glob("*.json"):
        record = json.loads(path.read_text())
        assert record["epochs"] == keys[path.stem].epochs
        assert record["seed"] == keys[path.stem].seed


@pytest.mark.long
@pytest.mark.parametrize("artifact", ARTIFACTS, ids=lambda path: path.stem)
def test_an_artifact_reproduces_its_row(artifact: Path) -> None:
    name, bits = artifact.stem.rsplit("-w", 1)
    wbits, abits = (int(part) for part in bits.split("a"))
    (record,) = (
        r
        for r in RECORDS
        if r["table"] in ("final", "final56")
        and (r["model"], r["wbits"], r["abits"], r["seed"]) == (name, wbits, abits, 0)
    )
    assert artifact.stat().st_size < 2e6
    data = real_data("cifar10")
    done = mecq("eval", artifact, "--data", data, "--json", cwd=data)
    assert done.document["top1"] == record["top1"]
