"""Count, merge and check token stores, of this kit and of GPT-NeoX."""

from openchatkit.tools.stores.command import main

if __name__ == "__main__":
    main()
