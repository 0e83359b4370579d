"""`python -m lorakit` is the command line."""

from lorakit.cli import main

main()
