"""Hiera and its masked autoencoder, for images and clips: `create`, `list_models`, `load_weights`."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.weights import load_weights
    from models.zoo import create, list_models

__all__ = ["create", "list_models", "load_weights"]
MODULES = {"create": "zoo", "list_models": "zoo", "load_weights": "weights"}


def __getattr__(name: str) -> object:
    """Import a module on first use: the models import timm, which takes seconds and launchers do not need."""
    if name not in MODULES:
        raise AttributeError(f"module 'models' has no attribute '{name}'")
    return getattr(importlib.import_module(f"models.{MODULES[name]}"), name)
