"""The exported ViT as an ONNX file, compared with PyTorch before it is kept."""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch

from ...shared.errors import DataError, UsageError
from .weights import Weights

ONNX = "model.onnx"
TOLERANCE = 1e-4
"""The largest difference between ONNX Runtime and PyTorch, relative to the largest output."""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Raises UsageError unless the packages of the `onnx` extra are installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'--onnx needs {", ".join(missing)}: pip install "mapet[onnx]", or export without --onnx.')


def write_onnx(weights: Weights, file: Path) -> float:
    """Writes `weights.vit()` as ONNX, runs the file with ONNX Runtime, and compares it with PyTorch.

    The input `pixels` is float32 (B, 3, S, S), normalised, for any B. The output is float32: `logits` (B, classes) of a
    fine-tuned model, `features` (B, dim), the pooled features, of others.

    Returns:
        The largest difference from PyTorch, relative to the largest output.

    Raises:
        DataError if that difference is over `TOLERANCE`; UsageError without the packages of the `onnx` extra.
    """
    require_onnx()
    import onnxruntime

    model, side = weights.vit(), weights.shape.image_size
    output = "logits" if weights.kind == "classifier" else "features"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecated calls
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, side, side),),
            None,
            input_names=["pixels"],
            output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    program.save(file)
    runtime = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in (1, 3):  # neither is the number of images that the model was traced with
        pixels = torch.randn((count, 3, side, side), generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = model(pixels).numpy()
        (computed,) = runtime.run(None, {"pixels": pixels.numpy()})
        difference = float(np.abs(computed - expected).max() / np.abs(expected).max())
        if not difference <= TOLERANCE:  # nan is a failure as well
            raise DataError(
                f"{file.name} gives other outputs in ONNX Runtime than in PyTorch (relative difference "
                f"{difference:.1e}); export without --onnx, and report this with the versions of `mapet doctor`."
            )
        largest = max(largest, difference)
    return largest
