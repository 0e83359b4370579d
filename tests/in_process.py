"""A command's entry point enters; the exit code leaves that a process of its own would have had."""


def exit_code(main):
    """Of `main()`; what it is asked stands in sys.argv."""
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0
