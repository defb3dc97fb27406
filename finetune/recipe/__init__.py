"""From YAML to a typed recipe, or every mistake at once."""
