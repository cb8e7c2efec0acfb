"""`mecq bench deploy`: latency, throughput and size of an export, beside what it competes with."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.export.onnx_compact import operations_of
from mecq_cli.export.ort import OrtRunner
from mecq_cli.export.ort_graph import float_nodes
from mecq_cli.sizes import totals
from mecq_cli.storage import atomic_write
from mecq_cli.target import resolve_target
from mecq_cli.workflow import deploy_plot, plots
from mecq_cli.workflow.deploy_networks import ARMS, FP32, MECQ, STATIC, Networks, build
from mecq_cli.workflow.deploy_settings import DeployConfig
from mecq_cli.workflow.interleave import interleave, is_busy, ratio, summary
from mecq_cli.workflow.machine import cores, cpu_name, integer_instructions

SECONDS = 5.0
"""For each combination of threads and batch size, where nothing else is asked for."""
_TASK = "time"


def bench(config: DeployConfig, listener: Listener) -> dict[str, Any]:
    """Time the FP32 network, onnxruntime's static INT8 of it, and our export, in turns.

    Returns:
        target, model, wbits, abits, input_shape, weights, calibration, machine; "sizes" in bytes;
        "kernels": types of the nodes that ran, counted; "float_nodes" of our export; "cells": one
        for each combination of threads and batch size, with latency, throughput and ratios.

    Raises:
        MecqError: see mecq_cli.errors.
    """
    started = time.perf_counter()
    _check(config)
    target = resolve_target(config.target)
    with tempfile.TemporaryDirectory() as folder:
        networks = build(config, target, Path(folder), listener)
        graphs = {
            arm: OrtRunner(path, threads=1, allow_foreign=True).optimized()
            for arm, path in networks.files.items()
        }
        floats = float_nodes(graphs[MECQ])
        names = [node.name for node in networks.integer.nodes]
        owners = operations_of([output for output, _ in floats], names)
        floats = [(name, op) for name, (_, op) in zip(owners, floats, strict=True)]
        if floats:
            listener.warn(_fallback(floats))
        machine = _machine()
        cells = _cells(config, networks, listener)
        sizes = {arm: path.stat().st_size for arm, path in networks.files.items()}
    metadata = networks.integer.metadata
    document: dict[str, Any] = {
        "target": target.name,
        "model": networks.model,
        "wbits": metadata.get("wbits"),
        "abits": metadata.get("abits"),
        "input_shape": list(networks.integer.input_shape),
        "weights": networks.weights,
        "calibration": {
            "images": len(networks.images),
            "source": "synthetic" if config.data is None else str(config.data),
        },
        "machine": machine,
        "sizes": {**sizes, "ideal": totals(networks.integer, 0, sizes[MECQ])["ideal_bytes"]},
        "kernels": {arm: _counts(graph) for arm, graph in graphs.items()},
        "float_nodes": [{"name": name, "type": op} for name, op in floats],
        "cells": cells,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if config.plot is not None:
        atomic_write(config.plot, deploy_plot.draw(document), force=config.force)
        document["plot"] = str(config.plot)
    return document


def _check(config: DeployConfig) -> None:
    """What would only fail after all the work."""
    if config.seconds is not None and config.repeats is not None:
        raise UsageError("--seconds and --repeats: give one of them")
    if config.plot is not None:
        plots.require_place(config.plot, force=config.force)


def _fallback(floats: Sequence[tuple[str, str]]) -> str:
    """The operations that onnxruntime computes with floats, and as what."""
    operations: dict[str, list[str]] = {}
    for name, op in floats:
        types = operations.setdefault(name, [])
        if op not in types:
            types.append(op)
    shown = [f"{name} ({', '.join(types)})" for name, types in list(operations.items())[:4]]
    more = f" and {len(operations) - 4} more" if len(operations) > 4 else ""
    return (
        f"between the first and the last layer {len(floats)} nodes compute with floats: "
        f"{', '.join(shown)}{more}"
    )


def _cells(config: DeployConfig, networks: Networks, listener: Listener) -> list[dict[str, Any]]:
    available = cores()
    if max(config.threads) > available:
        listener.warn(f"{max(config.threads)} threads on {available} cores wait for each other")
    cells: list[dict[str, Any]] = []
    listener.start(_TASK, len(config.threads) * len(config.batch_sizes))
    for threads in config.threads:
        runners = {
            arm: OrtRunner(path, threads=threads, allow_foreign=True)
            for arm, path in networks.files.items()
        }
        for batch in config.batch_sizes:
            cells.append(_cell(config, networks, runners, threads, batch))
            listener.advance(_TASK, len(cells))
    listener.finish(_TASK)
    if any(cell["busy"] for cell in cells):
        listener.warn(
            "other work shared the cores: latencies are too long; the ratios, of runs in the same "
            "round, suffer less"
        )
    return cells


def _cell(
    config: DeployConfig,
    networks: Networks,
    runners: Mapping[str, OrtRunner],
    threads: int,
    batch: int,
) -> dict[str, Any]:
    images = np.resize(networks.images, (batch, *networks.images.shape[1:]))
    calls = {arm: lambda runner=runner: runner.run(images) for arm, runner in runners.items()}
    seconds = SECONDS if config.seconds is None else config.seconds
    times = interleave(calls, seconds=seconds, repeats=config.repeats)
    arms = {arm: summary(times[arm], batch) for arm in ARMS}
    for arm in ARMS:
        arms[arm]["speedup"] = ratio(times[FP32].wall, times[arm].wall)
        arms[arm]["cpu_speedup"] = ratio(times[FP32].cpu, times[arm].cpu)
    return {
        "threads": threads,
        "batch_size": batch,
        "rounds": len(times[FP32].wall),
        "busy": threads == 1 and is_busy(times[FP32]),
        "arms": arms,
        "mecq_over_static_int8": ratio(times[STATIC].wall, times[MECQ].wall),
    }


def _counts(graph: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1),
        "integer_instructions": integer_instructions(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
    }
