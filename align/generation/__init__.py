"""Generate completions or labels for every row of a file."""
