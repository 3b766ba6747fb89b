"""Hiera and its masked autoencoder, for images and clips: `create`, `list_models`, `load_weights`."""

from models.errors import ModelError
from models.factory import create, list_models
from models.weights import load_weights

__all__ = ["ModelError", "create", "list_models", "load_weights"]
