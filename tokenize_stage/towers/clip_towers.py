"""Towers from open_clip: built-in names, local folders and the Hugging Face hub."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...shared.errors import DataError, UsageError
from ...shared.images.views import Preprocess
from ...shared.runtime.console import say
from .loading import RANDOM, library_errors_explained, seeded_if, unknown_name
from .tower import OpenedModel, TowerSettings


def open_clip_tower(settings: TowerSettings) -> OpenedModel:
    """Opens the image tower of an open_clip model. Raises UsageError and DataError as `opening.open_tower` does."""
    import open_clip

    name, random = settings.tower, settings.pretrained == RANDOM
    schema = name.partition(":")[0] if ":" in name else None
    tag = None if random or schema else settings.pretrained or "openai"
    if schema == "local-dir":
        _check_local_dir(Path(name.partition(":")[2]), random)
    elif schema is None:
        _check_builtin(name, tag)
    elif schema != "hf-hub":
        raise UsageError(
            f"--tower {name} is unknown; use an open_clip name, local-dir:PATH, hf-hub:ID, timm:NAME or pixels."
        )
    if tag and Path(tag).is_file() and (warning := quick_gelu_warning(name, Path(tag))):
        say(warning)
    with library_errors_explained(settings), seeded_if(random):
        model = open_clip.create_model(
            name,
            pretrained=tag,
            load_weights=not random,
            require_pretrained=not random,
            # OpenAI's weights were trained with QuickGELU; with GELU they give silently different features.
            force_quick_gelu=bool(tag and _tag_config(name, tag).get("quick_gelu")),
            force_image_size=settings.image_size,
            device=torch.get_default_device(),  # of the caller: a model without weights is opened on "meta"
        )
        fields = open_clip.get_model_preprocess_cfg(model)
    visual = model.visual

    def intermediates(pixels: Tensor, layer: int, final_norm: bool) -> Tensor:
        # Without `intermediates_only` open_clip's ModifiedResNet fails when features are not pooled.
        outputs = visual.forward_intermediates(
            pixels, indices=[layer], normalize_intermediates=final_norm, intermediates_only=True, stop_early=True
        )
        maps: Tensor = outputs["image_intermediates"][0]
        return maps

    return OpenedModel(visual, intermediates, "open_clip", _clip_preprocess(name, fields))


def quick_gelu_warning(name: str, file: Path) -> str | None:
    """What to say of a weights file that is about to be opened with GELU although it may need QuickGELU, or None.

    The tower's name decides, so that a codebook of an earlier version keeps its features.
    """
    import open_clip

    quick = f"{name.replace('/', '-')}-quickgelu"
    if name.endswith("-quickgelu") or quick not in open_clip.list_models():
        return None
    if "openai" in str(file).lower() or _is_torchscript(file):
        return (
            f"Warning: {file} seems to hold OpenAI's weights, which were trained with QuickGELU, and --tower {name} "
            f"computes GELU: the features will differ from OpenAI's. Use --tower {quick}, or --pretrained openai."
        )
    return (
        f"{file} does not tell its activation; --tower {name} computes GELU. Weights of OpenAI, MetaCLIP and DFN need "
        f"--tower {quick}."
    )


def _is_torchscript(file: Path) -> bool:
    """Whether a file is a TorchScript archive; of the CLIP models that open_clip knows, OpenAI's alone come as one."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any("/code/" in member for member in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _tag_config(name: str, tag: str) -> dict[str, Any]:
    import open_clip

    return open_clip.get_pretrained_cfg(name.replace("/", "-"), tag) or {}


def _check_local_dir(path: Path, random: bool) -> None:
    if not (path / "open_clip_config.json").is_file():
        raise DataError(f"{path} has no open_clip_config.json; local-dir: takes a folder in open_clip's layout.")
    if not random and not any(file.suffix in (".safetensors", ".bin", ".pth") for file in path.iterdir()):
        raise DataError(f"{path} holds no weights (*.safetensors, *.bin, *.pth); put them there, or --pretrained none.")


def _check_builtin(name: str, tag: str | None) -> None:
    import open_clip

    cleaned = name.replace("/", "-")
    if cleaned not in open_clip.list_models():
        raise unknown_name("--tower", name, open_clip.list_models())
    if tag is None or Path(tag).is_file():
        return
    tags = open_clip.list_pretrained_tags_by_model(cleaned)
    if tag not in tags:
        raise UsageError(
            f"--pretrained {tag} is neither a file nor a tag of {name}; its tags are {', '.join(tags) or 'none'}."
        )


def _clip_preprocess(name: str, fields: dict[str, Any]) -> Preprocess:
    size = fields["size"] if isinstance(fields["size"], int) else fields["size"][0]
    if fields["resize_mode"] not in ("shortest", "squash") or fields["size"] not in (size, (size, size), [size, size]):
        raise UsageError(
            f"--tower {name} resizes by {fields['resize_mode']!r} to {fields['size']}, which is not supported."
        )
    return Preprocess(
        image_size=size,
        resize=fields["resize_mode"],
        resize_size=size,
        interpolation=fields["interpolation"],
        mean=tuple(fields["mean"]),
        std=tuple(fields["std"]),
    )
