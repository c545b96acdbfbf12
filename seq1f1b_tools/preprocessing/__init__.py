"""What the tools that prepare training data share: reading, tokenizing, writing, reporting."""
