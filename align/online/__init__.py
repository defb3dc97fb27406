"""RLOO and GRPO: online RL on groups of completions, with TRL's trainers."""
