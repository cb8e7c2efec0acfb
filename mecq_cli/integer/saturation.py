"""Where a runtime that adds two 8-bit products in 16 bits would get a wrong sum.

CPUs with AVX2 but without VNNI multiply unsigned by signed bytes with an instruction that adds
neighbouring products in pairs and saturates the pair at 16 bits (``vpmaddubsw``); onnxruntime
uses it there. With x from 0 to r and weights W a pair reaches 2 r max|W|:

| input     | r   | weights                                      | largest pair     | fits |
|-----------|-----|----------------------------------------------|------------------|------|
| 8 bits    | 255 | 8 bits, -128 to 127                          | 65,280           | no   |
| 8 bits    | 255 | 7 bits, -64 to 63                            | 32,640           | yes  |
| 8 bits    | 255 | 1 to 6 bits, multiplied: at most 64 in size  | 32,640           | yes  |
| 7 or less | 127 | any                                          | 32,512           | yes  |

`weight_multiplier` fills up to 7 bits and no further, on either grid, so only 8-bit weights that
meet 8-bit activations are in danger, and 7-bit weights are the remedy.
"""

from __future__ import annotations

import numpy as np

from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node, multiplied_weight

_LOWEST, _HIGHEST = -(2**15), 2**15 - 1


def saturating(model: IntegerModel) -> list[str]:
    """Names of the layers whose weights hold a pair that some input takes out of 16 bits.

    Which weights become neighbours is the runtime's choice, so every two of an output channel
    count as a pair.
    """
    grids: dict[str, Grid | None] = {INPUT: None, **{node.name: node.grid for node in model.nodes}}
    found = []
    for node in model.nodes:
        grid = grids[node.inputs[0]]
        if node.op in ("conv2d", "linear") and grid is not None and _may_saturate(node, grid):
            found.append(node.name)
    return found


def _may_saturate(node: Node, grid: Grid) -> bool:
    weight = multiplied_weight(node)
    rows = np.sort(weight.reshape(len(weight), -1).astype(np.int64), axis=1)
    largest = max(grid.qmax, grid.zero_point)  # a padded zero is the zero point
    lowest, highest = np.minimum(rows[:, :2], 0), np.maximum(rows[:, -2:], 0)
    return bool(
        largest * int(lowest.sum(1).min()) < _LOWEST
        or largest * int(highest.sum(1).max()) > _HIGHEST
    )
