"""The checks of a run folder after every start of the state machine in test_run_machine.py."""

import json
import math
import signal
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from tests.run_bench import (
    Bench,
    Kind,
    Layout,
    Leg,
    alike,
    close,
    early_codes,
    equal,
    exported_step,
    first_difference,
    load_checkpoint,
    snapshot,
    steps_of,
    valid_checkpoints,
)
from tests.run_machine import Ended, Moment
from train.config import flatten
from train.metrics import read_csv

EVALUATION_BATCHES = 2  # in one process


@dataclass(frozen=True)
class Before:
    """The state before a start."""

    given: dict[str, object]
    digests: dict[str, str]
    valid: list[int]
    finished: bool
    files: list[Path]  # of checkpoints
    starts: list  # in env.json
    rows: dict[int, dict]


class Checks:
    """A run folder and its expected state; each method checks one documented behavior."""

    bench: Bench
    kind: Kind
    run: Path
    actions: list[str]
    data: Path
    settings: dict
    free: dict
    recorded: dict | None
    damaged: tuple[int, ...]
    legs: list[tuple[Leg, Layout]]
    due: dict[int, tuple[bool | None, bool | None]]
    layouts: set[tuple[int, int]]

    @property
    def valid(self) -> list[int]:
        return valid_checkpoints(self.run)

    @property
    def unnoticed(self) -> list[Path]:
        """Damaged checkpoints that are not renamed yet."""
        steps = {f"step-{step:09d}" for step in self.valid}
        return [path for path in self.run.glob("checkpoints/step-*.pt") if path.stem not in steps]

    @property
    def finished(self) -> bool:
        return exported_step(self.run) == steps_of(self.settings)

    def wanted(self) -> dict[str, object]:
        return {**self.settings, **self.free, "data.path": self.data}

    def changed(self) -> list[str]:
        """The changed settings that run.allow must name."""
        recorded = self.recorded or {}
        keys = [
            key for key in self.settings if key in recorded and not alike(recorded[key], self.settings[key])
        ]
        return [key if len(self.actions) % 2 else key.replace("_", "-") for key in keys]

    def state_before(self, given: dict[str, object]) -> Before:
        """The state before a start with these settings."""
        files = list(self.run.glob("checkpoints/step-*.pt*"))
        return Before(given, snapshot(self.run), self.valid, self.finished, files, self.starts(), self.rows())

    def check(self, before: Before, ended: Ended, moment: Moment | None, layout: Layout) -> None:
        """Check everything after a start."""
        assert "Traceback" not in ended.stderr, str(ended)
        self.check_environment(ended, before.starts)
        early = early_codes(moment) if moment and ended.struck else set()
        if before.finished:
            assert snapshot(self.run) == before.digests, f"a finished run was changed: {ended}"
            assert ended.code in early or (ended.code == 0 and "is finished" in ended.stdout), str(ended)
        elif before.files and not before.valid:
            assert ended.code not in early or snapshot(self.run) == before.digests, str(ended)
            if ended.code not in early:
                self.check_refused(ended, before.digests)
        else:
            resumed = before.valid[-1] if before.valid else 0
            self.note_legs(resumed, layout, before.rows)
            self.check_end(ended, moment, resumed, layout)
            self.check_checkpoints(ended, moment, resumed, before)
            self.check_config(ended, before.given)
            self.check_rows(ended)
            self.check_weights(resumed)
            self.check_settings(resumed, ended)

    def starts(self) -> list:
        """The entries of env.json, one per start."""
        path = self.run / "env.json"
        noted = json.loads(path.read_text()) if path.exists() else []
        assert isinstance(noted, list), "env.json is not a list of starts"
        return noted

    def check_environment(self, ended: Ended, before: list) -> None:
        """env.json keeps its entries, and every start that trains adds one."""
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
        """Update what determines the weights and the rows of every step."""
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
        errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in ended.stderr, f"not one line: {ended}"
        after = snapshot(self.run)
        different = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert not different, f"a refused start changed {sorted(different)}: {ended}"

    def check_end(self, ended: Ended, moment: Moment | None, resumed: int, layout: Layout) -> None:
        """Check the exit codes and the last step."""
        total, valid = steps_of(self.settings), self.valid
        newest = valid[-1] if valid else 0
        reached = resumed + math.ceil(ended.train / layout.accumulate)  # the current step
        assert newest >= resumed, f"the checkpoint of step {resumed} was lost: {ended}"
        if not ended.struck or moment is None:
            assert ended.code == 0 and self.finished and newest == total, str(ended)
            return
        several = layout.processes > 1
        if moment.signal == "SIGKILL":
            every = self.free["run.checkpoint_every"]
            assert -signal.SIGKILL in ended.codes, str(ended)
            sure = (max(0, reached - 1) // every - 1) * every  # the next one may be incomplete
            if moment.event == "evaluate" and not several:  # nothing was being written at the signal
                sure = reached // every * every
            assert newest >= sure, f"lost more steps than expected: {ended}"
        elif not ended.train:  # during the start
            codes = early_codes(moment) | ({2, -signal.SIGTERM, 128 + signal.SIGTERM} if several else set())
            assert set(ended.codes) <= codes | ({0} if self.finished else set()), str(ended)
        else:
            number = signal.Signals[moment.signal]
            late = 2 if several else 1  # steps until the processes agree
            in_last_batch = ended.evaluate % EVALUATION_BATCHES == 0
            if not several and (
                moment.event == "train" or (moment.event == "evaluate" and not in_last_batch)
            ):
                assert ended.code == 128 + number and newest == reached, f"not an immediate stop: {ended}"
            complete = set(ended.codes) == {0} and self.finished and reached >= total - late
            assert set(ended.codes) == {128 + number} or complete, f"not a stop by signal {number}: {ended}"
            assert min(reached, total) <= newest <= reached + late, (
                f"the current step was {reached}, {valid}: {ended}"
            )

    def check_checkpoints(self, ended: Ended, moment: Moment | None, resumed: int, before: Before) -> None:
        """There are as many valid checkpoints as configured, and damaged ones are renamed."""
        valid, keep, every = self.valid, self.free["run.keep"], self.free["run.checkpoint_every"]
        newest = valid[-1] if valid else 0
        written = {step for step in range(resumed + 1, newest + 1) if step % every == 0 or step == newest}
        expected = min(keep, len(before.valid) + len(written))
        assert len(valid) >= expected, f"{len(valid)} valid checkpoints, {expected} expected: {ended}"
        if written and not (moment and moment.signal == "SIGKILL"):
            assert len(valid) <= keep, f"{len(valid)} checkpoints where {keep} are kept: {ended}"
        for path in before.files if ended.train else []:
            if path.suffix == ".pt" and int(path.stem.partition("-")[2]) > resumed:
                assert path.with_name(f"{path.name}.damaged").exists(), (
                    f"{path.name} was not renamed: {ended}"
                )

    def check_config(self, ended: Ended, given: dict[str, object]) -> None:
        """If the run has trained, config.json has the settings in effect."""
        path = self.run / "config.json"
        if not path.exists():
            assert not ended.train, "config.json is missing"
            return
        config = flatten(json.loads(path.read_text()))
        new = {key: config[key] for key, value in given.items() if not alike(config[key], value)}
        old = {key for key in new if self.recorded is None or self.recorded[key] != config[key]}
        assert not new or not (ended.train or old), f"config.json has {new}, expected {given}: {ended}"
        self.recorded = config

    def check_rows(self, ended: Ended) -> None:
        """There are exactly the expected rows, with the values of the uninterrupted run."""
        rows, valid, done = self.rows(), self.valid, self.finished
        sure = (valid[-1] if valid else 0) + done  # the rows of earlier steps are complete
        for step, (row, evaluated) in self.due.items():
            found = rows.get(step)
            assert row is not False or found is None, f"a row at step {step} that was not due: {ended}"
            if step < sure:
                assert row is not True or found is not None, f"no row at step {step}: {sorted(rows)} {ended}"
                has = found is not None and found["loss_val"] is not None
                assert evaluated in (None, has), f"step {step} evaluated: {has}, due: {evaluated}: {ended}"
        assert set(rows) <= set(self.due), str(ended)
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
            assert not wrong, f"row {step} differs from the uninterrupted run's: {wrong}"
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
        """What determined the weights of a step, its first layout, and whether the layout never changed."""
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
        """The new checkpoints equal those of an uninterrupted run at the same steps."""
        for step in [step for step in self.valid if step > resumed][-2:]:
            legs, layout, exact = self.history(step)
            expected = self.bench.trace(self.kind, layout, legs).checkpoint(step)
            mine = load_checkpoint(self.run, step)
            if exact:
                assert equal(mine["model"], expected["model"]), f"other weights at step {step}"
                assert equal(mine["optimizer"], expected["optimizer"]), f"another optimizer at step {step}"
            else:
                close(mine["model"], expected["model"])
        if self.finished:
            final = load_checkpoint(self.run, self.valid[-1])["model"]
            with safe_open(self.run / "model.safetensors", "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert equal(weights, {name: final[name] for name in weights}), (
                "model.safetensors is of another step"
            )

    def check_settings(self, resumed: int, ended: Ended) -> None:
        """The optimizer's hyperparameters equal those of a run that always had these settings."""
        if ended.groups:
            leg = Leg(0, self.legs[-1][0].settings, ())
            expected = self.bench.trace(self.kind, Layout(), (leg,)).groups[resumed:]
            for step, (mine, theirs) in enumerate(zip(ended.groups, expected, strict=False), resumed + 1):
                assert mine == theirs, f"step {step}: {first_difference(mine, theirs)} {ended}"
