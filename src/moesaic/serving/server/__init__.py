"""An OpenAI-compatible server: transformers' serving app and continuous batching, and what they lack."""
