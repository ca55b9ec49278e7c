"""What opening a model has in common for all libraries: seeded random weights, errors in one sentence."""

import difflib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...shared.errors import DataError, MapetError, UsageError
from .tower import TowerSettings

RANDOM = "none"
"""The value of --pretrained that means seeded random weights."""
_SEED_OF_RANDOM_WEIGHTS = 0


@contextmanager
def seeded_if(random: bool) -> Iterator[None]:
    """Makes random weights the same each time the tower is opened. The caller's random state stays as it is."""
    with torch.random.fork_rng():
        if random:
            torch.manual_seed(_SEED_OF_RANDOM_WEIGHTS)
        yield


def unknown_name(kind: str, name: str, known: list[str]) -> UsageError:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return UsageError(f"{kind} {name!r} is unknown; did you mean {', '.join(close or known[:5])}?")


@contextmanager
def library_errors_explained(settings: TowerSettings) -> Iterator[None]:
    """Turns whatever a library raises or logs while it opens a model into one sentence."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    # Libraries that call `logging.info` would otherwise give the root logger a handler, for good.
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MapetError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        raise DataError(
            f"The weights of --tower {settings.tower} (--pretrained {settings.pretrained}) could not be fetched or "
            f"loaded: {reason}."
        ) from None
    finally:
        logging.root.removeHandler(handler)
        logging.disable(disabled)
