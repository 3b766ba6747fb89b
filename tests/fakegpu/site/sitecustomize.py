"""Replaces what cannot run on the imitated runtime in training commands and gpu-check: see ../README.md.

Python imports this file when it starts, if PYTHONPATH contains its folder and the project's.
"""

import sys
import warnings

COMMANDS = ("train.mae", "train.finetune", "finetune.main()", "benchmarks.gpu_check")

if any(command in " ".join(sys.orig_argv) for command in COMMANDS):
    from tests.fakegpu.child import replace_parts

    # `python -m train.mae` runs a module that replace_parts has imported.
    warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
    replace_parts()
