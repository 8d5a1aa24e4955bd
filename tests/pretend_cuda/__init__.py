"""A pretend GPU for tests."""
