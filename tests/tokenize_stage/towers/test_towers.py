"""Towers give what their own library gives on its own preprocessing, and say in one sentence what cannot be opened."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from mapet.shared.errors import DataError, MapetError, UsageError
from mapet.shared.images.views import Preprocess, center_view, to_array
from mapet.tokenize_stage.towers.opening import open_tower
from mapet.tokenize_stage.towers.tower import Tower, TowerSettings
from PIL import Image

from ...warm import warm_python


def images(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(90, 70), (64, 200), (300, 160)][:count]
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def features(tower: Tower) -> torch.Tensor:
    """Patch features as (B, rows, columns, dim)."""
    pixels = np.stack([to_array(center_view(image, tower.preprocess)) for image in images()])
    found = tower.features(torch.from_numpy(pixels))
    assert found.dtype == torch.float32
    return found.reshape(len(pixels), *tower.grid, tower.dim)


def open_clip_features(name: str, layer: int, norm: bool = False, **options) -> torch.Tensor:
    model, _, preprocess = open_clip.create_model_and_transforms(name, **options)
    with torch.no_grad():
        given = model.eval().visual.forward_intermediates(
            torch.stack([preprocess(image) for image in images()]),
            indices=[layer],
            normalize_intermediates=norm,
            intermediates_only=True,
        )
    return given["image_intermediates"][0].permute(0, 2, 3, 1)


def timm_features(model: torch.nn.Module, layer: int, norm: bool = False) -> torch.Tensor:
    preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        maps = model.eval().forward_intermediates(
            torch.stack([preprocess(image) for image in images()]),
            indices=[layer],
            norm=norm,
            intermediates_only=True,
        )
    return maps[0].permute(0, 2, 3, 1)


def same_weights(tower: Tower, model: torch.nn.Module) -> torch.nn.Module:
    """A model of timm's own with the tower's random weights, which only the tower's seed can make."""
    model.load_state_dict(tower._module.state_dict())
    return model


# Features


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("norm", [False, True])
def test_features_of_an_open_clip_vit_are_open_clips(tower: str, layer: int, norm: bool):
    opened = open_tower(TowerSettings(tower, layer=layer, final_norm=norm))
    assert (opened.grid, opened.dim) == ((8, 8), 32)
    assert torch.equal(features(opened), open_clip_features(tower, layer, norm))


@pytest.mark.parametrize(("layer", "grid", "dim"), [(4, (2, 2), 512), (3, (4, 4), 256), (0, (16, 16), 16)])
def test_features_of_an_open_clip_resnet_are_open_clips(resnet_tower: str, layer: int, grid: tuple, dim: int):
    opened = open_tower(TowerSettings(resnet_tower, layer=layer))
    assert (opened.grid, opened.dim) == (grid, dim)
    assert torch.equal(features(opened), open_clip_features(resnet_tower, layer))


def test_features_of_a_timm_vit_are_timms():
    opened = open_tower(TowerSettings("timm:test_vit", "none", layer=3))
    assert (opened.grid, opened.dim) == ((10, 10), 64)
    model = same_weights(opened, timm.create_model("test_vit"))
    assert torch.equal(features(opened), timm_features(model, 3))


def test_class_and_register_tokens_of_a_dino_are_dropped():
    """What DINO calls patch tokens: everything behind the class token and four registers, in raster order."""
    opened = open_tower(TowerSettings("timm:vit_small_patch14_reg4_dinov2", "none", image_size=70, final_norm=True))
    assert (opened.grid, opened.dim) == ((5, 5), 384)
    model = same_weights(opened, timm.create_model("vit_small_patch14_reg4_dinov2", img_size=70))
    assert model.num_prefix_tokens == 5
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (opened.preprocess.mean, opened.preprocess.std))
    pixels = torch.randint(0, 256, (2, 3, 70, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.eval().forward_features((pixels.float() / 255 - mean) / std)
    assert torch.allclose(opened.features(pixels), tokens[:, 5:], atol=1e-5)


def test_features_of_a_timm_convnet_are_timms():
    opened = open_tower(TowerSettings("timm:test_efficientnet", "none", layer=3))
    assert opened.grid == (10, 10)
    model = same_weights(opened, timm.create_model("test_efficientnet"))
    assert torch.equal(features(opened), timm_features(model, 3))


def test_features_of_trained_weights_from_a_file_are_timms(effnet_file: Path):
    opened = open_tower(TowerSettings("timm:tf_efficientnet_lite0", str(effnet_file), layer=3))
    assert (opened.grid, opened.dim) == ((14, 14), 112)
    model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(effnet_file))
    assert torch.equal(features(opened), timm_features(model, 3))


def test_an_open_clip_tower_around_a_timm_model_gives_open_clips_features():
    folder = Path(__file__).parents[4] / "shared/clip/lit-effnet-lite0"
    if not folder.is_dir():
        pytest.skip("the shared research tower lit-effnet-lite0 is not here")
    opened = open_tower(TowerSettings(f"local-dir:{folder}", layer=3))
    assert (opened.grid, opened.dim) == ((14, 14), 112)
    assert torch.equal(features(opened), open_clip_features(f"local-dir:{folder}", 3))


def all_towers(tower: str, resnet_tower: str) -> list[TowerSettings]:
    return [
        TowerSettings(tower),
        TowerSettings(resnet_tower),
        TowerSettings("timm:test_vit", "none"),
        TowerSettings("timm:test_efficientnet", "none"),
    ]


@pytest.mark.parametrize(("which", "last"), [(0, 1), (1, 4), (2, 5), (3, 4)])
def test_layer_minus_one_is_the_last_index(tower: str, resnet_tower: str, which: int, last: int):
    settings = all_towers(tower, resnet_tower)[which]
    opened = open_tower(settings)
    assert torch.equal(features(opened), features(open_tower(replace(settings, layer=last))))
    with pytest.raises(UsageError, match="--layer"):
        open_tower(replace(settings, layer=last + 1))


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("layer", [99, -99])
def test_a_layer_out_of_range_is_a_usage_error_that_names_it(tower: str, resnet_tower: str, which: int, layer: int):
    settings = replace(all_towers(tower, resnet_tower)[which], layer=layer)
    expect_sentence(settings, UsageError, rf"--layer {layer} does not fit tower {settings.tower[:20]}")


def test_final_norm_changes_vit_features_to_timms_normalised_ones():
    settings = TowerSettings("timm:test_vit", "none", layer=-1)
    plain, normed = open_tower(settings), open_tower(replace(settings, final_norm=True))
    assert not torch.allclose(features(plain), features(normed))
    model = same_weights(normed, timm.create_model("test_vit"))
    assert torch.equal(features(normed), timm_features(model, -1, norm=True))


def test_final_norm_of_open_clip_is_the_layer_norm_of_the_plain_features(tower: str):
    plain, normed = (open_tower(TowerSettings(tower, final_norm=norm)) for norm in (False, True))
    assert not torch.allclose(features(plain), features(normed))
    norm = open_clip.create_model(tower).visual.ln_post
    with torch.no_grad():
        assert torch.allclose(norm(features(plain)), features(normed), atol=1e-5)


def test_an_images_features_do_not_depend_on_its_company(tower: str):
    opened = open_tower(TowerSettings(tower))
    pixels = torch.from_numpy(np.stack([to_array(center_view(image, opened.preprocess)) for image in images()]))
    blank = torch.zeros_like(pixels)
    blank[1] = pixels[1]
    assert torch.equal(opened.features(pixels)[1], opened.features(blank)[1])


def test_bfloat16_gives_close_but_other_features(tower: str):
    full, half = (features(open_tower(TowerSettings(tower, precision=name))) for name in ("float32", "bfloat16"))
    assert not torch.equal(full, half)
    assert torch.nn.functional.cosine_similarity(full, half, dim=-1).min() > 0.99


# Identity


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_efficientnet", "ViT-S-32-alt"])
def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone(name: str):
    torch.manual_seed(1)
    first = open_tower(TowerSettings(name, "none"))
    drawn = torch.rand(3)
    torch.manual_seed(2)
    second = open_tower(TowerSettings(name, "none"))
    assert first.identity == second.identity
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)


def test_identity_changes_with_the_weights(tower: str, tower_copy: Path):
    from safetensors.torch import load_file, save_file

    before = open_tower(TowerSettings(tower)).identity
    assert open_tower(TowerSettings(f"local-dir:{tower_copy}")).identity == before
    weights = load_file(tower_copy / "open_clip_model.safetensors")
    weights["visual.conv1.weight"].view(-1)[0] += 1e-4
    save_file(weights, tower_copy / "open_clip_model.safetensors")
    after = open_tower(TowerSettings(f"local-dir:{tower_copy}")).identity
    assert after["weights_sha256"] != before["weights_sha256"]
    assert after["architecture"] == before["architecture"]


def test_identity_changes_with_the_activation(tower: str, tower_copy: Path):
    config = json.loads((tower_copy / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (tower_copy / "open_clip_config.json").write_text(json.dumps(config))
    plain, quick = (open_tower(TowerSettings(name)) for name in (tower, f"local-dir:{tower_copy}"))
    assert not torch.allclose(features(plain), features(quick))
    assert quick.identity["architecture"] != plain.identity["architecture"]


def test_description_is_plain_json_with_everything_that_settings_say(tower: str):
    opened = open_tower(TowerSettings(tower, layer=0, final_norm=True))
    about = json.loads(json.dumps(opened.description()))
    assert about == opened.description()
    assert about["library"] == "open_clip"
    assert (about["layer"], about["final_norm"], about["grid"], about["dim"]) == (0, True, [8, 8], 32)
    assert Preprocess.from_json(about["preprocess"]) == opened.preprocess


# Image size


@pytest.mark.parametrize(("name", "grid"), [("timm:test_vit", (6, 6)), ("timm:test_efficientnet", (3, 3))])
def test_timm_towers_take_another_image_size(name: str, grid: tuple):
    opened = open_tower(TowerSettings(name, "none", image_size=96))
    assert opened.preprocess.image_size == 96
    assert opened.grid == grid
    assert features(opened).shape[1:3] == grid


def test_an_open_clip_vit_resamples_its_positions_as_open_clip_does(tower: str):
    opened = open_tower(TowerSettings(tower, image_size=96))
    assert (opened.preprocess.image_size, opened.grid) == (96, (12, 12))
    assert torch.equal(features(opened), open_clip_features(tower, -1, force_image_size=96))


def test_resampled_positions_do_not_change_the_weights_digest(tower: str):
    digests = {open_tower(TowerSettings(tower, image_size=size)).identity["weights_sha256"] for size in (64, 96)}
    assert len(digests) == 1


# What cannot be opened


def expect_sentence(settings: TowerSettings, kind: type[MapetError], pattern: str) -> None:
    with pytest.raises(kind, match=pattern) as caught:
        open_tower(settings)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    assert len(text) < 1500


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        (TowerSettings("ViT-B-23"), r"--tower 'ViT-B-23' is unknown.*ViT-B-32"),
        (TowerSettings("timm:test_vitt", "none"), r"--tower timm:.*test_vit"),
        (TowerSettings("RN50", "lion2b"), r"--pretrained lion2b.*its tags are .*openai"),
        (TowerSettings("timm:test_vit", "r999"), r"--pretrained r999.*r160_in1k"),
        (TowerSettings("ftp:somewhere"), r"--tower ftp:somewhere is unknown"),
        (
            TowerSettings("timm:test_vit", "none", precision="float8"),
            r"--precision float8.*float32, bfloat16",
        ),
    ],
)
def test_an_unknown_name_is_a_usage_error_that_helps(settings: TowerSettings, pattern: str):
    expect_sentence(settings, UsageError, pattern)


def test_a_local_folder_without_its_config_is_a_data_error(tower_copy: Path):
    (tower_copy / "open_clip_config.json").unlink()
    expect_sentence(TowerSettings(f"local-dir:{tower_copy}"), DataError, r"has no open_clip_config\.json")


def test_a_local_folder_that_is_missing_is_a_data_error(tmp_path: Path):
    expect_sentence(TowerSettings(f"local-dir:{tmp_path}/nowhere"), DataError, "nowhere")


def test_a_local_folder_without_weights_is_a_data_error_unless_they_are_to_be_random(tower_copy: Path):
    (tower_copy / "open_clip_model.safetensors").unlink()
    name = f"local-dir:{tower_copy}"
    expect_sentence(TowerSettings(name), DataError, "holds no weights")
    assert open_tower(TowerSettings(name, "none")).grid == (8, 8)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model_cfg": {}}'])
def test_a_local_folder_with_a_broken_config_is_a_data_error(tower_copy: Path, text: str):
    (tower_copy / "open_clip_config.json").write_text(text)
    expect_sentence(TowerSettings(f"local-dir:{tower_copy}"), DataError, "tower copy")


def test_cut_weights_are_a_data_error(tower_copy: Path):
    path = tower_copy / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    expect_sentence(TowerSettings(f"local-dir:{tower_copy}"), DataError, "could not be fetched or loaded")


def test_weights_of_another_model_are_a_data_error(tower: str, effnet_file: Path):
    weights = f"{tower.removeprefix('local-dir:')}/open_clip_model.safetensors"
    expect_sentence(TowerSettings("timm:test_vit", weights), DataError, "could not be fetched or loaded")


def test_an_unreachable_hub_is_a_data_error():
    expect_sentence(TowerSettings("hf-hub:nobody/nothing"), DataError, "hf-hub:nobody/nothing.*could not be fetched")
    expect_sentence(TowerSettings("timm:test_vit"), DataError, "timm:test_vit.*could not be fetched")


def test_the_same_weights_with_other_heads_are_another_tower(tower: str, tmp_path: Path):
    folder = tmp_path / "heads"
    shutil.copytree(tower.removeprefix("local-dir:"), folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["head_width"] = 8
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    one, other = (open_tower(TowerSettings(name)).identity for name in (tower, f"local-dir:{folder}"))
    assert one["weights_sha256"] == other["weights_sha256"]
    assert one["architecture"] != other["architecture"]


# What libraries log

_CONFIGURES = "import logging; logging.basicConfig(level=logging.WARNING)\n"
_OPENS_A_TOWER = """
import logging, sys, threading, warnings
from mapet.tokenize_stage.towers.opening import open_tower
from mapet.tokenize_stage.towers.tower import TowerSettings
from mapet.tokenize_stage.towers import loading
before = [*logging.root.handlers]
with loading.libraries_silenced():
    assert logging.root.manager.disable == 0
    logging.warning("open_clip writes to the root logger")
    logging.getLogger("timm.models").error("timm to its own")
    logging.getLogger("huggingface_hub.file_download").error("the hub to one with a handler")
    warnings.warn("and torch warns")
    logging.getLogger("mapet.towers").warning("ours is heard")
    thread = threading.Thread(target=logging.getLogger("elsewhere").warning, args=("another thread is heard",))
    thread.start()
    thread.join()
open_tower(TowerSettings("ViT-S-32-alt", "none"))
assert logging.root.handlers == before
assert not [filter for handler in before for filter in handler.filters]
logging.getLogger("timm.models").error("afterwards timm is heard")
"""


@pytest.mark.parametrize("configured", [False, True])
def test_libraries_are_silent_while_a_tower_is_opened_and_nothing_else_is(configured: bool):
    """Also while they are imported, hence once in a process that has not imported them."""
    code = _CONFIGURES + _OPENS_A_TOWER if configured else _OPENS_A_TOWER
    python = warm_python() if configured else [sys.executable]
    result = subprocess.run([*python, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = [line.rpartition(":")[2] for line in result.stderr.splitlines()]
    assert said == ["ours is heard", "another thread is heard", "afterwards timm is heard"]
    assert result.stdout == ""
