"""`make env` installs the lock file, updates without removing packages, and leaves a conda environment alone.

Each test works in a copy of the Makefile with a lock file of one small package, which it makes itself.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.test_project import ROOT, call_make

UV = shutil.which("uv") or shutil.which("uv", path=ROOT / ".uv/bin")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def wheel(folder: Path, name: str, version: str) -> str:
    """Write a wheel with one module; return its line of a lock file."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    with ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"version = {version!r}\n")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the Makefile, two versions of a package, and an offline uv."""
    if not UV or not shutil.which("make"):
        pytest.skip("make or uv is not installed")
    for name in [name for name in os.environ if name.startswith(("MAKE", "CONDA", "UV_")) or name == "PY"]:
        monkeypatch.delenv(name)
    settings = {
        "NO_INDEX": 1,
        "FIND_LINKS": tmp_path / "wheels",
        "CACHE_DIR": tmp_path / "cache",
        "PYTHON": PYTHON,
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"UV_{name}", str(value))
    (tmp_path / "wheels").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    return tmp_path


def lock(checkout: Path, version: str) -> None:
    (checkout / "requirements.lock").write_text(wheel(checkout / "wheels", "pinned", version))


def start(checkout: Path) -> subprocess.Popen:
    command = ["make", "--no-print-directory", "env", f"UV={UV}"]
    return subprocess.Popen(command, cwd=checkout, stdout=-1, stderr=-2, text=True)


def make_env(checkout: Path) -> str:
    process = start(checkout)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0, printed
    return printed


def versions(checkout: Path) -> dict[str, str]:
    """The installed packages of .venv."""
    command = [str(UV), "pip", "freeze", "--python", checkout / ".venv/bin/python"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(line.split("==") for line in printed.split())


def test_an_update_installs_changed_pins_and_keeps_the_packages_of_the_user(checkout: Path):
    lock(checkout, "1.0")
    printed = make_env(checkout)
    assert "installing the packages of requirements.lock into .venv" in printed and "+ pinned==1.0" in printed
    assert not (checkout / ".venv.lock").exists()
    wheel(checkout / "wheels", "own", "3.0")
    subprocess.run([str(UV), "pip", "install", "-q", "own"], cwd=checkout, check=True)
    lock(checkout, "1.0")  # as a switch of branches touches the file: nothing is installed
    assert "pinned" not in make_env(checkout)
    lock(checkout, "2.0")
    printed = make_env(checkout)
    assert "requirements.lock has changed: updating .venv; packages that you added stay" in printed
    assert "- pinned==1.0" in printed and "+ pinned==2.0" in printed
    assert versions(checkout) == {"pinned": "2.0", "own": "3.0"}


def test_of_two_machines_one_installs_and_the_other_waits(checkout: Path):
    lock(checkout, "1.0")
    (checkout / ".venv.lock").mkdir()
    (checkout / ".venv.lock/owner").write_text("process 7 on node3\n")
    both = [start(checkout), start(checkout)]
    lines = [process.stdout.readline() for process in both if process.stdout]
    waiting = "waiting for process 7 on node3 to install into .venv; if it no longer runs, remove the folder"
    assert all(line.startswith(waiting) for line in lines)
    assert not (checkout / ".venv").exists()
    shutil.rmtree(checkout / ".venv.lock")
    printed = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert sorted("+ pinned==1.0" in text for text in printed) == [False, True]


def test_a_failed_installation_is_repeated(checkout: Path):
    lock(checkout, "1.0")
    make_env(checkout)
    lock(checkout, "2.0")
    (checkout / "wheels/pinned-2.0-py3-none-any.whl").rename(checkout / "away.whl")
    process = start(checkout)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "pinned" in printed
    assert not (checkout / ".venv.lock").exists() and versions(checkout) == {"pinned": "1.0"}
    (checkout / "away.whl").rename(checkout / "wheels/pinned-2.0-py3-none-any.whl")
    assert "+ pinned==2.0" in make_env(checkout)


@pytest.mark.parametrize(
    ("environment", "words", "python"),
    [
        (
            {"CONDA_DEFAULT_ENV": "hiera-train", "CONDA_PREFIX": "/envs/hiera-train"},
            (),
            "/envs/hiera-train/bin/python",
        ),
        ({"CONDA_DEFAULT_ENV": "base", "CONDA_PREFIX": "/envs"}, (), ".venv/bin/python"),
        ({"PY": "python"}, (), "python"),
        ({}, ("PY=python3.12",), "python3.12"),
    ],
)
def test_an_active_conda_environment_or_PY_replaces_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: tuple[str, ...], python: str
):
    for name in ("CONDA_DEFAULT_ENV", "CONDA_PREFIX", "PY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for target, program in (("train-mae", "train.mae"), ("check", "ruff"), ("embed", "tools.embed")):
        printed = call_make("-n", target, *words, "RUN=a", "OUT=b")
        assert f"{python} -m {program}" in printed
        assert ("uv" in printed) <= (python == ".venv/bin/python")
    assert f"{python} -m torch.distributed.run" in call_make("-n", "train-mae", "NODES=2", *words)


def test_the_image_is_built_from_the_lock_and_runs_without_privileges():
    """The Dockerfile has not been built; this reads it."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    assert steps[0][0] == "FROM" and {name for name, _ in steps} <= known
    for name, words in steps:
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", words], check=True)
    for name, words in steps:
        if name == "COPY":
            assert (ROOT / words.split()[0]).exists()
    order = [f"{name} {words}" for name, words in steps]
    installs = order.index("RUN pip install --no-cache-dir --require-hashes -r requirements.lock")
    assert order.index("COPY requirements.lock .") < installs < order.index("COPY . .")
    assert order[-2:] == ["USER hiera", 'CMD ["make"]']
    writable = next(words for name, words in steps if name == "RUN" and "chmod 1777" in words)
    assert {"data", "runs", "shards", "benchmarks/results"} <= {*writable.rpartition("chmod 1777")[2].split()}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "data", "shards/*"} <= {*ignored}
