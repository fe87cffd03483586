"""Serving a bundle over HTTP: an OpenAI-compatible endpoint (`app`), what answers its requests (`engine`), and a page."""
