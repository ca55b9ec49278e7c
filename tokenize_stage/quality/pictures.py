"""A store's pictures and the tokenizer that made its tokens, for what needs both."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from ...shared.errors import FingerprintMismatch, UsageError
from ...shared.tokens.store import TokenStore
from ...shared.tokens.stored_views import StoredViews
from ..tokenizers.base import Tokenizer
from ..tokenizers.opening import read_tokenizer


class StorePictures:
    """Opened before the store is read, so that a wrong option is reported at once; the tower is opened when needed."""

    def __init__(
        self,
        store: TokenStore,
        images: str | Path | Sequence[str | Path] | None = None,
        codebook: str | Path | None = None,
        *,
        tower: str | None = None,
        device: str = "auto",
    ):
        """Takes the options of `inspect`.

        Raises:
            DataError: the images are not those of the store, or the codebook is missing or damaged.
            FingerprintMismatch: the codebook did not make the tokens.
        """
        self.store, self.views = store, StoredViews(store, images)
        self.saved = read_tokenizer(codebook) if codebook else None
        self._tower, self._device = tower, device
        if self.saved:
            refuse_other_codebook(store, self.saved.fingerprint)

    @property
    def can_encode(self) -> bool:
        """Whether images can go through the tokenizer again."""
        return bool(self.saved and self.views.shards)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The opened tokenizer. Raises FingerprintMismatch for another tower, UsageError without a codebook."""
        if self.saved is None:
            raise UsageError("encoding images again needs --codebook; give the codebook of the store.")
        return self.saved.open(tower=self._tower, device=self._device)


def refuse_other_codebook(store: TokenStore, fingerprint: str) -> None:
    """Raises FingerprintMismatch unless the tokenizer of that fingerprint made the tokens of `store`."""
    if fingerprint != store.fingerprint:
        raise FingerprintMismatch(
            f"{store.path} was made with codebook {store.fingerprint[:12]}, not {fingerprint[:12]}."
        )
