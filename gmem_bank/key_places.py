"""Where in a listing a key is: sorted hashes, so that a million keys take 16 MB beside the listing and no text is kept twice.

Shapes: N images.
"""

from __future__ import annotations

import numpy as np

from gmem_bank.keys import hashes_of, sorted_table
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
        wanted = hashes_of([key])
        begin = int(np.searchsorted(self._hashes, wanted)[0])
        end = int(np.searchsorted(self._hashes, wanted, side="right")[0])
        places = (int(place) for place in self._places[begin:end])  # more than one where hashes collide
        return next((place for place in places if self.items.key(place) == key), None)

    def repeated(self) -> tuple[int, int] | None:
        """Return the places of an image and of the first after it in the listing with the key of one before, or None."""
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1]) + 1
        for place in sorted(self._places[same].tolist()):
            first = self.find(self.items.key(place))
            if first is not None and first != place:
                return first, place
        return None
