"""The system from outside: a node as a process, microVMs as an integrator sees them, clients as a user has them."""
