"""``ntkjax select``: choose pool examples for a domain."""
