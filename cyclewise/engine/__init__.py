"""From token ids to token ids: who runs, on how many tokens, and which token comes next.

`engine.py` is the file to read first: schedule, run, sample.
"""
