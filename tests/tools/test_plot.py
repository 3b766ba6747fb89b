"""Curves: color by run, style by column, epochs next to steps, any column; pictures of reconstructions."""

from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from PIL import Image

from pipelines.errors import UserError
from tools import fonts
from tools.plot import COLORS, Panel, draw, names_of, panels_of, plot
from tools.report import reconstructions, report
from train.mae import _sheet

LOSS = Panel("loss", ("loss_train", "loss", "loss_val"))


def rows(epochs_per_step: float = 0.5, **values: float) -> list[dict]:
    return [{"step": step, "epoch": step * epochs_per_step, **values} for step in (10, 20)]


def drawn(panel: Panel, tables: dict):
    """The axes of a panel after a drawing, so that the ticks exist."""
    figure = Figure()
    axis = figure.subplots()
    draw(axis, panel, tables)
    figure.draw_without_rendering()
    return axis


def test_color_is_of_the_run_and_style_of_the_column():
    axis = drawn(LOSS, {"a": rows(loss=1.0, loss_val=2.0), "b": rows(loss=3.0, loss_val=4.0)})
    found = {line.get_ydata()[0]: (line.get_color(), line.get_linestyle()) for line in axis.lines}
    first, second = COLORS[:2]
    assert found == {1.0: (first, "-"), 2.0: (first, "--"), 3.0: (second, "-"), 4.0: (second, "--")}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["loss", "loss_val"]
    assert axis.get_ylabel() == "loss" and axis.get_xlabel() == "step" and axis.get_xlim()[0] == 0


def test_epochs_are_next_to_steps_if_the_runs_agree():
    (above,) = drawn(LOSS, {"a": rows(loss=1.0), "b": rows(loss=1.0)}).child_axes
    assert above.get_xlabel() == "epoch" and above.get_xlim()[1] == pytest.approx(0.5 * 20 * 1.02)
    other = drawn(LOSS, {"a": rows(loss=1.0), "b": rows(epochs_per_step=0.1, loss=1.0)})
    assert other.get_xlabel() == "epoch" and not other.child_axes and max(other.lines[1].get_xdata()) == 2


def test_shares_are_percent_and_ticks_have_no_powers_of_ten():
    panel = Panel("accuracy", ("acc",), "%")
    table = rows(acc=0.25)
    table[1]["acc"] = 0.75
    axis = drawn(panel, {"a": table})
    assert axis.get_ylabel() == "accuracy (%)"
    assert {"30", "70"} <= {label.get_text() for label in axis.get_yticklabels()}
    table = [{**row, "grad_norm": 2.1 + row["step"] / 10, "step": 10_000 * row["step"]} for row in rows()]
    axis = drawn(Panel("gradient norm", ("grad_norm",), logarithmic=True), {"a": table})
    low, high = axis.get_ylim()
    shown = [tick for tick in axis.get_yticks() if low <= tick <= high]
    assert len(shown) >= 2 and "200,000" in [label.get_text() for label in axis.get_xticklabels()]
    assert not any("$" in label.get_text() for label in axis.get_yticklabels())


def test_columns_without_a_panel_get_one_by_name():
    ranks = {f"health_rank_stage{n}": float(n) for n in (1, 2)}
    table = rows(loss=1.0, **ranks, rank_1=1.0, rank_2=2.0, health_probe=0.5, max_mem_gb=1.0, step_ms=1.0)
    panels = {panel.title: (panel.columns, panel.unit) for panel in panels_of({"a": table})}
    assert list(panels) == ["loss", "duration", "health rank stage", "rank", "health probe"]
    assert panels["health rank stage"] == (tuple(ranks), "") and panels["rank"] == (("rank_1", "rank_2"), "")
    assert panels["health probe"] == (("health_probe",), "%")


def test_runs_of_the_same_name_are_told_apart():
    assert names_of([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert names_of([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]


def test_any_run_name_is_drawn_as_it_is_and_only_as_png(tmp_path: Path):
    (run := tmp_path / "a$x^$b").mkdir()
    (run / "metrics.csv").write_text("step,loss\n1,2.0\n2,1.0\n")
    assert Image.open(plot((run,))).format == "PNG"
    for command in (plot, lambda runs, out: report(*runs, out=out)):
        (run / "config.json").touch()
        with pytest.raises(UserError, match=r"curves\.pdf does not end in \.(png|html); name such a file"):
            command((run,), out=tmp_path / "curves.pdf")
    assert not (tmp_path / "curves.pdf").exists()


@pytest.mark.parametrize("frames", [1, 4])
def test_small_reconstructions_are_sharp_and_twice_as_large(frames: int, tmp_path: Path):
    columns = [np.full((3, 32, 32 * frames, 3), 80 * c, np.uint8) for c in range(3)]
    columns[0][:, :, 0] = 255  # the left column of pixels
    sheet, info = _sheet(columns, "")
    sheet.save(tmp_path / "reconstruction.png", pnginfo=info)
    image = Image.open(tmp_path / "reconstruction.png")
    zoom, height = int(image.info["zoom"]), int(image.info["part height"])
    assert zoom >= 2 and image.mode == "RGBA" and image.size[1] > 3 * height
    pixels = np.asarray(image)[30]
    assert (pixels[:zoom, :3] == 255).all() and (pixels[zoom : 32 * zoom * frames] == (0, 0, 0, 255)).all()
    assert {0, 255} == {*np.asarray(image)[..., 3].flat}, "the gaps are transparent"
    assert [width for width, _ in reconstructions(tmp_path)["pictures"]] == [image.width] * 3


def test_a_font_of_the_machine_draws_what_dejavu_sans_lacks(tmp_path: Path, monkeypatch, capsys):
    """Names of classes, files and runs; without such a font, a line names the characters."""
    make_font(tmp_path / "squares.ttf", "鱼", "Squares")
    monkeypatch.setattr(fonts, "machine_fonts", lambda: [tmp_path / "none.ttf", tmp_path / "squares.ttf"])
    monkeypatch.setattr(fonts, "WARNED", set())
    fonts.other_fonts.cache_clear()
    assert list(map(len, map(fonts.fonts_for, ["a鱼", "abc", "é"]))) == [2, 1, 1]
    assert [part for part, _ in fonts.parts_of("a鱼鱼 b", 12)] == ["a", "鱼鱼", " b"]
    square = (fonts.line_of("鱼", 40, "black", 60) < 128).all(axis=2)
    assert square.sum() == 20 * 20, "the glyph is a square of half the size"
    assert fonts.families("a鱼").get_family() == ["DejaVu Sans", "Squares"]
    assert capsys.readouterr().err == ""
    fonts.fonts_for("鱼狗")
    fonts.fonts_for("照片")  # another line of Chinese adds no warning
    printed = capsys.readouterr().err
    assert printed.startswith("warning: no font here has 狗: boxes are drawn; install one")
    assert printed.count("\n") == 1


def make_font(path: Path, characters: str, family: str) -> None:
    """A font whose characters are filled squares, half as wide and high as the font's size."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 500), (500, 500), (500, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square" for character in characters})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "square"), (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
