"""What HTTP is: connections, routes, bodies, answers."""
