"""ONNX files of exports: ONNX Runtime gives the outputs that PyTorch gives."""

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from mapet import export
from mapet.shared.errors import UsageError


def test_onnx_runtime_gives_the_features_of_timm(run: Path, tmp_path: Path):
    folder = export(run, tmp_path / "vit", onnx=True)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == ["pixels"]
    assert [node.name for node in session.get_outputs()] == ["features"]
    for count in (1, 5):
        pixels = torch.randn((count, 3, 64, 64), generator=torch.Generator().manual_seed(7))
        with torch.inference_mode():
            expected = model(pixels).numpy()
        (computed,) = session.run(None, {"pixels": pixels.numpy()})
        np.testing.assert_allclose(computed, expected, atol=1e-5 * np.abs(expected).max())


def test_onnx_without_its_packages_is_refused_before_anything_is_written(run: Path, tmp_path: Path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else found(name, *rest)
    )
    with pytest.raises(UsageError, match=r"--onnx needs onnxruntime: pip install \"mapet\[onnx\]\""):
        export(run, tmp_path / "vit", onnx=True)
    assert not (tmp_path / "vit").exists()


def test_an_onnx_file_that_differs_is_not_kept(run: Path, tmp_path: Path, monkeypatch):
    from mapet.shared.errors import DataError
    from mapet.train_stage.weights import onnx

    monkeypatch.setattr(onnx, "TOLERANCE", 0.0)
    with pytest.raises(DataError, match="other outputs in ONNX Runtime"):
        export(run, tmp_path / "vit", onnx=True)
    assert not (tmp_path / "vit").exists()
