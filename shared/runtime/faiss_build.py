"""Which build of FAISS is installed, and which GPUs it can use."""

from typing import Any

from ..errors import UsageError


def import_faiss() -> Any:
    """The `faiss` module of whichever distribution is installed; UsageError if neither can be imported."""
    try:
        import faiss
    except ImportError as error:
        raise UsageError(
            f'faiss is not usable here ({error}); install it with pip install "mapet[cpu]" or "mapet[gpu]", not both.'
        ) from None
    return faiss


def faiss_gpus() -> int:
    """How many GPUs this build of FAISS can use; 0 in the CPU build."""
    count = getattr(import_faiss(), "get_num_gpus", None)
    return int(count()) if count else 0
