"""Atomic writes, and the messages for full disks and folders without permission."""

import errno
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from pipelines import files
from pipelines.errors import UserError, run_cli
from tests.train_helpers import ROOT


def test_a_write_is_atomic_and_leaves_no_temporary_files(tmp_path):
    path = tmp_path / "a.txt"
    with files.atomic_write(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(ValueError, match="stop"), files.atomic_write(path) as temporary:
        temporary.write_text("two")
        raise ValueError("stop")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_the_umask_decides_who_can_read_files(tmp_path):
    with files.atomic_write(tmp_path / "w.safetensors") as temporary:
        save_file({"w": torch.ones(2)}, temporary)
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_full_disk_is_reported_whatever_error_a_library_raises(tmp_path, monkeypatch, capsys):
    full = files.shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: full)

    def write() -> None:
        with files.atomic_write(tmp_path / "c.pt") as temporary:
            temporary.touch()
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0")

    with pytest.raises(SystemExit) as ended:
        run_cli(write)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path}/c.pt: No space left on device; free some space, then")


@pytest.mark.parametrize("count", [1, 100_000])
def test_a_reader_that_ends_early_ends_the_command_without_a_traceback(count):
    """As `head` does; Python prints the rest of a short output when it ends."""
    main = f"from pipelines.errors import run_cli; run_cli(lambda: print('words ' * {count}))"
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-c", main], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_memory_that_is_too_small_gives_one_line(capsys):
    """In a command that does not train; training names settings that need less."""
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: torch.empty(1 << 50))
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: memory is too small (") and printed.count("\n") == 1
    assert "use a machine with more memory" in printed and "--device" not in printed
    with pytest.raises(SystemExit):
        run_cli(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to")))
    assert "(CUDA out of memory); use a GPU with more, or the CPU (DEVICE=cpu" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="shapes"):
        run_cli(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENAMETOOLONG])
def test_an_unwritable_path_gives_one_line(number, capsys):
    def fail() -> None:
        raise OSError(number, os.strerror(number), "/some/place")

    with pytest.raises(SystemExit):
        run_cli(fail)
    assert capsys.readouterr().err.startswith(f"error: /some/place: {os.strerror(number)}; c")
    with pytest.raises(OSError, match="Broken pipe"):
        run_cli(lambda: (_ for _ in ()).throw(OSError(errno.EPIPE, os.strerror(errno.EPIPE))))
    with pytest.raises(SystemExit):
        run_cli(lambda: (_ for _ in ()).throw(UserError("once")))
