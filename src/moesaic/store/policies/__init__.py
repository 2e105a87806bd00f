"""What leaves the fast tier when it is full: one policy a file."""
