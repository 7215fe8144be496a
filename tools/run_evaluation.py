"""Examine a model with lm-eval's tasks, or with tasks of your own: Hugging Face, layer shards or a checkpoint."""

from openchatkit.tools.evaluation.harness import main

if __name__ == "__main__":
    main()
