"""Make an index of your own files, keep it in step with them, search it, and measure how well it finds."""

from openchatkit.retrieval.command import main

if __name__ == "__main__":
    main()
