"""The maths of PPO as pure functions of tensors and numbers; it needs torch alone."""
