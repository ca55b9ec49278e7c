"""Layouts that are used again, in bounded memory."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

from ..model.layout import Layout


class LayoutCache:
    """Keeps layouts by key, the most recently used ones, as long as their masks take at most `limit` bytes together.

    The newest layout stays even if it alone takes more, so that a run with one layout builds it once.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._layouts: OrderedDict[Hashable, Layout] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, build: Callable[[], Layout]) -> Layout:
        """The layout of this key; `build` makes it unless it is kept."""
        with self._lock:
            if key in self._layouts:
                self._layouts.move_to_end(key)
            else:
                self._layouts[key] = build()
                while len(self._layouts) > 1 and self._size() > self.limit:
                    self._layouts.popitem(last=False)
            return self._layouts[key]

    @property
    def nbytes(self) -> int:
        """Memory of the masks of all layouts that are kept, on whichever devices they are."""
        with self._lock:
            return self._size()

    def _size(self) -> int:
        return sum(layout.nbytes for layout in self._layouts.values())

    def clear(self) -> None:
        """Forgets all layouts."""
        with self._lock:
            self._layouts.clear()

    def __len__(self) -> int:
        return len(self._layouts)
