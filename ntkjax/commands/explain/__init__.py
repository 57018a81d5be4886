"""``ntkjax explain``: why a selection chose what it chose."""
