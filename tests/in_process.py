"""Run a command in this process, and import what forked children need."""

from xml.sax.saxutils import quoteattr


def exit_code(main):
    """Exit code that a process of its own would have had; the command line is sys.argv."""
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def without_charts(replace=setattr):
    """Leave the charts of reports empty."""
    from lorakit.display import charts

    head = f'<svg class="chart" viewBox="0 0 {charts.WIDTH} {charts.HEIGHT}" role="img"'
    replace(charts, "_draw", lambda _, zero, said: f"{head} aria-label={quoteattr(said)}/>")


def quick_ends():
    """Let runs of this process end without curves, and with the short answers of tests."""
    from lorakit.inference import evaluate

    without_charts()
    evaluate.ANSWER_TOKENS = 8


def import_libraries():
    """Import the libraries of a run before a fork, so that a child starts in a second."""
    import bitsandbytes  # noqa: F401
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401
    import peft.utils.transformers_weight_conversion  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
