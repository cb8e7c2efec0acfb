"""Which models go all the way, and where the others stop."""
