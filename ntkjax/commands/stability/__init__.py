"""``ntkjax stability``: how far the kernel moves while the model is trained."""
