"""A configuration whose images all become squares of one size."""

from dataclasses import dataclass

from core.config import ResizeRule, TrainConfig


@dataclass(frozen=True, kw_only=True)
class SquareConfig(TrainConfig):
    """Squares of 64 pixels."""

    size: int = 64

    @property
    def resize_rule(self) -> ResizeRule:
        """Both sides alike."""
        return "square"

    @property
    def scale(self) -> tuple[int, int]:
        """`size` twice."""
        return self.size, self.size
