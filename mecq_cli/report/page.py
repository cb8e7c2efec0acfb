"""The page of a run: what was gathered, as HTML."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mecq_cli.report import figures, html
from mecq_cli.report.answers_page import answers_section
from mecq_cli.report.curves import PANELS
from mecq_cli.report.html import number, percent, signed, size, text
from mecq_cli.report.layers_page import histograms_section, layers_section
from mecq_cli.report.pictures_page import pictures_section
from mecq_cli.tasks.figures import CLASSIFY, figures_of

Document = Mapping[str, Any]


def render(document: Document, pictures: Mapping[int, Sequence[str]]) -> str:
    """The whole page.

    Args:
        document: what `mecq_cli.workflow.report` gathered.
        pictures: data URIs of the example images by their "index": one each or, of answers that
            are drawn, those of `pictures_page.TITLES`.
    """
    name = f"{document['model']}, W{document['wbits']} A{document['abits']}"
    parts = [part for part in _sections(document, pictures) if part is not None]
    links = "".join(f'<a href="#{anchor}">{text(title)}</a>' for anchor, title, _ in parts)
    body = [
        "<header>",
        f"<h1>{text(name)}</h1>",
        f'<p class="soft">{text(document["run"])}</p>',
        f'<nav aria-label="Sections">{links}</nav>',
        "</header>",
        "<main>",
        *_headline(document),
        *_left_out(document),
        *(html.section(anchor, title, inner) for anchor, title, inner in parts),
        "</main>",
    ]
    return html.page(f"{name}: report", document["mecq"], body)


def _sections(
    document: Document, pictures: Mapping[int, Sequence[str]]
) -> Iterator[tuple[str, str, Iterator[str]] | None]:
    if document["training"]:
        yield "training", "Training", _training(document["training"])
    if document.get("runtime"):
        yield "sizes", "Sizes and speed", _runtime(document)
    answers = document.get("answers")
    if answers:
        section = answers_section if answers["task"] == CLASSIFY else pictures_section
        yield "answers", "Answers", section(answers, pictures)
    if document.get("layers"):
        yield "layers", "Layers", layers_section(document)
        yield "histograms", "Histograms", histograms_section(document)
    yield "again", "How to make it again", _again(document)


def _headline(document: Document) -> Iterator[str]:
    summary = document["summary"]
    of = figures_of(summary)
    fp, reached = summary.get(f"fp_{of.key}"), summary.get(of.key)
    if summary:
        trained = summary.get("fp_trained", True)
        known = trained and fp is not None and reached is not None
        drop = f"{signed(reached - fp)} points against float" if known else ""
        of_float = f"on {summary.get('images', 0):,} images"
        if not trained:
            of_float = "its last layer, or all of it, was untrained: no measure"
        yield html.tiles(
            [
                (f"integer {of.label}", percent(reached), drop),
                (f"float {of.label}", percent(fp), of_float),
                *_size_tile(document),
                ("verification", *_verification(document)),
            ]
        )
    elif not document["finished"] and not document.get("sizes"):
        yield '<p class="note">The run is not finished: it has no results yet.</p>'
    rows = list(_headline_rows(document))
    if rows:
        yield html.table(["", ""], rows, caption="The run in figures", kind="pairs")


def _size_tile(document: Document) -> Iterator[tuple[str, str, str]]:
    sizes = document.get("sizes")
    if sizes:
        ratio = f"{sizes['ratio']:.1f} times smaller than float" if sizes.get("ratio") else ""
        yield "artifact", size(sizes["packed_bytes"]), ratio


def _verification(document: Document) -> tuple[str, str]:
    runtime = document.get("runtime") or {}
    verified = runtime.get("verified")
    if runtime.get("error"):
        return "no", "the ONNX file cannot be run"
    if not verified:
        return "–", "no images to compare on"
    if verified["equal"]:
        return "equal", f"onnxruntime and simulator, every logit, {verified['images']} images"
    if verified["top1_agreement"] == 100.0:
        return "same answers", f"on {verified['images']} images; logits differ in rounding"
    return "differs", f"{percent(verified['top1_agreement'])} of the answers are the same"


def _headline_rows(document: Document) -> Iterator[tuple[str, str]]:
    summary = document["summary"]
    of = figures_of(summary)
    fp = summary.get(f"fp_{of.key}") if summary.get("fp_trained", True) else None
    for key, label in (
        (f"fp_{of.key}", "float network"),
        (f"simulator_{of.key}", "quantized, simulator"),
        (of.key, "quantized, integer artifact"),
    ):
        value = summary.get(key)
        if value is not None:
            against = "" if key == f"fp_{of.key}" or fp is None else f" ({signed(value - fp)})"
            yield f"{label}, {of.label}", percent(value) + against
    if summary.get("images"):
        yield "measured on", f"{summary['images']:,} images"
    sizes = document.get("sizes")
    if sizes:
        if sizes.get("fp32_bytes"):
            yield "parameters in float32", size(sizes["fp32_bytes"])
        ideal = sizes["ideal_bytes"]
        over = 100 * (sizes["packed_bytes"] / ideal - 1)
        yield (
            "integer artifact",
            f"{size(sizes['packed_bytes'])} (weights, scales and biases alone: {size(ideal)}, "
            f"{signed(over, 1)} %)",
        )
    if summary.get("steps") is not None:
        yield "training", f"{summary['steps']:,} steps"
    if summary.get("seconds") is not None:
        phases = summary.get("seconds_by_phase") or {}
        parts = ", ".join(f"{text(k)} {v:,.1f} s" for k, v in phases.items())
        yield "time", f"{summary['seconds']:,.1f} s" + (f" ({parts})" if parts else "")
    if summary.get("resumed_at") is not None:
        yield "resumed", f"at step {summary['resumed_at']:,}"


def _left_out(document: Document) -> Iterator[str]:
    if document["left_out"]:
        items = "".join(f"<li>{text(line)}</li>" for line in document["left_out"])
        yield f'<div class="note"><p>Left out of this report:</p><ul>{items}</ul></div>'


def _training(training: Document) -> Iterator[str]:
    curves = training["curves"]
    waited = training["data_seconds"]
    yield (
        f"<p>{training['steps']:,} steps, {training['epochs']:,} "
        f"epoch{'s' * (training['epochs'] > 1)}, {training['seconds']:,.1f} s in steps"
        + (f" and {waited:,.1f} s of waiting for images" if waited else "")
        + '.</p><p class="soft">Thin lines: steps, or means of neighbouring ones. Thick lines: '
        "means of the last 5 % of all steps.</p>"
    )
    drawn = []
    for key, title, unit in PANELS:
        one = curves.get(key)
        if one is None or (key == "loss_mec" and not any(one["value"])):
            continue
        picture = figures.curve(f"curve-{key.replace('_', '-')}", title, one, unit)
        drawn.append(
            html.figure(picture, title, f"{number(one['first'])} → {number(one['last'])} {unit}")
        )
    lengths = curves["coding_length"]
    if lengths:
        picture = figures.curves("curve-coding", "Coding length by site", lengths, "nats")
        names = html.legend(figures.legend(list(lengths)))
        drawn.append(html.figure(picture + names, "Coding length by site"))
    yield html.grid(drawn)
    if lengths:
        yield html.details(
            "Coding lengths in nats, as a table",
            html.table(
                ["site", "first step", "end"],
                [(text(k), f"{v['first']:.3f}", f"{v['last']:.3f}") for k, v in lengths.items()],
                numbers=(1, 2),
            ),
        )


def _runtime(document: Document) -> Iterator[str]:
    runtime, sizes = document["runtime"], document["sizes"]
    if runtime.get("error"):
        yield f'<p class="note">{text(runtime["error"])}</p>'
    rows = [
        ("float32, ONNX", runtime.get("fp32_onnx_bytes")),
        ("float32, parameters alone", sizes.get("fp32_bytes") or None),
        ("integer, .safetensors artifact", sizes["packed_bytes"]),
        ("integer, ONNX with packed weights", runtime.get("onnx_bytes")),
        ("integer, weights, scales and biases alone", sizes["ideal_bytes"]),
    ]
    reference = sizes.get("fp32_bytes")
    table = html.table(
        ["file", "size", "of float32"],
        [
            (label, size(value), f"{100 * value / reference:.1f} %" if reference else "–")
            for label, value in rows
            if value is not None
        ],
        caption="Sizes",
        numbers=(1, 2),
    )
    made = runtime.get("file")
    table += (
        '<p class="soft">'
        + (
            f"The ONNX file is {text(made)}."
            if made
            else "The run has no model.onnx: one was made for these figures and not kept "
            "(<code>mecq export</code> writes it)."
        )
        + "</p>"
    )
    latency = runtime.get("latency")
    if not latency:
        yield table
    else:
        yield html.beside(
            html.column(table), html.column(_latency(runtime, latency, document["machine"]))
        )


def _latency(runtime: Document, latency: list[Document], machine: Document) -> str:
    def cell(arm: Document | None) -> str:
        if arm is None:
            return "–"
        low, high = arm["latency_low_ms"], arm["latency_high_ms"]
        return f'{arm["latency_ms"]:.2f} <span class="soft">({low:.2f} to {high:.2f})</span>'

    rows = []
    for row in latency:
        speedup = row.get("speedup")
        times = "–" if speedup is None else f"{speedup['median']:.2f} times"
        rows.append((str(row["batch"]), cell(row.get("fp32")), cell(row["integer"]), times))
    table = html.table(
        ["batch", "float32, ms", "integer, ms", "faster"],
        rows,
        caption=f"Latency: median and quartiles, onnxruntime {runtime['onnxruntime']}, one thread",
        numbers=(1, 2, 3),
    )
    known = machine["integer_instructions"]
    has = f" with {', '.join(known)}" if known else ""
    busy = any(row["busy"] for row in latency)
    shared = " Other work shared the core: the times are too long, the ratio suffers less."
    turns = "; both networks in turns" if any("fp32" in row for row in latency) else ""
    missing = runtime.get("fp32_error")
    without = f" {missing[0].upper()}{missing[1:]}." if missing else ""
    where = f"On {machine['cpu']}{has}{turns}.{shared if busy else ''}{without}"
    return f'{table}<p class="soft">{text(where)}</p>'


def _again(document: Document) -> Iterator[str]:
    if document["command"]:
        yield "<p>The same run, in a new folder:</p>"
        yield html.code(shlex.join(document["command"]))
    elif document["maker"]:
        maker = text(document["maker"])
        yield f"<p>Its images or its network were chosen by a program: {maker} makes it again.</p>"
    if document["settings"]:
        yield html.details("All settings (config.toml)", html.code(document["settings"]))
    trained = document["summary"].get("machine")
    if trained and trained != document["machine"]:
        yield _machine(trained, "Trained on")
        yield _machine(document["machine"], "This report was made on")
    else:
        title = "Trained and measured on" if trained else "This report was made on"
        yield _machine(document["machine"], title)


def _machine(machine: Document, title: str) -> str:
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("8-bit integer instructions", ", ".join(machine["integer_instructions"]) or "not known"),
        ("GPU", machine["gpu"] or "none"),
        ("memory", f"{machine['memory_bytes'] / 2**30:.1f} GiB"),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)),
    ]
    return html.table(["", ""], [(text(k), text(v)) for k, v in rows], caption=title)
