"""One command trains the same model under every schedule asked for and compares them."""
