"""Reinforcement learning from rewards: prompts, rollouts, rewards, and what learns from them."""
