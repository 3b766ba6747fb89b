"""Writes that are whole or absent, and what a full or closed place is answered with."""

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from pipelines import files
from pipelines.errors import UserError, run_cli


def test_a_write_is_whole_or_absent_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    with files.atomic_write(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(ValueError, match="stop"), files.atomic_write(path) as temporary:
        temporary.write_text("two")
        raise ValueError("stop")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    with files.atomic_write(tmp_path / "w.safetensors") as temporary:
        save_file({"w": torch.ones(2)}, temporary)
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_full_disk_is_called_that_whatever_the_library_says(tmp_path, monkeypatch, capsys):
    full = files.shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: full)

    def write() -> None:
        with files.atomic_write(tmp_path / "c.pt") as temporary:
            temporary.touch()
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0")

    with pytest.raises(SystemExit) as ended:
        run_cli(write)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/c.pt: No space left on device; free some space, then")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENAMETOOLONG])
def test_places_that_cannot_be_written_get_one_sentence(number, capsys):
    def fail() -> None:
        raise OSError(number, os.strerror(number), "/some/place")

    with pytest.raises(SystemExit):
        run_cli(fail)
    assert capsys.readouterr().err.startswith(f"error: /some/place: {os.strerror(number)}; c")
    with pytest.raises(OSError, match="Broken pipe"):
        run_cli(lambda: (_ for _ in ()).throw(OSError(errno.EPIPE, os.strerror(errno.EPIPE))))
    with pytest.raises(SystemExit):
        run_cli(lambda: (_ for _ in ()).throw(UserError("once")))
