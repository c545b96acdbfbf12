"""Model chunks whose home is host memory, over Megatron's own flat buffers."""
