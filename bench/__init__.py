"""Measurements of LeanVLM, run from a checkout: `python -m bench`. Results are JSON; `RESULTS.md` is made from them."""
