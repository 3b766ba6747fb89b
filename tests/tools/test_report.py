"""The report of finished, unfinished, damaged and hostile runs, and the model card."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from models import create
from pipelines.dataset import DatasetInfo
from pipelines.errors import UserError
from tests.train_helpers import call
from tools.report import LOG_LINES, report
from train.card import model_card
from train.config import to_dict
from train.metrics import FINETUNE_COLUMNS, MAE_COLUMNS
from train.presets import FINETUNE_PRESETS, MAE_PRESETS

EVIL = "</td><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A transparent pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a finished finetuning run leaves it, hostile wherever text comes from outside."""
    folder = tmp_path / "good <run>"
    folder.mkdir()
    config = FINETUNE_PRESETS["image-ft-pico"]
    config = replace(config, data=replace(config.data, path=Path(f"shards/{EVIL}")))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    start = {"command": EVIL, "packages": {"torch": "9.9"}, "gpus": []}
    (folder / "env.json").write_text(json.dumps([start]))
    samples = config.optim.batch * 8 // int(config.optim.epochs)
    data = {"classes": ["a", "b"], "splits": {"train": {"samples": samples}}}
    (folder / "data.json").write_text(json.dumps(data))
    found = {"id": [0, 1], "source": ["0.jpg", "1.jpg"], "label": [0, 1], "class_1": ["a", "b"]}
    pq.write_table(pa.table({**found, "probability_1": [0.9, 0.8]}), folder / "predictions.parquet")
    write_metrics(folder, FINETUNE_COLUMNS, steps=8)
    (folder / "log.txt").write_text("".join(f"line {i} {EVIL}\n" for i in range(100)))
    (folder / "reconstruction.png").write_bytes(PNG)
    names = [EVIL, "never seen", *(f"class {i}" for i in range(30))]
    samples = [10, 0, *[20] * 30]
    correct = [9, 0, *range(20), *range(10)]
    accuracy = [c / n if n else float("nan") for c, n in zip(correct, samples, strict=True)]
    table = {"class_name": names, "samples": samples, "correct": correct, "correct5": samples}
    pq.write_table(pa.table({**table, "accuracy": accuracy}), folder / "per_class.parquet")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def write_metrics(folder: Path, columns: tuple[str, ...], steps: int) -> None:
    values = {"loss": 0.5, "loss_train": 0.5, "acc": 0.75, "step_ms": 40.0, "data_wait_ms": 4.0, "time": 90.0}
    lines = [",".join(columns)]
    for step in range(1, steps + 1):
        row = {**values, "step": step, "samples_per_s": 1000.0 if step == 1 else 50.0, "lr": 1e-3}
        row["grad_norm"] = "nan" if step == 3 else 1.5
        lines.append(",".join(str(row.get(name, "")) for name in columns))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_top_5_is_left_out_for_five_classes_or_fewer(run: Path):
    assert "top-5" in report(run).read_text()
    few = {"class_name": ["a", "b"], "samples": [4, 4], "correct": [1, 2], "correct5": [4, 4]}
    pq.write_table(pa.table({**few, "accuracy": [0.25, 0.5]}), run / "per_class.parquet")
    page = report(run).read_text()
    assert "top-1" in page and "top-5" not in page


def words(page: str) -> str:
    """What a reader sees."""
    return unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.S))


def test_the_report_of_a_finished_run_is_complete(run: Path):
    path = report(run)
    assert path == run / "report.html" and sorted(run.glob(".*")) == []
    page = path.read_text()
    text = words(page)
    assert "finished after 8 steps" in text and "Not in this report" not in text
    for title in (
        "Numbers",
        "Curves",
        "Reconstructions",
        "Results",
        "Classes",
        "Settings",
        "Environment",
        "Log",
    ):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<svg") == 7
    assert "75.0%" in text and "10.0%" in text and "samples/s 50 " in " ".join(text.split())
    assert base64.b64encode(PNG).decode() in page and "true patch statistics colour the prediction" in text
    shown = re.findall(r"<tr><th>([^<]*)</th><td>20</td><td style", page)
    assert shown[:3] == ["class 0", "class 20", "class 1"] and len(shown) == 30  # weakest first, all there
    assert "never seen" not in text and "the other 11 classes" in text
    assert f"line {99}" in text and f"line {100 - LOG_LINES}" in text
    assert f"line {99 - LOG_LINES} " not in text
    assert "smoothing" in text and "9.9" in text


def test_text_of_the_run_is_escaped(run: Path):
    page = report(run).read_text()
    assert "<script" not in page and "<img src=x" not in page and "<run>" not in page
    assert words(page).count("document.title='owned'") == LOG_LINES + 3  # log, path, command, class
    assert EVIL in unescape(page)


def test_nothing_is_fetched(run: Path):
    page = report(run).read_text()
    markup = " ".join(re.findall(r"<style.*?</style>|<[^>]+>", page, re.S))
    outside = re.findall(r"""(?:\b(?:src|href)=|url\(|@import)["']?([^"')\s>]+)""", markup)
    assert len(outside) > 50 and all(link.startswith(("data:", "#")) for link in outside), outside
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) > 5 and all(not name.startswith(("figure", "axes")) for name in identities)


def test_an_unfinished_run_and_damaged_files_are_reported(run: Path):
    (run / "model.safetensors").unlink()
    (run / "per_class.parquet").write_bytes(b"PAR1 half")
    (run / "reconstruction.png").write_bytes(PNG[:50])
    (run / "log.txt").write_text("")
    (run / "env.json").write_text('{"command": ')
    with (run / "metrics.csv").open("a") as file:
        file.write("12.5,9,0.")  # a row being written
    text = words(report(run).read_text())
    assert "not finished: at step 8 of 8" in text
    (told,) = re.findall(r"Not in this report: (.*)", text)
    for part in ("Reconstructions (reconstruction.png cannot be read", "Classes (per_class.parquet cannot"):
        assert part in told
    assert "Environment (env.json cannot be read" in told and "Log (log.txt is empty so far)" in told
    assert "Curves" not in told and "75.0%" in text


def test_a_run_that_has_just_started(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(MAE_PRESETS["image-mae-pico"])))
    text = words(report(tmp_path, tmp_path / "page.html").read_text())
    assert "mae_hiera_pico_96, mae, not finished: at step 0" in text
    assert "Curves (there is no metrics.csv)" in text and "Classes (there is no per_class.parquet)" in text
    (tmp_path / "metrics.csv").write_text(",".join(MAE_COLUMNS) + "\n")
    assert "Curves (metrics.csv is empty so far)" in words(report(tmp_path).read_text())
    (tmp_path / "config.json").write_text("{")
    assert "Settings (config.json cannot be read" in words(report(tmp_path).read_text())


def test_accuracy_of_training_videos_is_marked(tmp_path: Path):
    preset = FINETUNE_PRESETS["video-ft-pico"]
    reference = replace(preset, data=replace(preset.data, eval_split="train"))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(reference)))
    assert "TRAINING videos" in report(tmp_path).read_text()
    (tmp_path / "config.json").write_text(json.dumps(to_dict(FINETUNE_PRESETS["video-ft-pico"])))
    assert "TRAINING videos" not in report(tmp_path).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    done = call("tools.report", str(tmp_path / "nowhere"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is no run folder" in done.stderr
    with pytest.raises(UserError, match="no run folder"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_opens_it_without_errors(run: Path, tmp_path: Path):
    def browse(page: Path) -> tuple[str, str]:
        where = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [CHROMIUM, *where, "--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout, done.stderr

    dom, log = browse(report(run))
    assert "CONSOLE" not in log
    assert "<title>good &lt;run&gt;</title>" in dom and dom.count("<svg") == 7 and "<script" not in dom
    broken = tmp_path / "broken.html"
    broken.write_text("<script>missing()</script>")
    assert "CONSOLE" in browse(broken)[1]  # so the check above can fail


# ---- the model card


INFO = DatasetInfo(
    Path("x"), "image", ("cats", "```dogs", "émus"), {"train": {"samples": 30}, "val": {"samples": 3}}, {}, {}
)


def started_from(init: str) -> str:
    config = FINETUNE_PRESETS["image-ft-pico"]
    return model_card(
        replace(config, model=replace(config.model, init=init)), INFO, {"step": 7, "acc": 0.5}, 7
    )


def test_the_card_describes_the_weights():
    text = started_from("")
    assert "hiera_pico_96, a classifier" in text and ": 7 steps" in text and "96 x 96" in text
    data, recipe, metrics = map(json.loads, text.split("```json\n")[1].split("\n```\n")[0].splitlines())
    assert data["splits"] == INFO.splits and tuple(data["classes"]) == INFO.classes
    config = FINETUNE_PRESETS["image-ft-pico"]
    assert recipe["optim.lr"] == config.optim.lr and recipe["smoothing"] == config.smoothing
    assert metrics == {"step": 7, "acc": 0.5} and "TRAINING" not in text
    assert "TRAINING videos" in model_card(config, INFO, {"held_out": 0}, 7)


def test_the_card_names_the_licence():
    for init in ("hiera_base_224:mae_in1k_ft_in1k", "weights/mae_hiera_base_224.pth"):
        assert "CC BY-NC 4.0" in started_from(init) and init in started_from(init)
    assert "ask their authors" in started_from("weights/found.pth")
    for init in ("", "weights/found.pth", "hiera_pico_96.pth"):
        assert "CC BY-NC" not in started_from(init)


@pytest.mark.parametrize("preset", ["image-ft-pico", "video-mae-pico"])
def test_the_cards_code_loads_the_weights(tmp_path: Path, monkeypatch, preset: str):
    config = {**FINETUNE_PRESETS, **MAE_PRESETS}[preset]
    size = 64 if preset == "image-ft-pico" else (8, 64, 64)
    config = replace(config, data=replace(config.data, size=64, frames=1 if size == 64 else 8))
    model = create(
        config.model.name, input_size=size, **({"num_classes": 3} if preset == "image-ft-pico" else {})
    )
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    made: dict = {}
    exec(model_card(config, INFO, {}, 1).split("```python\n")[1].split("```")[0], made)
    assert all(torch.equal(a, b) for a, b in zip(made["model"].parameters(), model.parameters(), strict=True))
