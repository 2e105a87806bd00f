"""Running models for users: text, and what other engines need."""
