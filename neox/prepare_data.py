#!/usr/bin/env python
"""Fetch a corpus and make a token store of it: `python prepare_data.py enron -t CharLevelTokenizer -d ./data/`."""

from openchatkit.neox.corpora import main

if __name__ == "__main__":
    main()
