"""Draw the curves of training runs and the timeline of their pipeline, as PNG files and one page."""

from openchatkit.tools.plots import main

if __name__ == "__main__":
    main()
