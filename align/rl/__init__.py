"""Reinforcement learning: prompts, rewards, rollouts, and what learns from them."""
