"""An OpenAI-compatible server: HTTP in, jobs for `engine/runner.py`, HTTP out. See `app.py`."""
