"""Tokenise records into the .bin and .idx files that GPT-NeoX reads, with GPT-NeoX's flags."""

from openchatkit.tools.preprocess.command import main

if __name__ == "__main__":
    main()
