"""Published files that hold a pickle: what is checked before and after PyTorch's weights-only unpickler."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import DataError


def refuse_compressed(path: Path, what: str) -> None:
    """Raises DataError for a zip file with compressed parts, which torch.save never writes and which may be bombs.

    `what` is what the file should be, for the message.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return  # another format, or damaged, which torch.load finds out
    if compressed:
        raise DataError(f"{path} is not {what}: torch.save did not write its {compressed[0][:200]!r}.")


def refuse_expanded(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a tensor that claims more values than the file stores."""
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{str(name)[:200]} has more values than the file")
