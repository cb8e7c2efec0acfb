"""`mecq report` and `mecq compare` of a real run: the page is whole and true, and works offline."""

from __future__ import annotations

import copy
import html
import json
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from mecq_cli.config import from_toml
from mecq_cli.data import ImageDataset, eval_batches, normalize, open_evaluation
from mecq_cli.errors import ArtifactError
from mecq_cli.events import Listener
from mecq_cli.export import safetensors
from mecq_cli.insertion import BitPlan
from mecq_cli.integer import reference
from mecq_cli.integerize import integerize
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.report import page
from mecq_cli.report.figures import legend
from mecq_cli.runs import RunFolder
from mecq_cli.workflow import report_runtime
from mecq_cli.workflow.report_runtime import look_at_runtime
from tests.e2e.command import mecq, refused, write_patterns
from tests.exactness import quantized
from tests.token_networks import network

VOID = {"meta", "img", "br", "link", "input", "hr"}
LARGEST = 2_000_000


class Page(HTMLParser):
    """The elements of a page, and whether they are nested as they should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, tag
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def reported(digits: Path) -> dict[str, Any]:
    """What `mecq report --json` says of the demo's run."""
    return mecq("report", "runs/demo/run", "--json", cwd=digits).document


def read(digits: Path, document: dict[str, Any]) -> str:
    path = digits / str(document["path"])
    return path.read_text(encoding="utf-8")


def pictures(text: str) -> list[str]:
    return [part.split("</svg>")[0] + "</svg>" for part in text.split("<svg")[1:]]


def check_offline(text: str) -> Page:
    """Nothing is loaded, nothing runs, every id is there once, and all parts are labelled."""
    assert len(text.encode()) < LARGEST
    found = Page(text)
    assert not found.all("script")
    assert not found.all("link")
    for tag, attributes in found.elements:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "xlink:href", "action", "data"):
            target = attributes.get(key)
            assert target is None or target.startswith(("#", "data:image/jpeg;base64,")), (tag, key)
    assert "url(http" not in text.replace(" ", "")
    assert "@import" not in text
    ids = Counter(a["id"] for _, a in found.elements if "id" in a)
    assert ids.most_common(1)[0][1] == 1
    links = {str(a["href"])[1:] for a in found.all("a")}
    assert links <= set(ids)
    assert all(image["alt"] for image in found.all("img"))
    assert all(head.get("scope") in ("col", "row") for head in found.all("th"))
    for picture in pictures(text):
        root = ElementTree.fromstring("<svg" + picture)
        title = root[0]
        assert title.tag.endswith("}title")
        assert title.text
        assert root.get("aria-labelledby") == title.get("id")
        assert "#0" not in picture.replace("&#0", ""), "a colour that no scheme changes"
        used = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        own = {e.get("id") for e in root.iter()}
        assert {link.removeprefix("#") for link in used} <= own
    return found


def test_the_page_is_whole_and_needs_nothing_else(digits: Path, reported: dict[str, Any]) -> None:
    text = read(digits, reported)
    assert len(text.encode()) == reported["bytes"]
    found = check_offline(text)
    headings = [tag for tag, _ in found.elements if tag in ("h1", "h2", "h3", "h4")]
    assert headings.count("h1") == 1
    assert headings.count("h2") == 6
    assert len(pictures(text)) == 6 + 20  # curves, and layers with weights
    assert 1 <= len(found.all("img")) <= 36
    assert reported["left_out"] == []


def test_its_numbers_are_those_of_the_run(digits: Path, reported: dict[str, Any]) -> None:
    run = digits / "runs/demo/run"
    summary = json.loads((run / "summary.json").read_text())
    assert reported["summary"] == summary
    said = " ".join(" ".join(Page(read(digits, reported)).text).split())
    for key in ("fp_top1", "top1"):
        assert f"{summary[key]:.2f} %" in said
    assert f"{summary['sizes']['ratio']:.1f} times smaller" in said
    assert reported["sizes"] == summary["sizes"]
    answers = reported["answers"]
    assert (answers["images"], answers["integer_top1"]) == (summary["images"], summary["top1"])
    assert answers["fp_top1"] == summary["fp_top1"]
    right = sum(answers["confusion"]["integer"][i][i] for i in range(10))
    assert right == round(summary["top1"] * summary["images"] / 100)
    before = sum(answers["confusion"]["fp"][i][i] for i in range(10))
    assert right - before == answers["won"] - answers["lost"]
    assert np.sum(answers["confusion"]["integer"]) == np.sum(answers["confusion"]["fp"]) == 360
    assert sum(row["images"] for row in answers["classes"]) == 360
    for example in answers["examples"]:
        assert example["fp"] == example["class"] != example["integer"]
        assert example["path"].startswith(f"{answers['split']}/{example['class']}/")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = reported["training"]
    assert training["steps"] == len(rows) == summary["steps"]
    assert training["curves"]["loss_task"]["value"] == [
        pytest.approx(row["loss_task"], rel=1e-5) for row in rows
    ]
    assert training["curves"]["coding_length"].keys() == rows[0]["coding_length"].keys()
    runtime = reported["runtime"]
    assert runtime["onnx_bytes"] == (run / "model.onnx").stat().st_size
    assert runtime["verified"]["equal"] is True
    assert runtime["verified"]["images"] == 256
    assert all(row["speedup"]["median"] > 0 for row in runtime["latency"])
    assert reported["command"][2:4] == ["--config", "runs/demo/run/config.toml"]


def entropy(codes: np.ndarray[Any, Any]) -> float:
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def test_codes_are_counted_as_the_reference_computes_them(
    digits: Path, reported: dict[str, Any]
) -> None:
    """By the NumPy reference, on the same images, for every layer."""
    run = digits / "runs/demo/run"
    model = safetensors.load(run / "model.safetensors")
    preprocessing = Preprocessing.from_json(dict(model.metadata["preprocessing"]))
    split = open_evaluation(from_toml(run / "config.toml").data)
    some = split.take(np.linspace(0, len(split) - 1, 256).astype(int).tolist())
    batches = eval_batches(ImageDataset(some, preprocessing), batch_size=256)
    images = normalize(next(iter(batches)).images, preprocessing).contiguous().numpy()
    values = reference.run(model, images, keep=True)
    nodes = {node.name: node for node in model.nodes}
    seen = 0
    for row in reported["layers"]:
        node = nodes[row["layer"]]
        source = node.inputs[0] if row["shape"] else node.name
        if row["shape"]:
            weight = node.tensors["weight"]
            assert row["weights"]["values"] == weight.size
            assert row["weights"]["entropy"] == pytest.approx(entropy(weight), abs=1e-9)
            assert row["weights"]["entropy"] <= row["wbits"]
            assert 0 <= row["weights"]["clipped"] < 0.5
            assert len(row["weights"]["before"]) == len(row["activations"]["before"]) == 48
        codes, grid = values[source], nodes[source].grid
        assert grid is not None
        found = row["activations"]
        assert found["values"] == codes.size
        assert found["entropy"] == pytest.approx(entropy(codes), abs=1e-9)
        assert found["used"] == len(np.unique(codes))
        area = sum(width * height for _, width, height in found["bars"])
        assert area == pytest.approx(1.0, rel=1e-2)
        if found["clipped"] is not None:
            ends = (codes == grid.qmax).mean() + (codes == grid.qmin).mean()
            assert found["clipped"] <= ends
            seen += found["clipped"] > 0
    assert seen > 10, "two bits clip something in most layers"


def test_names_from_outside_are_text(reported: dict[str, Any]) -> None:
    evil = "<img src=x onerror=alert(1)>\"'&\x1b[2J"
    document = copy.deepcopy(reported)
    document["run"] = document["model"] = evil
    document["left_out"] = [evil]
    document["settings"] = evil
    answers = document["answers"]
    answers["confusion"]["classes"][0] = evil
    for row in (*answers["classes"], *answers["examples"], *answers["pairs"]):
        row["class"] = evil
    for example in answers["examples"]:
        example["path"] = example["integer"] = evil
    for row in document["layers"]:
        row["layer"] = row["note"] = evil
    text = page.render(
        document, {e["index"]: ("data:image/jpeg;base64,",) for e in answers["examples"]}
    )
    found = check_offline(text)
    assert len(found.all("img")) == len(answers["examples"])
    assert "\x1b" not in text
    assert "<img src=x" in " ".join(found.text)


def test_what_is_gone_is_left_out_and_said(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(digits / "runs/demo/run", run)
    settings = (run / "config.toml").read_text()
    lines = [
        'data = "/gone"' if line.startswith("data = ")
        else 'checkpoint = "/gone.pth"' if line.startswith("checkpoint = ")
        else line
        for line in settings.splitlines()
    ]  # fmt: skip
    (run / "config.toml").write_text("\n".join(lines))
    (run / "model.onnx").write_bytes(b"damaged")
    document = mecq("report", "run", "--json", cwd=tmp_path).document
    assert document["answers"] is None
    assert ["/gone" in line for line in document["left_out"]] == [True, True]
    assert "error" in document["runtime"]
    (run / "model.onnx").unlink()
    looked = mecq("inspect", "run", cwd=tmp_path)
    assert (looked.code, looked.err) == (0, ""), "its images are gone: an export would fail"
    looked = mecq("eval", "run", "--data", digits / "runs/demo/digits", cwd=tmp_path)
    assert f"next: mecq export run --data {digits}" in looked.err
    text = check_offline((run / "report.html").read_text())
    assert "the images of run were in /gone" in " ".join(text.text)
    assert all(row["activations"] is None for row in document["layers"])
    assert document["layers"][1]["weights"]["entropy"] > 0
    # A report takes the place of a report, and of nothing else.
    assert mecq("report", "run", cwd=tmp_path).code == 0
    (run / "report.html").write_text("mine")
    done = mecq("report", "run", cwd=tmp_path)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "--force overwrites it" in done.err
    assert (run / "report.html").read_text() == "mine"
    done = mecq("report", "run", "--output", "page.txt", cwd=tmp_path)
    refused(done, 2, "page.txt: a page is a file that ends in .html")


def test_images_of_other_classes(digits: Path, tmp_path: Path) -> None:
    """Named they are refused; where the run's own have changed, the report goes without."""
    data = write_patterns(tmp_path / "data", {"train": 2, "val": 2}, classes=10, size=16)
    shutil.copytree(digits / "runs/demo/run", tmp_path / "run")
    refused(
        mecq("report", "run", "--data", data, cwd=tmp_path),
        3,
        "are not those of run (0, 1, 2, ...)",
    )
    settings = tmp_path / "run" / "config.toml"
    lines = settings.read_text().splitlines()
    lines = [f'data = "{data}"' if line.startswith("data = ") else line for line in lines]
    settings.write_text("\n".join(lines))
    document = mecq("report", "run", "--json", cwd=tmp_path).document
    assert document["answers"] is None
    assert "are not those of run" in document["left_out"][0]


def test_a_run_that_is_not_finished_shows_its_curves(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(digits / "runs/demo/run/config.toml", run)
    lines = (digits / "runs/demo/run/metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:20]) + '\n{"step": 20, "los')
    document = mecq("report", "run", "-o", "r.html", "--json", cwd=tmp_path).document
    assert (document["training"]["steps"], document["finished"]) == (20, False)
    found = check_offline((tmp_path / "r.html").read_text())
    assert "The run is not finished" in " ".join(found.text)


def test_without_matplotlib_the_extra_is_named(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (["report", "runs/demo/run"], ["compare", "runs/demo/run"] * 2):
        words = command[:2] if command[0] == "report" else [*command[:2], "runs/demo/run"]
        more = [] if command[0] == "report" else ["--html", "c.html"]
        done = mecq(*words, *more, cwd=digits)
        assert (done.code, done.err.count("\n")) == (6, 1)
        assert "pip install 'mecq[report]'" in done.err


def test_runs_beside_each_other(digits: Path, tmp_path: Path) -> None:
    run, other = digits / "runs/demo/run", tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "config.toml").read_text()
    assert "wbits = 2" in text
    (other / "config.toml").write_text(text.replace("wbits = 2", "wbits = 3"))
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({**summary, "top1": 12.5}))
    words = ["compare", run, other, "--html", "c.html"]
    document = mecq(*words, "--json", cwd=tmp_path).document
    first, second = document["runs"]
    assert (first["top1"], second["top1"]) == (summary["top1"], 12.5)
    assert second["drop"] == 12.5 - summary["fp_top1"]
    assert document["differing"] == [{"setting": "wbits", "values": [2, 3]}]
    assert document["unknown"] == []
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "model.safetensors", bare)
    shown = mecq("compare", run, "bare", cwd=tmp_path).out
    assert "settings are not known of: bare" in shown
    assert "the same" not in shown
    found = check_offline((tmp_path / "c.html").read_text())
    said = " ".join(found.text)
    assert "12.50 %" in said
    assert "wbits" in said
    (other / "summary.json").write_text(json.dumps({**summary, "fp_trained": False}))
    second = mecq(*words, "--json", "--force", cwd=tmp_path).document["runs"][1]
    assert (second["drop"], second["fp_top1"]) == (None, None)  # of guessing
    (other / "summary.json").write_text(json.dumps({**summary, "top1": 12.5}))
    shown = mecq("compare", run, other, cwd=tmp_path).out
    assert "12.50 %" in shown
    assert f"{summary['top1']:.2f} %" in shown
    many = mecq("compare", *[run] * 3, *[other] * 3, cwd=tmp_path).out
    assert many.count("12.50 %") == 3
    assert "2, 2, 2, 3, 3, 3" in many
    for arguments, code in ((["compare", run], 2), (["compare", run, tmp_path / "none"], 2)):
        done = mecq(*arguments, cwd=tmp_path)
        assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FRAME = """<!DOCTYPE html><title>-</title>
<iframe id=f width={width} height=800 srcdoc="{page}"></iframe>
<script>document.getElementById("f").onload = (event) => {{
  const page = event.target.contentDocument, all = [...page.querySelectorAll("svg, img")];
  document.title = [page.documentElement.scrollWidth, all.length,
    all.filter((e) => e.getBoundingClientRect().width < 40).length].join(" ");
}}</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser_it_fits_the_screen(
    digits: Path, reported: dict[str, Any], tmp_path: Path, width: int
) -> None:
    text = read(digits, reported)
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=html.escape(text)))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    done = subprocess.run(
        [
            str(BROWSER), *flags.split(), "--disable-background-networking",
            "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path / 'frame.html'}",
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    needed, shown, hidden = map(int, title.split())
    assert needed <= width, "the page must not scroll sideways"
    assert shown >= 26
    assert hidden == 0


def test_lines_of_one_colour_are_told_apart() -> None:
    shown = [background for background, _ in legend([f"line {n}" for n in range(20)])]
    assert len(set(shown)) == 20
    assert shown[0] == "var(--c1)"
    assert "var(--c1) 0 .4em" in shown[8]


def test_onnxruntime_is_looked_at_for_networks_of_tokens_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where the float network has no file, nothing is said of the integers for that."""
    images = torch.randn(4, 3, 8, 8)
    net = network("vit").eval()
    model = integerize(quantized(net, BitPlan(4, 4), images), (3, 8, 8), {})
    found = look_at_runtime(RunFolder(tmp_path), model, net, images, Listener())
    assert (found["verified"]["images"], found["verified"]["equal"]) == (4, True)
    assert {"integer", "fp32", "speedup"} <= found["latency"][0].keys()

    def refuse(*_: object) -> None:
        raise ArtifactError("the float network cannot be written")

    monkeypatch.setattr(report_runtime, "float_onnx", refuse)
    found = look_at_runtime(RunFolder(tmp_path), model, net, images, Listener())
    assert "error" not in found
    assert found["fp32_error"] == "the float network cannot be written"
    assert found["verified"]["images"] == 4
    assert "integer" in found["latency"][0]
    assert "fp32" not in found["latency"][0]
