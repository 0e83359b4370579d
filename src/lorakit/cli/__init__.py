"""The command line: `main.py` starts it, the other files hold its commands."""
