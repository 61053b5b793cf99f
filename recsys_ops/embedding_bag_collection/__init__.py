"""Pooled lookups in many tables at once, with the optimizer fused into the backward."""
