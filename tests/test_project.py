"""What a fresh clone must hold together: one source of dependencies, a Makefile that says what it does."""

import ast
import os
import re
import shutil
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def requirements(name: str) -> list[Requirement]:
    lines = re.sub(r"\\\n", " ", (ROOT / name).read_text()).splitlines()
    kept = [re.sub(r"--hash=\S+|#.*", "", line).strip() for line in lines]
    return [Requirement(line) for line in kept if line]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_pins_every_direct_dependency_within_its_range(python: str):
    here = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    pins: dict[str, set[str]] = {}
    for pin in requirements("requirements.lock"):
        if pin.marker is None or pin.marker.evaluate(here):
            pins.setdefault(pin.name.lower(), set()).add(str(pin.specifier).removeprefix("=="))
    for wanted in requirements("requirements.in"):
        found = pins.get(wanted.name.lower(), set())
        assert len(found) == 1, wanted
        assert wanted.specifier.contains(found.pop()), wanted


def test_every_pin_has_hashes_and_no_host_stands_in_the_lock():
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.split(r"\n(?=\S)", text)
    pins = [block for block in blocks if re.match(r"[A-Za-z0-9_.-]+==", block)]
    assert len(pins) > 50 and all("--hash=sha256:" in block for block in pins)
    assert "://" not in text and "index-url" not in text


def test_conda_builds_from_the_same_lock():
    text = (ROOT / "environment.yml").read_text()
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("- ")]
    assert lines == ["- conda-forge", "- python>=3.11,<3.14", "- pip", "- pip:", "- -r requirements.lock"]
    assert ">=3.11,<3.14" in (ROOT / "Makefile").read_text()


TARGETS = (
    "demo",
    "shards",
    "verify",
    "stage",
    "train-mae",
    "train-ft",
    "eval",
    "plot",
    "report",
    "predict",
    "bench",
    "gpu-check",
    "test",
    "check",
    "env",
    "clean",
)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets_and_a_command_can_be_pasted():
    listed = call_make()
    assert all(re.search(rf"^  {target} +\S", listed, re.M) for target in TARGETS)
    settings = ("GPUS=2", "DEVICE=cpu", "RECIPE=image-mae-pico", "ARGS=--optim.epochs 1")
    command = call_make("-n", "train-mae", *settings).splitlines()[-1]
    wanted = "train.mae image-mae-pico --speed.device cpu --speed.processes 2 --optim.epochs 1"
    assert " ".join(command.split()) == f".venv/bin/python -m {wanted}"
    for words, message in (
        (("train-mae", "TUNED=nowhere.txt"), "TUNED=nowhere.txt is empty or cannot be read"),
        (("shards", "TARS=a.tar", "IMAGES=b"), "index TARS= alone"),
    ):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            call_make("-n", *words)
        assert message in caught.value.stderr


def call_make(*words: str) -> str:
    """What `make` prints, also when these tests run under make."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "ARGS"))}
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def test_imports_go_one_way():
    allowed = {"pipelines": set(), "models": {"pipelines"}, "train": {"pipelines", "models"}}
    allowed["tools"] = {"pipelines", "models", "train"}  # benchmarks may import all of them
    for package, others in allowed.items():
        for path in (ROOT / package).glob("*.py"):
            packages = r"^\s*(?:from|import) (pipelines|models|train|tools|benchmarks)\b"
            found = set(re.findall(packages, path.read_text(), re.M))
            assert found <= {package} | others, path


def test_every_file_has_its_line_in_the_architecture():
    text = (ROOT / "docs/architecture.md").read_text()
    listed = re.findall(r"^\| `(\S+)` \|", text, re.M)
    packages = ("pipelines", "models", "train", "tools", "benchmarks")
    there = [
        f"{package}/{path.name}" for package in packages for path in (ROOT / package).glob("*.[ph][yt]*")
    ]
    assert sorted(listed) == sorted(name for name in there if not name.endswith("__init__.py"))


def test_no_file_is_long():
    paths = [
        path
        for package in ("pipelines", "models", "train", "tools")
        for path in (ROOT / package).glob("*.py")
    ]
    assert len(paths) > 40
    assert [path.name for path in paths if path.read_text().count("\n") > 400] == []


def test_no_imports_go_round():
    """Also those inside functions count."""
    packages = ("pipelines", "models", "train", "tools", "benchmarks")
    paths = {f"{package}.{path.stem}": path for package in packages for path in (ROOT / package).glob("*.py")}
    graph = {name: imported(path) & paths.keys() for name, path in paths.items()}
    assert sum(map(len, graph.values())) > 100
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def imported(path: Path) -> set[str]:
    """Modules that a file imports: `from a import b` counts as a.b and as a."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found
