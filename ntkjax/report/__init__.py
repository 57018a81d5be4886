"""Tables, plots and pages from plain rows and dicts: nothing here computes a result or knows a model."""
