"""Reinforcement learning from rewards: prompts, sampling, rewards, token statistics, maths."""
