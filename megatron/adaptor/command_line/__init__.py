"""The command line: flags, what they mean for a step, and which cannot be combined."""
