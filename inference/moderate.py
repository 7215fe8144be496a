#!/usr/bin/env python
"""Judge texts with a moderation model; see --help and docs/moderation.md."""

from openchatkit.inference.moderation.command import main

if __name__ == "__main__":
    main()
