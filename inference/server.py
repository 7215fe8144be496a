#!/usr/bin/env python
"""Serve a model by OpenAI's API, with a page to chat in; see --help and README.md."""

from openchatkit.inference.server.command import main

if __name__ == "__main__":
    main()
