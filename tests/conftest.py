"""Shared fixtures, and the table of `make faults`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see train/__init__.py


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed shards of 40 training and 14 validation pictures in two classes."""
    from tests.train_helpers import make_images

    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed shards of 20 training and 6 validation clips in two classes."""
    from tests.train_helpers import make_clips

    return make_clips(tmp_path_factory.mktemp("clips"))


# ---- make faults -----------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=4, help="kills per test that kills at random moments")
    parser.addoption("--sequences", type=int, default=150, help="sequences of the state machine of runs")
    parser.addoption("--seed", type=int, default=0, help="seed of these sequences")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault: a row of the table of `make faults`")
    config.addinivalue_line("markers", "long: slow tests that run only in `make faults`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr != "fault":
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    items[:] = slow_first(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


SLOW = (  # modules whose tests start many processes
    "test_runs", "test_resume", "test_fakegpu", "test_faults", "test_ending", "test_recipes",
    "test_golden", "test_accounting", "test_remote_paths", "test_draws", "test_run_machine",
)  # fmt: skip


def slow_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests in parts of equal length, one per worker, that begin with some of the slow modules.

    pytest-xdist cuts the list into such parts, and a worker that is done takes over the ends of others. If
    these were slow tests, some workers would be idle while the last tests run.
    """
    module = {item: Path(item.path).stem for item in items}
    rest, ordered = [item for item in items if module[item] not in SLOW], []
    for worker in range(workers):
        mine = SLOW[worker::workers]
        part = sorted(
            (item for item in items if module[item] in mine), key=lambda item: mine.index(module[item])
        )
        length = max(0, (len(items) - len(ordered)) // (workers - worker) - len(part))
        ordered += part + rest[:length]
        rest = rest[length:]
    return ordered + rest


@pytest.fixture
def happened(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Call it with the observed behavior, for the table of `make faults`."""
    return lambda text: record_property("happened", text)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Store the expected behavior, the first line of the test's docstring, in the report."""
    report = (yield).get_result()
    if call.when == "call" and item.get_closest_marker("fault"):
        promise = (item.function.__doc__ or "").partition("\n")[0]  # pyrefly: ignore
        report.fault = (item.name.removeprefix("test_").replace("_", " "), promise)


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the fault tests as a table if only they were selected."""
    if terminalreporter.config.option.markexpr != "fault":
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("fault", "expected", "observed", "", show_lines=True)
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.getreports(outcome):
            if hasattr(report, "fault"):
                observed = dict(report.user_properties).get("happened", "as expected")
                cells = (*report.fault, observed if outcome == "passed" else "", outcome)
                table.add_row(*map(Text, cells))  # names contain brackets, which must not be read as markup
    Console(width=150).print(table)
