"""The arithmetic of the benchmarks, and the commands that they start."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmarks.__main__ as bench
from benchmarks import learning, loader, plain_loop, playback, training
from benchmarks.results import markdown, ratio, summary
from pipelines.errors import UserError
from tests.pipelines_fixtures import jpeg, picture
from tools.samples import read_annotations
from train import console
from train.presets import FINETUNE_PRESETS, MAE_PRESETS

RACE = {
    "ours": {"samples/s": [10.0, 30.0, 20.0], "memory (MB)": [5.0]},
    "theirs": {"samples/s": [5.0, 10.0, 40.0]},
}


def test_ratios_are_computed_within_a_round():
    assert ratio([10.0, 30.0, 20.0], [5.0, 10.0, 40.0]) == "2.00 (0.50 to 3.00)"
    assert "| theirs | 10 | 2.00 (0.50 to 3.00) | - |" in markdown({"a race": RACE}, "a machine")
    assert "| a race | theirs | 2.00 (0.50 to 3.00) |" in summary({"a race": RACE}, "a machine")


def test_pages_keep_their_text_and_get_new_tables(tmp_path: Path):
    pages = [tmp_path / name for name in ("speed.md", "README.md", "README.zh-CN.md")]
    for page in pages:
        page.write_text(f"before\n{bench.BEGIN}old\n{bench.END}after\n")
    where = {"gpus": [], "cpus": 2, "processor": "Ours 3000", "commit": "abc"}
    places = bench.Pages(pages[0], tuple(pages[1:]), tmp_path / "results")
    for part, title in (("loader", "an old name"), ("model", "another"), ("loader", "a race")):
        bench.write({part: {title: RACE}}, where, places)
    for page in pages:
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count("| theirs |") == 2 and "Measured on 2-cores" in text and "commit abc" in text
        assert "Ours 3000, 2 cores" in text and "higher is better" in text
    (found,) = (tmp_path / "results").glob("*-2-cores.json")
    assert f"(results/{found.name})" in pages[0].read_text()
    written = json.loads(found.read_text())
    assert written["environment"] == where and "commit abc" in written["parts"]["loader"]["measured"]
    found = {part: written["parts"][part]["results"] for part in written["parts"]}
    assert found == {"loader": {"a race": RACE}, "model": {"another": RACE}}
    bench.write({"model": {"another": RACE}}, where | {"processor": "Theirs 5"}, places)
    text = pages[0].read_text()
    assert "Theirs 5" in text and "Ours 3000" not in text and "a race" not in text


def test_trainings_are_compared_on_the_cpu_and_a_gpu_is_named_for_what_used_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A training would take a GPU by default; the loops that it is compared with cannot."""
    monkeypatch.setattr(training, "samples", lambda _: 64)
    folders = []
    for racing in training.contenders(tmp_path, tmp_path, 9).values():
        for program, preset, *flags in (
            command for name, command in racing.items() if name.startswith("ours")
        ):
            monkeypatch.setattr("sys.argv", [program, preset, *flags])
            presets = MAE_PRESETS if program == "train.mae" else FINETUNE_PRESETS
            config = console.parse(presets, program)
            assert config.speed.device == "cpu"
            rare = (config.run.eval_every, config.run.checkpoint_every)
            assert rare == (9, 9), "the plain loops neither evaluate nor save"
            folders.append(config.run.root / (config.run.name or preset))
    assert len(set(folders)) == len(folders), "the second run in a folder would only resume the first"
    page = tmp_path / "page.md"
    page.write_text(f"{bench.BEGIN}{bench.END}")
    where = {"gpus": ["An H100"], "cpus": 2, "processor": "Ours 3000", "commit": "abc"}
    bench.write({"model": {"a race": RACE}}, where, bench.Pages(page, (page,), tmp_path))
    assert "An H100 (a step of a model); Ours 3000, 2 cores (all others)" in page.read_text()


def test_a_training_without_steps_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Such as a run that is already complete."""
    (tmp_path / "silent.py").write_text("for step in range(3):\n    print(f'step {step}: loss 1')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"python -m silent printed 3 steps instead of 9: step 0: loss 1\n"):
        training.trial(["silent"], batch=1, steps=9)


def test_the_results_of_complete_parts_are_kept_if_a_later_one_fails(tmp_path: Path):
    pages = [tmp_path / name for name in ("speed.md", "README.md")]
    for page in pages:
        page.write_text(f"{bench.BEGIN}{bench.END}")
    places = bench.Pages(pages[0], (pages[1],), tmp_path)
    with pytest.raises(UserError, match="nothing"):  # the folder of pictures does not exist
        bench.compare_all(tmp_path / "nothing", tmp_path / "work", 1, ("core", "packing"), pages=places)
    assert "a step of a model that does nothing" in pages[0].read_text()
    (found,) = tmp_path.glob("*.json")
    assert "command" not in json.loads(found.read_text())["environment"], "it has paths of this machine"


@pytest.mark.parametrize(
    ("model", "mae", "clips"),
    [
        ("ours", False, False),
        ("timm", False, False),
        ("ours", True, False),
        ("transformers", True, False),
        ("ours", False, True),
        ("ours", True, True),
    ],
)
def test_every_model_trains_in_the_plain_loop(model: plain_loop.Model, mae: bool, clips: bool):
    torch.manual_seed(0)
    arguments = plain_loop.Arguments(Path(), model, mae, clips)
    made, loss_of = plain_loop.model_and_loss(arguments, classes=4)
    shape = (16, 64, 64) if clips else (96, 96)
    loss_of(torch.randn(2, 3, *shape), torch.tensor([0, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["images", "clips", "playback", "letters"])
def test_the_commands_of_learning_are_accepted(kind: learning.Kind, monkeypatch: pytest.MonkeyPatch):
    chains = learning.chains_of(learning.Arguments(kind, Path("shards/x"), seeds=2))
    commands = [shlex.split(command) for chain in chains for command in chain]
    names = set()
    for program, *words in commands:
        monkeypatch.setattr("sys.argv", [program, *words])
        presets = MAE_PRESETS if program == "train.mae" else FINETUNE_PRESETS
        read = console.parse(presets, program)
        names.add(read.run.name)
        pretrained = "images" if kind == "images" else "clips"
        init = f"runs/learning/{pretrained}-mae-{read.run.name.rpartition('-')[2]}/model.safetensors"
        assert read.model.init in ("", init)
    counts = {"images": 2 * 3 + 2, "clips": 2 * 3, "playback": 2 * 2, "letters": 2 * 2}
    assert len(names) == len(commands) == counts[kind]


def test_playback_differs_only_in_the_order_of_frames(tmp_path: Path):
    (tmp_path / "annotations").mkdir()
    for split, video, count in (("train", "long", 20), ("val", "short", 15)):
        folder = tmp_path / "frames" / "some_one" / f"{video}_000000_000002"
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"frame_{number + 1:05d}.jpg").write_bytes(bytes([number]))
        table = f"label,youtube_id,time_start,time_end\nsome one,{video},0,2\n"
        (tmp_path / "annotations" / f"tiny_{split}.csv").write_text(table)
    playback.playback(tmp_path / "frames", tmp_path / "annotations", tmp_path / "out")
    found = {}
    for label in playback.ORDERS:
        files = sorted((tmp_path / "out/frames" / label.replace(" ", "_") / "long_000000_000002").iterdir())
        found[label] = [file.read_bytes()[0] for file in files]
    assert found["smooth"] == list(range(2, 18))
    assert found["to and fro"][:4] == [3, 2, 5, 4]
    assert sorted(found["jumbled"]) == sorted(found["to and fro"]) == found["smooth"] != found["jumbled"]
    assert len(read_annotations(tmp_path / "out/annotations/tiny_train.csv")) == 3
    assert not list((tmp_path / "out").rglob("short*"))


def test_frames_are_put_into_the_given_order():
    frames = torch.arange(16).view(1, 16, 1, 1, 1).expand(1, 16, 2, 2, 3)
    for order in learning.ORDERS.values():
        seen = learning.Reordered(nn.Identity(), order)(frames)
        assert seen[0, :, 0, 0, 0].tolist() == order  # pyrefly: ignore
    assert sorted(learning.ORDERS["shuffled"]) == list(range(16)) != learning.ORDERS["shuffled"]


def test_the_loader_is_measured_relative_to_its_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "CLIP_LENGTH", 62)
    (tmp_path / "pictures").mkdir()
    for seed in range(40):
        (tmp_path / "pictures" / f"{seed}.jpg").write_bytes(jpeg(picture(96, 72, seed)))
    loader.make_data(tmp_path / "pictures", tmp_path / "work", pictures=40, clips=8)
    images, work = tmp_path / "pictures", tmp_path / "work"
    found = loader.run(images, work, batch=4, workers=1, rounds=1, only="floor")
    assert list(found) == [f"loading {kind}, relative to the floor" for kind in ("pictures", "clips")]
    for race in found.values():
        assert race["decode and resize alone"]["times the floor"] == [1.0]
        assert race["ours"]["CPU microseconds per sample"][0] > 0
