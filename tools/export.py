"""Classifiers as programs without this code: ONNX files and torch.export's pt2 files.

The batch dimension is dynamic. A file is read back and compared with the model before it gets its name.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models.hiera import Hiera
from pipelines.errors import UserError
from pipelines.files import atomic_write

Run = Callable[[Tensor], Tensor]
LIMIT = 1e-4  # largest allowed difference of a logit
BATCHES = (1, 3)  # sizes that are compared; the program is traced with another
OPSETS = range(18, 24)
PROTOBUF_LIMIT = 2_000_000_000  # bytes of an ONNX file


def export(
    model: Hiera, target: Path, to: Literal["onnx", "pt2"], opset: int, facts: Mapping[str, object]
) -> float:
    """Write the model to `target` and return the largest difference of its logits from the model's.

    facts: metadata; every value becomes JSON in ONNX's metadata_props, and all of them in a pt2 file's
    `preprocessing.json`.
    Raises UserError, and leaves no file, if the logits differ by more than LIMIT, for an opset that torch
    does not write, and for a model that is too large for an ONNX file.
    """
    if to == "onnx" and opset not in OPSETS:
        raise UserError(f"opset is {opset}; choose one from {OPSETS[0]} to {OPSETS[-1]}")
    if to == "onnx" and sum(4 * value.numel() for value in model.parameters()) > PROTOBUF_LIMIT:
        raise UserError("the model has more than 2 GB, the limit of an ONNX file; choose --to pt2")
    shape = (model.config.in_chans, *model.input_size)
    batch = {0: torch.export.Dim("batch")}
    model.eval()
    with atomic_write(target) as temporary, torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, *shape),), dynamic_shapes=(batch,))
        run = (_write_onnx if to == "onnx" else _write_pt2)(program, temporary, facts, opset)
        difference = max(_difference(model, run, torch.randn(size, *shape)) for size in BATCHES)
        if not difference <= LIMIT:
            raise UserError(
                f"the logits of {target} would differ by {difference:.1e} from the model's, which is more "
                f"than {LIMIT}; choose another format or opset"
            )
    return difference


def _write_onnx(program: torch.export.ExportedProgram, path: Path, facts: Mapping, opset: int) -> Run:
    """Write an ONNX file; return a function that computes logits with onnxruntime."""
    import onnxruntime

    names = {"input_names": ["input"], "output_names": ["logits"]}
    written = torch.onnx.export(program, opset_version=opset, dynamo=True, verbose=False, **names)
    assert written is not None
    written.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    written.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def _write_pt2(program: torch.export.ExportedProgram, path: Path, facts: Mapping, opset: int) -> Run:
    """Write a pt2 file; return a function that computes logits with it."""
    with path.open("wb") as file:  # torch warns about paths with another suffix
        torch.export.save(program, file, extra_files={"preprocessing.json": json.dumps(facts)})
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _difference(model: nn.Module, run: Run, x: Tensor) -> float:
    """Largest difference of a logit."""
    return (run(x) - model(x)).abs().max().item()
