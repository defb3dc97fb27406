"""Proximal policy optimization (PPO): policy, reference, reward and value model on one frozen base."""
