"""The data path of a GPU, as far as it can be tested without one: graphs, waits, errors, threads."""

import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from pipelines import augment, decode, errors, loader, machine, order
from pipelines.config import DataConfig, DecodeConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.decode import Decoder
from pipelines.errors import UserError
from pipelines.machine import World
from pipelines.views import Rows, train_rows
from tests.pipelines_fixtures import clip_dataset, frame_bytes, image_dataset, jpeg, picture, write_dataset
from train import ending
from train.meters import Clock
from train.presets import MAE_PRESETS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BROKEN = "nvImageCodec failure: '#8'"
DALI_ERROR = (
    "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.image`,\n"
    "which was used in the pipeline definition with the following traceback:\n\n"
    '  File "graph.py", line 94, in build_pipeline\n\n'
    "encountered:\n\n{}\nStacktrace (2 entries):\n[frame 0]: libdali.so\n"
    "Current pipeline object is no longer valid."
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Dataset:
    return open_dataset(image_dataset(tmp_path_factory.mktemp("data") / "images"), "train")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Dataset:
    root = clip_dataset(tmp_path_factory.mktemp("data") / "clips", [5, 9, 20, 12, 40, 8])
    return open_dataset(root, "train")


# ---- the graph


def pixels_of(
    dataset: Dataset, config: DataConfig, decode: str, samples: int, threads: int = 2
) -> torch.Tensor:
    """The pixels of a batch from the GPU's graph, run on the CPU."""
    copies = config.copies
    _, ids = order.sample_at(np.arange(samples), len(dataset), seed=0)
    rows = train_rows(dataset, config, 0, np.repeat(ids, copies), np.arange(samples * copies))
    settings = DecodeConfig(threads=2, decode=decode)
    decoder = Decoder(config, settings, CPU, samples, copies, resize_on_cpu=True)
    decoder.feed(rows, dataset.read(rows.ids[::copies], rows.frames[::copies]))
    return decoder.take()[1]


@pytest.mark.parametrize("kind", ["triangular", "linear", "cubic"])
@pytest.mark.parametrize(("repeats", "clip"), [(1, 1), (3, 1), (1, 4), (2, 4)])
def test_crops_of_whole_pictures_equal_decoded_crops(images, clips, kind, repeats, clip):
    settings = {"repeats": repeats, "same_clip": True, "scale": (0.1, 1.0), "interpolation": kind}
    view = DataConfig(size=40, frames=clip, **settings)
    dataset = images if clip == 1 else clips
    whole, window = (pixels_of(dataset, view, decode, 6) for decode in ("whole", "window"))
    assert len(whole) == 6 * repeats and torch.equal(whole, window)


def test_crops_of_rotated_and_gray_pictures_are_equal_too(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn to the right
    pictures = []
    for number in range(4):
        buffer = io.BytesIO()
        shown = Image.fromarray(picture(64, 64, number)).convert("L" if number % 2 else "RGB")
        shown.save(buffer, "JPEG", exif=turned)
        pictures.append([buffer.getvalue()])
    catalogue = open_dataset(write_dataset(tmp_path / "d", pictures, "image"), "train")
    view = DataConfig(size=24, interpolation="cubic")
    parts = [pixels_of(catalogue, view, decode, 4) for decode in ("whole", "window")]
    assert torch.equal(*parts)


def defined(monkeypatch, decoder: Callable[[], Decoder]) -> str:
    """The serialized DALI graph of a decoder; this needs neither a driver nor a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "build", lambda pipeline: None)
        patch.setattr(decode, "gpu_index", lambda device: None)
        return decoder().pipeline.serialize().decode("latin-1")


@pytest.mark.parametrize("kind", ["triangular", "linear", "cubic"])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_gpu_decodes_whole_pictures_unless_speed_decode_is_window(monkeypatch, kind, copies):
    def made(words: str, device: torch.device = GPU) -> Decoder:
        data = DataConfig(frames=2, interpolation=kind)
        return Decoder(data, DecodeConfig(threads=2, decode=words), device, 4, copies)

    whole, window = (defined(monkeypatch, partial(made, words)) for words in ("whole", "window"))
    assert "decoders__ImageSlice" not in whole and "decoders__ImageSlice" in window
    assert all("mixed" in text and "device_memory_padding" in text for text in (whole, window))
    assert not made("whole", CPU).whole


# ---- waits


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_no_augmentation_uploads_a_constant(name, monkeypatch):
    """Uploading a constant would wait for all earlier work of the device."""
    rows = torch.randint(0, 256, (2, 3, 16, 24, 3), dtype=torch.uint8)
    values = torch.tensor([0.5, 1.0]).view(-1, 1, 1, 1, 1)

    def refuse(*values: object, **_: object) -> torch.Tensor:
        raise AssertionError(f"{name} makes {values} on the host")

    for function in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, function, refuse)
    augment.OPERATIONS[name][0](rows, values)


class Stream:
    """A device that works through a queue, on a clock that the test advances."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy_until = 0.0

    def event(self, **_: bool) -> "Event":
        return Event(self)

    def work(self, seconds: float) -> None:
        self.busy_until = max(self.now, self.busy_until) + seconds


class Event:
    """An event on a Stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.due = stream, 0.0

    def record(self, _: object) -> None:
        self.due = max(self.stream.now, self.stream.busy_until)

    def query(self) -> bool:
        return self.stream.now >= self.due

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.due - self.due)


def test_the_data_wait_is_the_time_in_which_the_device_is_idle(monkeypatch):
    """The loader takes 100 ms per batch; the device is busy with the previous batch for 70 ms of them."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr("train.meters.time.perf_counter", lambda: stream.now)
    blank = loader.blank_batch(DataConfig(size=8), 1, CPU)

    def batches():
        while True:
            stream.now += 0.100
            decoded = loader.mark(GPU)
            stream.work(0.010)  # augmentation
            yield replace(blank, decoded=decoded)

    endless, clock = batches(), Clock(0.0, GPU)
    for _ in range(20):
        next(clock.take(endless, 1))
        stream.work(0.060)
    stream.now += 1
    clock.skip()
    assert clock.waited == pytest.approx(0.1 + 19 * 0.030)


# ---- errors


class OnCpu(Decoder):
    """A GPU's decoder that runs on the CPU and fails for the JPEGs for which `fails` is true."""

    fails: Callable[[np.ndarray], bool] = staticmethod(lambda jpeg: False)

    def __post_init__(self) -> None:
        self.gpu, self.resize_on_cpu, self.device = self.device == GPU, True, CPU
        super().__post_init__()
        self.device = GPU if self.gpu else CPU

    def take(self) -> tuple[Rows, torch.Tensor]:
        if self.gpu and any(map(self.fails, self.waiting[0][1].jpegs)):
            raise RuntimeError(DALI_ERROR.format(BROKEN))
        device, self.device = self.device, CPU
        try:
            return super().take()
        finally:
            self.device = device


def on_an_imitated_gpu(monkeypatch, fails: Callable[[np.ndarray], bool]) -> None:
    """Run the GPU's decoders on the CPU; they fail for the JPEGs for which `fails` is true."""
    monkeypatch.setattr(OnCpu, "fails", staticmethod(fails))
    monkeypatch.setattr(loader, "Decoder", OnCpu)
    monkeypatch.setattr(loader, "mark", lambda device: None)


def train(dataset: Dataset, steps: int) -> list[loader.Batch]:
    parts = (dataset, DataConfig(size=32, max_bad=0.5), DecodeConfig(threads=1), World(0, 1, GPU))
    return list(itertools.islice(loader.TrainLoader(*parts, batch=10), steps))


def test_a_decoder_that_fails_only_on_a_whole_batch_is_reported_with_a_fix(images, monkeypatch):
    once = iter([True])  # the first JPEG of the batch; decoded alone, none fails
    on_an_imitated_gpu(monkeypatch, lambda jpeg: next(once, False))
    with pytest.raises(UserError, match=r"on a batch that begins with .*\.jpg at byte \d+: .*speed.decode"):
        train(images, 1)


def test_a_decoder_that_always_fails_is_reported_as_such(images, monkeypatch, capfd):
    on_an_imitated_gpu(monkeypatch, lambda jpeg: True)
    with pytest.raises(UserError) as raised:
        train(images, 1)
    message = str(raised.value)
    assert re.search(
        r"^the GPU's decoder failed on .*\.tar: .*\.jpg at byte \d+, which the CPU decodes", message
    )
    assert f": {BROKEN}; set speed.decode to whole" in message and "\n" not in message
    assert "does not decode" not in capfd.readouterr().err


def test_the_message_names_the_frame_on_which_the_decoder_fails(images, monkeypatch):
    culprit = frame_bytes(images, 17, 0)
    on_an_imitated_gpu(monkeypatch, lambda jpeg: np.array_equal(jpeg, culprit))
    with pytest.raises(UserError, match=r"failed on .*000002\.tar: 00000017-x\.jpg at byte"):
        train(images, 3)


def test_a_frame_that_the_cpu_cannot_decode_either_is_reported_as_damaged(tmp_path, monkeypatch):
    pictures = [[jpeg(picture(64, 48, seed))] for seed in range(20)]
    pictures[3] = [pictures[3][0][:-300]]
    on_an_imitated_gpu(monkeypatch, lambda jpeg: False)
    with pytest.raises(UserError, match=r"00000003-x\.jpg at byte \d+ does not decode, although"):
        train(open_dataset(write_dataset(tmp_path / "d", pictures, "image"), "train"), 2)


MACHINE_ERRORS = [
    "Can't allocate 1073741824 bytes on device 0.",
    "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory",
    "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access was encountered",
    "CUDA driver API error CUDA_ERROR_NO_DEVICE (100):\nno CUDA-capable device is detected",
    "CUDA driver version is insufficient for CUDA runtime version",
    "nvJPEG error (6): NVJPEG_STATUS_EXECUTION_FAILED",
]


@pytest.mark.parametrize("text", MACHINE_ERRORS)
def test_errors_of_the_machine_are_raised_immediately(images, monkeypatch, text):
    """No picture is decoded again, because the second pipeline would fail like the first."""
    on_an_imitated_gpu(monkeypatch, lambda jpeg: False)
    made = []

    def failing(decoder: Decoder) -> None:
        made.append(decoder)
        raise RuntimeError(DALI_ERROR.format(text))

    monkeypatch.setattr(OnCpu, "take", failing)
    with pytest.raises(RuntimeError, match="Critical error in pipeline"):
        train(images, 1)
    assert len(made) == 1


def test_a_decoding_error_is_not_an_error_of_the_machine():
    for text in ("nvImageCodec failure: '#3'", "Failed to decode sample #0 : cuda/driver.jpg", BROKEN):
        assert not errors.of_machine(RuntimeError(DALI_ERROR.format(text)))


def test_if_the_loader_runs_out_of_memory_the_message_names_settings_to_lower():
    for error in (
        *(RuntimeError(DALI_ERROR.format(text)) for text in MACHINE_ERRORS[:2]),
        RuntimeError(DALI_ERROR.format("std::bad_alloc")),
    ):
        sentence = ending.explained(error, MAE_PRESETS["image-mae-pico"].speed)
        assert sentence.startswith("a step does not fit into memory (") and "\n" not in sentence, sentence
        assert "lower speed.micro_batch" in sentence and "lower speed.threads" in sentence
    assert "Can't allocate 1073741824 bytes on device 0)" in ending.explained(
        RuntimeError(DALI_ERROR.format(MACHINE_ERRORS[0])), MAE_PRESETS["image-mae-pico"].speed
    )
    assert not ending.explained(RuntimeError(DALI_ERROR.format(BROKEN)), MAE_PRESETS["image-mae-pico"].speed)


# ---- the machine


def test_a_gpu_gets_at_most_twelve_decoder_threads(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 52)
    gpu, cpu = machine.sizing(GPU), machine.sizing(CPU)
    assert gpu.threads == 12 and "at most 12 for a GPU" in gpu.reason
    assert cpu.threads == 52 and "at most" not in cpu.reason
    assert machine.sizing(GPU, 20).threads == 20 and machine.sizing(GPU, 20).reason.startswith("20 decoding")


MAPS = """\
55d0-55d1 r--p 00000000 08:01 12   /usr/bin/python3
7f00-7f01 r-xp 00000000 08:01 13   {site}/nvidia/cu13/lib/libnvjpeg.so.13
7f01-7f02 r--p 00001000 08:01 13   {site}/nvidia/cu13/lib/libnvjpeg.so.13
7f02-7f03 r-xp 00000000 08:01 14   {site}/nvidia/nvimgcodec/extensions/libnvjpeg_ext.so.0.9.0
7f03-7f04 r-xp 00000000 08:01 15   /opt/cuda 12/lib64/libnvjpeg.so.12.3
7f04-7f05 rw-p 00000000 00:00 0
7f05-7f06 rw-p 00000000 00:00 0    [heap]
"""


def test_loaded_libraries_are_found(tmp_path):
    own, other = tmp_path / "nvidia/cu13/lib/libnvjpeg.so.13", Path("/opt/cuda 12/lib64/libnvjpeg.so.12.3")
    assert machine.libraries("libnvjpeg.so", MAPS.format(site=tmp_path)) == [own, other]


def test_the_installed_nvjpeg_is_loaded_before_any_other(tmp_path):
    """DALI uses the nvJPEG library that was loaded first, also if LD_LIBRARY_PATH has torchvision's."""
    site = Path(sysconfig.get_paths()["purelib"])
    (older,) = site.glob("torchvision.libs/libnvjpeg*")
    shutil.copy(older, tmp_path / "libnvjpeg.so.13")
    code = (
        "import ctypes, os; from pipelines import decode; import torchvision; "
        "own = ctypes.CDLL('libnvjpeg.so.13', os.RTLD_NOLOAD | os.RTLD_NOW); value = ctypes.c_int(); "
        "print([own.nvjpegGetProperty(n, ctypes.byref(value)) or value.value for n in range(3)])"
    )
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    message = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert message.strip() == str([int(part) for part in version("nvidia-nvjpeg").split(".")[:3]])


def test_a_gpu_run_prints_its_nvjpeg_and_warns_if_none_is_loaded(monkeypatch):
    (line,) = machine.message(GPU, 3)
    assert re.fullmatch(r"loader: 3 decoding threads .*, decoded by /\S+/libnvjpeg\.so\.\d+", line)
    assert "nvjpeg" not in "".join(machine.message(CPU, 3))
    monkeypatch.setattr(machine, "libraries", lambda name: [])
    assert "the CPU decodes every picture" in machine.message(GPU)[1]
