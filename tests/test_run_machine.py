"""A state machine of complete runs: random sequences of starts, signals, damage and changed settings.

After every start, the machine checks the run folder, and compares the weights, the optimizer and the rows
with those of an uninterrupted run. tests/run_machine.py makes starts fast.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.machine_checks import Checks
from tests.run_bench import KINDS, Bench, Layout, Leg, damage_frame, snapshot, valid_checkpoints
from tests.run_machine import Moment, warm_up
from tests.train_helpers import make_images

pytestmark = pytest.mark.fault
POLITE = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
FILES = ("file step-", "file metrics.csv", "file part-", "file safetensors", "file .json")
LAYOUTS = st.sampled_from([Layout(), Layout(), Layout(micro=2), Layout(processes=2)])
RANKS = st.sampled_from([(0,), (0, 1), (1,)])
FREE = st.one_of(
    st.tuples(st.just("run.log_every"), st.integers(1, 4)),
    st.tuples(st.just("run.eval_every"), st.integers(2, 5)),
    st.tuples(st.just("run.checkpoint_every"), st.integers(1, 5)),
    st.tuples(st.just("run.keep"), st.integers(1, 3)),
    st.sampled_from(
        [("run.detail", True), ("run.max_skipped", 5), ("data.max_bad", 0.3), ("speed.threads", 2)]
    ),
)
ALLOWED = (
    ("optim.lr", 2e-3),
    ("optim.weight_decay", 0.2),
    ("optim.betas", (0.8, 0.9)),
    ("optim.clip_norm", 0.5),
    ("optim.min_lr", 1e-4),
    ("optim.layer_decay", 0.5),
)
LOCKED = (  # cannot change, even with run.allow
    ("data.size", 96),
    ("data.frames", 8),
    ("data.repeats", 2),
    ("optim.name", "sgd"),
    ("optim.batch", 8),
    ("model.abs_win", True),
    ("model.init", "other.safetensors"),
    ("model.name", "hiera_tiny_224"),
    ("decoder_heads", 4),
    ("kind", ""),
)


def moments(signals: tuple[str, ...]) -> st.SearchStrategy[Moment]:
    """Moments of one of these signals: in a step, in an evaluation, or at the access of a file."""
    names, counts = st.sampled_from(signals), st.integers(1, 12)
    return st.one_of(
        st.builds(Moment, names, st.just("train"), counts, RANKS),
        st.builds(Moment, names, st.just("evaluate"), st.integers(1, 8), RANKS),
        st.builds(Moment, names, st.sampled_from(FILES), counts, RANKS),
        st.builds(Moment, names, st.just("file "), st.integers(1, 80), RANKS),
    )


class Machine(Checks, RuleBasedStateMachine):
    """A run folder, the actions so far, and the expected state."""

    other: Path  # another dataset

    def __init__(self) -> None:
        super().__init__()
        self.sound = False  # whether all checks passed so far
        self.actions: list[str] = []

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        layout=LAYOUTS,
        log_every=st.integers(1, 3),
        eval_every=st.integers(2, 5),
        checkpoint_every=st.integers(1, 5),
        keep=st.integers(1, 3),
    )
    def begin(self, kind, layout, log_every, eval_every, checkpoint_every, keep):
        """A new folder, and a copy of the data."""
        self.kind, self.layout = KINDS[kind], layout
        self.run, self.data = self.bench.folder("run"), self.bench.folder("data")
        shutil.copytree(self.bench.clean, self.data)
        self.settings = dict(self.kind.base)
        self.free = {
            "run.log_every": log_every,
            "run.eval_every": eval_every,
            "run.checkpoint_every": checkpoint_every,
            "run.keep": keep,
            "data.max_bad": 0.15,
        }
        self.recorded: dict | None = None  # the settings in config.json
        self.damaged: tuple[int, ...] = ()  # frames
        self.backup: Path | None = None  # of the checkpoints, once all of them are damaged
        self.legs: list[tuple[Leg, Layout]] = []
        self.due: dict[
            int, tuple[bool | None, bool | None]
        ] = {}  # step -> has a row, is evaluated; None = either
        self.layouts: set[tuple[int, int]] = set()
        self.prepared = 0  # actions since the last start
        self.bench.counts["sequences"] += 1
        self.sound = True

    # ---- starts

    @precondition(lambda self: not self.finished)
    @rule(moment=moments(("SIGKILL",)), layout=LAYOUTS)
    def kill(self, moment: Moment, layout: Layout):
        self.start(layout, moment)

    @precondition(lambda self: not self.finished)
    @rule(moment=moments(POLITE), layout=LAYOUTS)
    def stop(self, moment: Moment, layout: Layout):
        self.start(layout, moment)

    @precondition(lambda self: self.prepared if self.finished else self.actions)  # not as the first action
    @rule(layout=LAYOUTS)
    def finish(self, layout: Layout):
        self.start(layout)

    @precondition(lambda self: self.finished)
    @rule(moment=st.none() | moments(("SIGKILL", *POLITE)), epochs=st.sampled_from([0.6, 1.0]))
    def extend(self, moment: Moment | None, epochs: float):
        self.settings["optim.epochs"] = round(self.settings["optim.epochs"] + epochs, 1)
        self.start(self.layout, moment)

    # ---- between starts

    @precondition(lambda self: self.prepared < 2)
    @rule(change=FREE)
    def change_freely(self, change: tuple[str, object]):
        self.prepared += 1
        self.free[change[0]] = change[1]

    @precondition(lambda self: self.prepared < 2)
    @rule(change=st.sampled_from(ALLOWED))
    def change_with_run_allow(self, change: tuple[str, object]):
        self.prepared += 1
        self.settings[change[0]] = change[1]

    @precondition(lambda self: self.prepared < 2)
    @rule(copies=st.booleans())
    def move_the_data(self, copies: bool):
        self.prepared += 1
        place = self.bench.folder("data")
        shutil.copytree(self.data, place) if copies else shutil.move(self.data, place)
        self.data = place

    @precondition(lambda self: self.prepared < 2 and len(self.damaged) < 2)
    @rule(sample=st.sampled_from([3, 11]))
    def damage_a_frame(self, sample: int):
        self.prepared += 1
        if sample not in self.damaged:
            damage_frame(self.data, sample)
            self.damaged = tuple(sorted((*self.damaged, sample)))

    @precondition(lambda self: self.prepared < 2 and self.valid)
    @rule(whole=st.booleans(), how=st.sampled_from(["flipped", "cut", "empty", "no digest"]))
    def damage_checkpoints(self, whole: bool, how: str):
        self.prepared += 1
        steps = self.valid
        if whole or len(steps) == 1:
            self.backup = self.bench.folder("backup")
            shutil.copytree(self.run / "checkpoints", self.backup)
        for step in steps if whole else steps[-1:]:
            path = self.run / f"checkpoints/step-{step:09d}.pt"
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            if how == "no digest":
                path.with_suffix(".sha256").unlink()
            else:
                path.write_bytes({"flipped": data, "cut": data[: len(data) // 2], "empty": b""}[how])

    # ---- refused changes

    @precondition(lambda self: self.valid)
    @rule(change=st.sampled_from(ALLOWED), dashed=st.booleans())
    def refuse_a_change(self, change: tuple[str, object], dashed: bool):
        """A change is refused without run.allow, and so is an unknown name in run.allow."""
        key, value = change
        value = (0.7, 0.8) if key == "optim.betas" else value * 0.75  # pyrefly: ignore
        if not {key, key.replace("_", "-")} & set(self.changed()):  # else it is allowed already
            self.refuse({key: value}, ())
        self.refuse({}, ("optim.lrr" if dashed else "optim",))

    @precondition(lambda self: self.valid)
    @rule(change=st.sampled_from(LOCKED))
    def refuse_a_locked_change(self, change: tuple[str, object]):
        key, value = change
        if key == "decoder_heads" and self.kind is KINDS["finetune"]:
            key, value = "optim.batch", 8
        if key == "model.name" and self.kind is KINDS["mae"]:
            value = f"mae_{value}"
        self.refuse({} if key == "kind" else {key: value}, (key,), other_kind=key == "kind")

    @precondition(lambda self: self.valid and self.valid[-1] > 2 and not self.unnoticed)
    @rule()
    def refuse_fewer_epochs(self):
        """Even with run.allow. The rule needs intact checkpoints, because damaged newer ones are renamed."""
        self.refuse({"optim.epochs": 0.4}, ("optim.epochs",))

    @precondition(lambda self: self.valid)
    @rule()
    def refuse_other_data(self):
        self.refuse({"data.path": self.other}, ())

    def refuse(self, changes: dict, allow: tuple[str, ...], other_kind: bool = False) -> None:
        """Start with these changes: exit code 2, one line, no change of the folder."""
        kind = next(k for k in KINDS.values() if k is not self.kind) if other_kind else self.kind
        allow = (*self.changed(), *allow)
        given = {**self.wanted(), **changes, **({"run.allow": allow} if allow else {})}
        with self.recording(f"refused: {changes} allow {allow}"):
            before = snapshot(self.run)
            ended = self.bench.start(kind, given, self.run, Layout())
            self.check_refused(ended, before)

    # ---- one start and its checks

    @contextmanager
    def recording(self, what: str) -> Iterator[None]:
        """Add the actions so far to an exception."""
        self.sound = False
        self.actions.append(what)
        try:
            yield
        except BaseException as error:
            error.add_note("actions:\n" + "\n".join(self.actions))
            raise
        self.sound = True

    def start(self, layout: Layout, moment: Moment | None = None) -> None:
        """Start the command, send the signal, and check everything."""
        if moment is not None:
            ranks = tuple(rank for rank in moment.ranks if rank < layout.processes) or (0,)
            moment = Moment(moment.signal, moment.event, moment.count, ranks)
        given, allow, self.prepared = self.wanted(), self.changed(), 0
        with self.recording(f"start {layout} {moment} allow {allow}"):
            before = self.state_before(given)
            words = {**given, **({"run.allow": tuple(allow)} if allow else {})}
            ended = self.bench.start(self.kind, words, self.run, layout, moment)
            struck = f"struck {ended.struck} train {ended.train} evaluate {ended.evaluate}"
            self.actions[-1] += f" -> codes {ended.codes} {struck}; checkpoints {self.valid}"
            self.bench.counts[moment.signal if moment and ended.struck else "undisturbed"] += 1
            self.check(before, ended, moment, layout)
            if before.files and not before.valid and not before.finished:
                assert self.backup is not None
                shutil.rmtree(self.run / "checkpoints")
                shutil.copytree(self.backup, self.run / "checkpoints")

    def teardown(self) -> None:
        """Finish the run: every sequence ends with a comparison of the results."""
        if not self.sound:
            return
        for _ in range(3):
            if not self.finished:
                self.start(self.layout)
        assert self.finished
        for path in (self.run, self.data, self.backup):
            if path is not None:
                shutil.rmtree(path)
        print(f"sequence {self.bench.counts['sequences']} passed", flush=True)  # shown with pytest -s


# ---- the tests


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("machine")
    warm_up()
    Machine.other = make_images(root / "other", train=11, val=3)
    return Bench(root, make_images(root / "data", train=10, val=3))


def explore(bench: Bench, sequences: int, steps: int, begin: int | None = None, shrink: bool = False) -> str:
    """Run sequences, always the same or those of the seed `begin`; returns a summary."""
    machine = type("Machine", (Machine,), {"bench": bench})
    if begin is not None:
        seed(begin)(machine)
    chosen = settings(
        max_examples=sequences,
        stateful_step_count=steps,
        derandomize=begin is None,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink)[: 1 + shrink],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)
    seconds = {what: f"{bench.seconds[what] / bench.counts[what]:.1f} s" for what in bench.seconds}
    counted = ", ".join(f"{count} {what}" for what, count in sorted(bench.counts.items()))
    return f"{counted}; a start took {seconds}"


def test_no_process_ends_while_rank_0_saves(bench: Bench):
    """If a process ended early, torchrun would send SIGTERM, which after a Ctrl-C aborts the others."""
    run, kind = bench.folder("run"), KINDS["mae"]
    settings = {**dict(kind.base), "data.path": bench.clean, "run.checkpoint_every": 100}
    moment = Moment("SIGINT", "train", 4, (0,))
    ended = bench.start(kind, settings, run, Layout(processes=2), moment, slow="checkpoints/.step")
    assert ended.codes == [130, 130] and "run the same command to resume" in ended.stdout, str(ended)
    assert len(valid_checkpoints(run)) == 1, str(ended)


def test_a_few_sequences(bench: Bench, happened: Callable[[str], None]):
    """starts, signals, damage and changed settings in any order give the results of an uninterrupted run"""
    happened(explore(bench, sequences=3, steps=8))


@pytest.mark.long
def test_many_sequences(bench: Bench, pytestconfig: pytest.Config, happened: Callable[[str], None]):
    """starts, signals, damage and changed settings in any order give the results of an uninterrupted run"""
    option = pytestconfig.getoption
    happened(explore(bench, option("sequences"), steps=14, begin=option("seed"), shrink=True))
