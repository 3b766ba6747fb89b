"""Command-line tools around training: demo data, packing, checking, plotting, benchmarks."""

from pipelines.errors import catch_ctrl_c_during_imports

catch_ctrl_c_during_imports()
