"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see train/__init__.py


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed shards of 40 training and 14 validation pictures in two classes."""
    from tests.train_helpers import make_images

    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed shards of 20 training and 6 validation clips in two classes."""
    from tests.train_helpers import make_clips

    return make_clips(tmp_path_factory.mktemp("clips"))
