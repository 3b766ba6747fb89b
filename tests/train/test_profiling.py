"""--speed.profile: ranges, the ends of runs, and nothing without it; test_replay.py has a trace of a run."""

from pathlib import Path

import pytest
import torch

from pipelines.errors import UserError
from pipelines.machine import World
from train import profiling
from train.config import MaeConfig, SpeedConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("text", ["10", "10:", ":5", "0:5", "5:4", "a:b", "1:2:3", "-1:4", "1.5:3", " 1:2"])
def test_a_malformed_range_is_refused(text: str):
    with pytest.raises(UserError, match=f"speed.profile is '{text}'; give the first and the last step"):
        SpeedConfig(profile=text)


def test_a_range_has_both_ends_and_an_empty_one_no_steps():
    assert list(SpeedConfig(profile="10:12").profiled) == [10, 11, 12]
    assert list(SpeedConfig(profile="7:7").profiled) == [7]
    assert not SpeedConfig().profiled


def test_nothing_is_wrapped_without_a_range_and_on_other_ranks():
    steps = iter(range(1, 5))
    assert profiling.profiled(steps, MaeConfig(), World(0, 1, CPU)) is steps
    chosen = MaeConfig(speed=SpeedConfig(profile="2:3"))
    assert profiling.profiled(steps, chosen, World(1, 2, CPU)) is steps
    assert profiling.profiled(steps, chosen, World(0, 2, CPU)) is not steps


@pytest.mark.parametrize("steps", [range(4, 6), range(1, 9)])
def test_the_trace_of_a_run_that_ends_first_is_written(tmp_path: Path, steps: range):
    passed = list(profiling.profile(iter(range(3, 6)), steps, tmp_path, CPU))
    assert passed == [3, 4, 5]
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(f"steps-{max(3, steps[0])}-{steps[-1]}.")


def test_after_the_last_chosen_step_the_profiler_is_not_called(tmp_path: Path, monkeypatch):
    marks = []
    real = torch.profiler.profile.step
    monkeypatch.setattr(torch.profiler.profile, "step", lambda self: (marks.append(1), real(self)))
    assert list(profiling.profile(iter(range(1, 7)), range(2, 4), tmp_path, CPU)) == [*range(1, 7)]
    assert len(marks) == 1, "between steps 2 and 3 only"


def test_steps_that_are_over_are_not_profiled_and_this_is_reported(tmp_path: Path, capsys):
    assert list(profiling.profile(iter(range(5, 7)), range(2, 4), tmp_path, CPU)) == [5, 6]
    assert list(tmp_path.iterdir()) == []
    assert (
        "no step was profiled: the run ended before step 2 or resumed after step 3" in capsys.readouterr().out
    )
