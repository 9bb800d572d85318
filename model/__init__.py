"""The networks, the samplers, and what runs them. Importing this package needs no torch."""
