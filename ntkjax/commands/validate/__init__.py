"""``ntkjax validate``: do the scores predict what training on the examples does?"""
