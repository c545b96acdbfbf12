"""Stand-ins for transformer-engine and apex where they are missing."""
