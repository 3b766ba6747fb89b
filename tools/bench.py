"""Measures speed side by side with peers: python -m tools.bench loader|model|catalogue|core|all [flags].

`python -m tools.bench loader --help` lists the flags of a benchmark.
"""

import subprocess
import sys

from pipelines.errors import UserError, run_cli

BENCHMARKS = ("loader", "model", "catalogue", "core")


def main() -> None:
    """Run one benchmark, or all of them with their defaults; raises UserError on an unknown name."""
    name, *flags = sys.argv[1:] or ["all"]
    if name not in (*BENCHMARKS, "all"):
        raise UserError(f"unknown benchmark '{name}'; it can be all, {' or '.join(BENCHMARKS)}")
    for part in BENCHMARKS if name == "all" else (name,):
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{part}", *flags], check=False).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    run_cli(main)
