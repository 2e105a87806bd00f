"""Calibration: text, tokens, and what each layer's FFN does on them."""
