"""What is maximised: finished reward models and programs, weighted and put together."""
