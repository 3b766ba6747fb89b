"""The processes in the tests of evaluation with two processes."""

import os
import sys
from pathlib import Path

from pipelines.errors import run_cli
from tests.fault_helpers import redirect_output
from train import evaluate, probe


def evaluate_and_probe(rank: int, ports: tuple[int, int], run: Path, log: Path) -> None:
    """Evaluate and probe a run as process `rank` of two, as torchrun would start it; output goes to `log`."""
    redirect_output(log)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for program, words, port in ((evaluate, (), ports[0]), (probe, ("--k", "5"), ports[1])):
        os.environ["MASTER_PORT"] = str(port)  # one port each, because the first store may still be open
        sys.argv = ["x", str(run), "--device", "cpu", *words]
        run_cli(program.main)
