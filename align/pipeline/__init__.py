"""Pipelines: several stages in one YAML file, run in order, resumable, with one report."""
