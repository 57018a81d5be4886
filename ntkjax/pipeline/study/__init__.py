"""The engine of ``adapt`` and ``study``: runs kept by the hash of what they depend on, done once, found again."""
