"""Reward models: Bradley-Terry training on preferences, rule rewards, evaluation and scoring."""
