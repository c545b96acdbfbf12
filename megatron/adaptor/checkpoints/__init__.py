"""What Megatron's saving and loading of checkpoints lacks to be right or to say what is wrong."""
