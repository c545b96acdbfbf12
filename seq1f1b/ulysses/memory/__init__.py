"""What saves memory at the cost of time, and changes no value."""
