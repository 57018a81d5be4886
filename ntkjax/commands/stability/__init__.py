"""``ntkjax stability``: how far the tangent kernel moves while the model is trained."""
