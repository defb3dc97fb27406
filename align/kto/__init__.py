"""Stage kto: a policy learns from replies that are good or bad, on TRL's trainer."""
