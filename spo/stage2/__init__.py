"""Stage II: the vector refined by preferences between its own answers."""
