"""Secure aggregation: the server sees a sum of vectors and nothing else of them."""
