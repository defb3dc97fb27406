"""Rows in, token ids and loss masks out."""
