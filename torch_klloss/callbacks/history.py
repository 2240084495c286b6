"""History of a callback: what it logged, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Draw = Callable[[str, list[Row]], Any]


class History(dict[str, list[Row]]):
    """The logged rows of every loss, by its path in the module.

    Args:
        draw: draws the rows of a path.
        rows: those that are there already, by path.
    """

    def __init__(self, draw: Draw, rows: Mapping[str, list[Row]] | None = None) -> None:
        super().__init__(rows or {})
        self._draw = draw

    def to_dict(self) -> dict[str, list[Any]]:
        """Return a table: the columns by name, of which "path" says what loss a row is of.

        A value that some rows lack is NaN there. `pandas.DataFrame(callback.history.to_dict())` takes it.
        """
        rows = [{"path": path, **row} for path, logged in self.items() for row in logged]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name, float("nan")) for row in rows] for name in names}

    def figure(self, path: str | None = None) -> Figure:
        """Draw what was logged of a loss.

        Args:
            path: of the loss in the module; None for the only one.

        Raises:
            ValueError: if nothing was logged, or under another path, or of several losses and `path` is None.
        """
        logged = ", ".join(map(repr, self)) or "nothing yet"
        if path is None and len(self) != 1:
            raise ValueError(f"figure(path) draws one loss, and logged were: {logged}.")
        (path,) = self if path is None else (path,)
        if path not in self:
            raise ValueError(f"path must be one of those that were logged, {logged}; got {path!r}.")
        return self._draw(path, self[path])
