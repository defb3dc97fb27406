"""Client for OpenAI-compatible endpoints: settings, requests and answers, cache, errors."""
