"""The schedule of the linear head."""

import pytest
from mapet.train_stage.segmentation.linear_head import lr_share


def test_the_learning_rate_warms_up_and_falls_to_zero():
    shares = [lr_share(step, 400) for step in range(400)]
    assert shares[:15] == pytest.approx([(step + 1) / 15 for step in range(15)])
    assert shares[15] == 1
    assert shares[15 + 385 // 2] == pytest.approx(0.5, abs=0.01)
    assert sorted(shares[15:], reverse=True) == shares[15:]
    assert shares[-1] < 1e-4
