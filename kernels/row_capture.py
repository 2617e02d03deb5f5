"""A copy of the rows that a launch reads, made in passing when the device is told to.

A CUDA graph is captured once, and which of its launches makes the copy may change with every replay: each has
a flag on the device, which the host sets between two replays. A launch whose flag is 0 reads the flag and no
more.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowCapture:
    """Where a launch leaves a copy of its first rows, if its flag is set."""

    flag: Tensor
    """int32 [1], aligned like every tensor's start; the copy is made unless it is 0."""
    rows: Tensor
    """[most rows, K] of the dtype of what is copied, contiguous; rows past those of the launch stay."""

    def copy_reference(self, x: Tensor) -> None:
        """Do what a launch does in torch: copy the rows of x `[T, K]`, as far as there is room, if asked."""
        if self.flag.item():
            count = min(len(x), len(self.rows))
            self.rows[:count] = x[:count]


def capture_arguments(capture: RowCapture | None, unused: Tensor) -> tuple[int, Tensor, Tensor]:
    """What a launch is given: how many rows there is room for, 0 without a capture, its flag and its rows.

    Without a capture the kernel looks at neither, and gets some tensor for both.
    """
    return (0, unused, unused) if capture is None else (len(capture.rows), capture.flag, capture.rows)


def check_capture(capture: RowCapture | None, x: Tensor) -> None:
    """Check that a launch on x `[T, K]` can leave its rows.

    Raises:
        ValueError: for rows of another width, dtype or device.
    """
    if capture is None:
        return
    rows = capture.rows
    if (rows.shape[1], rows.dtype, rows.device) != (
        x.shape[1],
        x.dtype,
        x.device,
    ) or not rows.is_contiguous():
        raise ValueError(
            f"capture: rows must be (most, {x.shape[1]}) like x and contiguous, got {rows.shape}"
        )
