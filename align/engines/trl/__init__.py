"""The alignment stages on TRL's trainers."""
