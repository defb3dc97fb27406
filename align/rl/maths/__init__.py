"""The maths of PPO as pure functions of tensors and numbers; needs only torch."""
