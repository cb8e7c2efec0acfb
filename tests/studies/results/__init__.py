"""The tables of docs/results.md: what is run, what came out, and the page made of it."""
