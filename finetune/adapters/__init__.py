"""One file an adapter; the file's name is its name in `adapter.method`."""
