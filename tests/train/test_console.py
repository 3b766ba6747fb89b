"""The panel on a terminal, and plain lines elsewhere."""

import io
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from train.console import Screen, command_of

ROW = {
    "loss": 1.25, "lr": 5e-4, "samples_per_s": 123.4, "data_wait_ms": 3.0, "step_ms": 100.0,
    "max_mem_gb": 1.234, "epoch": 3.5, "acc": 0.91, "loss_val": 0.345,
}  # fmt: skip


@pytest.fixture
def output(monkeypatch) -> io.StringIO:
    monkeypatch.delenv("RANK", raising=False)
    return io.StringIO()


def screen_of(output: io.StringIO, terminal: bool) -> Screen:
    screen = Screen()
    screen._console = Console(file=output, force_terminal=terminal, width=80, height=24, soft_wrap=True)
    return screen


def test_the_panel_fits_80_columns_and_leaves_room_for_lines(output: io.StringIO):
    screen = screen_of(output, terminal=True)
    with screen.progress(10, 400):
        screen.advance(100)
        for loss in range(40, 0, -1):
            screen.show({**ROW, "loss": 1.0 + loss}, "loss", "best acc 0.9331 at step 90")
        lines = screen._console.render_lines(screen.panel(), screen._console.options)
        text = "\n".join("".join(segment.text for segment in line) for line in lines)
        screen.line("step 100: a line above the panel")
    assert len(lines) <= 8 and max(map(len, text.splitlines())) <= 80
    for part in ("100/400 steps", "time left", "loss", "█", "0.0005", "123.4 samples/s", "3% of a step"):
        assert part in text
    for part in ("1.2 GiB", "epoch", "3.5", "acc 0.91, loss_val 0.345", "acc 0.9331 at step 90"):
        assert part in text
    assert "time left" in output.getvalue() and "a line above the panel" in output.getvalue()


def test_without_a_terminal_there_are_only_lines(output: io.StringIO):
    screen = screen_of(output, terminal=False)
    with screen.progress(0, 4):
        screen.advance(1)
        screen.show(ROW, "loss", "")
        screen.line("step 1: loss 1.25")
    assert output.getvalue() == "step 1: loss 1.25\n"


def test_printed_commands_name_the_folder_of_the_run():
    """make looks in runs/ only."""
    of = partial(command_of, target="replay", module="train.replay")
    assert of(Path("runs/sweep/a"), step=3) == "make replay RUN=sweep/a STEP=3"
    assert of(Path("/scratch/runs/a"), step=3) == "python -m train.replay /scratch/runs/a --step 3"
