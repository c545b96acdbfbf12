"""What model chunks in host memory cost before they run: seconds of a step, bytes, and the best."""
