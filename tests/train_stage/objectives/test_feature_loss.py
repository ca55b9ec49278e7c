"""The regression of features equals its definition written out, in value and gradients."""

import numpy as np
import pytest
import torch
from mapet.train_stage.objectives.feature_loss import feature_loss
from torch import nn


def test_loss_similarities_and_gradients_are_those_of_the_definition():
    torch.manual_seed(0)
    rows, head = torch.randn(2, 3, 5, requires_grad=True), nn.Linear(5, 7)
    targets = 4 * torch.randn(2, 3, 7) + 1
    loss, cosine = feature_loss(rows, head, targets)
    loss.backward()
    weight, bias = (tensor.detach().double().numpy() for tensor in (head.weight, head.bias))
    weight_gradient, bias_gradient, expected = np.zeros_like(weight), np.zeros_like(bias), []
    for image in range(2):
        for row in range(3):
            x, truth = rows[image, row].detach().double().numpy(), targets[image, row].double().numpy()
            p, t = weight @ x + bias, truth / np.linalg.norm(truth)
            length = np.linalg.norm(p)
            expected.append(p @ t / length)
            # d(1 - cos)/dp = -(t - cos * p / |p|) / |p|, and the mean is over six rows.
            gradient = -(t - expected[-1] * p / length) / length / 6
            weight_gradient += np.outer(gradient, x)
            bias_gradient += gradient
            assert rows.grad[image, row].numpy() == pytest.approx(weight.T @ gradient, abs=1e-6)
    assert cosine.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert loss.item() == pytest.approx(1 - np.mean(expected), abs=1e-6)
    assert head.weight.grad.numpy() == pytest.approx(weight_gradient, abs=1e-6)
    assert head.bias.grad.numpy() == pytest.approx(bias_gradient, abs=1e-6)
    assert not cosine.requires_grad


def test_a_perfect_prediction_of_any_length_has_no_loss():
    head = nn.Linear(4, 4)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    rows = torch.randn(3, 4)
    for factor, expected in ((7.0, 0.0), (-0.1, 2.0)):
        assert feature_loss(rows, head, factor * rows)[0].item() == pytest.approx(expected, abs=1e-6)


def test_under_autocast_only_the_head_is_in_bfloat16():
    torch.manual_seed(0)
    rows, head, targets = torch.randn(16, 8), nn.Linear(8, 20), torch.randn(16, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss, cosine = feature_loss(rows, head, targets)
    reference = torch.nn.functional.cosine_similarity(
        nn.functional.linear(rows.bfloat16(), head.weight.bfloat16(), head.bias.bfloat16()).float(), targets, dim=-1
    )
    assert loss.dtype == cosine.dtype == torch.float32
    assert torch.allclose(cosine, reference, atol=1e-6)
