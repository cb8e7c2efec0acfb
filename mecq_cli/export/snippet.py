"""A few lines of Python that run an exported ONNX file, with its own preprocessing."""

from __future__ import annotations

from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.tasks.drawing import SHOWN, palette
from mecq_cli.tasks.figures import CLASSIFY, DETECT, SEGMENT

_IMPORTS = """
import os
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime
from PIL import Image

CLASSES = {classes!r}
"""

_LOAD = """MEAN = np.array({mean!r}, np.float32)
STD = np.array({std!r}, np.float32)


def load(path):
    image = Image.open(path)
    if image.mode.startswith("I"):  # 16 bits
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.has_transparency_data:  # lies on white
        pixels = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    image = image.convert({mode!r})
{resize}    pixels = np.asarray(image, np.float32){axis} / np.float32(255)
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)[None]


if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
    sys.exit(__doc__)
missing = [name for name in sys.argv[1:] if not Path(name).is_file()]
if missing:
    sys.exit(f"{{missing[0]}}: no such image")
session = onnxruntime.InferenceSession(Path(__file__).with_name({file!r}))
for name in sys.argv[1:]:
"""
_LOGITS = """    logits = session.run(None, {{"input": load(name)}})[0][0]
"""

_CLASSIFY = (
    '''"""Classify images with {shown}: python {script} IMAGE...

Needs onnxruntime ({version} or newer), numpy and pillow.
"""
'''
    + _IMPORTS
    + _LOAD
    + _LOGITS
    + """    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = int(probabilities.argmax())
    print(f"{{name}}: {{CLASSES[best]}} ({{100 * probabilities[best]:.1f}} %)")
"""
)

_SEGMENT = (
    '''"""Segment images with {shown}: python {script} IMAGE...

Writes NAME.mask.png here, {extent}, with the index of a class in each pixel, in
colours, and says how much of it each class covers. Needs onnxruntime ({version} or newer), numpy
and pillow.
"""
'''
    + _IMPORTS
    + "COLOURS = {colours!r}\n"
    + _LOAD
    + _LOGITS
    + """    mask = logits.argmax(0).astype(np.uint8)
    image = Image.frombytes("P", mask.shape[::-1], mask.tobytes())
{back}    image.putpalette(COLOURS)
    image.save(f"{{Path(name).stem}}.mask.png")
    shares = [100 * np.mean(mask == index) for index in range(len(CLASSES))]
    found = [f"{{c}} {{s:.1f}} %" for c, s in zip(CLASSES, shares) if s]
    print(f"{{name}}: {{', '.join(found)}}")
"""
)

_DETECT = (
    '''"""Find objects in images with {shown}: python {script} IMAGE...

Says the class, the probability and the place (left, top, right, bottom in pixels of the image) of
each. Needs onnxruntime ({version} or newer), numpy and pillow.
"""
'''
    + _IMPORTS
    + "LEAST = {least}\n"
    + _LOAD
    + """    outputs = ["boxes", "scores", "labels"]
    found = [part[0] for part in session.run(outputs, {{"input": load(name)}})]
    width, height = Image.open(name).size
    scale = np.array([width, height, width, height]) / ({width}, {height}, {width}, {height})
    for box, score, label in zip(*found):
        if score >= LEAST:
            place = ", ".join(f"{{corner:.0f}}" for corner in box * scale)
            print(f"{{name}}: {{CLASSES[label]}} ({{100 * score:.1f}} %) at {{place}}")
    if not (found[1] >= LEAST).any():
        print(f"{{name}}: nothing with a probability of {{100 * LEAST:.0f}} % or more")
"""
)

_TEMPLATES = {CLASSIFY: _CLASSIFY, SEGMENT: _SEGMENT, DETECT: _DETECT}
MODES = {1: "L", 3: "RGB"}
"""Which image files there are for a number of input channels."""
_BACK = "    image = image.resize(Image.open(name).size, Image.Resampling.NEAREST)\n"


def snippet(
    file: str, preprocessing: Preprocessing, classes: list[str], version: str, task: str = CLASSIFY
) -> str:
    """The content of a script beside ``file``, which needs that version of onnxruntime."""
    channels, height, width = preprocessing.input_size
    whole = preprocessing.crop_mode == "squash" and preprocessing.crop_pct == 1
    return _TEMPLATES[task].format(
        file=file,
        shown=_in_docstring(file),
        version=version,
        script=_in_docstring(file.rsplit(".", 1)[0] + ".py"),
        classes=classes,
        colours=palette(len(classes)),
        least=SHOWN,
        height=height,
        width=width,
        mode=MODES[channels],
        axis="[..., None]" if channels == 1 else "",
        mean=list(preprocessing.mean),
        std=list(preprocessing.std),
        resize=_resize(preprocessing),
        back=_BACK if whole else "",
        extent="as large as the image" if whole else f"of the {width} x {height} pixels it sees",
    )


def _in_docstring(name: str) -> str:
    """What a file may be called, where backslashes and quotes mean something."""
    if name.isprintable() and not {"\\", '"'} & {*name}:
        return name
    return ascii(name)[1:-1].replace("\\", "\\\\").replace('"', '\\"')


def _resize(preprocessing: Preprocessing) -> str:
    """As timm's transforms for evaluation do it."""
    _, height, width = preprocessing.input_size
    filter_name = preprocessing.interpolation.upper()
    if filter_name not in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS", "BOX", "HAMMING"):
        filter_name = "BICUBIC"
    filter_code = f"Image.Resampling.{filter_name}"
    tall, wide = (int(side / preprocessing.crop_pct) for side in (height, width))
    mode = preprocessing.crop_mode
    if mode == "squash":
        lines = [f"image = image.resize({(wide, tall)!r}, {filter_code})"]
    elif mode != "border" and tall == wide:
        lines = [
            f"size = [{tall} * side // min(image.size) for side in image.size]",
            f"image = image.resize(size, {filter_code})",
        ]
    else:
        choose = "max" if mode == "border" else "min"
        lines = [
            f"ratio = {choose}(image.height / {tall}, image.width / {wide})",
            "size = [round(side / ratio) for side in image.size]",
            f"image = image.resize(size, {filter_code})",
        ]
    if mode == "border":
        fill = tuple(round(255 * value) for value in preprocessing.mean)
        lines += [
            f"size = (max(image.width, {width}), max(image.height, {height}))",
            f"frame = Image.new(image.mode, size, {fill[0] if len(fill) == 1 else fill!r})",
            "offset = [(side - own) // 2 for side, own in zip(size, image.size)]",
            "frame.paste(image, offset)",
            "image = frame",
        ]
    lines += [
        f"left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)",
        f"image = image.crop((left, top, left + {width}, top + {height}))",
    ]
    return "".join(f"    {line}\n" for line in lines)
