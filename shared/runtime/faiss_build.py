"""Which build of FAISS is installed, and what it can use."""

from ..errors import UsageError


def import_faiss():
    """The faiss module, from whichever of its two distributions is installed; UsageError if neither is."""
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
    return count() if count else 0
