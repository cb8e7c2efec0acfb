"""The command line: parse, make settings, call the library once, render what it returns."""
