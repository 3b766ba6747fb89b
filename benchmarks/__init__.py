"""Comparisons of speed with other implementations: `python -m benchmarks`. Checks of a GPU: `gpu_check`."""

from pipelines.errors import catch_ctrl_c_during_imports

catch_ctrl_c_during_imports()
