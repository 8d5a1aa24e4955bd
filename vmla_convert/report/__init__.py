"""Rows in, Markdown, HTML and plots out; no torch."""
