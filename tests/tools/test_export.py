"""ONNX and pt2 files: logits, batch sizes, metadata, and refusal of files with other logits."""

import json
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

import models
from benchmarks.parity import randomise
from models.inputs import IMAGE_STATS, VIDEO_STATS
from pipelines.errors import UserError
from tools.convert import convert, export

torch.set_num_threads(2)
CLASSES = ["ant", "bee", "cat"]
LONG = (pytest.mark.fault, pytest.mark.long)  # a row of `make faults`, not in `make test`
PICTURE = {"size": 64, "frames": 1, "crop": 0.8, "interpolation": "triangular"}
CLIP = {**PICTURE, "size": 32, "frames": 4, "sampling": "stride", "stride": 3, "stride_fps": 25.0}


def run_folder(folder, data, **settings):
    """A run folder with the weights, classes and data settings of a classifier; returns the model."""
    video, side = data["frames"] > 1, data["size"]
    name, size = ("hiera_pico_16x64", (data["frames"], side, side)) if video else ("hiera_pico_96", side)
    torch.manual_seed(0)
    model = models.create(name, input_size=size, stages=(1, 1, 1, 1), num_classes=3, **settings).eval()
    randomise(model)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"kind": "finetune", "data": data}))
    (folder / "data.json").write_text(json.dumps({"classes": CLASSES}))
    return model


@pytest.mark.parametrize(
    ("to", "data", "settings"),
    [
        pytest.param("onnx", PICTURE, {"abs_win": True}, marks=LONG),
        ("onnx", CLIP, {}),
        ("pt2", PICTURE, {"abs_win": True}),
    ],
)
def test_an_export_gives_the_models_logits_for_any_batch(tmp_path, capsys, to, data, settings):
    model, path = run_folder(tmp_path / "run", data, **settings), tmp_path / f"out/model.{to}"
    convert(str(tmp_path / "run"), path, to=to)
    printed = capsys.readouterr().out
    assert f"wrote {path}: float32 [batch, 3, " in printed and "differ by at most" in printed
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if to == "onnx":
        written, session = onnx.load(path), onnxruntime.InferenceSession(path)
        facts = {entry.key: json.loads(entry.value) for entry in written.metadata_props}
        assert [imported.version for imported in written.opset_import] == [18]
        compute = lambda x: torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])  # noqa: E731
    else:
        extra = {"preprocessing.json": ""}
        compute = torch.export.load(path, extra_files=extra).module()
        facts = json.loads(extra["preprocessing.json"])
    mean, deviation = VIDEO_STATS if data is CLIP else IMAGE_STATS
    assert facts == {**data, "mean": list(mean), "std": list(deviation), "classes": CLASSES}
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, *model.input_size)
        with torch.no_grad():
            logits = model(x)
        assert logits.abs().max() > 0.1
        torch.testing.assert_close(compute(x), logits, rtol=0, atol=1e-4)


class Changing(torch.nn.Module):
    """A model that differs from its traced program by a number for each batch size."""

    input_size = (4, 4)

    def __init__(self, differences):
        super().__init__()
        self.differences, self.config = differences, SimpleNamespace(in_chans=3)

    def forward(self, x):
        return x.mean((2, 3)) + (0.0 if torch.compiler.is_exporting() else self.differences[len(x)])


@pytest.mark.parametrize("differences", [{1: 1.0, 3: 0.0}, {1: 0.0, 3: float("nan")}])
def test_an_export_with_other_logits_is_refused(tmp_path, differences):
    (tmp_path / "old.pt2").write_text("an earlier export")
    with pytest.raises(UserError, match=r"the logits of .*old.pt2 would differ by .*, which is more than"):
        export(Changing(differences), tmp_path / "old.pt2", "pt2", 18, {})
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [
        ("old.pt2", "an earlier export")
    ]


def test_an_unknown_opset_is_refused(tmp_path):
    run_folder(tmp_path / "run", PICTURE)
    with pytest.raises(UserError, match="opset is 9; choose one from 18 to 23"):
        convert(str(tmp_path / "run"), tmp_path / "model.onnx", to="onnx", opset=9)
    assert not (tmp_path / "model.onnx").exists()
