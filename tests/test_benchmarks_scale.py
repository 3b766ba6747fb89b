"""The check of an order at scale: a correct order passes, a wrong one fails."""

import subprocess
import sys

import numpy as np
import pytest

from benchmarks.scale import whole_epoch
from pipelines.errors import UserError
from tests.tools.test_pack import ROOT


def test_a_small_scale_is_measured(tmp_path):
    flags = ["--samples", "20000", "--ranks", "8", "--batch", "64", "--work", tmp_path / "columns"]
    command = [sys.executable, "-m", "benchmarks.scale", *map(str, flags)]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "random" in table and "local" in table
    assert not (tmp_path / "columns").exists()


def test_an_order_that_draws_a_sample_twice_is_refused():
    with pytest.raises(UserError, match=r"1 samples do not come in an epoch"):
        whole_epoch(lambda places: (np.zeros_like(places), np.where(places == 7, 8, places)), 100)
