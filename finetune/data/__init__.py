"""Data pipeline: load, mix, filter, tokenize, pack and collate rows; token ids and loss masks come out."""
