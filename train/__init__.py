"""The training core: configuration, the step loop, evaluation, checkpoints and metrics."""
