"""`mecq export --format compressed-tensors`: the weights alone, for programs that read those."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.config import ExportConfig
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.export import compressed_tensors
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.runs import PACKED_FILES, PACKED_WEIGHTS
from mecq_cli.storage import atomic_write, require_writable
from mecq_cli.workflow.verification import verify_artifact

FILE, CONFIG = PACKED_FILES

Array = NDArray[np.float32]


def export_weights(
    config: ExportConfig,
    source: Path,
    model: IntegerModel,
    batches: Iterator[Array],
    listener: Listener,
) -> dict[str, Any]:
    """Write the packed weights, and config.json beside them; compare what was written.

    The file holds no graph: it is read back, and its weights take the place of those in the
    integer model, which must then give the same logits.

    Args:
        config: settings.
        source: the artifact.
        model: its content.
        batches: preprocessed images [N, C, H, W].
        listener: hears of the progress.

    Raises:
        VerificationError: the written file does not agree; it is not kept.
        UsageError: a file is in the way.
    """
    output = config.output or source.parent / PACKED_WEIGHTS
    if output.suffix.lower() != Path(FILE).suffix:  # a folder, as the library wants one
        if output.suffix or output.is_file():
            raise UsageError(
                f"--output {output}: the format {config.format} is a folder, or a file that ends "
                f"in {Path(FILE).suffix}; give such a name, or another --format"
            )
        output = output / FILE
    described = output.with_name(CONFIG)
    if output.resolve() == source.resolve() or output.name == CONFIG:
        raise UsageError(f"--output {output}: is taken; give another name")
    for path in (output, described):
        if path.exists() and not config.force:
            raise UsageError(f"{path} exists; --force overwrites it, --output gives another folder")
        require_writable(path)
    data, description = compressed_tensors.to_bytes(model), compressed_tensors.config(model)
    document: dict[str, Any] = {
        "path": str(output),
        "format": config.format,
        "config": str(described),
        "bytes": len(data) + len(description),
        "verified": False,
    }
    if config.verify is not False:
        with tempfile.TemporaryDirectory() as folder:
            trial, deep = Path(folder) / output.name, config.verify is True
            atomic_write(trial, data, force=True)
            listener.note("verifying: the weights that were written, in the integer model")
            stored = compressed_tensors.with_weights_of(trial, model)
            document |= verify_artifact(stored, output.name, model, list(batches), deep=deep)
    # The weights last: whoever finds them finds what describes them too.
    atomic_write(described, description, force=config.force)
    atomic_write(output, data, force=config.force)
    return document
