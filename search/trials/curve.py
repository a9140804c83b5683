"""A learning curve of few points, the same however often its training was stopped and resumed."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST = 50  # points; even


@dataclass
class Curve:
    """Points (last step, mean loss over ``width`` steps); the width doubles when they are many.

    ``total`` over ``count`` steps: what is not yet a point. JSON values alone.
    """

    points: list[tuple[int, float]] = field(default_factory=list)
    width: int = 1
    total: float = 0.0
    count: int = 0

    def add(self, step: int, loss: float) -> None:
        self.total, self.count = self.total + loss, self.count + 1
        if self.count == self.width:
            self.points.append((step, self.total / self.width))
            self.total, self.count = 0.0, 0
        if len(self.points) == MOST:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(step, (first + second) / 2) for (_, first), (step, second) in pairs]
            self.width *= 2

    def up_to(self, step: int) -> tuple[tuple[int, float], ...]:
        """All points, and one for the steps since the last of them."""
        rest = [(step, self.total / self.count)] if self.count else []
        return tuple((at, loss) for at, loss in (*self.points, *rest))
