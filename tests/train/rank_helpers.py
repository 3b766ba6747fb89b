"""The processes in the tests of evaluation with two processes."""

import os
import sys
from pathlib import Path

from pipelines.errors import run_cli
from tests.fault_helpers import redirect_output
from tools import embed
from train import evaluate, probe


def evaluate_probe_and_embed(rank: int, ports: tuple[int, int, int], run: Path, log: Path) -> None:
    """Evaluate, probe and embed a run as process `rank` of two, as torchrun would start it.

    Output goes to `log`, features to features.parquet next to the run.
    """
    redirect_output(log)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    out = ("--out", str(run.with_name("features.parquet")), "--processes", "2")
    for program, words, port in zip((evaluate, probe, embed), ((), ("--k", "5"), out), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # one port each, because the first store may still be open
        sys.argv = ["x", str(run), "--device", "cpu", *words]
        run_cli(program.main)
