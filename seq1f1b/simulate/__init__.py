"""What a schedule costs before it runs."""
