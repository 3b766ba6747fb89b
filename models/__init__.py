"""Hiera and its masked autoencoder, for images and clips: `create`, `list_models`, `load_weights`."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.errors import ModelError
    from models.factory import create, list_models
    from models.weights import load_weights

__all__ = ["ModelError", "create", "list_models", "load_weights"]
MODULES = {"ModelError": "errors", "create": "factory", "list_models": "factory", "load_weights": "weights"}


def __getattr__(name: str) -> object:
    """Import a part when it is first used: timm takes seconds, and a launcher can do without."""
    if name not in MODULES:
        raise AttributeError(f"module 'models' has no attribute '{name}'")
    return getattr(importlib.import_module(f"models.{MODULES[name]}"), name)
