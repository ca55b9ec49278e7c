"""Pushes an exported folder to the Hugging Face Hub, with a model card."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from ...shared.errors import DataError, UsageError
from ...shared.printable import printable
from ...shared.storage.files import written_whole
from .weights import Weights

CARD = "README.md"
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A Vision Transformer, trained with [MaPeT](https://arxiv.org/abs/2306.07346) by mapet {{ version }}.

| | |
| --- | --- |
{% for label, value in rows -%}
| {{ label }} | {{ value | replace("\\\\", "\\\\\\\\") | replace("|", "\\\\|") | e }} |
{% endfor %}
```python
import timm

model = timm.create_model("hf-hub:{{ repo }}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```
"""


def refuse_unready_hub(repo: str) -> None:
    """Raises UsageError, before anything is written, unless `repo` is a name and a token is there."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not re-exported

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = printable(str(error).splitlines()[0].rstrip("."))
        raise UsageError(f"--push-to-hub {printable(repo)} is no name of a repository ({reason}).") from None
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"--push-to-hub {repo} needs a network and HF_HUB_OFFLINE is set; unset it.")
    if get_token() is None:
        raise UsageError(
            f"--push-to-hub {repo} needs a token with write access; give it in HF_TOKEN, or run `hf auth login`."
        )


def write_card(folder: Path, weights: Weights, repo: str, rows: Sequence[tuple[str, str]]) -> None:
    """Writes README.md, the model card of an exported folder.

    Args:
        folder: the folder.
        weights: what was exported.
        repo: name of the repository that the folder is pushed to.
        rows: (name, value) of what else the card states.
    """
    from huggingface_hub import ModelCard, ModelCardData

    shape, task = weights.shape, "image-classification" if weights.kind == "classifier" else "image-feature-extraction"
    about = [
        ("kind", f"classifier of {weights.classes:,} classes" if weights.classes else "encoder"),
        ("sizes", f"width {shape.dim}, depth {shape.depth}, {shape.heads} heads, patches of {shape.patch_size} pixels"),
        ("images", f"{shape.image_size} pixels, mean {weights.input.mean}, std {weights.input.std}"),
    ]
    card = ModelCard.from_template(
        ModelCardData(library_name="timm", pipeline_tag=task, tags=["mapet", "timm", task]),
        template_str=_TEMPLATE,
        name=repo.rpartition("/")[2],
        repo=repo,
        version=version("mapet"),
        rows=[(label, printable(value)) for label, value in (*about, *rows)],
    )
    with written_whole(folder / CARD) as partial:
        partial.write_text(str(card), encoding="utf-8")


def push_folder(folder: Path, repo: str, private: bool) -> str:
    """Uploads a folder as one commit and returns the URL of the commit. The repository is made if it is missing.

    Raises:
        UsageError if `private` is wanted and the repository is public; DataError if the hub cannot be reached or
        refuses the upload. The folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="mapet", library_version=version("mapet"))
    with _explained(folder, repo):
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(url.repo_id).private:
            raise UsageError(
                f"--private: the repository {url.repo_id} exists and is public, so nothing was uploaded; make it "
                f"private on the hub and run `hf upload {url.repo_id} {folder}`, or choose another name."
            )
        return str(api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Export of mapet"))


@contextmanager
def _explained(folder: Path, repo: str) -> Iterator[None]:
    """Errors of the hub in one sentence that says where the export is and how to push it later."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of whichever HTTP client the library has
        HfHubHTTPError,
        HTTPError,
    )

    again = f"The export is in {folder}; when that is mended, `hf upload {repo} {folder}` pushes it."
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = printable(str(error.server_message or error.response.reason_phrase or "no reason given").strip())[:200]
        if status in (401, 403):
            raise DataError(
                f"The hub refused the token for {repo} ({status}: {reason}); it needs write access to this repository. "
                f"{again}"
            ) from None
        raise DataError(f"The hub refused the upload to {repo} ({status}: {reason}). {again}") from None
    except (HTTPError, OSError, ValueError, KeyError) as error:
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)[:200]
        raise DataError(f"{repo} could not be pushed: the hub cannot be reached ({reason}). {again}") from None
