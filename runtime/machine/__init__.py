"""Facts about the machine, below the library: its GPUs, what the installed libraries have kernels for, a board's sensors."""
