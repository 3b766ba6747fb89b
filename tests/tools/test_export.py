"""ONNX and pt2 files: logits, batch sizes, metadata, and refusal of files with other logits."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

import models
from benchmarks.parity import randomise
from models.layers import IMAGE_STATS, VIDEO_STATS, NormalizedInput
from pipelines.dataset import open_dataset
from pipelines.errors import UserError
from tests import LONG
from tools.convert import convert, export
from tools.predict import pack
from train.distributed import World
from train.presets import FINETUNE_PRESETS
from train.task import batches_of

torch.set_num_threads(2)
CLASSES = ["ant", "bee", "猫"]
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
        texts = {entry.key: entry.value for entry in written.metadata_props}
        facts = {name: json.loads(text) for name, text in texts.items()}
        assert "猫" in texts["classes"], "readable without a JSON parser"
        assert [imported.version for imported in written.opset_import] == [18]
        compute = lambda x: torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])  # noqa: E731
    else:
        extra = {"preprocessing.json": ""}
        compute = torch.export.load(path, extra_files=extra).module()
        facts = json.loads(extra["preprocessing.json"])
    mean, deviation = VIDEO_STATS if data is CLIP else IMAGE_STATS
    resize = "Pillow's BILINEAR; torchvision's bilinear with antialias=True"
    assert facts == {**data, "mean": list(mean), "std": list(deviation), "classes": CLASSES, "resize": resize}
    if to == "onnx" and data is CLIP:
        check_the_code_of_the_docs(tmp_path, path)
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, *model.input_size)
        with torch.no_grad():
            logits = model(x)
        assert logits.abs().max() > 0.1
        torch.testing.assert_close(compute(x), logits, rtol=0, atol=1e-4)


def check_the_code_of_the_docs(folder, exported):
    """The code in docs/weights.md gives the view of a video that training evaluates."""
    ramp = np.mgrid[0:60, 0:90].sum(0)
    video = [np.stack([ramp + 2 * t, 220 - ramp, ramp], 2).astype(np.uint8) for t in range(31)]
    with av.open(folder / "clip.mp4", "w") as file:
        stream = file.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 90, 60, "yuv444p"
        for picture in (*(av.VideoFrame.from_ndarray(frame, "rgb24") for frame in video), None):
            file.mux(stream.encode(picture))
    text = (Path(__file__).parents[2] / "docs/weights.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "clip.mp4" in block)
    for name, path in (("hiera.onnx", exported), ("clip.mp4", folder / "clip.mp4")):
        code = code.replace(f'"{name}"', repr(str(path)))
    values = {}
    exec(code, values)
    preset = FINETUNE_PRESETS["video-ft-pico"]
    config = replace(preset, data=replace(preset.data, **CLIP), speed=replace(preset.speed, device="cpu"))
    (folder / "packed").mkdir()
    assert pack(config, [folder / "clip.mp4"], {}, folder / "packed")[1] == [""]
    dataset = open_dataset(folder / "packed", "val")
    (batch,) = batches_of(config, World(0, 1, torch.device("cpu")), dataset, (1, 1))
    ours = NormalizedInput(torch.nn.Identity(), 4)(batch.pixels[:1]).numpy()
    assert values["clip"].shape == ours.shape == (1, 3, 4, 32, 32) and values["logits"].shape == (1, 3)
    assert np.abs(values["clip"] - ours).mean() < 0.02  # JPEG; another first frame would give 0.035


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
