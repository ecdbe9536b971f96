"""Where a reading is cut into pieces of queries that share a lookup."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Pieces:
    """Pieces of `size` tokens, the last one ahead of each beginning shorter.

    Pieces begin anew where a reading is taken up and where a document ends, so that documents read one after the other are
    cut as they are when they are read together.

    Attributes:
        size: Tokens of a whole piece.
        begins: Where pieces are counted from, in order.
    """

    size: int
    begins: tuple[int, ...] = (0,)

    def anew(self, positions: Iterable[int]) -> Pieces:
        """The same with further beginnings."""
        return replace(self, begins=tuple(sorted({*self.begins, *positions})))

    def taken_up(self, start: int) -> Pieces:
        """The same from `start` on, which is a beginning; what lies before it is forgotten."""
        return replace(self, begins=(start, *self.begins[bisect_right(self.begins, start) :]))

    def end(self, start: int) -> int:
        """Where the piece ends that holds token `start`."""
        following = bisect_right(self.begins, start)
        end = start + self.size - (start - self.begins[following - 1]) % self.size
        return min(end, self.begins[following]) if following < len(self.begins) else end

    def last_end(self, limit: int) -> int:
        """The last end of a piece up to `limit`."""
        begin = self.begins[bisect_right(self.begins, limit) - 1]
        return begin + (limit - begin) // self.size * self.size
