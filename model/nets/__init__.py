"""The networks, and the layers that they are built from."""
