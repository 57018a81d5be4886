"""``ntkjax study``: selectors x domains x sizes x budgets x seeds from one file."""
