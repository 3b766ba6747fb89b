"""Training on GPUs, as far as it can be tested without one."""

import gc
import os
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

import models
from models.layers import NormalizedInput
from pipelines.dataset import open_dataset
from pipelines.errors import UserError
from tests.test_project import call_make
from tests.train.test_resume import CPU, changed, fit, quick, stopping_at, task_of
from tests.train_helpers import small
from train import build, checkpoint, distributed, finetune, loop, meters, probe
from train.distributed import World
from train.presets import FINETUNE_PRESETS
from train.rundir import Run
from train.task import Task

GPU = torch.device("cuda", 0)
ALONE = World(0, 1, CPU)
PICO = FINETUNE_PRESETS["image-ft-pico"]


# ---- memory


def test_a_checkpoint_is_loaded_to_the_cpu_and_then_freed(images, tmp_path, monkeypatch):
    """Only the optimizer keeps tensors of the checkpoint, on the CPU, as its state."""
    settings = quick(images, tmp_path, "run")
    assert loop.fit(settings, stopping_at(15, 5)) == 15
    loaded, load = [], checkpoint.load

    def watched(*given) -> dict:
        state = load(*given)
        tensors = [*state["model"].values(), *state.get("ema", {}).values(), state["meters"]]
        loaded.extend(weakref.ref(tensor) for tensor in tensors)
        return state

    def make(*given) -> Task:
        task = finetune.make_task(*given)

        def loss(*batch) -> torch.Tensor:
            gc.collect()
            assert loaded and not any(reference() is not None for reference in loaded)
            return task.loss(*batch)

        return replace(task, loss=loss)

    monkeypatch.setattr(checkpoint, "load", watched)
    fit(settings, make)
    newest = checkpoint.choose(tmp_path / "run/checkpoints")
    assert newest is not None
    state = load(newest, GPU)
    assert all(value.device == CPU for value in state["model"].values())
    seen = meters.Meters(torch.device("meta"))
    seen.restore(state["meters"], 0, 1)
    assert seen.values.device.type == "meta"


def test_gpu_memory_includes_that_of_dali_and_nccl(monkeypatch):
    """It is the memory in use on the device, and its maximum over the rows so far."""
    free = iter((6, 3, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (next(free) * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    clock = meters.Clock(0.0)
    rows = [clock.row(step, 4, World(0, 1, GPU), 1.0) for step in range(3)]
    assert [row["max_mem_gb"] for row in rows] == [2.0, 5.0, 5.0]


# ---- copies


class Blocking(TorchFunctionMode):
    """Counts copies between host and device for which the host waits."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = args[1] if len(args) > 1 else kwargs.get("device")
        if function is torch.Tensor.to and not isinstance(target, torch.dtype):
            self.count += not kwargs.get("non_blocking")
        return function(*args, **kwargs)


def test_a_checkpoint_is_copied_to_the_host_with_one_wait():
    state = {"model": {f"w{i}": torch.ones(3) * i for i in range(5)}, "row": None, "list": [torch.zeros(2)]}
    with Blocking() as seen:
        copied = checkpoint.to_host(state)
    state["model"]["w3"].zero_()
    assert seen.count == 0 and copied["model"]["w3"].tolist() == [3.0, 3.0, 3.0] and copied["row"] is None


@pytest.mark.parametrize("kind", ["mae", "ft", "probe"])
def test_evaluation_never_waits_for_a_copy_to_the_device(images, tmp_path, kind: str):
    config = small("image-mae-pico" if kind == "mae" else "image-ft-pico", images, tmp_path, "run")
    catalogue = open_dataset(images, "val")
    task = task_of(config)(config, Run(ALONE))
    model = NormalizedInput(task.model, 1)
    with Blocking() as seen:
        if kind == "probe":
            probe.features(config, ALONE, model, catalogue)
        else:
            task.evaluate(model, catalogue, lambda: None)
    assert seen.count == 0


# ---- precision


@pytest.mark.parametrize("name", ["hiera_pico_96", "mae_hiera_pico_96", "hiera_pico_16x64"])
def test_under_autocast_the_residual_stream_is_fp32_in_every_stage(name: str):
    model = models.create(name).train()
    x = torch.randn(2, 3, *model.input_size)
    keep = torch.arange(3).expand(2, -1) if name.startswith("mae") else None
    with torch.autocast("cpu", torch.bfloat16):
        stages = model.encode(x, keep)
    assert [stage.dtype for stage in stages] == [torch.float32] * 4


# ---- the machine


def test_the_message_for_no_gpu_has_the_reason(monkeypatch):
    """With an old driver, PyTorch finds 0 GPUs, and training would silently use the CPU."""
    if not torch.cuda.is_available():
        why = "Found no NVIDIA driver on your system"
        assert distributed.resolve_device("auto", 1) == "cpu"
        assert distributed.device_text(ALONE).startswith(f"the CPU ({why}), ")
        with pytest.raises(UserError, match=rf"this machine has 0 \({why}; CUDA 13 requires driver 580"):
            distributed.resolve_device("cuda", 1)

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UserError, match=r"too old \(found version 12020\); CUDA 13 requires driver 580"):
        distributed.resolve_device("cuda", 1)


@pytest.mark.parametrize(
    ("visible", "gpus", "local", "found"), [("3", 1, 3, 0), ("0,1,2,3", 4, 3, 3), (None, 4, 3, 3)]
)
def test_a_launcher_may_make_one_gpu_visible_per_process(monkeypatch, visible, gpus, local, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert distributed.resolve_device("cuda", 4) == "cuda" and distributed.index(local) == found


def test_processes_do_not_share_a_gpu(monkeypatch):
    """Two processes on a machine with one GPU are refused, also under torchrun."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="the run needs 2 GPUs, and this machine has 1"):
        distributed.resolve_device("cuda", 2)


# ---- compilation, kernels


def test_after_a_compilation_error_training_runs_uncompiled(capsys):
    from torch._inductor.compile_worker.subproc_pool import SubprocException
    from triton.runtime.errors import PTXASError

    config = changed(PICO, speed={"compile": "yes"})
    for error in (
        PTXASError("ptxas: unknown sm_999"),
        SubprocException("worker", "died"),
        OSError("no compiler"),
    ):
        model = NormalizedInput(torch.nn.Linear(1, 1), frames=1)

        def trial(error: Exception = error) -> torch.Tensor:
            raise error

        build.compile_model(model, config.speed, CPU, trial)
        assert capsys.readouterr().out.startswith("torch.compile: FAILED")
        assert model._compiled_call_impl is None


def test_processes_share_the_cores_for_compiling(monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor, "compile_threads", 7)
    monkeypatch.setattr(build, "usable_cores", lambda: 96)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    build.share_compile_workers()
    assert inductor.compile_threads == 7
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    build.share_compile_workers()
    assert inductor.compile_threads == 12


def test_flash_attention_is_the_default_on_a_gpu(capsys):
    cuda = torch.backends.cuda
    build.choose_kernels(PICO.speed, GPU)
    assert "flash" in capsys.readouterr().out
    assert cuda.flash_sdp_enabled() and not cuda.cudnn_sdp_enabled()
    build.choose_kernels(replace(PICO.speed, attention="cudnn"), GPU)
    assert "cudnn, as set" in capsys.readouterr().out
    assert cuda.cudnn_sdp_enabled() and not cuda.flash_sdp_enabled()
    order = torch._C._get_sdp_priority_order()  # PyTorch takes the first that is enabled, and math always is
    assert order.index(SDPBackend.CUDNN_ATTENTION.value) < order.index(SDPBackend.MATH.value)
    build.choose_kernels(PICO.speed, CPU)
    assert capsys.readouterr().out == "" and cuda.flash_sdp_enabled()
    with pytest.raises(UserError, match=r"speed\.attention is 'fast'; it can be auto, flash"):
        changed(PICO, speed={"attention": "fast"})


def test_training_runs_with_deterministic_kernels(images, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    settings = changed(quick(images, tmp_path, "run"), speed={"deterministic": True, "attention": "math"})
    try:
        fit(settings)
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert "deterministic kernels: on" in capsys.readouterr().out
    finally:
        build.choose_kernels(PICO.speed, CPU)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert not torch.are_deterministic_algorithms_enabled()


# ---- torchrun


def test_torchrun_gives_its_processes_time_to_save():
    """torchrun's default of 30 seconds is too short for a large model."""
    assert "--shutdown-timeout 240" in call_make("-n", "train-mae", "NODES=2", "GPUS=8")
    timeouts = []

    def run(arguments) -> None:
        timeouts.append(arguments.shutdown_timeout)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("sys.argv", ["train.mae", "image-mae-pico"])
        patch.setattr("torch.distributed.run.run", run)
        distributed.launch(2, 0)
    assert timeouts == [240]
