"""``ntkjax verify``: every approximation of the kernel against the exact one."""
