"""Every command in README, CONTRIBUTING and docs/ exists, and accepts the flags that are given there."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.test_docs_pages import cells, code_words
from tests.test_project import call_make
from train import config, console
from train.presets import FINETUNE_PRESETS, MAE_PRESETS

ROOT = Path(__file__).resolve().parent.parent
TOP = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
PRESETS = {"train.mae": MAE_PRESETS, "train.finetune": FINETUNE_PRESETS}


def blocks(page: Path) -> list[str]:
    """The lines of the page's shell blocks."""
    found = re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
    return [line for block in found for line in block.splitlines()]


def mentioned(page: Path) -> list[str]:
    """Words in backticks outside of code blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_prints_commands_that_accept_their_flags(page: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [*blocks(page), *mentioned(page)]
    commands = [" ".join(text.split("#")[0].split()) for text in texts if text.startswith("make ")]
    for command in commands:
        if len(command.split()) == 2:  # only the target: some need variables
            assert f"\n  {command.split()[1]} " in call_make()
            continue
        command = command.replace("NODE_RANK=i", "NODE_RANK=0")  # i is a placeholder
        printed = call_make("-n", *shlex.split(command)[1:]).replace("\\\n", " ")
        assert printed, command
        parse_training(printed, monkeypatch)
    for line in blocks(page):
        if "--help" not in line and "python -m train." in line:
            parse_training(line.split("#")[0], monkeypatch)


def parse_training(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments of training commands; raises UserError or SystemExit."""
    for program, words in re.findall(r" -m (train\.\w+) (.*)", command):
        if program in PRESETS:
            monkeypatch.setattr("sys.argv", [program, *shlex.split(words)])
            console.parse(PRESETS[program], program)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_and_files_exist(page: Path):
    text = page.read_text()
    modules = set(re.findall(r"python -m ((?:tools|train|models|benchmarks|tests)\.\w+)", text))
    assert [name for name in modules if find_spec(name) is None] == []
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    named = [
        name
        for name in mentioned(page)
        if re.fullmatch(r"(?:pipelines|models|train|tools|benchmarks|tests|docs)/[\w./-]+", name)
    ]
    for block in blocks(page):
        named += re.findall(r"\btests/[\w/]+\.py", block)
    assert [name for name in named if not (ROOT / name).exists() and "results/DATE" not in name] == []


def test_named_settings_exist():
    known = {
        f"--{key.replace('_', '-')}"
        for preset in (*MAE_PRESETS.values(), *FINETUNE_PRESETS.values())
        for key in config.flatten(config.to_dict(preset))
    }
    groups = tuple({flag.partition(".")[0] + "." for flag in known if "." in flag})
    for page in PAGES:
        for flag in re.findall(r"--[a-z]+\.[a-z.-]+[a-z]", page.read_text()):
            assert not flag.startswith(groups) or flag in known, (page.name, flag)


def test_every_flag_for_users_of_other_trainers_is_accepted(monkeypatch: pytest.MonkeyPatch):
    page = (ROOT / "docs/coming-from.md").read_text()
    words = [word for column in (1, 2) for cell in cells(page, column) for word in code_words(cell)]
    flags = {word for word in words if word.startswith("--") and "_" not in word and " " in word}
    assert len(flags) > 70
    accepted: set[str] = set()
    for program, name in (("train.mae", "video-mae-base"), ("train.finetune", "video-ft-base")):
        known = config.flatten(config.to_dict(PRESETS[program][name]))
        fitting = {flag for flag in flags if flag.split()[0][2:].replace("-", "_") in known}
        monkeypatch.setattr("sys.argv", [program, name, *" ".join(sorted(fitting)).split()])
        console.parse(PRESETS[program], program)
        accepted |= fitting
    assert flags - accepted == set()
