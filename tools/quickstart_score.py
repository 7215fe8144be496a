"""Ask the quickstart's model, through inference/bot.py, what it was not trained on, and count the right answers."""

from openchatkit.tools.quickstart.examination import main

if __name__ == "__main__":
    main()
