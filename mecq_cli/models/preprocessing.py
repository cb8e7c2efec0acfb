"""How an image becomes the input of a model: size, crop, mean and standard deviation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from mecq_cli.errors import UsageError

MOST_PIXELS = 2**28
"""Numbers of an image before it is cropped, in a description that is read from a file."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize so that the crop is ``crop_pct`` of the short side, crop the centre, normalise.

    Attributes:
        input_size: (channels, height, width) that the model sees.
        mean, std: per channel, of pixels in [0, 1].
        interpolation: "bilinear", "bicubic", ... as timm names it.
        crop_pct: 1.0 keeps the whole image.
        crop_mode: "center", "squash" or "border", as timm names it.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def overridden(
        self, *, img_size: int | None = None, crop_pct: float | None = None
    ) -> Preprocessing:
        """The same with square images of ``img_size`` pixels, or another crop; None: as it is.

        Raises:
            UsageError: a size below 1, or a crop outside of (0, 1].
        """
        if img_size is not None and img_size < 1:
            raise UsageError(f"--img-size is {img_size}; it must be at least 1")
        if crop_pct is not None and not 0 < crop_pct <= 1:
            raise UsageError(f"--crop-pct is {crop_pct}; it must lie in (0, 1]")
        size = self.input_size if img_size is None else (self.input_size[0], img_size, img_size)
        return replace(
            self, input_size=size, crop_pct=self.crop_pct if crop_pct is None else crop_pct
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_json`.

        Raises:
            TypeError, ValueError: it is none.
        """
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in document.items()
        }
        found = cls(**fields)
        found.require_sound()
        return found

    def require_sound(self) -> None:
        """Raise TypeError or ValueError unless these are numbers for an image of some channels.

        What is read from a file may be anything.
        """
        size: tuple[Any, ...] = self.input_size
        if len(size) != 3 or any(type(n) is not int or n < 1 for n in size):
            raise ValueError(f"input_size is {size}; three whole numbers are needed")
        if not len(self.mean) == len(self.std) == size[0]:
            raise ValueError(
                f"mean has {len(self.mean)} numbers and std {len(self.std)}, for {size[0]} channels"
            )
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean is {self.mean}; finite numbers are needed")
        if not all(math.isfinite(n) and n > 0 for n in self.std):
            raise ValueError(f"std is {self.std}; numbers above 0 are needed")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}; it must lie in (0, 1]")
        if math.prod(size) / self.crop_pct**2 > MOST_PIXELS:
            raise ValueError(
                f"input_size {size} and crop_pct {self.crop_pct} make images too large"
            )
        names: tuple[Any, ...] = (self.interpolation, self.crop_mode)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"interpolation and crop_mode are {names}; names are needed")
