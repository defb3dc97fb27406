"""Learning from groups of one's own replies, on TRL: RLOO and GRPO."""
