#!/usr/bin/env python
"""Evaluate the model that GPT-NeoX's configuration files describe, by lm-eval."""

from openchatkit.neox.evaluation import main

if __name__ == "__main__":
    main()
