"""How the built-in models were trained. Not installed: it runs from a checkout, as `make train` does."""
