"""Side-by-side timings against named peers, each in one run: ratios, never absolute times."""
