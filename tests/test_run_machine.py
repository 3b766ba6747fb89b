"""A state machine over whole runs: random sequences of starts, signals, damage and changed settings.

After every start the machine compares the run folder with what was promised, and the weights, the optimizer
and the rows with those of a run that nothing disturbed. tests/run_machine.py makes a start cheap.
"""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from safetensors import safe_open

from tests.run_machine import (
    KINDS,
    Bench,
    Ended,
    Layout,
    Leg,
    Moment,
    close,
    damage_frame,
    equal,
    load_checkpoint,
    snapshot,
    steps_of,
    valid_checkpoints,
    warm_up,
)
from tests.train_helpers import make_images
from train.config import flatten
from train.metrics import read_csv

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
LOCKED = (  # never to be changed, allowed or not
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
    """Moments of one of these signals: often in a step or an evaluation, else at a file."""
    names, counts = st.sampled_from(signals), st.integers(1, 12)
    return st.one_of(
        st.builds(Moment, names, st.just("train"), counts, RANKS),
        st.builds(Moment, names, st.just("evaluate"), st.integers(1, 8), RANKS),
        st.builds(Moment, names, st.sampled_from(FILES), counts, RANKS),
        st.builds(Moment, names, st.just("file "), st.integers(1, 80), RANKS),
    )


def exported_step(run: Path) -> int | None:
    """The step of a run's final weights; None where there are none."""
    path = run / "model.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["hiera-train"])["step"]


class Machine(RuleBasedStateMachine):
    """One run folder, what was done to it, and what it must hold therefore."""

    bench: Bench
    other: Path  # another dataset

    def __init__(self) -> None:
        super().__init__()
        self.sound = False  # whether everything so far was as promised
        self.story: list[str] = []

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
        self.recorded: dict | None = None  # what config.json says
        self.damaged: tuple[int, ...] = ()  # frames
        self.backup: Path | None = None  # of checkpoints of which none is left
        self.legs: list[tuple[Leg, Layout]] = []
        self.due: dict[
            int, tuple[bool | None, bool | None]
        ] = {}  # step -> has a row, is evaluated; None = either
        self.layouts: set[tuple[int, int]] = set()
        self.prepared = 0  # things done since the last start
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

    @precondition(lambda self: not self.finished or self.prepared)
    @rule(layout=LAYOUTS)
    def finish(self, layout: Layout):
        self.start(layout)

    @precondition(lambda self: self.finished)
    @rule(moment=st.none() | moments(("SIGKILL", *POLITE)), epochs=st.sampled_from([0.6, 1.0]))
    def extend(self, moment: Moment | None, epochs: float):
        self.settings["optim.epochs"] = round(self.settings["optim.epochs"] + epochs, 1)
        self.start(self.layout, moment)

    # ---- what happens between starts

    @precondition(lambda self: self.prepared < 2)
    @rule(change=FREE)
    def change_freely(self, change: tuple[str, object]):
        self.prepared += 1
        self.free[change[0]] = change[1]

    @precondition(lambda self: self.prepared < 2)
    @rule(change=st.sampled_from(ALLOWED))
    def change_with_leave(self, change: tuple[str, object]):
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

    # ---- what is refused

    @precondition(lambda self: self.valid)
    @rule(change=st.sampled_from(ALLOWED), dashed=st.booleans())
    def refuse_a_change(self, change: tuple[str, object], dashed: bool):
        """Without leave; and a name that no setting has is no leave."""
        key, value = change
        value = (0.7, 0.8) if key == "optim.betas" else value * 0.75  # pyrefly: ignore
        if key not in self.changed():
            self.refuse({key: value}, ())
        self.refuse({}, ("optim.lrr" if dashed else "optim",))

    @precondition(lambda self: self.valid)
    @rule(change=st.sampled_from(LOCKED))
    def refuse_a_locked_change(self, change: tuple[str, object]):
        key, value = change
        if key == "decoder_heads" and self.kind is KINDS["finetune"]:
            key = "optim.batch"
        if key == "model.name" and self.kind is KINDS["mae"]:
            value = f"mae_{value}"
        self.refuse({} if key == "kind" else {key: value}, (key,), other_kind=key == "kind")

    @precondition(lambda self: self.valid and self.valid[-1] > 2)
    @rule()
    def refuse_fewer_epochs(self):
        """Fewer than were trained already, even with leave."""
        self.refuse({"optim.epochs": 0.4}, ("optim.epochs",))

    @precondition(lambda self: self.valid)
    @rule()
    def refuse_other_data(self):
        self.refuse({"data.path": self.other}, ())

    def refuse(self, changes: dict, allow: tuple[str, ...], other_kind: bool = False) -> None:
        """Start with these changes: exit code 2, one sentence, the folder as it was."""
        kind = next(k for k in KINDS.values() if k is not self.kind) if other_kind else self.kind
        allow = (*self.changed(), *allow)
        asked = {**self.wanted(), **changes, **({"run.allow": allow} if allow else {})}
        with self.telling(f"refused: {changes} allow {allow}"):
            before = snapshot(self.run)
            ended = self.bench.start(kind, asked, self.run, Layout())
            self.check_refused(ended, before)

    # ---- one start and what must be true after it

    @property
    def valid(self) -> list[int]:
        return valid_checkpoints(self.run)

    @property
    def finished(self) -> bool:
        return exported_step(self.run) == steps_of(self.settings)

    def wanted(self) -> dict[str, object]:
        return {**self.settings, **self.free, "data.path": self.data}

    def changed(self) -> list[str]:
        """The settings that need leave to change."""
        recorded = self.recorded or {}
        keys = [
            key for key in self.settings if key in recorded and not _alike(recorded[key], self.settings[key])
        ]
        return [key if len(self.story) % 2 else key.replace("_", "-") for key in keys]

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Add the story so far to what goes wrong."""
        self.sound = False
        self.story.append(what)
        try:
            yield
        except BaseException as error:
            error.add_note("what happened:\n" + "\n".join(self.story))
            raise
        self.sound = True

    def start(self, layout: Layout, moment: Moment | None = None) -> None:
        """Start the command, strike it, and check everything."""
        if moment is not None:
            ranks = tuple(rank for rank in moment.ranks if rank < layout.processes) or (0,)
            moment = Moment(moment.signal, moment.event, moment.count, ranks)
        asked, allow, self.prepared = self.wanted(), self.changed(), 0
        with self.telling(f"start {layout} {moment} allow {allow}"):
            before, valid, finished = snapshot(self.run), self.valid, self.finished
            files = list(self.run.glob("checkpoints/step-*.pt*"))
            starts, rows = self.starts(), self.rows()
            ended = self.bench.start(
                self.kind,
                {**asked, **({"run.allow": tuple(allow)} if allow else {})},
                self.run,
                layout,
                moment,
            )
            self.story[-1] += (
                f" -> codes {ended.codes} struck {ended.struck} train {ended.train}; {self.valid}"
            )
            self.bench.counts[f"{moment.signal if moment and ended.struck else 'undisturbed'}"] += 1
            assert "Traceback" not in ended.stderr, ended
            self.check_environment(ended, starts)
            struck = _codes(moment) if moment and ended.struck else set()
            if finished:
                assert snapshot(self.run) == before, "a finished run was changed"
                assert ended.code in struck or (ended.code == 0 and "is finished" in ended.stdout), ended
            elif files and not valid:
                assert ended.code not in struck or snapshot(self.run) == before
                if ended.code not in struck:
                    self.check_refused(ended, before)
                assert self.backup is not None
                shutil.rmtree(self.run / "checkpoints")
                shutil.copytree(self.backup, self.run / "checkpoints")
            else:
                resumed = valid[-1] if valid else 0
                self.note_legs(resumed, layout, rows)
                self.check_end(ended, moment, resumed, layout)
                self.check_checkpoints(ended, moment, resumed, valid, files)
                self.check_config(ended, asked)
                self.check_rows(ended)
                self.check_weights(resumed)

    def starts(self) -> list:
        """What env.json notes of every start."""
        path = self.run / "env.json"
        noted = json.loads(path.read_text()) if path.exists() else []
        assert isinstance(noted, list), "env.json is not a list of starts"
        return noted

    def check_environment(self, ended: Ended, before: list) -> None:
        """env.json keeps what it notes of every start; one that trains is noted."""
        after = self.starts()
        assert after[: len(before)] == before, f"env.json lost a start: {ended}"
        assert len(after) - len(before) in ({1} if ended.train else {0, 1}), (
            f"env.json: {len(after)} starts {ended}"
        )

    def rows(self) -> dict[int, dict]:
        path = self.run / "metrics.csv"
        rows = read_csv(path) if path.exists() else []
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps)), f"rows are duplicate or out of order: {steps}"
        return {row["step"]: row for row in rows}

    def note_legs(self, resumed: int, layout: Layout, rows: dict[int, dict]) -> None:
        """Bring up to date what decides the weights and the rows of every step."""
        leg = Leg(resumed, tuple(sorted(self.settings.items())), self.damaged)
        self.legs = [(old, how) for old, how in self.legs if old.start < resumed]
        last = self.legs[-1] if self.legs else None
        if last is None or (last[0].settings, last[0].damaged, last[1].same) != (
            leg.settings,
            leg.damaged,
            layout.same,
        ):
            self.legs.append((leg, layout))
        self.layouts.add(layout.same)
        total = steps_of(self.settings)

        def wants(step: int) -> tuple[bool, bool]:
            evaluates = step == total or step % self.free["run.eval_every"] == 0
            return evaluates or step % self.free["run.log_every"] == 0, evaluates

        due = {step: flags for step, flags in self.due.items() if step < resumed}
        if resumed:
            old, new = self.due.get(resumed, (False, False)), wants(resumed)
            row = rows.get(resumed)
            there = (row is not None, row is not None and row["loss_val"] is not None)
            agreed = (
                a if a == b or (a and is_there) else None
                for a, b, is_there in zip(old, new, there, strict=True)
            )
            due[resumed] = tuple(agreed)  # pyrefly: ignore
        self.due = due | {step: wants(step) for step in range(resumed + 1, total + 1)}

    def check_refused(self, ended: Ended, before: dict[str, str]) -> None:
        assert ended.code == 2, f"not refused: {ended}"
        said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and "Traceback" not in ended.stderr, f"not one sentence: {ended}"
        after = snapshot(self.run)
        different = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert not different, f"a refused start changed {sorted(different)}: {ended}"

    def check_end(self, ended: Ended, moment: Moment | None, resumed: int, layout: Layout) -> None:
        """Exit codes, and how far the run came."""
        total, valid = steps_of(self.settings), self.valid
        newest = valid[-1] if valid else 0
        reached = resumed + math.ceil(ended.train / layout.accumulate)  # the step under way, or evaluated
        assert newest >= resumed, f"the checkpoint of step {resumed} was lost: {ended}"
        if not ended.struck or moment is None:
            assert ended.code == 0 and self.finished and newest == total, ended
            return
        several = layout.processes > 1
        if moment.signal == "SIGKILL":
            every = self.free["run.checkpoint_every"]
            assert -signal.SIGKILL in ended.codes, ended
            assert newest >= (max(0, reached - 1) // every - 1) * every, f"lost more than promised: {ended}"
        elif not ended.train:  # while it began
            codes = _codes(moment) | ({2, -signal.SIGTERM, 128 + signal.SIGTERM} if several else set())
            assert set(ended.codes) <= codes | ({0} if self.finished else set()), ended
        else:
            number = signal.Signals[moment.signal]
            late = 2 if several else 1  # steps that the processes may need to agree
            complete = set(ended.codes) == {0} and self.finished and reached >= total - late
            assert set(ended.codes) == {128 + number} or complete, f"not a stop by signal {number}: {ended}"
            assert min(reached, total) <= newest <= reached + late, (
                f"step {reached} was under way, {valid}: {ended}"
            )

    def check_checkpoints(
        self, ended: Ended, moment: Moment | None, resumed: int, before: list[int], files: list[Path]
    ) -> None:
        """As many valid checkpoints as were promised; damaged ones are set aside."""
        valid, keep, every = self.valid, self.free["run.keep"], self.free["run.checkpoint_every"]
        newest = valid[-1] if valid else 0
        written = {step for step in range(resumed + 1, newest + 1) if step % every == 0 or step == newest}
        expected = min(keep, len(before) + len(written))
        assert len(valid) >= expected, f"{len(valid)} valid checkpoints, {expected} were promised: {ended}"
        if written and not (moment and moment.signal == "SIGKILL"):
            assert len(valid) <= keep, f"{len(valid)} checkpoints where {keep} are kept: {ended}"
        for path in files if ended.train else []:
            if path.suffix == ".pt" and int(path.stem.partition("-")[2]) > resumed:
                assert path.with_name(f"{path.name}.damaged").exists(), (
                    f"{path.name} was not set aside: {ended}"
                )

    def check_config(self, ended: Ended, asked: dict[str, object]) -> None:
        """config.json says what is in effect, in a run that has begun to train."""
        path = self.run / "config.json"
        if not path.exists():
            assert not ended.train, "config.json is missing"
            return
        config = flatten(json.loads(path.read_text()))
        new = {key: config[key] for key, value in asked.items() if not _alike(config[key], value)}
        old = {key for key in new if self.recorded is None or self.recorded[key] != config[key]}
        assert not new or not (ended.train or old), f"config.json says {new}, asked {asked}: {ended}"
        self.recorded = config

    def check_rows(self, ended: Ended) -> None:
        """No row is missing, none too many, and each has the values of the undisturbed run."""
        rows, valid, done = self.rows(), self.valid, self.finished
        sure = (valid[-1] if valid else 0) + done  # rows of the steps before are complete
        for step, (row, evaluated) in self.due.items():
            found = rows.get(step)
            assert row is not False or found is None, f"a row at step {step} that was not due: {ended}"
            if step < sure:
                assert row is not True or found is not None, f"no row at step {step}: {sorted(rows)} {ended}"
                has = found is not None and found["loss_val"] is not None
                assert evaluated in (None, has), f"step {step} evaluated: {has}, due: {evaluated}: {ended}"
        assert set(rows) <= set(self.due), ended
        if done:
            parquet = pq.read_table(self.run / "metrics").to_pylist()
            assert parquet == list(rows.values()), "the Parquet rows differ from metrics.csv"
        if sure > 1:
            self.check_values({step: row for step, row in rows.items() if step < sure})

    def check_values(self, rows: dict[int, dict]) -> None:
        legs, layout, _ = self.history(max(rows, default=0))
        if not rows or not legs:
            return
        trace = self.bench.trace(self.kind, layout, legs).rows
        rel = 1e-9 if len(self.layouts) == 1 else 1e-4
        before = 0
        for step, row in rows.items():
            expected = trace[step]
            same = {
                name: (row[name], expected[name]) for name in ("lr", "epoch", "samples", "skipped", "bad")
            }
            wrong = {name: values for name, values in same.items() if values[0] != values[1]}
            assert not wrong, f"row {step} differs from the undisturbed run's: {wrong}"
            if row["loss_val"] is not None:
                for name in {"loss_val", "acc"} & row.keys():
                    assert row[name] == pytest.approx(expected[name], rel=rel), f"row {step}: {name}"
            losses = [trace[s][self.kind.loss] for s in range(before + 1, step + 1)]
            norms = [trace[s]["grad_norm"] for s in range(before + 1, step + 1)]
            if None not in {flags[0] for s, flags in self.due.items() if before < s < step}:
                mean = sum(losses) / len(losses)
                assert row[self.kind.loss] == pytest.approx(mean, rel=rel), (
                    f"row {step}: not the mean of {losses}"
                )
                assert min(norms) * (1 - rel) <= row["grad_norm"] <= max(norms) * (1 + rel), f"row {step}"
            before = step

    def history(self, step: int) -> tuple[tuple[Leg, ...], Layout, bool]:
        """What decided the weights of a step, the layout it began with, and whether it kept to that."""
        legs = [(leg, layout) for leg, layout in self.legs if leg.start < step]
        if not legs:
            return (), Layout(), True
        merged: list[Leg] = []
        for leg, _ in legs:
            last = merged[-1] if merged else None
            if last is None or (last.settings, last.damaged) != (leg.settings, leg.damaged):
                merged.append(leg)
        first = legs[0][1]
        return tuple(merged), first, all(layout.same == first.same for _, layout in legs)

    def check_weights(self, resumed: int) -> None:
        """The new checkpoints hold what an undisturbed run has at their steps."""
        for step in [step for step in self.valid if step > resumed][-2:]:
            legs, layout, exact = self.history(step)
            expected = self.bench.trace(self.kind, layout, legs).checkpoint(step)
            mine = load_checkpoint(self.run, step)
            if exact:
                assert equal(mine["model"], expected["model"]), f"other weights at step {step}"
                assert equal(mine["optimizer"], expected["optimizer"]), f"another optimizer at step {step}"
            else:
                close(mine["model"], expected["model"])
            if len(legs) > 1:  # are the settings in effect, as in a run that had them from the start?
                fresh = self.bench.trace(self.kind, layout, (Leg(0, legs[-1].settings, ()),)).checkpoint(step)
                groups = (mine["optimizer"]["param_groups"], fresh["optimizer"]["param_groups"])
                assert equal(*groups), f"settings without effect at step {step}: {_first_difference(*groups)}"
        if self.finished:
            final = load_checkpoint(self.run, self.valid[-1])["model"]
            with safe_open(self.run / "model.safetensors", "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert equal(weights, {name: final[name] for name in weights}), (
                "model.safetensors is of another step"
            )

    def teardown(self) -> None:
        """Let the run finish: every sequence ends with a comparison of the results."""
        if not self.sound:
            return
        for _ in range(3):
            if not self.finished:
                self.start(self.layout)
        assert self.finished
        for path in (self.run, self.data, self.backup):
            if path is not None:
                shutil.rmtree(path)


def _alike(a: object, b: object) -> bool:
    """Whether a setting read from JSON equals one that was asked for."""
    b = list(b) if isinstance(b, tuple) else str(b) if isinstance(b, Path) else b
    return a == b


def _codes(moment: Moment) -> set[int]:
    """How a process may end that a signal strikes before it listens."""
    number = signal.Signals[moment.signal]
    return {-number, 128 + number}


def _first_difference(mine: list[dict], expected: list[dict]) -> dict:
    pairs = ((a, b) for a, b in zip(mine, expected, strict=True) if a != b)
    a, b = next(pairs)
    return {key: (a.get(key), b.get(key)) for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


# ---- the tests


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("machine")
    warm_up()
    Machine.other = make_images(root / "other", train=11, val=3)
    return Bench(root, make_images(root / "data", train=10, val=3))


def explore(bench: Bench, sequences: int, steps: int, begin: int | None = None) -> str:
    """Run sequences, the same every time or those of the seed `begin`; gives what was done, in words."""
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
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)
    seconds = {what: f"{bench.seconds[what] / bench.counts[what]:.1f} s" for what in bench.seconds}
    said = ", ".join(f"{count} {what}" for what, count in sorted(bench.counts.items()))
    return f"{said}; a start took {seconds}"


def test_a_few_sequences(bench: Bench, happened: Callable[[str], None]):
    """starts, signals, damage and changed settings in any order: all as in an undisturbed run"""
    happened(explore(bench, sequences=7, steps=8))


@pytest.mark.long
def test_many_sequences(bench: Bench, pytestconfig: pytest.Config, happened: Callable[[str], None]):
    """starts, signals, damage and changed settings in any order: all as in an undisturbed run"""
    happened(
        explore(bench, pytestconfig.getoption("sequences"), steps=14, begin=pytestconfig.getoption("seed"))
    )
