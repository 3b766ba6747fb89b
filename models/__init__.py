"""Hiera and its masked autoencoder, for images and clips: `create`, `list_models`, `load_weights`."""

from models.errors import ModelError
from models.weights import load_weights
from models.zoo import create, list_models

__all__ = ["ModelError", "create", "list_models", "load_weights"]
