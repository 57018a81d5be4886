"""``ntkjax adapt``: base, domain only, random and selected, side by side."""
