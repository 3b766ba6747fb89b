"""The first cases of every reader of files; python -m tests.fuzz runs as many as there is time for."""

import os
import shutil

import pytest

from tests import fuzz


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return fuzz.make(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_reader_takes_what_it_gets_or_says_why_not(good, tmp_path, name):
    copied = shutil.copytree(good, tmp_path / "copied")
    outcomes = {fuzz.one(name, seed, good, copied) for seed in range(50)}
    assert outcomes == ({"taken"} if name in ("index", "metrics") else {"taken", "refused"})


def test_a_reader_that_crashes_or_raises_is_a_finding(good, monkeypatch):
    def crash(_):
        raise KeyError("x")

    monkeypatch.setattr(fuzz, "MEMORY", -1)  # this process may have taken more already
    monkeypatch.setitem(fuzz.READERS, "broken", (("labels.txt",), (fuzz.bytes_of,), crash))
    _, findings = fuzz.fuzz("broken", good, 0.5, 0)
    assert findings and "KeyError" in findings[0]
    monkeypatch.setitem(fuzz.READERS, "broken", (("labels.txt",), (fuzz.bytes_of,), lambda _: os._exit(3)))
    _, findings = fuzz.fuzz("broken", good, 0.5, 0)
    assert "the process ended with 3" in findings[0]
