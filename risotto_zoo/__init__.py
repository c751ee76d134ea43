"""risotto-zoo: residual networks without normalization, exactly isometric at the start. Importing registers them."""

from . import models

__version__ = "0.1.0"
__all__ = ["__version__", "models"]
