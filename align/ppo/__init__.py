"""Proximal policy optimization: policy, reference, reward and value on one frozen base."""
