"""A learning curve with few points. Stopping and resuming the training does not change it."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST = 50  # the largest number of points; it must be even


@dataclass
class Curve:
    """A list of points, each of them a step and the mean loss of the ``width`` steps up to it.

    When there are ``MOST`` points, pairs of points are joined and the width doubles. ``total``: the
    sum of the losses of the last ``count`` steps, which do not yet form a point. Losses are in
    nats. All fields are JSON values.
    """

    points: list[tuple[int, float]] = field(default_factory=list)
    width: int = 1
    total: float = 0.0
    count: int = 0

    def add(self, step: int, loss: float) -> None:
        """Add the loss of one training step, in nats."""
        self.total, self.count = self.total + loss, self.count + 1
        if self.count == self.width:
            self.points.append((step, self.total / self.width))
            self.total, self.count = 0.0, 0
        if len(self.points) == MOST:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(step, (first + second) / 2) for (_, first), (step, second) in pairs]
            self.width *= 2

    def up_to(self, step: int) -> tuple[tuple[int, float], ...]:
        """Return all points, and one more for the steps after the last point, if there are any."""
        rest = [(step, self.total / self.count)] if self.count else []
        return tuple((at, loss) for at, loss in (*self.points, *rest))
