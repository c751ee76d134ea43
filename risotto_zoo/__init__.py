"""risotto-zoo: residual networks without normalization, exactly isometric at the start. Importing registers them."""

from . import models, registry
from .loading import Classifier, load

__version__ = "0.2.0"
__all__ = ["Classifier", "__version__", "load", "models", "registry"]
