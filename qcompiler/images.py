"""Images as model input: how to preprocess them, and reading one file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from qcompiler.errors import QCompilerError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageOptions:
    """How a folder of images becomes model input: value = (pixel * scale - mean) / std, pixels 0..255.

    resize: (height, width), bilinear; None if the images already have the model's size.
    mean, std: one number, or one per channel in the order of `color`.
    """

    resize: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    color: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: float = 1.0

    def __post_init__(self) -> None:
        channels = 1 if self.color == "gray" else 3
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise QCompilerError(
                    f"{name} has {len(values)} values; give one, or one for each of {channels} channels"
                )
        if 0 in self.std:
            raise QCompilerError("std must not be zero: pixels are divided by it")
        if self.resize is not None and min(self.resize) < 1:
            raise QCompilerError(f"images cannot be resized to {self.resize[0]}x{self.resize[1]}")


def parse_size(text: str) -> tuple[int, int]:
    """ "224" → (224, 224); "240x320" → (240, 320), height first. Raises QCompilerError."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise QCompilerError(f"{text!r} is not an image size; write 224 or 240x320 (height x width)")
    sizes = [int(part) for part in parts]
    return sizes[0], sizes[-1]


def read_image(file: Path, options: ImageOptions) -> np.ndarray:
    """One image as float32 [C,H,W] or [H,W,C], preprocessed. Raises QCompilerError if it cannot be read."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if options.color == "gray" else "RGB")
    except (UnidentifiedImageError, OSError):
        raise QCompilerError(f"{file} cannot be read as an image; remove or replace it") from None
    if options.resize is not None:
        height, width = options.resize
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32)
    pixels = pixels[:, :, np.newaxis] if options.color == "gray" else pixels
    pixels = pixels[:, :, ::-1] if options.color == "bgr" else pixels
    values = (pixels * np.float32(options.scale) - np.array(options.mean, np.float32)) / np.array(
        options.std, np.float32
    )
    return np.ascontiguousarray(values.transpose(2, 0, 1) if options.layout == "NCHW" else values)
