"""Weight files from anywhere -> a module's state, or one line of error. No code of theirs runs."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mecq_cli import errors
from mecq_cli.errors import CheckpointError
from mecq_cli.layout import check_weight_file, is_image

# Where training scripts keep the weights in a checkpoint. Averaged weights come first: where a
# script keeps both, they are the ones it reports.
_WRAPPERS = (
    "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "network"
)  # fmt: skip
_WRAPPERS_DEEP = 3
# What DistributedDataParallel, torch.compile and Lightning put before each name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_NAMES_SHOWN = 3
_ZIP_MAGIC = b"PK\x03\x04"


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a weight file: names -> dense CPU tensors.

    ``.safetensors`` is read as such, everything else as PyTorch's own format by
    ``torch.load(weights_only=True)``, which builds tensors and plain containers only. Wrappers
    (``state_dict``, ``model`` and their EMA kin) are opened, prefixes that every name has
    (``module.``, ``_orig_mod.``, ``model.``) are cut.

    Args:
        path: a file; what its suffix says is believed.

    Raises:
        CheckpointError: there is no such file, it cannot be read, it holds more than tensors,
            or no state dict.
    """
    check_weight_file(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file; a weight file is needed")
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    loaded: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _checked(_without_prefixes(_unwrapped(loaded, path)), path)


def fit_state_dict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    ignore: Collection[str] = (),
) -> None:
    """Copy ``state`` into ``module``, every tensor of it and nothing else.

    Two differences are allowed, since neither changes what the net computes: no
    ``num_batches_tracked`` (files older than it), and buffers that the module makes by itself.

    Args:
        module: is changed in place.
        state: as `load_state_dict` gives it.
        source: what to call the weights in an error.
        ignore: submodules that keep the values they have, by name.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape, or not finite.
    """
    skipped = tuple(f"{name}." for name in ignore)
    own = {k: v for k, v in module.state_dict().items() if not k.startswith(skipped)}
    computed = {name for name, _ in module.named_buffers()} - own.keys()
    given = {k: v for k, v in state.items() if not k.startswith(skipped) and k not in computed}
    missing = [k for k in own.keys() - given.keys() if not k.endswith(".num_batches_tracked")]
    unexpected = given.keys() - own.keys()
    misshapen = [
        f"{k} {list(given[k].shape)} for {list(v.shape)}"
        for k, v in own.items()
        if k in given and given[k].shape != v.shape
    ]
    complaints = [
        f"{len(names)} {what} ({_shortened(sorted(names))})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if complaints:
        raise CheckpointError(
            f"{source} does not fit the model of {len(own)} tensors: {', '.join(complaints)}; "
            "is it of this architecture?"
        )
    _require_finite(given, source)
    module.load_state_dict(given, strict=False)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            kind = (file.metadata() or {}).get("format", "")
        if not kind.startswith("mecq"):
            return load_file(path)
    except Exception as error:
        raise _damaged(path, error) from error
    raise CheckpointError(
        f"{path} is a file of a quantized network ({kind}); --checkpoint takes the float weights "
        "that it is made from, and TARGET of mecq eval, export and predict an integer model"
    )


def _read_torch(path: Path) -> object:
    """Whatever the file holds, as far as ``weights_only`` lets it in."""
    if is_image(path.suffix):
        raise CheckpointError(f"{path} is an image; --checkpoint takes weights")
    _require_stored(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error).lower() or "Unsupported global" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects beside tensors, which may run code, or is no weight "
                "file; save only the weights: torch.save(model.state_dict(), FILE)"
            ) from error
        raise _damaged(path, error) from error


def _require_stored(path: Path) -> None:
    """Refuse archives that unpack to more than they are: torch.save never writes such."""
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            return  # PyTorch's older format, or no weight file: for torch to judge
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise _damaged(path, error) from error
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(
            f"{path} is an archive of another kind (TorchScript, a compressed file), no PyTorch "
            "weight file; give one that torch.save(model.state_dict(), FILE) wrote"
        )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch weight"
    # Of a KeyError of the reader of pickles, the key alone would mean nothing to anybody.
    said = f"{type(error).__name__}: {first_line(error)}"
    return CheckpointError(
        f"{path} is no readable {kind} file, it is damaged or something else ({said}); give one "
        "that torch.save(model.state_dict(), FILE) or safetensors wrote"
    )


def _unwrapped(loaded: object, path: Path) -> Mapping[Any, Any]:
    for _ in range(_WRAPPERS_DEEP):
        inner = [loaded.get(key) for key in _WRAPPERS] if isinstance(loaded, Mapping) else []
        loaded = next((i for i in inner if isinstance(i, Mapping) and i), loaded)
    if isinstance(loaded, Mapping) and loaded:
        return loaded
    found = "an empty one" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
    raise CheckpointError(f"{path} holds no state dict (names to tensors), but {found}")


def _without_prefixes(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    # The counter of torch.optim.swa_utils.AveragedModel, beside the weights it averages.
    state = {k: v for k, v in state.items() if k != "n_averaged"}
    while True:
        for prefix in _PREFIXES:
            if state and all(isinstance(k, str) and k.startswith(prefix) for k in state):
                state = {k[len(prefix) :]: v for k, v in state.items()}
                break
        else:
            return state


def _checked(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds no state dict (names to tensors): "
                f"{str(key)[:60]!r} is a {type(value).__name__}"
            )
        if (
            value.layout is not torch.strided
            or value.device.type != "cpu"
            or value.is_quantized
            or value.is_complex()
        ):
            raise CheckpointError(
                f"{path}: {key[:60]!r} is no dense tensor of real numbers; save plain weights"
            )
    return {key: value.detach() for key, value in state.items()}


def _require_finite(state: Mapping[str, Tensor], source: str) -> None:
    broken = sorted(k for k, v in state.items() if not bool(v.isfinite().all()))
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or Inf in {len(broken)} tensors ({_shortened(broken)}); "
            "take a checkpoint from before that happened"
        )


def _shortened(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:_NAMES_SHOWN])
    return shown + (", ..." if len(names) > _NAMES_SHOWN else "")


def first_line(error: Exception) -> str:
    """What an error of somebody else's has to say, cut to fit into a line of ours."""
    return errors.first_line(error)[:120].rstrip(" .:")
