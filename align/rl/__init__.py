"""Reinforcement learning on one base: rollouts, their maths, and the trainer."""
