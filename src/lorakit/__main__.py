"""`python -m lorakit` is the command line."""

from lorakit.cli.main import main

main()
