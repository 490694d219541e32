"""How fast and how good: Cyclewise measured beside other engines on the same file."""
