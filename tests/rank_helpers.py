"""What one of two processes does in the tests of evaluation over processes."""

import os
import sys
from pathlib import Path

from pipelines.errors import run_cli
from tests.fault_helpers import speak_to
from train import evaluate, probe


def evaluate_and_probe(rank: int, port: int, run: Path, log: Path) -> None:
    """Evaluate and probe a run as process `rank` of two, as torchrun would start it; output goes to `log`."""
    speak_to(log)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for program, words in ((evaluate, ()), (probe, ("--k", "5"))):
        sys.argv = ["x", str(run), "--device", "cpu", *words]
        run_cli(program.main)
