"""Stand-ins for CUDA and NCCL on a machine without a GPU."""
