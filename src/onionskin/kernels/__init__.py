"""The extension modules over the C kernels in `csrc`: they wrap, and decide nothing."""
