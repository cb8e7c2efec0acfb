"""One library call for each command of the command line."""
