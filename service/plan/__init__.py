"""What a request means: its fields, its rows, its recipe."""
