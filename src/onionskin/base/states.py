"""What a stretch of a disk or a layer is, wherever an array or a tuple has a `state`; the kernels count the same way."""

HOLE = 0  # nothing is here: what is below shows, and where nothing is below it reads zero
DATA = 1
ZERO = 2  # reads zero, and hides what is below
