"""Where in a listing a key is: sorted hashes, so that a million keys take 16 MB beside the listing and no text is kept twice.

Shapes: N images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gmem_bank.keys import find, hashes_of, sorted_table
from gmem_bank.listing import Items


class KeyPlaces:
    """Finds the images of a listing by their keys.

    Args:
        items: the images; kept, not copied.
    """

    def __init__(self, items: Items) -> None:
        self.items = items
        self._hashes, self._places = sorted_table(hashes_of(items.all_keys()))

    def __len__(self) -> int:
        return len(self.items)

    def find(self, key: str) -> int | None:
        """Return the place of the first image with a key, or None."""
        place = int(find(self._hashes, self._places, [key], self._keys)[0])
        return None if place < 0 else place

    def _keys(self, places: NDArray[np.int64]) -> list[str]:
        return [self.items.key(place) for place in places.tolist()]

    def repeated(self) -> tuple[int, int] | None:
        """Return the places of an image and of the first after it in the listing with the key of one before, or None."""
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1]) + 1
        for place in sorted(self._places[same].tolist()):
            first = self.find(self.items.key(place))
            if first is not None and first != place:
                return first, place
        return None
