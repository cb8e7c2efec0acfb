"""How much speed does onnxruntime leave on the table at 1 and 2 bits, on one core of a CPU?

``python -m tests.studies.low_bit_kernels [--json FILE]`` from the repository's root; about a
minute. docs/kernels.md says what was asked and what came out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mecq_cli.events import Listener
from mecq_cli.target import resolve_target
from mecq_cli.workflow.deploy_networks import MECQ, build
from mecq_cli.workflow.deploy_settings import DeployConfig
from mecq_cli.workflow.machine import cpu_name, integer_instructions

Codes = NDArray[np.uint8]
Sums = NDArray[np.int32]
Shape = tuple[int, int, int]
"""(M, N, K) of a product: rows (pixels times batch), columns (channels), products in each sum."""

SOURCE = Path(__file__).with_suffix(".c")
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vnni", "avx512_vpopcntdq")
GOAL = 1.5
"""Times faster a whole network must become."""

NETWORKS = ("resnet18", "resnet50", "torchvision/mobilenet_v2")
CONVOLUTIONS: tuple[Shape, ...] = (
    (3136, 64, 576),
    (784, 128, 1152),
    (196, 256, 2304),
    (49, 512, 4608),
)
"""The 3x3 convolutions of ResNet-18."""
LINEAR: tuple[Shape, ...] = ((1, 1000, 512), (8, 1000, 512), (1, 1000, 2048), (8, 1000, 2048))
POINTWISE: tuple[Shape, ...] = (
    (3136, 256, 64),
    (784, 128, 512),
    (196, 256, 1024),
    (49, 512, 2048),
    (49, 1280, 320),
)
"""1x1 convolutions of ResNet-50 and MobileNetV2."""


class Unavailable(Exception):
    """The machine cannot run this; the message is one line that says why."""


# ---- The kernels in C --------------------------------------------------------------------------


def compile_kernels(folder: Path) -> ctypes.CDLL:
    """The library of low_bit_kernels.c, compiled into ``folder``.

    Raises:
        Unavailable: no compiler, or a CPU without the instructions.
    """
    flags = _cpu_flags()
    missing = [flag for flag in NEEDED if flag not in flags]
    if missing:
        raise Unavailable(f"this CPU lacks {', '.join(missing)}")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("no C compiler: none of cc, gcc and clang was found")
    out = folder / "low_bit_kernels.so"
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["without a word"])[0]
        raise Unavailable(f"{compiler} failed: {reason}")
    return ctypes.CDLL(str(out))


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line[:5] == "flags"), set())


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that begins at a multiple of 64 bytes, with 64 more behind it."""
    raw = np.zeros(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def _padded(codes: Codes, multiple: int) -> Codes:
    """Zeros behind the last axis, until its length is a multiple."""
    width = -codes.shape[-1] % multiple
    return np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, width)])


def _call(function: Any, *arguments: Any) -> Callable[[], None]:
    """Arrays as pointers, whole numbers as C ints; the call keeps the arrays alive."""
    ready = [
        ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else ctypes.c_int(x)
        for x in arguments
    ]

    def run() -> None:
        _ = arguments
        function(*ready)

    return run


@dataclass(frozen=True)
class Product:
    """A kernel with its operands packed.

    Attributes:
        run: computes the product once.
        sums: int32 [M, N] where it goes.
        pack: what has to happen to activations before; None where codes are used as they are.
        activations: where it puts them; else the codes.
    """

    run: Callable[[], None]
    sums: Sums
    pack: Callable[[], None] | None
    activations: NDArray[Any]


def vnni(lib: ctypes.CDLL, a: Codes, w: Codes) -> Product:
    """8-bit dot products; ``a`` [M, K] below 256, ``w`` [N, K] below 128; N a multiple of 64."""
    rows, columns = _padded(a, 4), _padded(w, 4)
    m, (n, k) = len(rows), columns.shape
    packed = columns.reshape(n // 64, 64, k // 4, 4).transpose(0, 2, 1, 3)
    out = _aligned(np.zeros((m, n), np.int32))
    rows, weights = _aligned(rows), _aligned(packed.astype(np.int8))
    return Product(_call(lib.gemm_vnni, rows, weights, out, m, n, k), out, None, rows)


def planes(lib: ctypes.CDLL, a: Codes, w: Codes, abits: int, wbits: int) -> Product:
    """Bit-serial: for each pair of bit planes and, population count, add."""
    rows, columns = _aligned(_padded(a, 64)), _padded(w, 64)
    m, (n, k) = len(rows), columns.shape
    bits = np.stack(
        [np.packbits(columns >> q & 1, axis=1, bitorder="little") for q in range(wbits)]
    )
    words = bits.view(np.uint64).reshape(wbits, n // 32, 32, k // 64).transpose(0, 1, 3, 2)
    activations = _aligned(np.zeros((abits, m, k // 64), np.uint64))
    pack = _call(lib.pack_planes, rows, activations, m, k, abits)
    pack()
    out = _aligned(np.zeros((m, n), np.int32))
    run = _call(lib.gemm_planes, activations, _aligned(words), out, m, n, k, abits, wbits)
    return Product(run, out, pack, activations)


def tables(lib: ctypes.CDLL, a: Codes, w: Codes, abits: int, wbits: int) -> Product:
    """Table lookup: six activations of 1 or 2 bits make a table, six bits of a weight plane
    choose from it."""
    rows, columns = _aligned(_padded(a, 6)), _padded(w, 6)
    m, (n, k) = len(rows), columns.shape
    assert k * ((1 << abits) - 1) * ((1 << wbits) - 1) < 1 << 16, "sums are of 16 bits"
    vectors = max(v for v in ((1, 2, 4) if wbits == 1 else (1, 2)) if n % (64 * v) == 0)
    patterns = _patterns(columns, wbits).reshape(wbits, n // (64 * vectors), vectors, 64, k // 6)
    packed = _aligned(patterns.transpose(1, 4, 2, 0, 3))
    activations = _aligned(np.zeros((m, k // 3), np.uint8))
    pack = _call(lib.pack_thirds, rows, activations, m, k)
    pack()
    out = _aligned(np.zeros((m, n), np.int32))
    run = _call(lib.gemm_tables, activations, packed, out, m, n, k, abits, wbits, vectors)
    return Product(run, out, pack, activations)


def tables8(lib: ctypes.CDLL, a: Codes, w: Codes, wbits: int) -> Product:
    """Table lookup for activations of 8 bits; the tables are made within the product."""
    rows, columns = _aligned(_padded(a, 6)), _padded(w, 6)
    m, (n, k) = len(rows), columns.shape
    patterns = _patterns(columns, wbits).reshape(wbits, n // 64, 64, k // 6)
    packed = _aligned(patterns.transpose(1, 3, 0, 2))
    scratch = _aligned(np.zeros((k // 6, 2, 2, 64), np.uint8))
    out = _aligned(np.zeros((m, n), np.int32))
    run = _call(lib.gemm_tables8, rows, packed, out, m, n, k, wbits, scratch)
    return Product(run, out, None, rows)


def _patterns(columns: Codes, wbits: int) -> Codes:
    """Six bits of a plane in each: u8 [wbits, N, K/6]."""
    n, k = columns.shape
    sixes = columns.reshape(n, k // 6, 6)
    powers = (1 << np.arange(6)).astype(np.uint8)
    return np.stack([((sixes >> q & 1) * powers).sum(-1, dtype=np.uint8) for q in range(wbits)])


def gathered(
    lib: ctypes.CDLL,
    picture: Codes,
    outs: int,
    stride: int,
    size: int,
    out: NDArray[Any] | None = None,
) -> tuple[Callable[[], None], Codes]:
    """Copies the pixels under each place of a kernel, from packed pictures with their border.

    Args:
        picture: u8 [count, side, side, bytes].
        outs: height and width of the output.
        stride: of the kernel.
        size: height and width of the kernel.
        out: where to copy them, if not into a new array; 64 bytes behind it get lost.

    Returns:
        What does it, and u8 [count, outs, outs, size, size, bytes] where it goes.
    """
    count, side, _, width = picture.shape
    shape = (count, outs, outs, size, size, width)
    total = int(np.prod(shape))
    place = _aligned(np.zeros(total, np.uint8)) if out is None else out.reshape(-1).view(np.uint8)
    assert place.size == total
    run = _call(lib.gather, _aligned(picture), place, count, side, outs, stride, size, width)
    return run, place.reshape(shape)


def requantized(lib: ctypes.CDLL, sums: Sums, abits: int) -> Callable[[], None]:
    """Sums to codes of activations: a factor and an offset for each channel, rounded, clipped."""
    m, n = sums.shape
    scale, shift = np.full(n, 1e-3, np.float32), np.zeros(n, np.float32)
    out = np.zeros((m, n), np.uint8)
    return _call(lib.requantize, sums, scale, shift, out, m, n, (1 << abits) - 1)


Arm = Callable[[ctypes.CDLL, Codes, Codes], Product]
VNNI = "W8 A8 vpdpbusd"
ARMS: dict[str, tuple[int, int, Arm]] = {
    VNNI: (7, 8, vnni),
    "W1 A1 planes": (1, 1, lambda lib, a, w: planes(lib, a, w, 1, 1)),
    "W1 A2 planes": (1, 2, lambda lib, a, w: planes(lib, a, w, 2, 1)),
    "W2 A2 planes": (2, 2, lambda lib, a, w: planes(lib, a, w, 2, 2)),
    "W1 A1 tables": (1, 1, lambda lib, a, w: tables(lib, a, w, 1, 1)),
    "W1 A2 tables": (1, 2, lambda lib, a, w: tables(lib, a, w, 2, 1)),
    "W2 A2 tables": (2, 2, lambda lib, a, w: tables(lib, a, w, 2, 2)),
    "W1 A8 tables": (1, 8, lambda lib, a, w: tables8(lib, a, w, 1)),
    "W2 A8 tables": (2, 8, lambda lib, a, w: tables8(lib, a, w, 2)),
}
"""Bits of weights and of activations, and what makes the product."""

INSTRUCTIONS = {
    VNNI: 1 / 64,
    "W1 A1 planes": 3 / 512,
    "W1 A2 planes": 6 / 512,
    "W2 A2 planes": 12 / 512,
    "W1 A1 tables": 2 / 384,
    "W1 A2 tables": 2 / 384,
    "W2 A2 tables": 4 / 384,
    "W1 A8 tables": 4 / 384,
    "W2 A8 tables": 8 / 384,
}
"""Vector instructions of 512 bits for a product in the innermost loop, counted by hand. Loads, the
making of tables and the widening of their sums are left out."""


def operands(shape: Shape, wbits: int, abits: int, seed: int = 0) -> tuple[Codes, Codes]:
    """Random codes: activations [M, K] and weights [N, K]."""
    m, n, k = shape
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 1 << abits, (m, k)).astype(np.uint8)
    return a, rng.integers(0, 1 << wbits, (n, k)).astype(np.uint8)


def prepare(lib: ctypes.CDLL, arm: str, shape: Shape, seed: int = 0) -> tuple[Product, Sums]:
    """The product of random codes, and what it must be: int32 [M, N]."""
    wbits, abits, make = ARMS[arm]
    a, w = operands(shape, wbits, abits, seed)
    # float64 holds all of these sums exactly.
    right = np.rint(a.astype(np.float64) @ w.T.astype(np.float64)).astype(np.int32)
    return make(lib, a, w), right


# ---- onnxruntime -------------------------------------------------------------------------------


class Profiled:
    """A session on one thread whose operators are timed by onnxruntime itself.

    Args:
        model: the file's bytes, or a path.
        feed: its inputs.
        folder: where the profile goes.
        settings: entries of the session's configuration.
        optimized: where to write what onnxruntime made of the graph.
    """

    def __init__(
        self,
        model: bytes | str,
        feed: Mapping[str, NDArray[Any]],
        folder: Path,
        settings: Mapping[str, str] | None = None,
        optimized: Path | None = None,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / f"profile{id(self)}")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        for key, value in (settings or {}).items():
            options.add_session_config_entry(key, value)
        self._session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self._feed = dict(feed)

    def run(self) -> list[NDArray[Any]]:
        """The outputs."""
        outputs: list[NDArray[Any]] = self._session.run(None, self._feed)
        return outputs

    def events(self) -> list[dict[str, Any]]:
        """What onnxruntime noted of each call of an operator. Ends the profile."""
        path = Path(self._session.end_profiling())
        events = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        end = "_kernel_time"
        return [
            event | {"name": event["name"][: -len(end)]}
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith(end)
        ]

    def seconds(self) -> dict[tuple[str, str], float]:
        """The least time of each operator, by its type and name. Ends the profile."""
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in self.events():
            found[event["args"]["op_name"], event["name"]].append(event["dur"])
        # Whole microseconds, so that 0 may stand there.
        return {key: 1e-6 * min(values) for key, values in found.items()}


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int]]],
    output: tuple[int, Sequence[int]],
    constants: Mapping[str, NDArray[Any]],
) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "one",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("Y", *output)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains)
    model.ir_version = 10
    return bytes(model.SerializeToString())


def float_matmul(shape: Shape) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """MatMul of floats with a constant."""
    m, n, k = shape
    node = helper.make_node("MatMul", ["A", "B"], ["Y"])
    b = np.random.default_rng(0).standard_normal((k, n), np.float32)
    a = np.random.default_rng(1).standard_normal((m, k), np.float32)
    inputs = {"A": (TensorProto.FLOAT, (m, k))}
    return _model([node], inputs, (TensorProto.FLOAT, (m, n)), {"B": b}), {"A": a}


def _bytes(shape: Sequence[int], low: int, high: int, dtype: type) -> NDArray[Any]:
    return np.random.default_rng(2).integers(low, high, tuple(shape)).astype(dtype)


def integer_matmul(shape: Shape) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """MatMulInteger of u8 with constant s8; int32 comes out."""
    m, n, k = shape
    node = helper.make_node("MatMulInteger", ["A", "B"], ["Y"])
    constants = {"B": _bytes((k, n), -2, 2, np.int8)}
    inputs = {"A": (TensorProto.UINT8, (m, k))}
    data = _model([node], inputs, (TensorProto.INT32, (m, n)), constants)
    return data, {"A": _bytes((m, k), 0, 4, np.uint8)}


def _scales(n: int) -> dict[str, NDArray[Any]]:
    return {
        "one": np.ones((), np.float32),
        "scales": np.full(n, 0.01, np.float32),
        "zero": np.zeros((), np.uint8),
        "zeros": np.zeros(n, np.int8),
        "bias": np.zeros(n, np.int32),
    }


def quantized_gemm(shape: Shape) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """QGemm of u8 with constant s8; u8 comes out."""
    m, n, k = shape
    names = ["A", "one", "zero", "B", "scales", "zeros", "bias", "one", "zero"]
    node = helper.make_node("QGemm", names, ["Y"], domain="com.microsoft", transB=1)
    constants = {"B": _bytes((n, k), -2, 2, np.int8), **_scales(n)}
    inputs = {"A": (TensorProto.UINT8, (m, k))}
    data = _model([node], inputs, (TensorProto.UINT8, (m, n)), constants)
    return data, {"A": _bytes((m, k), 0, 4, np.uint8)}


def quantized_conv(shape: Shape, size: int) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """QLinearConv of u8 with constant s8, kernels of ``size`` pixels, on a picture of M pixels."""
    m, n, k = shape
    side, channels = round(m**0.5), k // size**2
    height, width = (side, side) if side**2 == m else (m, 1)
    names = ["A", "one", "zero", "B", "scales", "zeros", "one", "zero", "bias"]
    node = helper.make_node("QLinearConv", names, ["Y"], pads=[size // 2] * 4)
    constants = {"B": _bytes((n, channels, size, size), -2, 2, np.int8), **_scales(n)}
    there, back = (1, channels, height, width), (1, n, height, width)
    inputs = {"A": (TensorProto.UINT8, there)}
    data = _model([node], inputs, (TensorProto.UINT8, back), constants)
    return data, {"A": _bytes(there, 0, 4, np.uint8)}


def matmul_nbits(
    shape: Shape, bits: int, block: int, accuracy: int
) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """MatMulNBits: floats with constant integers of few bits, a scale for each block."""
    m, n, k = shape
    rng = np.random.default_rng(3)
    packed = rng.integers(0, 256, (n, k // block, block * bits // 8)).astype(np.uint8)
    scales = np.full((n, k // block), 0.1, np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["A", "B", "scales"],
        ["Y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=block,
        accuracy_level=accuracy,
    )
    inputs = {"A": (TensorProto.FLOAT, (m, k))}
    constants: dict[str, NDArray[Any]] = {"B": packed, "scales": scales}
    data = _model([node], inputs, (TensorProto.FLOAT, (m, n)), constants)
    return data, {"A": rng.standard_normal((m, k), np.float32)}


LUT = {"mlas.use_lut_gemm": "1"}
"""Lets MatMulNBits take onnxruntime's own table lookup for 2 bits, where it has one."""


def onnxruntime_arms(shape: Shape, folder: Path) -> dict[str, Profiled]:
    """All operators of onnxruntime that can compute this product; those it refuses are left out."""
    arms = {
        "MatMul fp32": Profiled(*float_matmul(shape), folder),
        "MatMulInteger": Profiled(*integer_matmul(shape), folder),
        "QGemm": Profiled(*quantized_gemm(shape), folder),
        "QLinearConv": Profiled(*quantized_conv(shape, 1), folder),
    }
    for bits in (2, 4):
        for accuracy in (0, 4):
            for block in (32, 128):
                for settings in ({}, LUT) if bits == 2 else ({},):
                    if shape[2] % block:
                        continue
                    name = f"NBits {bits}, level {accuracy}, block {block}"
                    name += ", lut" if settings else ""
                    made = matmul_nbits(shape, bits, block, accuracy)
                    arms[name] = Profiled(*made, folder, settings)
    return arms


OURS = ("MatMul", "MatMulInteger", "QGemm", "QLinearConv", "MatMulNBits", "Gemm")


def operator_seconds(arms: Mapping[str, Profiled], rounds: int) -> dict[str, float]:
    """The least time of each arm's product, seconds; the arms take turns."""
    for _ in range(rounds):
        for arm in arms.values():
            arm.run()
    found = {}
    for name, arm in arms.items():
        times = [t for (kind, _), t in arm.seconds().items() if kind in OURS]
        found[name] = max(times) if times else float("nan")
    return found


# ---- Measuring ---------------------------------------------------------------------------------


def least(
    arms: Mapping[Any, Callable[[], object]], rounds: int
) -> tuple[dict[Any, float], dict[Any, float]]:
    """The least processor time of each arm, seconds; the arms take turns, with two calls each.

    Returns:
        Of the first call, whose operands the other arms have driven out of the nearer caches, and
        of the second one.
    """
    cold, warm = ({name: float("inf") for name in arms} for _ in range(2))
    for _ in range(rounds + 1):
        for name, run in arms.items():
            for best in (cold, warm):
                start = time.process_time_ns()
                run()
                best[name] = min(best[name], 1e-9 * (time.process_time_ns() - start))
    return cold, warm


def rates(shape: Shape, seconds: float) -> float:
    """GMAC/s: thousand millions of products a second."""
    m, n, k = shape
    return m * n * k / seconds / 1e9


def ceilings(lib: ctypes.CDLL) -> dict[str, float]:
    """GMAC/s of the innermost instructions alone, with nothing but registers."""
    times = 100_000
    runs = {kind: _call(lib.instructions, kind, times) for kind in range(3)}
    _, seconds = least(runs, 30)
    vpdpbusd, planes_, tables_ = (12 * times / seconds[kind] / 1e9 for kind in range(3))
    return {
        VNNI: 64 * vpdpbusd,
        "W1 A1 planes": 512 * planes_,
        "W1 A2 planes": 256 * planes_,
        "W2 A2 planes": 128 * planes_,
        "W1 A1 tables": 384 * tables_,
        "W1 A2 tables": 384 * tables_,
        "W2 A2 tables": 192 * tables_,
        "W1 A8 tables": 192 * tables_,
        "W2 A8 tables": 96 * tables_,
    }


def kernels_on(
    lib: ctypes.CDLL, shape: Shape, folder: Path, rounds: int, size: int = 3
) -> dict[str, Any]:
    """All kernels and onnxruntime's on one convolution: microseconds by arm, checked to be exact.

    Packing and requantization are in lines of their own; the former of a picture before its
    pixels are taken 9 times (3x3).
    """
    m, n, k = shape
    runs: dict[Any, Callable[[], object]] = {}
    wrong = []
    for arm in ARMS:
        product, right = prepare(lib, arm, shape)
        product.run()
        if not np.array_equal(product.sums, right):
            wrong.append(arm)
        runs[arm] = product.run
    picture = (m, n, k // size**2)
    for name in ("W2 A2 planes", "W2 A2 tables"):
        pack = prepare(lib, name, picture)[0].pack
        assert pack is not None
        runs["pack " + name[6:]] = pack
    runs["requantize"] = requantized(lib, product.sums, 2)
    stock = {
        "QLinearConv": Profiled(*quantized_conv(shape, size), folder),
        "MatMulInteger": Profiled(*integer_matmul(shape), folder),
    }
    _, seconds = least(runs | {name: arm.run for name, arm in stock.items()}, rounds)
    # Those of onnxruntime by its profile: without the changes of layout around a single operator.
    seconds.update(operator_seconds(stock, 0))
    return {
        "shape": shape,
        "exact": not wrong,
        "wrong": wrong,
        "us": {name: 1e6 * value for name, value in seconds.items()},
    }


# ---- Whole networks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A convolution that low bits could speed up.

    Attributes:
        name: of its operator.
        pixels: of the output.
        inputs: pixels of the input.
        channels: of the input.
        columns: channels of the output.
        taps: pixels in the kernel.
    """

    name: str
    pixels: int
    inputs: int
    channels: int
    columns: int
    taps: int

    def product(self, multiple: int) -> Shape:
        """As a product: channels of each tap filled up to a multiple, columns to 64."""
        k = self.taps * -(-self.channels // multiple) * multiple
        return self.pixels, -(-self.columns // 64) * 64, k


@dataclass(frozen=True)
class Network:
    """An export, loaded.

    Attributes:
        name: of the model.
        profiled: its session.
        layers: convolutions but the first and those by groups (depthwise).
        kinds: what other convolutions are, by name: "first" or "depthwise".
    """

    name: str
    profiled: Profiled
    layers: list[Layer]
    kinds: dict[str, str]


def network(name: str, folder: Path) -> Network:
    """The export W2 A2 of a model with random weights; 224 x 224 pixels, batch 1."""
    folder = folder / name.replace("/", "_")
    folder.mkdir(parents=True)
    config = DeployConfig(target=name, wbits=2, abits=2, calibration_images=2)
    made = build(config, resolve_target(name), folder, Listener())
    path, optimized = str(made.files[MECQ]), folder / "optimized.onnx"
    feed = {onnx.load(path).graph.input[0].name: made.images[:1]}
    once = Profiled(path, feed, folder, optimized=optimized)
    once.run()
    pixels = {event["name"]: _pixels(event["args"]) for event in once.events()}
    graph = onnx.load(optimized).graph
    shapes = {item.name: tuple(item.dims) for item in graph.initializer}
    layers: list[Layer] = []
    kinds: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "QLinearConv":
            continue
        columns, channels, *kernel = shapes[node.input[3]]
        groups = {a.name: a.i for a in node.attribute}.get("group", 1)
        if groups > 1:
            kinds[node.name] = "depthwise"
        elif not kinds:
            kinds[node.name] = "first"
        else:
            inputs, outputs = pixels[node.name]
            taps = int(np.prod(kernel))
            layers.append(Layer(node.name, outputs, inputs, channels, columns, taps))
    return Network(name, Profiled(path, feed, folder), layers, kinds)


def _pixels(event: Mapping[str, Any]) -> tuple[int, int]:
    """Of the first input and of the output, if they are [1, H, W, C]."""
    first = [next(iter(item.values())) for item in event["input_type_shape"][:1]]
    last = [next(iter(item.values())) for item in event["output_type_shape"][:1]]
    sizes = [int(np.prod(shape[1:-1])) if len(shape) == 4 else 0 for shape in (*first, *last)]
    return (sizes[0], sizes[-1]) if sizes else (0, 0)


SCHEMES = {
    "W2 A2": ("W2 A2 planes", "W2 A2 tables"),
    "W1 A2": ("W1 A2 planes", "W1 A2 tables"),
    "W1 A1": ("W1 A1 planes", "W1 A1 tables"),
    "W8 A8": (VNNI,),
}
"""Kernels that compute it; the last one is no low-bit scheme, but our own 8-bit kernel."""

MULTIPLES = {"planes": 64, "tables": 6, "vpdpbusd": 4}


def estimate(lib: ctypes.CDLL, networks: Sequence[Network], rounds: int) -> list[dict[str, Any]]:
    """What whole networks would gain, if each layer took the fastest kernel there is.

    "products alone" counts a layer's product, with operands packed and in a near cache. "all
    around" adds packing of the layer's input, copies of the pixels under the kernel and
    requantization, each as a pass of its own; "far" has the product's operands come from memory or
    a farther cache besides. "in order" times all layers of a network as they follow each other.
    Where onnxruntime is faster it stays.
    """
    runs: dict[Any, Callable[[], object]] = {}
    for net in networks:
        runs[net.name] = net.profiled.run
        for layer in net.layers:
            for arm, key in _kernels(layer):
                if ("run", *key) not in runs:
                    _add(lib, runs, arm, layer, key)
    cold, warm = least(runs, rounds)
    found = []
    for net in networks:
        operators = net.profiled.seconds()
        chains = _in_order(lib, net, {name: t for (_, name), t in operators.items()}, warm)
        _, times = least({scheme: chain for scheme, (_, chain) in chains.items()}, rounds)
        whole = {scheme: kept + times[scheme] for scheme, (kept, _) in chains.items()}
        found.append(_estimate(net, operators, cold, warm, whole))
    return found


def _kernels(layer: Layer) -> list[tuple[str, tuple[Any, ...]]]:
    """Arms, and what tells their measurements apart."""
    arms = [arm for arms in SCHEMES.values() for arm in arms]
    return [
        (arm, (arm, layer.product(MULTIPLES[arm.split()[-1]]), layer.inputs, layer.channels))
        for arm in arms
    ]


def _add(
    lib: ctypes.CDLL,
    runs: dict[Any, Callable[[], object]],
    arm: str,
    layer: Layer,
    key: tuple[Any, ...],
) -> None:
    runs.update({(part, *key): run for part, run in _parts(lib, arm, layer).items()})


def _parts(lib: ctypes.CDLL, arm: str, layer: Layer) -> dict[str, Callable[[], None]]:
    """What a layer does, in its order."""
    wbits, abits, make = ARMS[arm]
    shape = layer.product(MULTIPLES[arm.split()[-1]])
    product = make(lib, *operands(shape, wbits, abits))
    parts: dict[str, Callable[[], None]] = {}
    side, outs, size = (round(x**0.5) for x in (layer.inputs, layer.pixels, layer.taps))
    stride = -(-side // outs)
    if product.pack is not None and size == 1 and stride == 1:
        parts["pack"] = product.pack
    elif product.pack is not None:
        picture = (layer.inputs, 64, layer.channels)
        pack = make(lib, *operands(picture, wbits, abits)).pack
        assert pack is not None
        count = abits if arm.endswith("planes") else 1
        width = product.activations.nbytes // (count * layer.pixels * layer.taps)
        border = np.zeros((count, side + size - 1, side + size - 1, width), np.uint8)
        gather = gathered(lib, border, outs, stride, size, product.activations)[0]
        parts |= {"pack": pack, "gather": gather}
    parts["run"] = product.run
    parts["after"] = requantized(lib, product.sums, abits)
    return parts


def _chain(calls: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _in_order(
    lib: ctypes.CDLL, net: Network, stock: Mapping[str, float], warm: Mapping[Any, float]
) -> dict[str, tuple[float, Callable[[], None]]]:
    """Of each scheme all layers in a row, each with weights of its own: by the kernel that was the
    fastest alone. Beside it the seconds of those where onnxruntime was faster still."""
    chains = {}
    for scheme, arms in SCHEMES.items():
        kept, calls = 0.0, []
        for layer in net.layers:
            times = {
                arm: sum(warm.get((part, *key), 0.0) for part in ("pack", "gather", "run", "after"))
                for arm, key in _kernels(layer)
                if arm in arms
            }
            arm = min(times, key=lambda name: times[name])
            if times[arm] < stock[layer.name]:
                calls += list(_parts(lib, arm, layer).values())
            else:
                kept += stock[layer.name]
        chains[scheme] = kept, _chain(calls)
    return chains


def _estimate(
    net: Network,
    operators: Mapping[tuple[str, str], float],
    cold: Mapping[Any, float],
    warm: Mapping[Any, float],
    in_order: Mapping[str, float],
) -> dict[str, Any]:
    stock = {name: t for (kind, name), t in operators.items() if kind == "QLinearConv"}
    total = sum(operators.values())
    eligible = sum(stock[layer.name] for layer in net.layers)
    shares = {
        "low-bit convolutions": eligible / total,
        "first convolution": sum(stock[n] for n, k in net.kinds.items() if k == "first") / total,
        "depthwise convolutions": sum(stock[n] for n, k in net.kinds.items() if k == "depthwise")
        / total,
        "last layer": sum(t for (kind, _), t in operators.items() if kind == "QGemm") / total,
    }
    shares["all else"] = 1 - sum(shares.values())
    gains = {}
    for scheme, arms in SCHEMES.items():
        bare = near = far = total
        replaced = 0
        for layer in net.layers:
            keys = [key for arm, key in _kernels(layer) if arm in arms]
            now = stock[layer.name]
            product = min(warm["run", *key] for key in keys)
            bare -= max(0.0, now - product)
            around = {
                key: sum(warm.get((part, *key), 0.0) for part in ("pack", "gather", "after"))
                for key in keys
            }
            near -= max(0.0, now - min(warm["run", *key] + around[key] for key in keys))
            full = min(cold["run", *key] + around[key] for key in keys)
            far -= max(0.0, now - full)
            replaced += full < now
        gains[scheme] = {
            "products alone": total / bare,
            "all around, near": total / near,
            "all around, far": total / far,
            "in order": total / (total - eligible + in_order[scheme]),
            "layers replaced": replaced,
        }
    return {
        "network": net.name,
        "ms": 1e3 * total,
        "shares": shares,
        # Amdahl: x * (1 - share + share / needed) = 1 with x the goal.
        "limit": total / (total - eligible),
        "needed": _needed(eligible / total),
        "layers": len(net.layers),
        "gmacs": sum(_macs(layer) for layer in net.layers) / 1e9,
        "stock GMAC/s": sum(_macs(layer) for layer in net.layers) / eligible / 1e9,
        "gains": gains,
    }


def _macs(layer: Layer) -> int:
    return layer.pixels * layer.columns * layer.channels * layer.taps


def _needed(share: float) -> float | None:
    """How many times faster a share of the time must become for `GOAL`; None: it cannot."""
    left = 1 / GOAL - (1 - share)
    return share / left if left > 0 else None


# ---- The command -------------------------------------------------------------------------------


def study(progress: Callable[[str], None]) -> dict[str, Any]:
    """All measurements, as docs/kernels.md shows them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lib = compile_kernels(folder)
        progress("networks: building")
        networks = [network(model, folder) for model in NETWORKS]
        progress("networks: measuring")
        wholes = estimate(lib, networks, 15)
        progress("kernels")
        kernels = [kernels_on(lib, shape, folder, 20) for shape in CONVOLUTIONS]
        top = ceilings(lib)
        progress("operators of onnxruntime")
        operators = [
            {"shape": shape, "us": {k: 1e6 * v for k, v in found.items()}}
            for shape in LINEAR + POINTWISE
            for found in [operator_seconds(onnxruntime_arms(shape, folder), 10)]
        ]
    machine = {
        "cpu": cpu_name(),
        "integer_instructions": integer_instructions(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {
        "machine": machine,
        "networks": wholes,
        "kernels": kernels,
        "ceilings": top,
        "operators": operators,
    }


def _rows(rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * (head.count(" | ") + 1), *body, ""])


def report(result: Mapping[str, Any]) -> str:
    """The tables of docs/kernels.md, from what `study` returns."""
    networks, kernels = result["networks"], result["kernels"]
    parts = [f"{key}: {value}\n" for key, value in result["machine"].items()]
    shares = list(networks[0]["shares"])
    rows = [["network", "ms", *shares, "limit, x", "needed, x", "GMAC/s"]]
    for net in networks:
        needed = "never" if net["needed"] is None else f"{net['needed']:.2f}"
        percent = (f"{100 * net['shares'][share]:.1f} %" for share in shares)
        end = (f"{net['limit']:.2f}", needed, f"{net['stock GMAC/s']:.0f}")
        rows.append([net["network"], f"{net['ms']:.2f}", *percent, *end])
    parts.append(_rows(rows))
    shapes = ["x".join(map(str, item["shape"])) for item in kernels]
    rows = [["kernel", "MAC / instruction", "ceiling", *shapes, "x vpdpbusd"]]
    for name in [*ARMS, "QLinearConv", "MatMulInteger"]:
        speeds = [rates(item["shape"], 1e-6 * item["us"][name]) for item in kernels]
        ratios = [item["us"][VNNI] / item["us"][name] for item in kernels]
        theory = f"{1 / INSTRUCTIONS[name]:.0f}" if name in INSTRUCTIONS else ""
        ceiling = f"{result['ceilings'][name]:.0f}" if name in INSTRUCTIONS else ""
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append([name, theory, ceiling, *(f"{x:.0f}" for x in speeds), spread])
    parts.append(_rows(rows))
    rows = [["microseconds", *shapes]]
    for name in ("pack planes", "pack tables", "requantize", "W2 A2 tables", VNNI):
        rows.append([name, *(f"{item['us'][name]:.1f}" for item in kernels)])
    parts.append(_rows(rows))
    wrong = [name for item in kernels for name in item["wrong"]]
    parts.append(f"not exact: {', '.join(wrong) or 'none'}\n")
    names = dict.fromkeys(name for item in result["operators"] for name in item["us"])
    rows = [["operator, GMAC/s", *("x".join(map(str, o["shape"])) for o in result["operators"])]]
    for name in names:
        cells = [
            f"{rates(o['shape'], 1e-6 * max(o['us'][name], 0.5)):.1f}" if name in o["us"] else ""
            for o in result["operators"]
        ]
        rows.append([name, *cells])
    parts.append(_rows(rows))
    rows = [["network", "scheme", *networks[0]["gains"]["W2 A2"]]]
    for net in networks:
        for scheme, gain in net["gains"].items():
            *times, replaced = gain.values()
            count = f"{replaced} of {net['layers']}"
            rows.append([net["network"], scheme, *(f"{x:.2f}" for x in times), count])
    parts.append(_rows(rows))
    return "\n".join(parts)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> int:
    """Exit code 0; 1 if a kernel was not exact, 2 if this machine cannot run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    try:
        result = study(_say)
    except Unavailable as reason:
        sys.stderr.write(f"cannot run: {reason}\n")
        return 2
    sys.stdout.write(report(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(any(not item["exact"] for item in result["kernels"]))


if __name__ == "__main__":
    sys.exit(main())
