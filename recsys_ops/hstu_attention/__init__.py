"""Jagged HSTU attention: pointwise SiLU instead of a softmax, every mask, relative bias in the kernel."""
