"""Foreign worlds, each importable alone."""
