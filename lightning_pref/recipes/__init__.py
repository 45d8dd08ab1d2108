"""One short file a recipe; each runs as `python -m lightning_pref.recipes.<name>`."""
