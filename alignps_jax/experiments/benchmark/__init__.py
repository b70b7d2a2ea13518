"""How fast this machine trains, searches and evaluates (`--mode=benchmark`); see `run.py`."""
