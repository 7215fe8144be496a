"""Train a tokenizer, draw a small GPT-NeoX at random and make layer shards of it in pretrained/Quickstart/."""

from openchatkit.tools.quickstart.base_model import main

if __name__ == "__main__":
    main()
