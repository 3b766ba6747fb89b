"""Speed, side by side with peers; `python -m tools.bench` runs them."""

from pipelines.errors import catch_ctrl_c_during_imports

catch_ctrl_c_during_imports()
