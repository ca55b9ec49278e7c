"""k-CLIP: patch features of a frozen tower, and the nearest centroid of each."""

from dataclasses import replace

from ...shared.errors import FingerprintMismatch
from ...shared.tokens.codebook import TOKEN_FIELDS, Codebook
from ..towers.opening import open_tower
from ..towers.tower import Tower, TowerSettings


def open_same_tower(book: Codebook, tower: str | None, device: str) -> Tower:
    """The codebook's tower, opened where it was or at `tower`; FingerprintMismatch if that is another one."""
    about = book.description
    recorded = TowerSettings(**{name: about[name] for name in TowerSettings.__dataclass_fields__})
    opened = open_tower(replace(recorded, tower=tower) if tower else recorded, device)
    for name, value in opened.description().items():
        if name in TOKEN_FIELDS and value != about[name]:
            raise FingerprintMismatch(
                f"--tower {opened.settings.tower} is not the tower of the codebook: its {name} is {value}, "
                f"the codebook's {about[name]}."
            )
    return opened
