"""Stage dpo: a policy learns from comparisons, against its own start."""
