"""Layer-wise learning-rate decay is timm's, parameter by parameter."""

import pytest
import torch
from mapet.train_stage.classification.layer_decay import lr_scale, without_weight_decay
from mapet.train_stage.model.classifier import Classifier
from mapet.train_stage.model.shape import Shape
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay


@pytest.mark.parametrize(("depth", "layer_decay"), [(2, 0.65), (12, 0.65), (5, 0.75), (3, 1.0)])
def test_groups_are_timms_parameter_by_parameter(depth: int, layer_decay: float):
    timm_model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=depth, num_heads=2, num_classes=3, init_values=0.1,
        global_pool="avg", fc_norm=True,
    )  # fmt: skip
    names = {id(parameter): name for name, parameter in timm_model.named_parameters()}
    groups = param_groups_layer_decay(
        timm_model, 0.05, no_weight_decay_list=timm_model.no_weight_decay(), layer_decay=layer_decay
    )
    expected = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    model = Classifier(Shape(8, depth, 2, 8, 16, 0), 3)
    ours = {
        name: (lr_scale(name, depth, layer_decay), 0.0 if without_weight_decay(name, parameter) else 0.05)
        for name, parameter in model.named_parameters()
    }
    joined = {name.replace(".attn.q.", ".attn.qkv."): value for name, value in ours.items() if ".attn.kv." not in name}
    assert joined == expected
    assert all(ours[name.replace(".q.", ".kv.")] == value for name, value in ours.items() if ".attn.q." in name)


def test_a_frozen_model_keeps_its_first_blocks_and_computes_as_timms():
    model = Classifier(Shape(8, 3, 2, 8, 16, 0), 3)
    model.freeze(2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"blocks", "fc_norm", "head"}
    assert all(name.startswith("blocks.2") for name in trained if name.startswith("blocks"))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
