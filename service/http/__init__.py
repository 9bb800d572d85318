"""The HTTP side: connections, routes, bodies, answers."""
