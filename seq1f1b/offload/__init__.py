"""Model chunks that live in host memory, and the PCIe tree over which they visit the GPUs."""
