"""Sub-sequence pipeline parallelism (Seq1F1B, arXiv 2406.03488): the method, without Megatron."""
