"""Reading image files as people have them: rotated by EXIF, grey, CMYK, 16-bit, palettes, animated, broken."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

# Of the longer side to the shorter: resizing gives the shorter one the net's size, the other that many times as much.
MAX_RATIO = 1000


class UnreadableImage(Exception):
    """The file is no image that can be read; the message is the reason, in a few words."""


def read_image(path: str | Path | BinaryIO, channels: int = 3) -> Image.Image:
    """The image in a file (of an animation, its first frame), upright, in mode RGB or, for one channel, L.

    Raises:
        UnreadableImage: If the file is missing, empty, truncated, no image, too large to be decoded safely, or more
            than 1,000 times as long as wide.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):  # Pillow itself only warns here
                raise Image.DecompressionBombError
            if max(image.size) > MAX_RATIO * min(image.size):
                raise UnreadableImage("too long and thin to be resized")
            return to_mode(ImageOps.exif_transpose(image), channels)
    except UnreadableImage:
        raise
    except FileNotFoundError:
        raise UnreadableImage("the file does not exist") from None
    except Image.DecompressionBombError:
        raise UnreadableImage("more pixels than are safe to decode") from None
    except MemoryError:
        raise UnreadableImage("more pixels than fit in memory") from None
    # Pillow's decoders raise nearly anything on broken files; whatever it is, the file cannot be read.
    except Exception as error:
        reason = (
            "not an image" if "cannot identify" in str(error) else str(error).split("\n")[0] or type(error).__name__
        )
        raise UnreadableImage(reason) from None


def readable_suffixes() -> set[str]:
    """The suffixes, such as '.png', of the kinds that Pillow opens; some it can only save."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert to RGB or L; 16-bit grey is scaled to 8 bits, where Pillow would clip it to white.

    Floating grey values are taken for shares of white if none is above 1.

    Raises:
        UnreadableImage: If a value is not finite.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise UnreadableImage("some of its values are not finite")
        brightest = values.max(initial=0)
        deep = image.mode.startswith("I;16") or brightest > 255  # mode I and F do not say how deep they are
        scale = 257.0 if deep else 1 / 255 if image.mode == "F" and brightest <= 1 else 1.0
        image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    # The same pixels; converted at once, Pillow warns that transparency is lost.
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")
