"""Vision towers: pixels to tokens, with what the pruners want to see of them; no family is named here."""
