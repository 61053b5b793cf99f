"""Pooled embedding lookups: sum, mean or maximum of the rows of each bag."""
