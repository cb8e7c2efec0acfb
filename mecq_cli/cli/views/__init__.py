"""What the commands print: each view makes tables of at most 80 columns of a document."""
