"""The values of `state` in arrays and tuples. They say what a stretch is; the kernels use the same values."""

HOLE = 0  # there is nothing here: the layers below show through, and without any it reads as zeros
DATA = 1
ZERO = 2  # it reads as zeros, and hides what is below
