"""The training core: configuration, the step loop, evaluation, checkpoints and metrics."""

import os

from pipelines.errors import catch_ctrl_c_during_imports

catch_ctrl_c_during_imports()
# OpenMP's threads would otherwise spin while they wait for each other: with anything else running on the
# same cores (DALI's threads, a second process) a CPU step was measured 4 to 10 times slower. Read when torch
# is first imported, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
