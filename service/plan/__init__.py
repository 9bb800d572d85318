"""The meaning of a request: its fields, its rows, its recipe."""
