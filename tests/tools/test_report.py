"""The report of finished, unfinished, damaged and hostile runs, and the model card."""

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models import create
from pipelines.dataset import DatasetInfo
from pipelines.errors import UserError
from tests.train_helpers import call
from tools.compare import MEANINGS, NUMBERS, meanings, settings, summary
from tools.plot import COLORS
from tools.report import LOG_LINES, report, usage
from train.card import model_card
from train.config import to_dict
from train.console import parse
from train.metrics import FINETUNE_COLUMNS, MAE_COLUMNS
from train.presets import FINETUNE_PRESETS, MAE_PRESETS

EVIL = "</td><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A transparent pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


INFO = DatasetInfo(
    Path("x"), "image", ("cats", "```dogs", "émus"), {"train": {"samples": 30}, "val": {"samples": 3}}, {}, {}
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a finished finetuning run leaves it, hostile wherever text comes from outside."""
    folder = tmp_path_factory.mktemp("runs") / "good <run>"
    folder.mkdir()
    config = FINETUNE_PRESETS["image-ft-pico"]
    config = replace(config, data=replace(config.data, path=Path(f"shards/{EVIL}")))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    start = {"command": EVIL, "packages": {"torch": "9.9"}, "gpus": [], "cpus": 12, "processes": 2}
    start["parameters"] = 1_234_567
    (folder / "env.json").write_text(json.dumps([start]))
    samples = config.optim.batch * 8 // int(config.optim.epochs)
    splits = {"train": {"samples": samples}, "val": {"samples": 1500}}
    (folder / "data.json").write_text(json.dumps({"splits": splits, "classes": ["a", EVIL]}))
    found = {"id": [0, 1, 2, 3], "source": ["0.jpg", EVIL, "2.jpg", "3.jpg"], "label": [0, 1, 0, 0]}
    found |= {"class_1": ["a"] * 4, "probability_1": [0.9, 0.8, 0.7, 0.6]}
    pq.write_table(pa.table(found), folder / "predictions.parquet")
    write_metrics(folder, (*FINETUNE_COLUMNS, EVIL), steps=8)
    (folder / "log.txt").write_text("".join(f"line {i} {EVIL}\n" for i in range(100)))
    (folder / "reconstruction.png").write_bytes(PNG)
    weights = create(config.model.name, input_size=96, num_classes=2).state_dict()
    save_file(weights, folder / "model.safetensors", {"hiera-train": json.dumps({"step": 8})})
    info = replace(INFO, classes=("a", EVIL))
    (folder / "model_card.md").write_text(model_card(config, info, {"step": 8, "acc": 0.75}, 8))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to change."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    """The report of that run."""
    path = report(finished)
    assert path == finished / "report.html" and sorted(finished.glob(".*")) == []
    return path.read_text()


def write_metrics(folder: Path, columns: tuple[str, ...], steps: int) -> None:
    values = {
        "loss": 0.5,
        "loss_train": 0.5,
        "loss_val": 0.5,
        "acc": 0.75,
        "step_ms": 40.0,
        "data_wait_ms": 4.0,
        "time": 90.0,
    }
    lines = [",".join(columns)]
    for step in range(1, steps + 1):
        row = {**values, "step": step, "samples_per_s": 1000.0 if step == 1 else 50.0, "lr": 1e-3}
        row["grad_norm"] = "nan" if step == 3 else 1.5
        row["epoch"] = step / 4
        row[EVIL] = step
        lines.append(",".join(str(row.get(name, "")) for name in columns))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def words(page: str) -> str:
    """What a reader sees."""
    return unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.S))


def test_the_report_of_a_finished_run_is_complete(page: str):
    text = " ".join(words(page).split())
    assert "Not in this report" not in text
    titles = (
        "Summary",
        "Numbers",
        "Curves",
        "Settings",
        "Reconstructions",
        "Results",
        "Use these weights",
        "Environment",
        "Log",
    )
    assert re.findall("<h2>(.*?)</h2>", page) == [*titles]
    assert page.count("<svg") == 7
    assert "75.0%" in text and "10.0%" in text and " 50 samples/s " in text
    (picture,) = re.findall(r'<img width="2" [^>]*base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (1, 1)
    assert "true patch statistics color the prediction" in text
    assert f"line {99}" in text and f"line {100 - LOG_LINES}" in text
    assert f"line {99 - LOG_LINES} " not in text
    assert "9.9" in text


def test_reconstructions_from_plain_pixels_have_no_true_colors(tmp_path: Path):
    config = replace(MAE_PRESETS["image-mae-pico"], normalize_targets=False)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    (tmp_path / "reconstruction.png").write_bytes(PNG)
    text = words(report(tmp_path).read_text())
    assert "visible patches, and reconstruction" in text and "true patch statistics" not in text


def test_the_summary_names_task_data_model_hardware_and_results(page: str):
    text = " ".join(words(page).split())
    for fact in (
        "Task finetuning on images, from random weights",
        "12 training and 1,500 validation images, 2 classes,",
        "Model hiera_pico_96, 1.2 M parameters, input 96 x 96",
        "Hardware 12 CPU cores, 2 processes",
        "Progress finished: 8 steps, epoch 2, 1.5 min of training",
        "Last evaluation accuracy (acc) 75.0% (step 8, epoch 2): 3 of 4 samples",
        "Best evaluation accuracy (acc) 75.0% (step 1, epoch 0.25): 3 of 4 samples Chance level",
        "Chance level accuracy (acc) 75.0%: always predicting the most frequent class",
        "Few samples only 4 samples are evaluated: acc changes in steps of 0.25; small differences may be",
    ):
        assert fact in text
    assert "the last evaluation, not of the best one: 3 of 4 predictions are right" in text


def test_the_last_evaluation_is_quoted_if_the_best_is_better(run: Path):
    text = (run / "metrics.csv").read_text().replace(",0.75,", ",1.0,", 1)
    (run / "metrics.csv").write_text(text)
    last, best = (summary(run)[f"{name} evaluation"][0] for name in ("Last", "Best"))
    assert last == "accuracy (acc) 75.0% (step 8, epoch 2): 3 of 4 samples"
    assert best.startswith(
        "accuracy (acc) 100.0% (step 1, epoch 0.25): 4 of 4 samples; it was chosen on these"
    )
    (run / "predictions.parquet").write_bytes(b"PAR1 half")
    assert summary(run)["Last evaluation"] == [last.split(":")[0]] and "Chance level" not in summary(run)


def test_every_number_and_every_curve_is_explained(page: str):
    columns = {*MAE_COLUMNS, *FINETUNE_COLUMNS} - {"step", "epoch", "samples", "held_out"}  # not shown
    numbers = {column for column in columns if column in NUMBERS}
    assert numbers == {*NUMBERS} and len(meanings([*columns])) == len(MEANINGS)
    assert {re.sub(r"(stage)\d$", r"\1", column) for column in columns} == {*MEANINGS}
    text = words(page)
    for column in {*FINETUNE_COLUMNS} & {"loss", "acc", "lr", "grad_norm", "step_ms"}:
        assert MEANINGS[column] in text.replace("\n", " "), column
    assert list(meanings(["health_rank_stage1", "health_rank_stage2", "acc5", "new"])) == [
        "acc5",
        "health_rank_stageN",
    ]


def test_settings_are_those_that_differ_from_the_preset(tmp_path: Path):
    config = FINETUNE_PRESETS["image-ft-pico"]
    changed = replace(config, optim=replace(config.optim, lr=0.0125, epochs=float(config.optim.epochs)))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(changed)))
    start = {"command": "python -m train.finetune image-ft-pico --optim.lr 0.0125"}
    (tmp_path / "env.json").write_text(json.dumps([start]))
    found = settings(tmp_path)
    assert found["columns"] == ["preset image-ft-pico", "this run"]
    assert found["rows"] == [("optim.lr", ["0.001", "0.0125"])] and found["others"] > 50
    shutil.copytree(tmp_path, tmp_path / "b")
    changed = replace(changed, smoothing=0.25)
    (tmp_path / "b/config.json").write_text(json.dumps(to_dict(changed)))
    both = settings(tmp_path, tmp_path / "b")
    rows = both["rows"]
    assert both["columns"] == ["preset image-ft-pico", tmp_path.name, "b"]
    assert [name for name, _ in rows] == ["smoothing", "optim.lr"], "differences between the runs come first"


def section(page: str, title: str) -> str:
    return page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_the_weights_can_be_used_as_the_page_shows(finished: Path, page: str, tmp_path: Path, monkeypatch):
    blocks = re.findall("<pre>(.*?)</pre>", section(page, "Use these weights"), re.S)
    command, code = map(unescape, blocks)
    _, dash_m, module, folder, _ = shlex.split(command)
    assert dash_m == "-m" and find_spec(module) and Path(folder) == finished
    made: dict = {}
    exec(code, made)
    trained = load_file(finished / "model.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in made["model"].state_dict().items())
    (tmp_path / "config.json").write_text(json.dumps(to_dict(MAE_PRESETS["image-mae-pico"])))
    (tmp_path / "env.json").write_text(json.dumps([{"command": "python -m train.mae image-mae-pico"}]))
    shutil.copy(finished / "model_card.md", tmp_path)
    monkeypatch.setattr("sys.argv", shlex.split(usage(tmp_path)[0])[2:])
    assert parse(FINETUNE_PRESETS, "train.finetune").model.init == str(tmp_path / "model.safetensors")


def test_one_page_compares_runs(run: Path):
    other = run.parent / "b"
    shutil.copytree(run, other)
    config = FINETUNE_PRESETS["image-ft-pico"]
    (other / "config.json").write_text(json.dumps(to_dict(replace(config, smoothing=0.25))))
    text = (other / "metrics.csv").read_text().replace(",0.75,", ",0.875,", 1)
    (other / "metrics.csv").write_text(text)
    started = run.parent / "c"
    started.mkdir()
    (started / "config.json").write_text(json.dumps(to_dict(config)))
    path = report(run, other, started)
    assert path == run.parent / "report.html"
    page = path.read_text()
    ranking = " ".join(words(section(page, "Numbers")).split())
    assert ranking.index("1. b") < ranking.index("2. good <run>") < ranking.index("3. c")
    assert "accuracy (acc) 87.5% (step 1, epoch 0.25)" in ranking
    assert "smoothing" in section(page, "Settings")
    drawn = section(page, "Curves")
    assert "stroke: var(--run0)" in drawn and "stroke: var(--run1)" in drawn
    assert not any(color in drawn for color in COLORS), "a dark page has colors of its own"
    assert "Curves of c (there is no metrics.csv)" in page and "Results of c (there is no predictions" in page
    assert section(page, "Log").count("<details><summary>") == 2
    (started / "config.json").write_text("{")
    text = words(report(started, run).read_text())
    assert f"Settings (config.json cannot be read: {started}/config.json is no" in text, "not the other run's"


def test_text_and_curves_have_contrast_in_both_modes(page: str):
    """At least 4.5 to 1 (WCAG 2, AA), computed from the page's own colors."""
    light, dark = (dict(re.findall(r"--([\w]+): (#\w+|[\d ]+);", part)) for part in page.split("@media")[:2])
    assert light.keys() == dark.keys() and len(light) == 7 + len(COLORS)
    used = set(re.findall(r"var\(--(\w+)\)", page)) - {"c", "share", "side", "color"}
    assert used <= light.keys()
    for colors in (light, dark):
        for text in ("ink", "quiet", *(name for name in colors if name.startswith("run"))):
            for paper in ("paper", "card", "right", "wrong") if text == "ink" else ("paper", "card"):
                assert contrast(colors[text], colors[paper]) >= 4.5, (text, paper, colors)


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        values = [int(digits[i : i + 2], 16) for i in (0, 2, 4)] if "#" in color else map(int, color.split())
        shares = [value / 255 for value in values]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_of_the_run_is_escaped(page: str):
    assert "<script" not in page and "<img src=x" not in page and "<run>" not in page
    titles = ("Summary", "Curves", "Settings", "Results", "Environment", "Log")
    counts = [words(section(page, title)).count("document.title='owned'") for title in titles]
    # Path; column; path; class twice, source, missing path; command; log.
    assert counts == [1, 1, 1, 4, 1, LOG_LINES]
    assert EVIL in unescape(page)


def test_nothing_is_fetched(page: str):
    page = re.sub(r'title="[^"]*"', "", page)  # texts of the run, which may look like markup
    markup = " ".join(re.findall(r"<style.*?</style>|<[^>]+>", page, re.S))
    outside = re.findall(r"""(?:\b(?:src|href)=|url\(|@import)["']?([^"')\s>]+)""", markup)
    assert len(outside) > 50 and all(link.startswith(("data:", "#")) for link in outside), outside
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) > 5 and all(not name.startswith(("figure", "axes")) for name in identities)


def test_an_unfinished_run_and_damaged_files_are_reported(run: Path):
    (run / "model.safetensors").unlink()
    (run / "predictions.parquet").write_bytes(b"PAR1 half")
    (run / "reconstruction.png").write_bytes(PNG[:50])
    (run / "log.txt").write_text("")
    (run / "env.json").write_text('{"command": ')
    with (run / "metrics.csv").open("a") as file:
        file.write("12.5,9,0.")  # a row being written
    text = words(report(run).read_text())
    assert "not finished: 8 steps" in text
    (told,) = re.findall(r"Not in this report: (.*)", text)
    for part in ("Reconstructions (reconstruction.png cannot be read", "Results (predictions.parquet cannot"):
        assert part in told
    assert "Environment (env.json cannot be read" in told and "Log (log.txt is empty so far)" in told
    assert "Curves" not in told and "75.0%" in text


def test_a_run_that_has_just_started(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(MAE_PRESETS["image-mae-pico"])))
    text = words(report(tmp_path, out=tmp_path / "page.html").read_text())
    assert "mae_hiera_pico_96, input 96 x 96" in text and "not finished: 0 steps" in text
    assert "Curves (there is no metrics.csv)" in text and "Results (there is no predictions.parquet)" in text
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
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is not a run folder" in done.stderr
    with pytest.raises(UserError, match="is not a run folder"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_opens_it_without_errors(finished: Path, page: str, tmp_path: Path):
    def browse(page: Path) -> tuple[str, str]:
        where = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [CHROMIUM, *where, "--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout, done.stderr

    dom, log = browse(finished / "report.html")
    assert "CONSOLE" not in log
    assert (
        "<title>good &lt;run&gt;</title>" in dom
        and dom.count("<svg") == 7
        and dom.count("Confusion matrix") == 1
        and "<script" not in dom
    )
    broken = tmp_path / "broken.html"
    broken.write_text("<script>missing()</script>")
    assert "CONSOLE" in browse(broken)[1]  # so the check above can fail


# ---- the model card


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
    assert "Data, its 3 classes in the order of the outputs; recipe" in text
    assert "training samples" in model_card(config, INFO, {"held_out": 0}, 7)
    autoencoder = model_card(MAE_PRESETS["image-mae-pico"], INFO, {}, 7)
    assert "\nData; recipe; last metrics:" in autoencoder and '"émus"' in autoencoder


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
