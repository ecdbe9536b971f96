"""Facts, the prose they are hidden in, and questions about them. Needs no torch."""
