"""Train a tokenizer, draw a small GPT-NeoX at random and make layer shards of it in pretrained/Quickstart/."""

from openchatkit.convert.from_scratch import main

if __name__ == "__main__":
    main()
