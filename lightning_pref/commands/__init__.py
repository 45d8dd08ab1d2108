"""Commands beside the recipes: `python -m lightning_pref <command>`. One file a command, one typed function in it."""
